"""Fits of loss against FLOPs, and the ratio of FLOPs at equal loss.

Two forms: a power law, loss = a C^-b, as in Moonlight (arXiv 2502.16982, figure 3), and one with an irreducible part,
loss = E + a C^-b. Both are fitted to logarithms of losses by least squares. Intervals come from a bootstrap that draws
models and, for each, its seeds with replacement; both optimizers are drawn alike, since their runs are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Form = Literal["power", "irreducible"]
Array = NDArray[np.float64]


class NoCommonLoss(ValueError):
    """Two curves have no range of losses in common, so that FLOPs at equal loss cannot be compared."""


@dataclass(frozen=True)
class Law:
    """loss = irreducible + a C^-b, with C in the unit of the fitted points.

    Attributes:
        a: Loss above the irreducible part at C = 1.
        b: Exponent, positive.
        irreducible: Loss that no training removes; 0 for a power law.
    """

    a: float
    b: float
    irreducible: float = 0.0

    def loss(self, flops: Array | float) -> Array:
        """Losses at numbers of FLOPs."""
        return np.asarray(self.irreducible + self.a * np.asarray(flops) ** -self.b, dtype=np.float64)

    def flops(self, loss: float) -> float:
        """FLOPs at which the law reaches a loss; infinity if it never does."""
        above = loss - self.irreducible
        return float((self.a / above) ** (1 / self.b)) if above > 0 else math.inf


def fit_law(flops: Sequence[float], losses: Sequence[float], form: Form, *, polished: bool = True) -> Law:
    """Fits a law to points.

    Args:
        flops: Operations.
        losses: One for each.
        form: The law.
        polished: Whether the irreducible loss is refined beyond 400 steps of a grid, which a bootstrap can do without.

    Raises:
        ValueError: If there are fewer points than parameters, or a value is not positive.
    """
    x, y = np.asarray(flops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    least = 2 if form == "power" else 3
    if len(set(x.tolist())) < least or len(x) != len(y):
        raise ValueError(f"fit of the {form} law: got {len(set(x.tolist()))} sizes, expected at least {least}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError(f"fit of the {form} law: got values that are not positive and finite")
    # Logarithms relative to the middle of the points keep a and b nearly independent of each other.
    centre = float(np.exp(np.log(x).mean()))
    slope, level = np.polyfit(np.log(x / centre), np.log(y), 1)
    if form == "power":
        return Law(float(np.exp(level) * centre**-slope), float(-slope))

    floors, parts, slopes = _grid(x / centre, y)
    errors = np.log((floors + parts * (x / centre)[:, None] ** slopes) / y[:, None])
    best = int((errors**2).sum(axis=0).argmin())
    floor, part, slope = float(floors[best]), float(parts[best]), float(slopes[best])
    if polished:

        def residuals(parameters: Array) -> Array:
            loss = parameters[0] + parameters[1] * (x / centre) ** parameters[2]
            return np.asarray(np.log(np.maximum(loss, 1e-300) / y), dtype=np.float64)

        bounds = ([0.0, 0.0, -np.inf], [float(y.min()), np.inf, 0.0])
        start = np.clip([floor, part, slope], *(np.asarray(bound) for bound in bounds))
        floor, part, slope = (float(value) for value in least_squares(residuals, start, bounds=bounds).x)
    return Law(part * centre**-slope, -slope, floor)


def _grid(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """For each of many irreducible losses, the power law that fits what is above it.

    With the irreducible loss E given, log(y - E) is linear in log x. Weights ((y - E) / y)^2 make squared errors those
    of log y, to first order.
    """
    floors = y.min() * (1 - np.geomspace(1e-4, 1, 400))
    above = y[:, None] - floors
    weights = (above / y[:, None]) ** 2
    u, v = np.log(x)[:, None], np.log(above)
    total = weights.sum(axis=0)
    u_mean, v_mean = (weights * u).sum(axis=0) / total, (weights * v).sum(axis=0) / total
    slopes = (weights * (u - u_mean) * (v - v_mean)).sum(axis=0) / (weights * (u - u_mean) ** 2).sum(axis=0)
    return floors, np.exp(v_mean - slopes * u_mean), slopes


@dataclass(frozen=True)
class Interval:
    """A number with the 2.5 and 97.5 percentiles of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Comparison:
    """Muon against AdamW under one form of law.

    Attributes:
        adamw: AdamW's law.
        muon: Muon's law.
        exponents: `adamw` and `muon` -> exponent with its interval.
        losses: Losses over which both laws are fitted, from high to low.
        ratio: For each of `losses`, Muon's FLOPs over AdamW's at that loss.
        middle: The ratio at the middle of the range.
    """

    adamw: Law
    muon: Law
    exponents: Mapping[str, Interval]
    losses: Sequence[float]
    ratio: Sequence[Interval]
    middle: Interval


