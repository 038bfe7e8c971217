"""`python examples/scaling_law`: run, fit, plot and report a study.

    python examples/scaling_law run --ladder tiny.yaml      # trains what is missing; resumes after an interruption
    python examples/scaling_law fit --ladder tiny.yaml      # laws, intervals and the ratio of FLOPs at equal loss
    python examples/scaling_law plot --ladder tiny.yaml     # the figures
    python examples/scaling_law report --ladder tiny.yaml   # tables and figures as one Markdown page

`fit`, `plot` and `report` need the raw results alone (`--results`), not the runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from scaling_law.ladder import Ladder, load_ladder

HERE = Path(__file__).resolve().parent
CORPUS_PACKAGES = ("torch", "megatron", "numpy", "setuptools", "pip")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit code: 2 for settings or files that do not fit.
    """
    parser = argparse.ArgumentParser(
        prog="scaling_law", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in (("run", _run), ("fit", _fit), ("plot", _plot), ("report", _report)):
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        command.add_argument("--ladder", type=Path, required=True, help="YAML file; looked for beside this package too")
        command.add_argument("--out", type=Path, help="directory of the study; runs/scaling_law/NAME by default")
        command.add_argument("--results", type=Path, help="raw results; OUT/results.json by default")
        if name == "run":
            command.add_argument("--corpus", type=Path, help="directory with train and valid; made in OUT if absent")
            command.add_argument("--side-by-side", type=int, default=2, help="runs at a time")
    options = parser.parse_args(argv)
    console = Console()
    try:
        path = options.ladder if options.ladder.is_file() else HERE / options.ladder
        if not path.is_file():
            raise ValueError(f"--ladder: got {options.ladder}, expected a YAML file")
        ladder = load_ladder(path)
        options.out = options.out or Path("runs") / "scaling_law" / ladder.name
        options.results = options.results or options.out / "results.json"
        options.action(ladder, options, console)
    except ValueError as error:
        console.print(f"scaling_law: {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    return 0


def _run(ladder: Ladder, options: argparse.Namespace, console: Console) -> None:
    from scaling_law.runner import run_study
    from scaling_law.study import Study, write

    corpus = options.corpus or options.out / "corpus"
    if not (corpus / "corpus.json").is_file():
        # In a process of its own: this one has no other need of torch and Megatron.
        packages = [] if options.corpus else list(CORPUS_PACKAGES)
        subprocess.run([sys.executable, str(HERE / "corpus.py"), str(corpus), *packages], check=True)
    results = run_study(ladder, options.out / "runs", corpus, console, options.side_by_side)
    write(Study(ladder, {result.run: result for result in results}), options.results)
    console.print(f"{len(results)} runs; raw results in {escape(str(options.results))}", soft_wrap=True)


def _fit(ladder: Ladder, options: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    from scaling_law import tables
    from scaling_law.study import read

    study = read(ladder, options.results)
    for heading, rows, note in tables.SECTIONS:
        head, *body = rows(study)
        view = Table(title=f"{heading}. {note}", title_justify="left", show_edge=False)
        for number, cell in enumerate(head):
            view.add_column(cell, justify="right" if number else "left", overflow="fold")
        for row in body:
            view.add_row(*row)
        console.print(view)
    console.print(tables.headline(study), highlight=False)


def _plot(ladder: Ladder, options: argparse.Namespace, console: Console) -> None:
    from scaling_law import figures
    from scaling_law.study import read

    for path in figures.write(read(ladder, options.results), options.out):
        console.print(escape(str(path)), soft_wrap=True)


def _report(ladder: Ladder, options: argparse.Namespace, console: Console) -> None:
    from scaling_law import figures, tables
    from scaling_law.study import read

    study = read(ladder, options.results)
    paths = figures.write(study, options.out)
    lines = [f"# Scaling law: {ladder.name}", "", tables.headline(study), ""]
    for heading, rows, note in tables.SECTIONS:
        lines += [f"## {heading}", "", note, "", tables.markdown(rows(study)), ""]
    lines += ["## Figures", "", *(f"![{path.stem}]({path.name})" for path in paths), ""]
    page = options.out / "scaling_law.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    console.print(escape(str(page)), soft_wrap=True)
