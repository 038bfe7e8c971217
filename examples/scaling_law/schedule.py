"""Which runs a study still needs, given the losses it has. Pure functions: a study resumes by calling them again.

1. *Sweep*: at every size and for both optimizers the learning rate is moved by a factor until the best rate has a
   worse neighbour on both sides (first seed).
2. *Seeds*: the remaining seeds at AdamW's best rate, for AdamW and for Muon, and at Muon's own best rate.
3. *Batch* and *decay*: at some sizes, AdamW and Muon at AdamW's best rate with half and twice the batch and with other
   weight decays (first seed).
4. *Variants*: at some sizes, each variant of Muon with all seeds at the rate of Muon's base runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from scaling_law.ladder import OPTIMIZERS, Ladder, Model, OptimizerName, Run, neighbours, rounded

Losses = Mapping[Run, float]
# A sweep that leaves this range of rates around its start has met something else than an optimum.
MOST_MOVES = 8


@dataclass(frozen=True)
class Sweep:
    """The learning rates tried for one model and optimizer.

    Attributes:
        losses: Rate -> final validation loss, in rising order of rates; NaN for a run that diverged.
        best: The rate of the lowest loss; None while there is none.
        wanted: Rates that must be tried next; empty once both neighbours of the best are worse.
    """

    losses: Mapping[float, float]
    best: float | None
    wanted: tuple[float, ...]

    @property
    def done(self) -> bool:
        """Whether the best rate has a worse neighbour on both sides."""
        return self.best is not None and not self.wanted


def sweep(ladder: Ladder, model: Model, optimizer: OptimizerName, losses: Losses) -> Sweep:
    """What is known of the best learning rate of a model.

    Raises:
        RuntimeError: If the sweep has moved too far from where it began; the ladder's start is wrong then.
    """
    start = rounded(model.learning_rate or ladder.learning_rate)
    seed = ladder.seeds[0]
    tried = {
        run.learning_rate: loss
        for run, loss in losses.items()
        if run == ladder.base(model, optimizer, run.learning_rate, seed)
    }
    tried = dict(sorted(tried.items()))
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    if not finite:
        lower = rounded(min(tried) / ladder.factor) if tried else start
        return Sweep(tried, None, (lower,))
    best = min(finite, key=lambda rate: (finite[rate], rate))
    wanted = tuple(rate for rate in neighbours(best, ladder.factor) if rate not in tried)
    if wanted and not start / ladder.factor**MOST_MOVES < best < start * ladder.factor**MOST_MOVES:
        raise RuntimeError(
            f"{model.name}, {optimizer}: the best learning rate so far is {best}, expected one near {start}; "
            "set learning_rate of the model in the ladder"
        )
    return Sweep(tried, best, wanted)


def needed(ladder: Ladder, losses: Losses) -> list[Run]:
    """The runs that can be started now, in the order of their worth; empty once the study is complete."""
    return [run for run in dict.fromkeys(_wanted(ladder, losses)) if run not in losses]


def _wanted(ladder: Ladder, losses: Losses) -> Iterator[Run]:
    for model in ladder.models:
        sweeps = {name: sweep(ladder, model, name, losses) for name in OPTIMIZERS}
        for name, found in sweeps.items():
            yield from (ladder.base(model, name, rate, ladder.seeds[0]) for rate in found.wanted)
        adamw = sweeps["adamw"]
        if not adamw.done or adamw.best is None:
            continue
        rates: list[tuple[OptimizerName, float]] = [("adamw", adamw.best), ("muon", adamw.best)]
        muon = sweeps["muon"]
        if muon.done and muon.best is not None:
            rates.append(("muon", muon.best))
        for name, rate in rates:
            yield from (ladder.base(model, name, rate, seed) for seed in ladder.seeds)
        yield from (run for _, run, _ in changes(ladder, model, adamw.best))


def changes(ladder: Ladder, model: Model, rate: float) -> Iterator[tuple[str, Run, Run]]:
    """What is changed at AdamW's best rate of a model: a label, the changed run, and the run it is compared with."""
    for name in OPTIMIZERS:
        base = ladder.base(model, name, rate, ladder.seeds[0])
        if model.name in ladder.batch_models:
            for batch_size in (base.batch_size // 2, base.batch_size * 2):
                if batch_size:
                    yield f"{name}: batch {batch_size}", replace(base, batch_size=batch_size), base
        if model.name in ladder.decay_models:
            for decay in ladder.decays:
                yield f"{name}: weight decay {decay}", replace(base, weight_decay=decay), base
    if model.name in ladder.variant_models:
        for variant in ladder.variants:
            for seed in ladder.seeds:
                base = ladder.base(model, "muon", rate, seed)
                decay = base.weight_decay if variant.weight_decay is None else variant.weight_decay
                yield variant.name, replace(base, variant=variant.name, weight_decay=decay), base


@dataclass(frozen=True)
class Points:
    """The losses of one curve.

    Attributes:
        name: `AdamW`, `Muon at AdamW's rate` or `Muon at its own rate`.
        rates: Model name -> learning rate.
        losses: Model name -> losses by seed, in the ladder's order; only models with all seeds.
    """

    name: str
    rates: Mapping[str, float]
    losses: Mapping[str, tuple[float, ...]]


def curves(ladder: Ladder, losses: Losses) -> dict[str, Points]:
    """The three curves of the study: `adamw`, `muon` (AdamW's rate) and `muon_tuned` (its own best rate)."""
    out = {}
    for key, name, optimizer, rated_by in (
        ("adamw", "AdamW", "adamw", "adamw"),
        ("muon", "Muon at AdamW's rate", "muon", "adamw"),
        ("muon_tuned", "Muon at its own best rate", "muon", "muon"),
    ):
        rates, points = {}, {}
        for model in ladder.models:
            found = sweep(ladder, model, rated_by, losses)  # type: ignore[arg-type]
            if not found.done or found.best is None:
                continue
            runs = [ladder.base(model, optimizer, found.best, seed) for seed in ladder.seeds]  # type: ignore[arg-type]
            values = [losses.get(run, math.nan) for run in runs]
            if all(math.isfinite(value) for value in values):
                rates[model.name], points[model.name] = found.best, tuple(values)
        out[key] = Points(name, rates, points)
    return out
