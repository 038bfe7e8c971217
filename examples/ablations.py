"""Two of Moonlight's findings on the demo's scale: the RMS that updates should have, and weight decay on or off.

    make ablations                                        # or, in an environment that has the package:
    python examples/ablations.py --out runs/ablations

Trains the demo's mini-Moonlight with Distributed Muon, once for each setting, from the same weights on the same bytes,
4 ranks on this machine's CPU. Moonlight (arXiv 2502.16982, table 8) trains far larger models for far longer; here
are some 300k bytes, so that only the large differences can be expected to come out alike.
Leaves results.json and ablations.png in the output directory; `--docs DIRECTORY` also writes ablations.md there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo
import demo_report
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_muon import report

# Target RMS -> training loss in Moonlight's table 8.
MOONLIGHT = {0.05: 3.355, 0.1: 3.239, 0.2: 3.198, 0.4: 3.199, 0.8: 3.386}
WEIGHT_DECAY = 0.1
STEPS = 80


@dataclass(frozen=True)
class Setting:
    """One training run.

    Attributes:
        update_rms: What updates are scaled to.
        weight_decay: Of matrices and of all other parameters that have one.
        seed: Of the initial weights and of the order of the data.
    """

    update_rms: float
    weight_decay: float
    seed: int

    @property
    def name(self) -> str:
        """For directories."""
        return f"rms{self.update_rms}-wd{self.weight_decay}-seed{self.seed}"

    def flags(self) -> list[str]:
        """The words that follow the demo's."""
        return [
            *("--muon-update-rms", str(self.update_rms)),
            *("--weight-decay", str(self.weight_decay)),
            *("--seed", str(self.seed)),
        ]


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        setting: Its setting.
        validation_loss: Nats per byte, by step.
        train_loss: Mean of the last tenth of the steps.
        weight_rms: Mean over Muon's matrices, when metrics were logged last.
    """

    setting: Setting
    validation_loss: Mapping[int, float]
    train_loss: float
    weight_rms: float

    @property
    def final_loss(self) -> float:
        """Validation loss at the end."""
        return self.validation_loss[max(self.validation_loss)]


def settings(seeds: int) -> list[Setting]:
    """The sweep over RMS with weight decay, then weight decay off, and ten times stronger, at Moonlight's RMS.

    A run this short moves weights by the sum of lr * weight_decay, some 2 %, at Moonlight's weight decay; a ten times
    stronger one shows the direction.
    """
    decays = (0.0, 10 * WEIGHT_DECAY)
    pairs = [(rms, WEIGHT_DECAY) for rms in MOONLIGHT] + [(0.2, decay) for decay in decays]
    return [Setting(rms, decay, 1234 + seed) for rms, decay in pairs for seed in range(seeds)]


def run_all(chosen: Sequence[Setting], steps: int, out: Path, console: Console) -> list[Result]:
    """Trains with every setting, one after the other.

    Raises:
        ValueError: If `steps` is too small.
        RunFailed: If a run exits with an error.
    """
    corpus = out / "corpus"
    for stale in ("corpus", "tensorboard", "logs"):
        shutil.rmtree(out / stale, ignore_errors=True)
    flags = {
        s: [
            *demo.training_flags(
                "muon", steps=steps, lr=demo.LEARNING_RATE, corpus=corpus, tensorboard=out / "tensorboard" / s.name
            ),
            *s.flags(),
            *("--muon-log-interval", str(max(1, steps // 4))),
        ]
        for s in chosen
    }
    # What the demo shows beside a run's progress.
    demo_report.LABELS.update({s.name: f"RMS {s.update_rms} decay {s.weight_decay}" for s in chosen})
    demo.prepare_corpus(corpus)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        for s in chosen:
            task = progress.add_task(demo_report.LABELS[s.name], total=steps, status="starting")
            log = demo.train(s.name, flags[s], out, progress, task)
            results.append(result_of(s, log, out / "tensorboard" / s.name))
    return results


def result_of(setting: Setting, log: demo_report.RunLog, directory: Path) -> Result:
    """A finished run's result, from what it logged."""
    last = sorted(log.train_loss)[-max(1, len(log.train_loss) // 10) :]
    matrices = report.read(report.find(directory))[-1]["matrices"]
    return Result(
        setting,
        dict(log.validation_loss),
        statistics.fmean(log.train_loss[step] for step in last),
        statistics.fmean(m["weight_rms"] for m in matrices.values()),
    )


def rows(results: Sequence[Result]) -> list[tuple[str, str, str, str, str]]:
    """One line per setting: RMS, weight decay, validation loss, weight RMS, Moonlight's loss; means over seeds."""
    out = []
    groups: dict[tuple[float, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.setting.update_rms, result.setting.weight_decay), []).append(result)
    for (rms, decay), group in groups.items():
        losses = [result.final_loss for result in group]
        spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
        theirs = f"{MOONLIGHT[rms]:.3f}" if decay == WEIGHT_DECAY else ""
        weights = statistics.fmean(result.weight_rms for result in group)
        out.append((f"{rms}", f"{decay}", f"{statistics.fmean(losses):.3f}{spread}", f"{weights:.4f}", theirs))
    return out


HEADINGS = ("target RMS", "weight decay", "validation loss, nats/byte", "weight RMS", "Moonlight's training loss")


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    view = Table(title="mini-Moonlight with Distributed Muon", title_justify="left")
    for heading in HEADINGS:
        view.add_column(heading, justify="right")
    for row in rows(results):
        view.add_row(*row)
    return view


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws the loss over the target RMS beside Moonlight's, and the curves of the weight decays."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sweep, decays = figure.subplots(1, 2)
    ours = [r for r in results if r.setting.weight_decay == WEIGHT_DECAY]
    sweep.plot([r.setting.update_rms for r in ours], [r.final_loss for r in ours], "o", color="tab:red", label="here")
    sweep.set_xscale("log")
    sweep.set_xticks(list(MOONLIGHT), [str(rms) for rms in MOONLIGHT])
    sweep.minorticks_off()
    sweep.set_xlabel("target RMS of updates")
    sweep.set_ylabel("validation loss here, nats/byte")
    theirs = sweep.twinx()
    theirs.plot(list(MOONLIGHT), list(MOONLIGHT.values()), "s--", color="tab:gray", label="Moonlight, table 8")
    theirs.set_ylabel("Moonlight's training loss, nats/token")
    sweep.figure.legend(loc="outside upper left", ncols=2, fontsize="small")
    sweep.set_title("Target RMS")
    at_rms = sorted((r for r in results if r.setting.update_rms == 0.2), key=lambda r: r.setting.weight_decay)
    for r in at_rms:
        steps = sorted(r.validation_loss)
        label = f"{r.setting.weight_decay}: {r.final_loss:.3f}"
        decays.plot(steps, [r.validation_loss[step] for step in steps], "o-", markersize=3, label=label)
    decays.set_xlabel("step")
    decays.set_ylabel("validation loss, nats/byte")
    decays.legend(title="weight decay: final loss")
    decays.set_title("Weight decay, at a target RMS of 0.2")
    figure.savefig(path, dpi=120)


def document(results: Sequence[Result], steps: int) -> str:
    """`ablations.md`."""
    tokens = steps * demo.GLOBAL_BATCH * demo.SEQUENCE_LENGTH
    seeds = len({r.setting.seed for r in results})
    lines = [
        "# Two findings of Moonlight's on the demo's scale",
        "",
        f"`make ablations`: mini-Moonlight with Distributed Muon, {steps} steps, {tokens:,} bytes, {seeds} seed(s),",
        f"learning rate {demo.LEARNING_RATE}; all settings from the same weights on the same bytes. Weight RMS is the",
        "mean over Muon's matrices. Moonlight's losses (arXiv 2502.16982, table 8) are of a far larger training.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---:|---:|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows(results)),
        "",
        "![loss over target RMS; loss by weight decay](ablations.png)",
        "",
        "Seeds of such short runs differ by a few hundredths of a nat; smaller differences mean nothing. Moonlight's",
        "weight decay moves weights by a few per cent in so few steps: what it is for, weights that stop growing over",
        "a long run, shows in the column of weight RMS and with the tenfold decay.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line and runs the ablations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default: %(default)s")
    parser.add_argument("--docs", type=Path, help="where to write ablations.md and ablations.png as well")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}, expected at least 1")
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        results = run_all(settings(options.seeds), options.steps, options.out, console)
    except ValueError as error:
        parser.error(str(error))
    except demo.RunFailed as error:
        console.print(f"[bold red]failed[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    saved: dict[str, Any] = {"steps": options.steps, "results": [asdict(r) for r in results]}
    (options.out / "results.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    plot(results, options.out / "ablations.png")
    console.print(table(results))
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.out / "ablations.png", options.docs / "ablations.png")
        (options.docs / "ablations.md").write_text(document(results, options.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
