"""What documents name exists: links, paths, tests, flags, make targets, commands; and tables equal the results."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_muon import cli, launch
from megatron_muon.profile import command as profile_command
from tests.megatron.test_arguments import extended_parser
from tests.paths import DOCS, EXAMPLES, ROOT

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md")),
        *DOCS.glob("*.md"),
    ]
)
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

# Pages of the site that lie elsewhere in the repository; `docs/site_hooks.py` adds them.
ELSEWHERE = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
FOLDERS = ("docs", "examples", "benchmarks", "tests", "megatron_muon", "patches")
# Flags of programs that are neither ours nor Megatron's: torchrun, pip, pytest, nccl-tests, NVIDIA's tools.
OTHER_FLAGS = {"--nproc-per-node", "--nnodes", "--no-deps", "--no-build-isolation", "--check", "--strict"}


def code(text: str) -> Iterator[str]:
    """Code spans, lines of fenced and of indented blocks."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def parser_of(main: Callable[[list[str]], object], *words: str) -> argparse.ArgumentParser:
    """The parser that a command's `main` reads these words with."""

    class Parsing(Exception):
        pass

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Parsing(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsing) as parsing:
            main(list(words))
    return parsing.value.args[0]


@functools.cache
def parsers() -> tuple[argparse.ArgumentParser, ...]:
    """Of `python -m megatron_muon`, `.profile`, its reports and the launcher."""
    return (
        parser_of(cli.main),
        parser_of(profile_command.main),
        parser_of(profile_command.main, "report"),
        parser_of(launch.main),
    )


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, sub in action.choices.items()
    }


@functools.cache
def known_flags() -> frozenset[str]:
    """Flags of Megatron, this package, the benchmarks and the examples."""
    found = {*extended_parser()[0]._option_string_actions, *OTHER_FLAGS}
    for parser in parsers():
        for one in (parser, *subparsers_of(parser).values()):
            found.update(one._option_string_actions)
    for path in (*EXAMPLES.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        found.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    return frozenset(found)


def exists(target: str) -> bool:
    return bool(list(ROOT.glob(target))) if "*" in target else (ROOT / target).exists()


@functools.cache
def tests_by_name() -> frozenset[str]:
    """Names of test modules, classes and functions."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.add(path.name)
        found.update(re.findall(r"^\s*(?:def|class) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return frozenset(found)


@page
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        name = target.split("#")[0]
        if path.parent == DOCS and name.startswith("results/"):
            assert (ROOT / "benchmarks" / name).exists(), target
        else:
            assert (path.parent / name).exists() or (path.parent == DOCS and name in ELSEWHERE), target
    for drawing in re.findall(r"<!-- drawing: (\S+) -->", text):
        assert (DOCS / "drawings" / drawing).exists(), drawing


@page
def test_paths_and_tests_exist(path: Path) -> None:
    for span in code(path.read_text(encoding="utf-8")):
        for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*[\w*}}]", span):
            if "{" not in name and "<" not in span.split(name, 1)[1][:1]:
                assert exists(name), f"{name} in: {span}"
        for name in re.findall(r"\btest_\w+\.py\b|(?<=::)\w+", span):
            assert name in tests_by_name(), f"{name} in: {span}"


@page
def test_flags_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":  # names what is gone, too
        return
    known = known_flags()
    for span in code(path.read_text(encoding="utf-8")):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*[\w](?![\w*<-])", span):
            assert flag in known, f"{flag} in: {span}"


@page
def test_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    subcommands = {
        "megatron_muon": subparsers_of(parsers()[0]),
        "megatron_muon.profile": subparsers_of(parsers()[1]),
    }
    for span in code(path.read_text(encoding="utf-8")):
        for names in re.findall(r"(?:^\s*|\$ )make ((?:[a-z-]+ ?)+)", span):
            assert set(names.split()) <= targets, span
        for module, following in re.findall(r"-m (megatron_muon[\w.]*)(?: ([a-z]+)\b)?", span):
            assert importlib.util.find_spec(module) is not None, span
            assert not following or following in subcommands.get(module, {following}), span


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def results(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def rows_of(path: Path, heading: str) -> list[list[str]]:
    """The cells of a table, whose head contains `heading`; its rule is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|") and heading in line)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_readme_has_the_measured_steps() -> None:
    measured = {(f"{row['ours_ms']:.0f}", f"{row['theirs_ms']:.0f}", f"{row['ratio']:.2f}") for row in results("step")}
    rows = rows_of(ROOT / "README.md", "Megatron's ms")
    assert len(rows) > 5
    for row in rows:
        for case in zip(*(cell.split(" / ") for cell in row[1:4]), strict=True):
            assert case in measured, row


def test_a_computed_plan_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = (row for row in results("plans") if (row["model"], row["dp"]) == ("qwen3-8b", 128))
    assert cli.main(["plan", "qwen3-8b", "--dp", "128", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    adamw = stage["adamw"]["sent_bytes"]
    for name in ("megatron_muon", "megatron_layer_wise"):
        scheme, expected = stage["schemes"][name], row[name]
        assert scheme["flops"]["max_over_ideal"] == pytest.approx(expected["max_over_ideal"], rel=1e-3)
        assert scheme["sent_bytes"]["mean"] / adamw == pytest.approx(expected["sent_over_adamw_mean"], rel=1e-3)
        assert scheme["sent_bytes"]["max"] / adamw == pytest.approx(expected["sent_over_adamw_max"], rel=1e-3)
