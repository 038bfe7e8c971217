"""What stands out in a run's metrics and losses: rules on numbers, each with a sentence for the report's summary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from megatron_muon.observe.metric_names import by_layer_kind
from megatron_muon.profile.run_files import RunFiles

# Below this share of the update RMS that the settings aim at, an update counts as small.
_SMALL_UPDATE = 0.75
# A kind of layer with so many times the median share of its weights replaced counts as fast.
_FAST = 4.0
# A loss so far above its lowest value counts as risen.
_RISEN = 0.03
_UNEVEN = 1.1


def stands_out(run: RunFiles) -> list[str]:
    """Sentences, the most urgent first; empty if all values are where they should be."""
    return [*_losses(run), *_metrics(run.records)] if run.records else list(_losses(run))


def _losses(run: RunFiles) -> Iterator[str]:
    for title, curve in run.losses.items():
        steps = sorted(curve)
        recent = [curve[step] for step in steps[-max(len(steps) // 20, 1) :]]
        # A mean over the last twentieth, since single batches differ.
        now, lowest = sum(recent) / len(recent), min(steps, key=curve.__getitem__)
        if now > (1 + _RISEN) * curve[lowest] and len(steps) >= 5 and title.startswith("Validation"):
            yield f"{title} has risen from {curve[lowest]:.4g} at step {lowest} to {now:.4g}."


def _metrics(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    last, expected = records[-1], records[-1].get("expected", {})
    run = last["run"]
    if run.get("qk_nonfinite_heads"):
        yield f"{run['qk_nonfinite_heads']:.0f} attention heads had NaN or infinite logits before step {last['step']}."
    if run.get("qk_clipped_heads"):
        yield f"QK-Clip acted on {run['qk_clipped_heads']:.0f} heads before step {last['step']}."
    updates = _means(last, "update_rms")
    aim = expected.get("update_rms")
    if aim:
        small = {kind: value for kind, value in updates.items() if value < _SMALL_UPDATE * aim}
        if small:
            reason = "Their gradients have few directions."
            yield f"Updates below {_SMALL_UPDATE:.0%} of an RMS of {aim:g}: {_listed(small, largest=False)}. {reason}"
    errors = _means(last, "orthogonality_error")
    if expected.get("orthogonality_error"):
        low, high = expected["orthogonality_error"]
        above = {kind: value for kind, value in errors.items() if value > high + 0.01}
        if above:
            yield (
                f"Orthogonality error above the {low:.2g} to {high:.2g} of this coefficient set: {_listed(above)}. "
                "Gradients with a steep spectrum, or too low a precision of Newton-Schulz."
            )
    shares = _means(last, "update_to_weight")
    if len(shares) > 2:
        middle = median(shares.values())
        fast = {kind: value for kind, value in shares.items() if value > _FAST * middle}
        if fast:
            than = f"{_FAST:g} times as fast as the median kind's ({middle:.2g})"
            yield f"Weights replaced more than {than}: {_listed(fast)}."
    if run.get("ns_ms_imbalance", 1.0) > _UNEVEN > run.get("ns_flops_imbalance", 1.0):
        yield (
            f"Newton-Schulz took {run['ns_ms_imbalance']:.2f} of the ranks' mean on the slowest rank although the plan "
            "is level: a slow device, or a busy host."
        )


def _means(record: Mapping[str, Any], metric: str) -> dict[str, float]:
    return {kind: math.fsum(v) / len(v) for kind, v in by_layer_kind(record["matrices"], metric).items()}


def _listed(values: Mapping[str, float], *, largest: bool = True, most: int = 3) -> str:
    worst = sorted(values.items(), key=lambda item: item[1], reverse=largest)
    more = f" and {len(worst) - most} more" if len(worst) > most else ""
    return ", ".join(f"{short_name(kind)} ({value:.2g})" for kind, value in worst[:most]) + more


def short_name(kind: str) -> str:
    """A kind of layer in a word or two, for labels: `self_attention.linear_qkv.weight.q` is `qkv.q`."""
    words = [word for word in kind.split(".") if word not in ("self_attention", "mlp", "weight", "local_experts")]
    return ".".join(word.removeprefix("linear_") for word in words) or kind