Curve = Mapping[str, tuple[float, Sequence[float]]]
"""Model name -> its FLOPs, and its losses by seed."""


def compare(adamw: Curve, muon: Curve, form: Form, *, draws: int = 1000, seed: int = 0) -> Comparison:
    """Fits both curves and bootstraps the ratio of FLOPs at equal loss.

    Args:
        adamw: AdamW's points.
        muon: Muon's points, of the same models and seeds.
        form: The law.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the curves have other models or other numbers of seeds, or too few models.
        NoCommonLoss: If the curves share no range of losses.
    """
    if list(adamw) != list(muon) or any(len(adamw[name][1]) != len(muon[name][1]) for name in adamw):
        raise ValueError(f"compare: got models {list(adamw)} and {list(muon)}, expected the same ones and seeds")
    names = list(adamw)
    laws = tuple(fit_law(*_points(curve, names, None), form) for curve in (adamw, muon))
    losses = _common_losses(laws, adamw, muon)
    random = np.random.default_rng(seed)
    ratios, exponents = [], []
    least = 2 if form == "power" else 3
    while len(ratios) < draws:
        drawn = [names[i] for i in random.integers(len(names), size=len(names))]
        if len(set(drawn)) < least:
            continue
        seeds = [random.integers(len(adamw[name][1]), size=len(adamw[name][1])) for name in drawn]
        pair = tuple(fit_law(*_points(curve, drawn, seeds), form, polished=False) for curve in (adamw, muon))
        ratios.append([pair[1].flops(loss) / pair[0].flops(loss) for loss in losses])
        exponents.append([law.b for law in pair])
    values = [laws[1].flops(loss) / laws[0].flops(loss) for loss in losses]
    bands = [_interval(value, [row[i] for row in ratios]) for i, value in enumerate(values)]
    named = {name: _interval(laws[i].b, [row[i] for row in exponents]) for i, name in enumerate(("adamw", "muon"))}
    return Comparison(laws[0], laws[1], named, losses, bands, bands[len(bands) // 2])


def _points(curve: Curve, names: Sequence[str], seeds: Sequence[Array] | None) -> tuple[list[float], list[float]]:
    """FLOPs and mean losses of models, over all seeds or those drawn for each."""
    means = []
    for i, name in enumerate(names):
        losses = np.asarray(curve[name][1], dtype=np.float64)
        means.append(float((losses if seeds is None else losses[seeds[i]]).mean()))
    return [curve[name][0] for name in names], means


def _common_losses(laws: Sequence[Law], *curves: Curve, count: int = 41) -> list[float]:
    """Losses, equally far apart in AdamW's FLOPs, that both laws reach inside the range of the points."""
    lows, highs = zip(*((min(c[0] for c in curve.values()), max(c[0] for c in curve.values())) for curve in curves))
    high = min(float(law.loss(low)) for law, low in zip(laws, lows, strict=True))
    low = max(float(law.loss(top)) for law, top in zip(laws, highs, strict=True))
    if not low < high:
        raise NoCommonLoss(
            f"compare: the curves share no range of losses: one ends at {low:.3f}, one begins at {high:.3f}"
        )
    start, stop = (math.log(laws[0].flops(loss)) for loss in (high, low))
    return [float(laws[0].loss(math.exp(x))) for x in np.linspace(start, stop, count)]


def _interval(value: float, samples: Sequence[float]) -> Interval:
    low, high = np.percentile([sample for sample in samples if math.isfinite(sample)] or [math.nan], [2.5, 97.5])
    return Interval(value, float(low), float(high))
