"""Coefficient tables of the quintic Newton-Schulz iteration, each with its source, and what they converge on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

CoefficientSet = Literal["keller", "you", "polar_express", "cans", "deepseek_v4", "aol"]
Scaling = Literal["frobenius", "aol"]
Schedule = tuple[tuple[float, float, float], ...]

ALIASES: dict[str, CoefficientSet] = {"simple": "keller", "quintic": "you", "deepseekv4": "deepseek_v4"}
"""Names that emerging-optimizers 0.3 (and so Megatron's ``--muon-coefficient-type``) gives to the same numbers.

``cans``, ``aol`` and ``polar_express`` bear the same name on both sides; upstream's ``polar_express`` is cut to
four decimals, ours is not. Upstream starts a table again from its first entry where ``you`` and ``aol`` here
repeat the last one, and it runs ``aol`` after plain Frobenius scaling, which `check_schedule` refuses.
"""

AOL_SIGMA_MAX = 0.85
"""Upper bound of the singular values after ``scaling="aol"``.

AOL's own bound of one is attained: by a matrix of rank one with entries of one sign, and by one with orthogonal
rows. The ``aol`` quintics change sign at 0.884, so that they would turn exactly those matrices around. Up to 0.86
they are within 0.013 of one.
"""


@dataclass(frozen=True)
class _Table:
    """A published table.

    Attributes:
        entries: The quintics ``(a, b, c)`` in order. Fewer steps take the first ones, more steps repeat the last.
        scaling: How the input has to be scaled.
        fixed: True if the table is one composition that can be neither cut nor extended.
    """

    entries: Schedule
    scaling: Scaling = "frobenius"
    fixed: bool = False


# Keller Jordan, https://kellerjordan.github.io/posts/muon/: the steepest slope at zero that still stays in 1 +- 0.32.
_KELLER = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932, Algorithm 1, l = 1e-3.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
# The same algorithm's safety factor: rounding may lift a singular value above one, where the first quintics explode.
_POLAR_EXPRESS_SAFETY = 1.01

_TABLES: dict[CoefficientSet, _Table] = {
    "keller": _Table((_KELLER,)),
    # YouJiacheng, https://x.com/YouJiacheng/status/1905861218138804534; Megatron's "quintic".
    "you": _Table(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # The limit (1.875, -1.25, 0.375) converges from anywhere in (0, 1] and needs no safety factor.
    "polar_express": _Table(
        (
            *(
                (a / _POLAR_EXPRESS_SAFETY, b / _POLAR_EXPRESS_SAFETY**3, c / _POLAR_EXPRESS_SAFETY**5)
                for a, b, c in _POLAR_EXPRESS
            ),
            (1.875, -1.25, 0.375),
        )
    ),
    # Grishina, Smirnov, Rakhuba, "Accelerating Newton-Schulz Iteration for Orthogonalization via Chebyshev-type
    # Polynomials" (CANS), arXiv 2506.10935, in the rounding of emerging-optimizers.
    "cans": _Table(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        )
    ),
    # DeepSeek-V4 report: eight fast steps, then two that converge.
    "deepseek_v4": _Table((_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2, fixed=True),
    # Boissin et al., "Turbo-Muon", https://hal.science/hal-05390446; numbers as in emerging-optimizers 0.3.
    "aol": _Table(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        scaling="aol",
    ),
}


def _table(name: str) -> _Table:
    canonical = ALIASES.get(name, name)
    for known, table in _TABLES.items():
        if known == canonical:
            return table
    choices = ", ".join((*get_args(CoefficientSet), *ALIASES))
    raise ValueError(f"coefficient set: got {name!r}, expected one of {choices}")


def scaling_for(name: str) -> Scaling:
    """Returns the scaling that a coefficient set (or alias) needs.

    Raises:
        ValueError: If the name is not known.
    """
    return _table(name).scaling


def coefficients(name: str, steps: int) -> Schedule:
    """Returns the ``steps`` quintics ``(a, b, c)`` of a coefficient set, in the order they are applied.

    Fewer steps than the table has entries take its first entries, more steps repeat its last one. ``keller`` is one
    entry repeated. ``deepseek_v4`` is a composition of exactly ten.

    Args:
        name: A `CoefficientSet` or one of `ALIASES`.
        steps: Number of iterations, at least one.

    Raises:
        ValueError: If the name is not known, ``steps`` < 1, a fixed table is given another number of steps, or the
            cut table does not orthogonalize (see `check_schedule`).
    """
    table = _table(name)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"Newton-Schulz steps: got {steps!r}, expected an integer of at least 1; 5 is usual")
    length = len(table.entries)
    if table.fixed and steps != length:
        raise ValueError(
            f"Newton-Schulz steps: got {steps} for coefficient set {name!r}, which is one composition of {length}; "
            f"set the steps to {length} or take another set, such as 'keller', which goes with any number"
        )
    schedule = (*table.entries[:steps], *table.entries[-1:] * max(0, steps - length))
    try:
        check_schedule(schedule, table.scaling)
    except ValueError as error:
        raise ValueError(f"coefficient set {name!r} cannot be cut to {steps} steps: {error}") from error
    return schedule


def evaluate(schedule: Sequence[tuple[float, float, float]], sigma: float) -> float:
    """Returns the composed polynomial of a schedule at one singular value."""
    for a, b, c in schedule:
        square = sigma * sigma
        sigma *= a + square * (b + square * c)
    return sigma


@lru_cache(maxsize=256)
def check_schedule(schedule: Schedule, scaling: Scaling) -> None:
    """Refuses a schedule that does not orthogonalize what its scaling hands to it.

    Scaling leaves singular values in (0, B]: B = 1 for ``frobenius``, `AOL_SIGMA_MAX` for ``aol``. On all of it the
    composed polynomial has to be positive (else a direction is turned around) and below 2 (else it may diverge), and
    once it has risen to 0.5 it may not fall below 0.1 again (else the strongest directions are lost).

    Args:
        schedule: Quintics as from `coefficients`. Has to be hashable; the answer is cached.
        scaling: The scaling that will be used.

    Raises:
        ValueError: If the schedule is empty or not made of triples, the scaling is not known, or one of the
            conditions above is violated.
    """
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling: got {scaling!r}, expected one of {', '.join(get_args(Scaling))}")
    if not schedule or any(len(step) != 3 for step in schedule):
        raise ValueError(f"schedule: got {schedule!r}, expected at least one (a, b, c); take it from coefficients()")
    bound = AOL_SIGMA_MAX if scaling == "aol" else 1.0
    # In log s the composition oscillates with a period of about one slope; 400 points a decade follow it.
    points_per_decade, decades = 400, 8
    risen = False
    for index in range(points_per_decade * decades, -1, -1):
        sigma = bound * 10.0 ** (-index / points_per_decade)
        value = evaluate(schedule, sigma)
        risen = risen or value >= 0.5
        lowest = 0.1 if risen else 0.0
        if not lowest < value < 2.0 or math.isnan(value):
            remedy = (
                "scale with scaling='aol'"
                if scaling == "frobenius" and schedule[:1] == _TABLES["aol"].entries[:1]
                else "take more steps or another coefficient set"
            )
            raise ValueError(
                f"schedule of {len(schedule)} steps maps the singular value {sigma:.3g} to {value:.3g} under "
                f"scaling {scaling!r}, expected more than {lowest} and less than 2; {remedy}"
            )
