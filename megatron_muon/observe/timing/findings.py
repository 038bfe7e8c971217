"""What slows a step down, and the flag that would help: rules on the numbers of profiled steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_muon.observe.timing.peaks import RunFacts
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


@dataclass(frozen=True)
class Finding:
    """A part of the step that takes time, why, and what would help.

    Attributes:
        part: Part of the step, a key of `PARTS`.
        share: Mean share of the step's time.
        cause: Explanation by the numbers.
        advice: What would help.
        flag: Flag to set, with its value; empty where there is none.
    """

    part: str
    share: float
    cause: str
    advice: str
    flag: str = ""

    def __str__(self) -> str:
        remedy = f"{self.advice}: {self.flag}" if self.flag else self.advice
        return f"{PARTS[self.part][0]}, {self.share:.0%} of the step: {self.cause}. {remedy}."


PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "compute": ("Newton-Schulz", ("newton_schulz",)),
        "exchange": ("Waiting for the exchange", ("wait",)),
        "teams": ("Teams", ("teams",)),
        "param_gather": ("Gathering parameters", ("param_gather",)),
        "second_moment": ("The second moment", ("second_moment",)),
        "metrics": ("Measuring the logged metrics", ("metrics",)),
        "local": ("Momentum, packing and applying", ("momentum", "pack", "unpack", "apply")),
        "other": ("AdamW's part, casts and launches", ("other",)),
    }
)
"""The parts of a step's time: key -> (title, phases)."""


def find(summary: StepSummary, facts: RunFacts) -> list[Finding]:
    """The bottleneck, then other parts that take at least a tenth of the step, largest first.

    Args:
        summary: Median of a run's profiled steps.
        facts: Facts about the run.

    Returns:
        At least one.
    """
    shares = {part: summary.share(*phases) for part, (_, phases) in PARTS.items()}
    order = sorted(shares, key=lambda part: -shares[part])
    named = [part for part in order if shares[part] >= WORTH_NAMING] or order[:1]
    return [_RULES[part](summary, facts, shares[part]) for part in named]


