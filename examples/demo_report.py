"""What the demo's runs measured: read from what Megatron logged, as a table, `report.json`, `loss.csv`, `loss.png`.

    python examples/demo_report.py runs/demo

makes them anew from the TensorBoard files of an earlier `python examples/demo.py` and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

LABELS = {"adamw": "AdamW", "muon": "Muon", "resumed": "resumed"}
COLORS = {"adamw": "tab:gray", "muon": "tab:red"}
# Muon with experts in FP8, by recipe.
FP8_PREFIX = "muon_"
for _recipe, _color in (("delayed", "tab:purple"), ("tensorwise", "tab:blue"), ("mxfp8", "tab:green")):
    LABELS[FP8_PREFIX + _recipe], COLORS[FP8_PREFIX + _recipe] = f"Muon, FP8 {_recipe}", _color

# Megatron's timers of the first step run on into the second, and both allocate state.
WARMUP_STEPS = 2


@dataclass(frozen=True)
class RunLog:
    """What a run logged so far.

    Attributes:
        train_loss: Nats per byte, by step from 1.
        validation_loss: Nats per byte, by step.
        learning_rate: By step.
        step_s: Seconds of a training step, by step; the first is not logged.
        optimizer_s: Seconds of the optimizer's part of it, on the slowest rank: gradient clipping, the update and the
            gathering of updated parameters.
        state_bytes: For each rank, the bytes its optimizers keep from step to step, by the optimizers' class names.
            Empty while the run is active.
    """

    train_loss: Mapping[int, float] = field(default_factory=dict)
    validation_loss: Mapping[int, float] = field(default_factory=dict)
    learning_rate: Mapping[int, float] = field(default_factory=dict)
    step_s: Mapping[int, float] = field(default_factory=dict)
    optimizer_s: Mapping[int, float] = field(default_factory=dict)
    state_bytes: tuple[Mapping[str, int], ...] = ()

    def median_ms(self, seconds: Mapping[int, float]) -> float:
        """Median milliseconds of the steps after the first two; of all, if there are no others."""
        settled = [value for step, value in seconds.items() if step > WARMUP_STEPS] or list(seconds.values())
        return 1e3 * statistics.median(settled)


class RunReader:
    """Reads a run's TensorBoard directory, also while it is being written.

    Args:
        directory: Given to Megatron as `--tensorboard-dir`; need not exist yet. Must hold one run only.
    """

    TAGS = (
        ("train_loss", "lm loss"),
        ("validation_loss", "lm loss validation"),
        ("learning_rate", "learning-rate"),
        ("step_s", "iteration-time"),
        ("optimizer_s", "optimizer-time"),
    )

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._events: Any = None

    def read(self) -> RunLog:
        """All that was logged up to now."""
        if self._events is None:
            if not any(self._directory.glob("events.out.tfevents.*")):
                return RunLog()
            self._events = EventAccumulator(str(self._directory), size_guidance={"scalars": 0})
        self._events.Reload()
        logged = set(self._events.Tags()["scalars"])
        series = {
            name: {event.step: event.value for event in self._events.Scalars(tag)} if tag in logged else {}
            for name, tag in self.TAGS
        }
        return RunLog(**series, state_bytes=self._state_bytes())

    def _state_bytes(self) -> tuple[Mapping[str, int], ...]:
        paths = {
            int(match.group(1)): path
            for path in self._directory.glob("optimizer.rank*.json")
            if (match := re.fullmatch(r"optimizer\.rank(\d+)\.json", path.name))
        }
        return tuple(json.loads(paths[rank].read_text(encoding="utf-8")) for rank in sorted(paths))


def steps_to_reach(curve: Mapping[int, float], target: float) -> float | None:
    """When a loss curve first comes down to `target`.

    Args:
        curve: Loss by step.
        target: Loss.

    Returns:
        The step, interpolated linearly between the two neighbours around the crossing; the curve's first step if that
        is low enough already; None if it never gets there.
    """
    before: tuple[int, float] | None = None
    for step, loss in sorted(curve.items()):
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def continuation(whole: RunLog, resumed: RunLog, saved_step: int) -> dict[str, Any]:
    """Compares the training losses of a resumed run with those of the run that went on.

    Args:
        whole: The run that was saved and went on.
        resumed: The run that loaded the checkpoint.
        saved_step: The step after which it was saved.

    Returns:
        `saved_step`; `steps`, those after it; `resumed` and `uninterrupted`, the losses there in nats per byte; and
        `largest_difference` between them.

    Raises:
        ValueError: If the resumed run's steps are not those that the other one made after the save.
    """
    steps = sorted(resumed.train_loss)
    expected = [step for step in sorted(whole.train_loss) if step > saved_step]
    if not steps or steps != expected:
        raise ValueError(f"resumed run: got steps {steps}, expected {expected}, those after its checkpoint")
    losses = {"resumed": [resumed.train_loss[s] for s in steps], "uninterrupted": [whole.train_loss[s] for s in steps]}
    largest = max(abs(a - b) for a, b in zip(losses["resumed"], losses["uninterrupted"], strict=True))
    return {"saved_step": saved_step, "steps": steps, **losses, "largest_difference": largest}


def told(resumed: Mapping[str, Any], saved_layout: str, layout: str) -> str:
    """What `continuation` found, for people."""
    first, last = resumed["steps"][0], resumed["steps"][-1]

    def losses(run: str) -> str:
        return f"{resumed[run][0]:.4f} at step {first}, {resumed[run][-1]:.4f} at step {last}"

    return (
        f"Muon saved after step {resumed['saved_step']} at {saved_layout}, resumed at {layout}:\n"
        f"  training loss, resumed        {losses('resumed')}\n"
        f"  training loss, uninterrupted  {losses('uninterrupted')}\n"
        f"  largest difference over steps {first} to {last}: {resumed['largest_difference']:.4f} nats/byte"
    )


def summarize(logs: Mapping[str, RunLog], tokens_per_step: int) -> dict[str, dict[str, Any]]:
    """The report's numbers.

    Args:
        logs: Finished runs by name.
        tokens_per_step: Bytes of text in a global batch.

    Returns:
        For each run: `steps`, `tokens`, `final_validation_loss` (nats per byte), `tokens_to_adamw_loss` (None where
        AdamW was not run or its final loss not reached), `loss_minus_bf16` (None but for FP8 runs beside the bf16
        one), `optimizer_state_bytes` by rank, `optimizer_step_ms` and `step_ms` (medians), `tokens_per_s`.

    Raises:
        ValueError: If a run has no validation loss.
    """
    summary = {}
    adamw = logs.get("adamw")
    for name, log in logs.items():
        if not log.validation_loss:
            raise ValueError(f"run {name}: got no validation loss, expected at least the one at its end")
        last = max(log.validation_loss)
        reached = None
        if adamw is not None:
            reached = steps_to_reach(log.validation_loss, adamw.validation_loss[max(adamw.validation_loss)])
        step_ms = log.median_ms(log.step_s)
        summary[name] = {
            "steps": last,
            "tokens": last * tokens_per_step,
            "final_validation_loss": log.validation_loss[last],
            "loss_minus_bf16": _loss_minus_bf16(name, logs),
            "tokens_to_adamw_loss": None if reached is None else round(reached * tokens_per_step),
            "optimizer_state_bytes": [dict(rank) for rank in log.state_bytes],
            "optimizer_step_ms": log.median_ms(log.optimizer_s),
            "step_ms": step_ms,
            "tokens_per_s": 1e3 * tokens_per_step / step_ms,
        }
    return summary


def _loss_minus_bf16(name: str, logs: Mapping[str, RunLog]) -> float | None:
    bf16 = logs.get("muon")
    if bf16 is None or not name.startswith(FP8_PREFIX):
        return None
    return logs[name].validation_loss[max(logs[name].validation_loss)] - bf16.validation_loss[max(bf16.validation_loss)]


def table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """The summary for people."""
    view = Table(title="mini-Moonlight, trained twice from the same seed on the same bytes", title_justify="left")
    view.add_column("")
    for name in summary:
        view.add_column(LABELS[name], justify="right")

    def reached(run: Mapping[str, Any]) -> str:
        if "adamw" not in summary:
            return "AdamW was not run"
        tokens = run["tokens_to_adamw_loss"]
        return "never" if tokens is None else f"{tokens:,} ({tokens / summary['adamw']['tokens']:.0%})"

    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "final validation loss, nats/byte": lambda run: f"{run['final_validation_loss']:.3f}",
    }
    if any(run["loss_minus_bf16"] is not None for run in summary.values()):
        rows["that minus bf16's"] = lambda run: (
            "" if run["loss_minus_bf16"] is None else f"{run['loss_minus_bf16']:+.4f}"
        )
    rows |= {
        "tokens to AdamW's final loss": reached,
        "optimizer state, bytes per rank": lambda run: _range([sum(r.values()) for r in run["optimizer_state_bytes"]]),
        "optimizer step, ms (median)": lambda run: f"{run['optimizer_step_ms']:.0f}",
        "training step, ms (median)": lambda run: f"{run['step_ms']:.0f}",
        "tokens/s": lambda run: f"{run['tokens_per_s']:,.0f}",
    }
    for title, cell in rows.items():
        view.add_row(title, *(cell(run) for run in summary.values()))
    return view


def _range(numbers: list[int]) -> str:
    if not numbers:
        return "unknown"
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def write_csv(logs: Mapping[str, RunLog], tokens_per_step: int, path: Path) -> None:
    """Writes one line per run and step; a value that was not logged at a step stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["run", "step", "tokens", "train_loss", "validation_loss", "learning_rate", "step_ms", "optimizer_ms"]
        )
        for name, log in logs.items():
            for step in sorted(log.train_loss):
                times = [f"{1e3 * s[step]:.2f}" if step in s else "" for s in (log.step_s, log.optimizer_s)]
                losses = [series.get(step, "") for series in (log.train_loss, log.validation_loss, log.learning_rate)]
                writer.writerow([name, step, step * tokens_per_step, *losses, *times])


