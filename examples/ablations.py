"""Two findings of Moonlight on the scale of the demo: which RMS updates should have, and weight decay on or off.

    make ablations                                        # or, in an environment that has the package:
    python examples/ablations.py --out runs/ablations
    python examples/ablations.py --parts momentum --seeds 3 --out runs/momentum

Trains the demo's mini-Moonlight with Distributed Muon, once for each setting, from the same weights on the same bytes,
4 ranks on this machine's CPU. Moonlight (arXiv 2502.16982, table 8) trains far larger models for far longer. Here a
run sees about 300k bytes, so that only large differences can be expected to agree. A third part, what a bf16 momentum
buffer costs, is not from Moonlight.
Leaves results.json and ablations.png in the output directory; `--docs DIRECTORY` also writes ablations.md there.
A second call with the same output directory continues where the first one was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import signal
import statistics
import sys
import time
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

from megatron_muon.observe.metric_names import FILE_NAME
from megatron_muon.profile.run_files import read_metrics

# Target RMS -> training loss in Moonlight's table 8.
MOONLIGHT = {0.05: 3.355, 0.1: 3.239, 0.2: 3.198, 0.4: 3.199, 0.8: 3.386}
BEST_RMS = 0.2
WEIGHT_DECAY = 0.1
STEPS = 80
PARTS = ("rms", "decay", "momentum")

# What README.md's demo takes on two cores: a step with its share of the evaluations, and a run's start and end.
STEP_S, START_S = 1.1, 25.0


@dataclass(frozen=True)
class Setting:
    """One training run.

    Attributes:
        update_rms: What updates are scaled to.
        weight_decay: Of matrices and of all other parameters that have one.
        seed: Of the initial weights and of the order of the data.
        momentum_dtype: Of Muon's momentum buffer.
    """

    update_rms: float
    weight_decay: float
    seed: int
    momentum_dtype: str = "fp32"

    @property
    def name(self) -> str:
        """For directories."""
        return f"rms{self.update_rms}-wd{self.weight_decay}-{self.momentum_dtype}-seed{self.seed}"

    def flags(self) -> list[str]:
        """The words that follow the demo's."""
        return [
            *("--muon-update-rms", str(self.update_rms)),
            *("--weight-decay", str(self.weight_decay)),
            *("--muon-momentum-dtype", self.momentum_dtype),
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


def settings(seeds: int, parts: Sequence[str] = PARTS) -> list[Setting]:
    """The settings of the parts, each once: `rms` varies the target RMS, `decay` the decay, `momentum` its dtype.

    All parts have Moonlight's RMS and weight decay with an fp32 buffer in common. A run this short moves weights by the
    sum of lr * weight_decay, some 2 %, at Moonlight's weight decay; a ten times stronger one shows the direction.
    """
    chosen = [(rms, WEIGHT_DECAY, "fp32") for rms in MOONLIGHT if "rms" in parts or rms == BEST_RMS]
    if "decay" in parts:
        chosen += [(BEST_RMS, 0.0, "fp32"), (BEST_RMS, 10 * WEIGHT_DECAY, "fp32")]
    if "momentum" in parts:
        chosen += [(BEST_RMS, WEIGHT_DECAY, "bf16")]
    return [Setting(rms, decay, 1234 + seed, dtype) for rms, decay, dtype in chosen for seed in range(seeds)]


def estimate(runs: int, steps: int, measured_s: Sequence[float] = ()) -> str:
    """How long `runs` more runs take: as long as those measured, else as README.md's demo does on two cores."""
    if measured_s:
        return f"about {runs * statistics.fmean(measured_s) / 60:.0f} min, by the runs so far"
    return f"about {runs * (START_S + steps * STEP_S) / 60:.0f} min on two cores that have nothing else to do"


class Finished:
    """Results of runs that have ended, kept so that a later call need not repeat them.

    Args:
        directory: Where they are.
        corpus: What the runs were trained on, as `prepare_corpus` says it.
    """

    def __init__(self, directory: Path, corpus: Sequence[Mapping[str, Any]]) -> None:
        self._directory, self._corpus = directory, list(corpus)

    def _job(self, setting: Setting, steps: int) -> dict[str, Any]:
        """What a result depends on; another job's result is not taken."""
        return {
            "setting": asdict(setting),
            "steps": steps,
            "learning_rate": demo.LEARNING_RATE,
            "model": demo.model_flags(),
            "corpus": self._corpus,
            "versions": {
                name: importlib.metadata.version(name) for name in ("megatron-core", "megatron-muon", "torch")
            },
        }

    def load(self, setting: Setting, steps: int) -> tuple[Result, float] | None:
        """The result and the seconds of a run that has ended; None if there is none of this job."""
        path = self._directory / f"{setting.name}.json"
        if not path.is_file():
            return None
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["job"] != json.loads(json.dumps(self._job(setting, steps))):
            return None
        values = saved["result"]
        losses = {int(step): loss for step, loss in values["validation_loss"].items()}
        return Result(setting, losses, values["train_loss"], values["weight_rms"]), saved["run_s"]

    def save(self, result: Result, steps: int, run_s: float) -> None:
        """Keeps a result; a file is there whole or not at all."""
        self._directory.mkdir(parents=True, exist_ok=True)
        content = {"job": self._job(result.setting, steps), "result": asdict(result), "run_s": run_s}
        partial = self._directory / f"{result.setting.name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(partial.with_suffix(".json"))


def run_all(chosen: Sequence[Setting], steps: int, out: Path, console: Console) -> list[Result]:
    """Trains with every setting that no earlier call has finished, one after the other.

    Raises:
        ValueError: If `steps` is too small.
        RunFailed: If a run exits with an error.
    """
    corpus = out / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)
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
    demo_report.LABELS.update({s.name: f"RMS {s.update_rms} decay {s.weight_decay} {s.momentum_dtype}" for s in chosen})
    finished = Finished(out / "finished", demo.prepare_corpus(corpus))
    ended = {s: before for s in chosen if (before := finished.load(s, steps)) is not None}
    todo = [s for s in chosen if s not in ended]
    seconds = [run_s for _, run_s in ended.values()]
    console.print(
        f"{len(chosen)} runs of {steps} steps, {len(ended)} finished before; the others take "
        f"{estimate(len(todo), steps, seconds)}",
        highlight=False,
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    results = {s: result for s, (result, _) in ended.items()}
    with Progress(*columns, console=console) as progress:
        for number, s in enumerate(todo):
            for stale in ("tensorboard", "logs"):
                shutil.rmtree(out / stale / s.name, ignore_errors=True)
            task = progress.add_task(demo_report.LABELS[s.name], total=steps, status="starting")
            started = time.monotonic()
            log = demo.train(s.name, flags[s], out, progress, task)
            seconds.append(time.monotonic() - started)
            results[s] = result_of(s, log, out / "tensorboard" / s.name)
            finished.save(results[s], steps, seconds[-1])
            if number == 0 and len(todo) > 1:
                console.print(
                    f"{len(todo) - 1} runs to go: {estimate(len(todo) - 1, steps, seconds)}",
                    highlight=False,
                    soft_wrap=True,
                )
    return [results[s] for s in chosen]


def result_of(setting: Setting, log: demo_report.RunLog, directory: Path) -> Result:
    """A finished run's result, from what it logged."""
    last = sorted(log.train_loss)[-max(1, len(log.train_loss) // 10) :]
    matrices = read_metrics(next(directory.rglob(FILE_NAME)))[-1]["matrices"]
    return Result(
        setting,
        dict(log.validation_loss),
        statistics.fmean(log.train_loss[step] for step in last),
        statistics.fmean(m["weight_rms"] for m in matrices.values()),
    )


def groups(results: Sequence[Result]) -> dict[tuple[float, float, str], list[Result]]:
    """Results by RMS, weight decay and momentum dtype, in order; those of a group differ by their seeds."""
    out: dict[tuple[float, float, str], list[Result]] = {}
    for r in results:
        out.setdefault((r.setting.update_rms, r.setting.weight_decay, r.setting.momentum_dtype), []).append(r)
    return out


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """One line per setting, in the order of `HEADINGS`; means over seeds."""
    out = []
    for (rms, decay, dtype), group in groups(results).items():
        losses = [result.final_loss for result in group]
        spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
        theirs = f"{MOONLIGHT[rms]:.3f}" if (decay, dtype) == (WEIGHT_DECAY, "fp32") else ""
        weights = statistics.fmean(result.weight_rms for result in group)
        out.append((f"{rms}", f"{decay}", dtype, f"{statistics.fmean(losses):.3f}{spread}", f"{weights:.4f}", theirs))
    return out


HEADINGS = (
    "target RMS",
    "weight decay",
    "momentum",
    "validation loss, nats/byte",
    "weight RMS",
    "Moonlight's training loss",
)


def findings(results: Sequence[Result]) -> list[str]:
    """What the runs say of each part that they have, in sentences with their numbers."""
    loss = {key: statistics.fmean(r.final_loss for r in group) for key, group in groups(results).items()}
    weights = {key: statistics.fmean(r.weight_rms for r in group) for key, group in groups(results).items()}
    base = (BEST_RMS, WEIGHT_DECAY, "fp32")
    out = []
    sweep = {rms: loss[rms, WEIGHT_DECAY, "fp32"] for rms in MOONLIGHT if (rms, WEIGHT_DECAY, "fp32") in loss}
    if len(sweep) > 1:
        best, theirs = min(sweep, key=sweep.__getitem__), min(MOONLIGHT, key=MOONLIGHT.__getitem__)
        ends = ", ".join(f"{sweep[rms] - sweep[best]:+.3f} at {rms}" for rms in (min(sweep), max(sweep)) if rms != best)
        out.append(f"Target RMS: the loss is lowest at {best} ({ends}); Moonlight's at {theirs}.")
    for decay in (0.0, 10 * WEIGHT_DECAY):
        if (other := (BEST_RMS, decay, "fp32")) in loss:
            out.append(
                f"Weight decay {decay} instead of {WEIGHT_DECAY}: loss {loss[other] - loss[base]:+.3f}, weight RMS "
                f"{weights[other] / weights[base] - 1:+.1%}."
            )
    if (other := (BEST_RMS, WEIGHT_DECAY, "bf16")) in loss:
        pairs = zip(groups(results)[other], groups(results)[base], strict=True)
        each = ", ".join(f"{bf16.final_loss - fp32.final_loss:+.4f}" for bf16, fp32 in pairs)
        out.append(f"Momentum in bf16 instead of fp32: loss {loss[other] - loss[base]:+.4f} (by seed: {each}).")
    return out


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
    fp32 = [r for r in results if r.setting.momentum_dtype == "fp32"]
    ours = [r for r in fp32 if r.setting.weight_decay == WEIGHT_DECAY]
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
    at_rms = sorted((r for r in fp32 if r.setting.update_rms == BEST_RMS), key=lambda r: r.setting.weight_decay)
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
        "# Ablations: two findings of Moonlight, and momentum in bf16",
        "",
        f"`make ablations` trains the demo's model with Distributed Muon: {steps} steps, {tokens:,} bytes,",
        f"{seeds} seed(s), learning rate {demo.LEARNING_RATE}; all settings start from the same weights and see the",
        "same bytes. Weight RMS is the mean over Muon's matrices. Moonlight's losses (arXiv 2502.16982, table 8)",
        "come from far larger runs.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---:|---:|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows(results)),
        "",
        *(f"- {finding}" for finding in findings(results)),
        "",
        "![loss over target RMS; loss by weight decay](ablations.png)",
        "",
        "Short runs with different seeds differ by a few hundredths of a nat; smaller differences mean nothing. In",
        "so few steps, Moonlight's weight decay changes weights by a few per cent. Its purpose is that weights stop",
        "growing in a long run; this is visible in the column of weight RMS, and with the tenfold decay.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line and runs the ablations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default: %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what is varied (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="also where finished runs are kept; default: %(default)s",
    )
    parser.add_argument("--docs", type=Path, help="where to write ablations.md and ablations.png as well")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}, expected at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        results = run_all(settings(options.seeds, options.parts), options.steps, options.out, console)
    except ValueError as error:
        parser.error(str(error))
    except demo.RunFailed as error:
        console.print(f"[bold red]failed[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; the ranks are stopped. The same command continues with the remaining runs")
        sys.exit(130)
    saved: dict[str, Any] = {"steps": options.steps, "results": [asdict(r) for r in results]}
    (options.out / "results.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    plot(results, options.out / "ablations.png")
    console.print(table(results))
    for finding in findings(results):
        console.print(finding, highlight=False, soft_wrap=True)
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.out / "ablations.png", options.docs / "ablations.png")
        (options.docs / "ablations.md").write_text(document(results, options.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