def _compute(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    rate, peak = summary.ns_flops_per_s, facts.flops.per_s
    cause = f"{arithmetic(rate)} a rank, {rate / peak:.0%} of {arithmetic(peak)} ({facts.flops.source})"
    settings, on_gpu = facts.settings, facts.device_type == "cuda"
    if on_gpu and settings["ns_dtype"] == "fp32":
        return Finding("compute", share, cause, "bf16 products are many times faster", "--muon-ns-dtype bf16")
    if not settings["batched"]:
        return Finding("compute", share, cause, "Matrices of equal shape can share products", "--muon-batched")
    if settings["ns_steps"] > 5:
        advice = f"{settings['ns_steps']} steps; Moonlight takes 5"
        return Finding("compute", share, cause, advice, "--muon-ns-steps 5 --muon-coefficients keller")
    if (uneven := _uneven(summary, facts, "compute", share)) is not None:
        return uneven
    if on_gpu and settings["ns_backend"] == "torch":
        advice = "Symmetric kernels do half of the products' work"
        return Finding("compute", share, cause, advice, "--muon-ns-backend emerging --muon-max-team-size 1")
    return Finding("compute", share, cause, "Its work falls with every data-parallel rank that is added")


def _uneven(summary: StepSummary, facts: RunFacts, part: str, share: float) -> Finding | None:
    """Newton-Schulz of the slowest rank, if it is what others wait for."""
    time, flops = summary.ns_ms, summary.ns_flops
    if time.imbalance < UNEVEN:
        return None
    cause = f"rank {time.rank} takes {time.imbalance:.2f} of the ranks' mean for Newton-Schulz"
    if flops.imbalance < UNEVEN:
        advice = "The plan gives it no more work than others: look at its clocks and neighbours (profile links)"
        return Finding(part, share, cause, advice)
    cause += f", and the plan gives rank {flops.rank} {flops.imbalance:.2f} of their mean FLOPs"
    if facts.settings["max_team_size"] < facts.world_size:
        advice = "More ranks may share a matrix"
        return Finding(part, share, cause, advice, f"--muon-max-team-size {facts.world_size}")
    return Finding(
        part, share, cause, "Its matrices do not divide further; other layouts: python -m megatron_muon plan"
    )


def _exchange(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    # What the slowest rank has beyond the mean, the others spend waiting for its scatter.
    lead_ms = summary.ns_ms.largest - summary.ns_ms.mean
    if lead_ms >= 0.5 * summary.busy_ms["wait"].mean:
        uneven = _uneven(summary, facts, "exchange", share)
        if uneven is not None:
            return uneven
    known = facts.link
    wire = min(summary.wires.values(), key=lambda wire: wire.bytes_per_s or math.inf)
    cause = f"{summary.hidden_share or 0.0:.0%} of the exchange is hidden; {bandwidth(wire.bytes_per_s)}, "
    cause += f"{wire.bytes_per_s / known.per_s:.0%} of {bandwidth(known.per_s)} ({known.source})"
    settings, buffer_mb = facts.settings, facts.settings["exchange_buffer_mb"]
    latency_s = REACHED["cuda" if facts.device_type == "cuda" else "cpu"].latency_s
    if wire.message_bytes < latency_s * known.per_s:
        cause += f", since messages of {amount(wire.message_bytes)} take as long as empty ones"
        if facts.rounds > ENOUGH_ROUNDS:
            advice = f"A larger buffer makes fewer rounds than {facts.rounds}"
            return Finding("exchange", share, cause, advice, f"--muon-exchange-buffer-mb {2 * buffer_mb}")
        return Finding("exchange", share, cause, "The matrices are small for so many ranks")
    if settings["exchange_dtype"] == "fp32":
        return Finding("exchange", share, cause, "bf16 halves the bytes", "--muon-exchange-dtype bf16")
    if wire.bytes_per_s < SLOW_LINK * known.per_s:
        return Finding("exchange", share, cause, "Links or neighbours are slow: python -m megatron_muon.profile links")
    if facts.rounds == 1:
        smaller_mb = max(round(summary.sent_bytes.largest / 2**20), 2) // 2
        advice = "One round has nothing to hide behind; a smaller buffer makes several"
        return Finding("exchange", share, cause, advice, f"--muon-exchange-buffer-mb {smaller_mb}")
    return Finding("exchange", share, cause, "Links are busy; bytes on a rank fall with every data-parallel rank")


def _teams(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    cause = f"ranks that share a matrix send each other {amount(summary.team_bytes.largest)} a step"
    size = facts.settings["max_team_size"]
    if summary.team_flops_per_s >= 0.5 * max(summary.ns_flops_per_s, 1.0):
        cause += f" and compute {arithmetic(summary.team_flops_per_s)} meanwhile"
        return Finding("teams", share, cause, "This is Newton-Schulz more than talk; it falls with more ranks")
    advice = "Smaller teams talk less and compute more"
    return Finding("teams", share, cause, advice, f"--muon-max-team-size {min(size, facts.world_size) // 2 or 1}")


def _param_gather(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    cause = f"Megatron's all-gather of parameters, {bandwidth(summary.param_gather_bytes_per_s)}, hides behind nothing"
    if facts.overlap_param_gather:
        return Finding("param_gather", share, cause, "It overlaps already where it can")
    advice = "It can run in the next forward pass"
    return Finding("param_gather", share, cause, advice, "--overlap-param-gather --overlap-grad-reduce")


def _second_moment(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    cause = f"variant {facts.settings['variant']} divides by it, with all-reduces over the exchange's ranks"
    return Finding("second_moment", share, cause, "Plain Muon has none", "--muon-variant muon")


def _local(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    names = PARTS["local"][1]
    largest = max(names, key=lambda name: summary.busy_ms[name].mean if name in summary.busy_ms else 0.0)
    cause = f"element-wise on a rank's slices, {largest} most of all"
    if largest == "momentum" and facts.settings["momentum_dtype"] == "bf16":
        return Finding("local", share, cause, "Stochastic rounding draws random bits", "--muon-momentum-dtype fp32")
    return Finding("local", share, cause, "Bound by memory; slices shrink with every data-parallel rank")


def _metrics(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    cause = "this step is logged as well as profiled; steps that are not logged do not pay for it"
    return Finding("metrics", share, cause, "Profile other steps than those of --muon-log-interval to leave it out")


def _other(summary: StepSummary, facts: RunFacts, share: float) -> Finding:
    return Finding("other", share, "none of Muon's phases", "Nothing of Muon's would change it")


_RULES: Mapping[str, Callable[[StepSummary, RunFacts, float], Finding]] = MappingProxyType(
    {
        "compute": _compute,
        "exchange": _exchange,
        "teams": _teams,
        "param_gather": _param_gather,
        "second_moment": _second_moment,
        "metrics": _metrics,
        "local": _local,
        "other": _other,
    }
)