def write_plot(logs: Mapping[str, RunLog], tokens_per_step: int, path: Path) -> None:
    """Draws the loss over tokens: thin lines for training, dots for validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, log in logs.items():
        color = COLORS[name]
        steps = sorted(log.train_loss)
        tokens = [step * tokens_per_step for step in steps]
        axes.plot(tokens, [log.train_loss[step] for step in steps], color=color, linewidth=0.7, alpha=0.5)
        steps = sorted(log.validation_loss)
        losses = [log.validation_loss[step] for step in steps]
        tokens = [step * tokens_per_step for step in steps]
        axes.plot(tokens, losses, "o-", color=color, markersize=3.5, label=f"{LABELS[name]}: {losses[-1]:.3f}")
    if "adamw" in logs:
        curve = logs["adamw"].validation_loss
        axes.axhline(curve[max(curve)], color=COLORS["adamw"], linestyle=":", linewidth=1)
    lowest = min(min(log.validation_loss.values()) for log in logs.values())
    axes.set_ylim(lowest - 0.1, min(lowest + 1.5, 5.6))
    axes.set_xlabel("tokens (bytes of Python source)")
    axes.set_ylabel("loss, nats/byte")
    axes.set_title("mini-Moonlight: validation (dots), training (thin)")
    axes.legend(title="final validation loss")
    figure.savefig(path, dpi=150)


def write_report(directory: Path, logs: Mapping[str, RunLog], setup: Mapping[str, Any]) -> Table:
    """Writes `report.json`, `loss.csv` and `loss.png` into `directory`.

    Args:
        directory: Exists.
        logs: Finished runs by name.
        setup: How the runs were made, kept in the report; must hold `tokens_per_step`.

    Returns:
        The table to show.
    """
    tokens_per_step = setup["tokens_per_step"]
    summary = summarize(logs, tokens_per_step)
    report = {"setup": dict(setup), "runs": summary}
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_csv(logs, tokens_per_step, directory / "loss.csv")
    write_plot(logs, tokens_per_step, directory / "loss.png")
    return table(summary)


def main() -> None:
    """Makes the report of an earlier demo anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what was given to demo.py as --out")
    directory = parser.parse_args().directory
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    logs = {name: RunReader(directory / "tensorboard" / name).read() for name in report["runs"]}
    Console().print(write_report(directory, logs, report["setup"]))


if __name__ == "__main__":
    main()
