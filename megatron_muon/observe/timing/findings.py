"""What slows a step down, and the flag that would help: rules on the numbers of profiled steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from megatron_muon.observe.timing.peaks import RunFacts
from megatron_muon.observe.timing.shown import part_phases
from megatron_muon.observe.timing.steps import StepSummary
from megatron_muon.observe.units import amount, arithmetic, bandwidth
from megatron_muon.plan.machines import REACHED
from megatron_muon.plan.rounds import ENOUGH_ROUNDS

# A phase below this share of the step is not worth a finding.
WORTH_NAMING = 0.1
# The slowest rank over the mean: what plans keep below, see `docs/planning.md`.
UNEVEN = 1.1
# Of the link rate that is known: below it, something other than the volume is wrong.
SLOW_LINK = 0.5


class _Cause(NamedTuple):
    cause: str
    advice: str
    flag: str = ""


@dataclass(frozen=True)
class Finding:
    """A part of the step that takes time, why, and what would help.

    Attributes:
        part: Part of the step, a key of `PARTS`.
        share: Mean share of the step's time.
        cause: Explanation by the numbers.
        advice: What would help.
        flag: Flag to set, with its value; empty if no flag helps.
    """

    part: str
    share: float
    cause: str
    advice: str
    flag: str = ""

    def __str__(self) -> str:
        remedy = f"{self.advice}: {self.flag}" if self.flag else self.advice
        return f"{PARTS[self.part][0]}, {self.share:.0%} of the step: {self.cause}. {remedy}."


def find(summary: StepSummary, facts: RunFacts) -> list[Finding]:
    """The bottleneck, then other parts that take at least a tenth of the step, largest first.

    Args:
        summary: Median of a run's profiled steps.
        facts: Facts about the run.

    Returns:
        At least one.
    """
    shares = {part: summary.share(part_phases(part)) for part in PARTS}
    order = sorted(shares, key=lambda part: -shares[part])
    named = [part for part in order if shares[part] >= WORTH_NAMING] or order[:1]
    return [Finding(part, shares[part], *PARTS[part][1](summary, facts)) for part in named]


def _compute(summary: StepSummary, facts: RunFacts) -> _Cause:
    rate, peak = summary.rates["newton_schulz"], facts.flops.per_s
    cause = f"{arithmetic(rate)} a rank, {rate / peak:.0%} of {arithmetic(peak)} ({facts.flops.source})"
    settings, on_gpu = facts.settings, facts.device_type == "cuda"
    if on_gpu and settings["ns_dtype"] == "fp32":
        return _Cause(cause, "bf16 products are many times faster", "--muon-ns-dtype bf16")
    if not settings["batched"]:
        return _Cause(cause, "Matrices of equal shape can share products", "--muon-batched")
    if settings["ns_steps"] > 5:
        advice = f"{settings['ns_steps']} steps; Moonlight takes 5"
        return _Cause(cause, advice, "--muon-ns-steps 5 --muon-coefficients keller")
    if (uneven := _uneven(summary, facts)) is not None:
        return uneven
    if on_gpu and settings["ns_backend"] == "torch":
        advice = "Symmetric kernels do half of the products' work"
        return _Cause(cause, advice, "--muon-ns-backend emerging --muon-max-team-size 1")
    return _Cause(cause, "Its work falls with every data-parallel rank that is added")


def _uneven(summary: StepSummary, facts: RunFacts) -> _Cause | None:
    """Newton-Schulz of the slowest rank, if it is what others wait for."""
    time, flops = summary["ns_ms"], summary["ns_flops"]
    if time.imbalance < UNEVEN:
        return None
    cause = f"rank {time.rank} takes {time.imbalance:.2f} of the ranks' mean for Newton-Schulz"
    if flops.imbalance < UNEVEN:
        advice = "The plan gives it no more work than others: look at its clocks and neighbours (profile links)"
        return _Cause(cause, advice)
    cause += f", and the plan gives rank {flops.rank} {flops.imbalance:.2f} of their mean FLOPs"
    if facts.settings["max_team_size"] < facts.world_size:
        advice = "More ranks may share a matrix"
        return _Cause(cause, advice, f"--muon-max-team-size {facts.world_size}")
    return _Cause(cause, "Its matrices do not divide further; other layouts: python -m megatron_muon plan")


def _exchange(summary: StepSummary, facts: RunFacts) -> _Cause:
    # What the slowest rank has beyond the mean, the others spend waiting for its scatter.
    lead_ms = summary["ns_ms"].largest - summary["ns_ms"].mean
    if lead_ms >= 0.5 * summary["wait_ms"].mean:
        uneven = _uneven(summary, facts)
        if uneven is not None:
            return uneven
    known = facts.link
    slowest = min(summary.message_bytes, key=lambda name: summary.rates[name] or math.inf)
    rate, message_bytes = summary.rates[slowest], summary.message_bytes[slowest]
    cause = f"{summary.hidden_share or 0.0:.0%} of the exchange is hidden; {bandwidth(rate)}, "
    cause += f"{rate / known.per_s:.0%} of {bandwidth(known.per_s)} ({known.source})"
    settings, buffer_mb = facts.settings, facts.settings["exchange_buffer_mb"]
    latency_s = REACHED["cuda" if facts.device_type == "cuda" else "cpu"].latency_s
    if message_bytes < latency_s * known.per_s:
        cause += f", since messages of {amount(message_bytes)} take as long as empty ones"
        if facts.rounds > ENOUGH_ROUNDS:
            advice = f"A larger buffer makes fewer rounds than {facts.rounds}"
            return _Cause(cause, advice, f"--muon-exchange-buffer-mb {2 * buffer_mb}")
        return _Cause(cause, "The matrices are small for so many ranks")
    if settings["exchange_dtype"] == "fp32":
        return _Cause(cause, "bf16 halves the bytes", "--muon-exchange-dtype bf16")
    if rate < SLOW_LINK * known.per_s:
        return _Cause(cause, "Links or neighbours are slow: python -m megatron_muon.profile links")
    if facts.rounds == 1:
        smaller_mb = max(round(summary["sent_bytes"].largest / 2**20), 2) // 2
        advice = "One round has nothing to hide behind; a smaller buffer makes several"
        return _Cause(cause, advice, f"--muon-exchange-buffer-mb {smaller_mb}")
    return _Cause(cause, "Links are busy; bytes on a rank fall with every data-parallel rank")


def _teams(summary: StepSummary, facts: RunFacts) -> _Cause:
    cause = f"ranks that share a matrix send each other {amount(summary['team_bytes'].largest)} a step"
    size = facts.settings["max_team_size"]
    rate = summary.rates["teams"]
    if rate >= 0.5 * max(summary.rates["newton_schulz"], 1.0):
        cause += f" and compute {arithmetic(rate)} meanwhile"
        return _Cause(cause, "This is computing rather than sending; it falls with more ranks")
    advice = "Smaller teams send less and compute more"
    return _Cause(cause, advice, f"--muon-max-team-size {min(size, facts.world_size) // 2 or 1}")


def _param_gather(summary: StepSummary, facts: RunFacts) -> _Cause:
    cause = f"Megatron's all-gather of parameters, {bandwidth(summary.rates['param_gather'])}, hides behind nothing"
    if facts.overlap_param_gather:
        return _Cause(cause, "It overlaps already where it can")
    advice = "It can run in the next forward pass"
    return _Cause(cause, advice, "--overlap-param-gather --overlap-grad-reduce")


def _second_moment(summary: StepSummary, facts: RunFacts) -> _Cause:
    cause = f"variant {facts.settings['variant']} divides by it, with all-reduces over the exchange's ranks"
    return _Cause(cause, "Plain Muon has none", "--muon-variant muon")


def _local(summary: StepSummary, facts: RunFacts) -> _Cause:
    present = [name for name in part_phases("local") if f"{name}_ms" in summary.spreads]
    largest = max(present, key=lambda name: summary[f"{name}_ms"].mean)
    cause = f"element-wise on a rank's slices, {largest} most of all"
    if largest == "momentum" and facts.settings["momentum_dtype"] == "bf16":
        return _Cause(cause, "Stochastic rounding draws random bits", "--muon-momentum-dtype fp32")
    return _Cause(cause, "Bound by memory; slices shrink with every data-parallel rank")


def _metrics(summary: StepSummary, facts: RunFacts) -> _Cause:
    cause = "this step is logged as well as profiled; steps that are not logged do not pay for it"
    return _Cause(cause, "Profile other steps than those of --muon-log-interval to leave it out")


def _other(summary: StepSummary, facts: RunFacts) -> _Cause:
    return _Cause("none of Muon's phases", "Nothing of Muon's would change it")


PARTS: Mapping[str, tuple[str, Callable[[StepSummary, RunFacts], _Cause]]] = MappingProxyType(
    {
        "compute": ("Newton-Schulz", _compute),
        "exchange": ("Waiting for the exchange", _exchange),
        "teams": ("Teams", _teams),
        "param_gather": ("Gathering parameters", _param_gather),
        "second_moment": ("The second moment", _second_moment),
        "metrics": ("Measuring the logged metrics", _metrics),
        "local": ("Momentum, packing and applying", _local),
        "other": ("AdamW's part, casts and launches", _other),
    }
)
"""The parts of a step's time, as in `shown.SHOWN`: key -> (title, rule)."""
