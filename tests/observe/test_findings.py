"""What a step's numbers are said to mean: one test for each rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_muon.observe.timing.findings import PARTS, Finding, find
from megatron_muon.observe.timing.peaks import RunFacts
from megatron_muon.observe.timing.steps import Spread, StepSummary
from tests.profiles import facts

WALL_MS = 100.0


def step(
    *,
    ns_largest: float = 0.0,
    flops_largest: float = 1.0,
    ns_rate: float = 300e12,
    link: float = 38e9,
    message_bytes: float = 100e6,
    team_rate: float = 0.0,
    **means: float,
) -> StepSummary:
    """A step of 100 ms on two ranks.

    Args:
        ns_largest: Milliseconds of rank 1's Newton-Schulz, if it has more than the mean.
        flops_largest: FLOPs of rank 1's over the mean.
        ns_rate: FLOPs per second.
        link: Bytes per second of the gather.
        message_bytes: Of a collective.
        team_rate: FLOPs per second in teams.
        **means: Phase -> milliseconds; the rest of the step is `other`.
    """
    ns = means.get("newton_schulz", 0.0)
    other = WALL_MS - sum(means.values())
    return StepSummary(
        step=10,
        steps=5,
        ranks=2,
        spreads={
            "wall_ms": Spread(WALL_MS, WALL_MS, 0),
            **{f"{name}_ms": Spread(ms, ms, 0) for name, ms in {**means, "other": other}.items()},
            "ns_ms": Spread(ns, max(ns_largest, ns), 1),
            "ns_flops": Spread(1e12, flops_largest * 1e12, 1),
            "sent_bytes": Spread(8 * message_bytes, 8 * message_bytes, 0),
            "team_bytes": Spread(3 * 2**20, 3 * 2**20, 0),
        },
        rates={
            "newton_schulz": ns_rate,
            "teams": team_rate,
            "param_gather": 30e9,
            "gather": link,
            "scatter": 2 * link,
        },
        message_bytes={"gather": message_bytes, "scatter": message_bytes},
        hidden_share=0.25,
    )


SYRK = dict(ns_backend="emerging", max_team_size=1)
# Numbers and settings -> the part that is named first, the flag, and words of cause or advice.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    "fp32 products": (dict(newton_schulz=70), dict(ns_dtype="fp32"), "compute", "--muon-ns-dtype bf16", "bf16"),
    "not stacked": (dict(newton_schulz=70), dict(batched=False), "compute", "--muon-batched", "equal shape"),
    "many steps": (
        dict(newton_schulz=70),
        dict(ns_steps=10, coefficients="deepseek_v4"),
        "compute",
        "--muon-ns-steps 5 --muon-coefficients keller",
        "10 steps",
    ),
    "plain products": (
        dict(newton_schulz=70),
        {},
        "compute",
        "--muon-ns-backend emerging --muon-max-team-size 1",
        "300 TFLOP/s a rank, 30% of 989 TFLOP/s",
    ),
    "nothing to gain": (dict(newton_schulz=70), SYRK, "compute", "", "every data-parallel rank"),
    "no kernels on a CPU": (dict(newton_schulz=70), dict(device_type="cpu"), "compute", "", "every data-parallel rank"),
    "uneven plan": (
        dict(newton_schulz=60, ns_largest=90, flops_largest=1.5),
        dict(max_team_size=1, world_size=8),
        "compute",
        "--muon-max-team-size 8",
        "rank 1 takes 1.50 of the ranks' mean",
    ),
    "uneven and shared already": (
        dict(newton_schulz=60, ns_largest=90, flops_largest=1.5),
        dict(world_size=8),
        "compute",
        "",
        "do not divide further",
    ),
    "slow rank": (dict(newton_schulz=60, ns_largest=90), {}, "compute", "", "look at its clocks"),
    "waiting for a slow rank": (dict(wait=50, newton_schulz=30, ns_largest=60), {}, "exchange", "", "its clocks"),
    "waiting for the plan": (
        dict(wait=50, newton_schulz=30, ns_largest=60, flops_largest=2.0),
        dict(max_team_size=1, world_size=8),
        "exchange",
        "--muon-max-team-size 8",
        "2.00 of their mean FLOPs",
    ),
    "small messages in many rounds": (
        dict(wait=50, message_bytes=1e5, link=1e9),
        dict(rounds=9),
        "exchange",
        "--muon-exchange-buffer-mb 2048",
        "messages of 97.7 KiB take as long as empty ones",
    ),
    "small messages": (dict(wait=50, message_bytes=1e5, link=1e9), {}, "exchange", "", "small for so many ranks"),
    "fp32 on the wire": (
        dict(wait=50),
        dict(exchange_dtype="fp32"),
        "exchange",
        "--muon-exchange-dtype bf16",
        "25% of the exchange is hidden; 38 GB/s, 95% of 40 GB/s (measured links)",
    ),
    "slow links": (dict(wait=50, link=5e9), {}, "exchange", "", "python -m megatron_muon.profile links"),
    "one round": (dict(wait=50), dict(rounds=1), "exchange", "--muon-exchange-buffer-mb 381", "nothing to hide behind"),
    "busy links": (dict(wait=50), {}, "exchange", "", "Links are busy"),
    "teams that talk": (
        dict(teams=50, team_rate=10e12),
        dict(world_size=32),
        "teams",
        "--muon-max-team-size 16",
        "send each other 3 MiB a step",
    ),
    "teams that compute": (dict(teams=50, team_rate=200e12), dict(world_size=32), "teams", "", "rather than sending"),
    "param gather": (
        dict(param_gather=50),
        {},
        "param_gather",
        "--overlap-param-gather --overlap-grad-reduce",
        "30 GB/s, hides behind nothing",
    ),
    "second moment": (
        dict(second_moment=50),
        dict(variant="normuon"),
        "second_moment",
        "--muon-variant muon",
        "variant normuon",
    ),
    "random bits": (
        dict(momentum=50, apply=10),
        dict(momentum_dtype="bf16"),
        "local",
        "--muon-momentum-dtype fp32",
        "momentum most of all",
    ),
    "memory": (dict(momentum=20, apply=40), {}, "local", "", "apply most of all"),
    "not Muon's": (dict(newton_schulz=5), {}, "other", "", "none of Muon's phases"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bottleneck_and_its_flag(name: str) -> None:
    numbers, settings, part, flag, words = CASES[name]
    found = find(step(**numbers), facts(**settings))
    assert (found[0].part, found[0].flag) == (part, flag)
    assert words in str(found[0])
    shares = [finding.share for finding in found]
    assert shares == sorted(shares, reverse=True)
    assert all(share >= 0.1 for share in shares[1:])


def test_flags_exist() -> None:
    """Every flag that a rule names is Muon's or Megatron's, and what it gives is accepted."""
    import argparse

    from megatron_muon.megatron.entry.arguments import add_arguments, config_from_args

    for numbers, settings, _, flag, _ in CASES.values():
        words = find(step(**numbers), facts(**settings))[0].flag.split()
        assert words == flag.split()
        if words and words[0].startswith("--muon"):
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            config_from_args(parser.parse_args(words))


def test_a_gather_that_overlaps_needs_no_flag() -> None:
    overlapping: RunFacts = replace(facts(), overlap_param_gather=True)
    assert find(step(param_gather=50), overlapping)[0].flag == ""


def test_small_parts_are_not_named() -> None:
    found = find(step(newton_schulz=70, wait=15, momentum=5), facts())
    assert [finding.part for finding in found] == ["compute", "exchange", "other"]
    assert "Newton-Schulz, 70% of the step: " in str(found[0])
    assert isinstance(found[0], Finding) and set(PARTS) >= {finding.part for finding in found}
