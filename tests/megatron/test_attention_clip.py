"""QK-Clip: its rule against logits computed from the weights, and runs of Megatron whose logits are too large."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon.observe.metric_names import FILE_NAME
from megatron_muon.rule.qk_clip import (
    ClipRule,
    FactorTable,
    HeadRows,
    gammas,
    grouped_rows,
    mla_key_rows,
    mla_query_rows,
    range_of_row,
    scale_rows,
)
from tests.checkpoint_runs import Run, assemble, build, with_config
from tests.distributed import RankError, run_ranks
from tests.models import Layout, initialize, make_chunks, make_config
from tests.observe.test_step_metrics import count_collectives
from tests.training_runs import MUON, launch_ranks

# The rule, on one attention layer in fp64.

TOKENS, COLS = 9, 6


@dataclass(frozen=True)
class Layer:
    """Sizes of an attention layer; `rotary` and `value` are MLA's."""

    heads: int = 4
    groups: int = 4
    width: int = 3
    gated: bool = False
    mla: bool = False
    rotary: int = 2
    value: int = 5

    @property
    def rows(self) -> dict[str, tuple[HeadRows, ...]]:
        if self.mla:
            return {
                "q": mla_query_rows(self.heads, self.width, self.rotary),
                "kv": mla_key_rows(self.heads, self.width, self.value),
            }
        rows = grouped_rows(self.heads, self.groups, self.width, gated=self.gated)
        return {"qkv": rows, "bias": rows}

    def random_weights(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if self.mla:
            return {
                "q": normal(self.heads * (self.width + self.rotary), COLS),
                "kv": normal(self.heads * (self.width + self.value), COLS),
                "rotary_key": normal(self.rotary, COLS),
            }
        per_group = self.heads // self.groups * (2 if self.gated else 1) + 2
        rows = self.groups * per_group * self.width
        return {"qkv": normal(rows, COLS), "bias": normal(rows)}

    def logits(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """Of each head, (tokens, tokens). Also values and gates, which must stay as they are, come at the end."""
        x = torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        if self.mla:
            q = (x @ weights["q"].mT).view(TOKENS, self.heads, -1)
            kv = (x @ weights["kv"].mT).view(TOKENS, self.heads, -1)
            rotary_key = x @ weights["rotary_key"].mT
            out = [
                q[:, h, : self.width] @ kv[:, h, : self.width].mT + q[:, h, self.width :] @ rotary_key.mT
                for h in range(self.heads)
            ]
            return [*out, kv[:, :, self.width :]]
        fused = (x @ weights["qkv"].mT + weights["bias"]).view(TOKENS, self.groups, -1, self.width)
        queries = self.heads // self.groups
        return [
            *(fused[:, h // queries, h % queries] @ fused[:, h // queries, -2].mT for h in range(self.heads)),
            fused[:, :, queries:-2],
            fused[:, :, -1],
        ]


LAYERS = {
    "heads": Layer(),
    "grouped": Layer(heads=6, groups=2),
    "one key": Layer(groups=1),
    "gated": Layer(groups=2, gated=True),
    "MLA": Layer(mla=True),
}


def clipped(layer: Layer, weights: dict[str, Tensor], rule: ClipRule, cuts: list[int]) -> dict[str, Tensor]:
    """The weights after QK-Clip on slices of them, cut at these positions of each."""
    gammas = rule.gammas(torch.stack([x.max() for x in layer.logits(weights)[: layer.heads]]))
    out = {name: weight.clone() for name, weight in weights.items()}
    for name, rows in layer.rows.items():
        flat = out[name].view(-1)
        ends = [min(cut, flat.numel()) for cut in (0, *cuts, flat.numel())]
        factors = torch.cat((rule.factors(rows, gammas), torch.ones(1, dtype=torch.float64)))
        of_row = factors[torch.tensor(range_of_row(rows, len(out[name])))]
        for start, stop in itertools.pairwise(ends):
            scale_rows(flat[start:stop], start, flat.numel() // len(out[name]), of_row)
    return out


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_heads_above_the_threshold_come_down_to_it_and_others_stay(name: str, alpha: float) -> None:
    layer, weights = LAYERS[name], LAYERS[name].random_weights()
    before = layer.logits(weights)
    largest = sorted(x.max().item() for x in before[: layer.heads])
    # One head, all but one, and all: of groups, some heads and every head.
    for threshold in ((largest[-2] + largest[-1]) / 2, (largest[0] + largest[1]) / 2, largest[0] / 2):
        rule = ClipRule(threshold, alpha)
        after = layer.logits(clipped(layer, weights, rule, []))
        for old, new in zip(before[: layer.heads], after[: layer.heads], strict=True):
            if old.max() > threshold:
                # A dozen roundings in fp64.
                assert new.max().item() == pytest.approx(threshold, rel=1e-13)
            else:
                assert torch.equal(old, new)
        for old, new in zip(before[layer.heads :], after[layer.heads :], strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("name", LAYERS)
def test_slices_that_end_within_rows_are_clipped_as_the_whole(name: str) -> None:
    layer, weights = LAYERS[name], LAYERS[name].random_weights()
    rule = ClipRule(1.0, 0.3)
    whole = clipped(layer, weights, rule, [])
    for cuts in ([1, 2, 20, 21, 50], [7], [layer.width * COLS], list(range(1, 200))):
        cut = clipped(layer, weights, rule, cuts)
        assert all(torch.equal(cut[key], whole[key]) for key in whole)


def factors_of(rule: ClipRule, rows: tuple[HeadRows, ...], gammas: list[float]) -> list[tuple[int, int, float]]:
    """Rows that do not stay as they are, with their factors."""
    factors = rule.factors(rows, torch.tensor(gammas, dtype=torch.float64)).tolist()
    return [(row.start, row.stop, factor) for row, factor in zip(rows, factors, strict=True) if factor != 1]


def test_factors_are_the_papers() -> None:
    """Kimi K2's: q^C and k^C by sqrt(gamma), q^R by gamma; without MLA the exponents alpha and 1 - alpha."""
    gammas = [1.0, 0.25]
    rule = ClipRule(100.0, 0.5)
    assert factors_of(rule, mla_query_rows(2, 3, 2), gammas) == [(5, 8, 0.5), (8, 10, 0.25)]
    assert factors_of(rule, mla_key_rows(2, 3, 4), gammas) == [(7, 10, 0.5)]
    rows = grouped_rows(2, 2, 3)
    assert factors_of(ClipRule(100.0, 0.25), rows, gammas) == [
        (9, 12, pytest.approx(0.25**0.25)),
        (12, 15, pytest.approx(0.25**0.75)),
    ]
    # A shared key takes what both of its heads need, the query of the larger logits the rest; nothing grows.
    both = [0.25, 0.0625]
    assert [f for *_, f in factors_of(rule, grouped_rows(2, 1, 3), both)] == [0.5, 0.125, 0.5]
    assert [f for *_, f in factors_of(rule, grouped_rows(2, 1, 3), gammas)] == [0.25]


def test_a_table_of_several_weights_is_that_of_each() -> None:
    """Groups of different sizes, thresholds and alphas in one vector of heads."""
    weights = [(grouped_rows(4, 1, 3), 4, 0.3), (mla_query_rows(3, 2, 2), 3, 0.5), (grouped_rows(6, 2, 1), 6, 0.8)]
    largest = torch.tensor([3.0, 1.0, 2.0, 9.0, 0.5, 7.0, math.nan, 8.0, 1.0, 1.0, 4.0, math.inf, -math.inf])
    firsts = [0, 4, 7]
    table = FactorTable.of([(rows, first, a) for (rows, _, a), first in zip(weights, firsts)], torch.device("cpu"))
    thresholds = torch.tensor([2.0] * 4 + [1.0] * 3 + [5.0] * 6, dtype=torch.float64)
    got = table.factors(gammas(largest, thresholds)).tolist()
    expected = []
    for (rows, heads, alpha), first in zip(weights, firsts):
        rule = ClipRule(thresholds[first].item(), alpha)
        expected += rule.factors(rows, rule.gammas(largest[first : first + heads])).tolist()
    assert got == expected and len({*got}) >= 6


def test_gammas() -> None:
    values = torch.tensor([200.0, 100.0, 100.1, -5.0, 0.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    assert ClipRule(100.0, 0.5).gammas(values).tolist() == [0.5, 1.0, 100 / 100.1, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("threshold", "alpha", "message"),
    [
        (0.0, 0.5, "--qk-clip-threshold: got 0.0, expected a positive number"),
        (-1.0, 0.5, "--qk-clip-threshold: got -1.0"),
        (math.nan, 0.5, "--qk-clip-threshold: got nan"),
        (math.inf, 0.5, "--qk-clip-threshold: got inf"),
        (100.0, -0.1, r"--qk-clip-alpha: got -0.1, expected a number in \[0, 1\]"),
        (100.0, 1.1, "--qk-clip-alpha: got 1.1"),
        (100.0, math.nan, "--qk-clip-alpha: got nan"),
    ],
)
def test_bad_settings(threshold: float, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipRule(threshold, alpha)


# Whole runs.

# Of groups of heads, some are then above it in part and some as a whole.
THRESHOLD, ALPHA = 11.2, 0.5
CLIP = dict(qk_clip=True, qk_clip_threshold=THRESHOLD, qk_clip_alpha=ALPHA)
# Initial weights have logits of a few units: these have 7 to 20.
FACTOR = 2.0
CLIPPED = ("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
STEPS = 2


@dataclass
class Outcome:
    """What a rank saw.

    Attributes:
        plain: What the rank stored after one step without QK-Clip.
        plain_collectives: Of another such step, by name.
        maxima: For each step with it, attention module -> largest logits of the heads in this rank's vector.
        pieces: For each step, what the rank stored after it.
        collectives: For each step, collectives by name.
        metrics: For each step, what would be logged.
        losses: Of each step.
        clipped_only: `maxima` of two steps on one batch that clip, and change nothing else.
        agrees: Whether model parameters were the main parameters after those.
        tp_rank: The rank's.
        shares_groups: Whether the vector has the heads of all tensor-parallel ranks.
    """

    plain: Any = None
    plain_collectives: dict[str, int] = field(default_factory=dict)
    maxima: list[dict[str, list[float]]] = field(default_factory=list)
    pieces: list[Any] = field(default_factory=list)
    collectives: list[dict[str, int]] = field(default_factory=list)
    metrics: list[tuple[dict[str, float], dict[str, float]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    clipped_only: list[dict[str, list[float]]] = field(default_factory=list)
    agrees: bool = False
    tp_rank: int = 0
    shares_groups: bool = False


def large_logits(model: str, layout: Layout, **settings: Any) -> Run:
    """A run whose query and key weights are so large that some heads' logits are above the threshold."""
    run = build(model, layout, **settings)
    with torch.no_grad():
        for place in run.places:
            if any(part in place.name for part in CLIPPED):
                place.parameter.mul_(FACTOR)
    for part in run.optimizer.chained_optimizers:
        part.reload_model_params()
    return run


def watch(run: Run, maxima: list[dict[str, list[float]]]) -> None:
    """Makes QK-Clip tell what it decides upon: written into the last of `maxima`."""
    clip = run.optimizer.qk_clip
    original = clip._decide

    def decide(flat: Tensor) -> None:
        parts = torch.split(flat, clip._sizes)
        maxima[-1].update({attention.name: part.tolist() for attention, part in zip(clip._attentions, parts)})
        original(flat)

    clip._decide = decide


def agree(run: Run) -> bool:
    """Whether what the optimizers store is what the model computes with, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, run.pieces())
    return run.differences(assemble(gathered)) == []


def clip_only(run: Run) -> list[dict[str, list[float]]]:
    """Largest logits of two steps with learning rates of zero, on one batch."""
    maxima: list[dict[str, list[float]]] = []
    watch(run, maxima)
    for _ in range(2):
        maxima.append({})
        run.step = 0
        run.train(1)
    return maxima


def session(rank: int, world_size: int, model: str, layout: Layout) -> Outcome:
    """A step without QK-Clip, and from the same weights some with it."""
    from megatron.core import parallel_state as ps

    outcome = Outcome()
    counts = count_collectives()
    run = large_logits(model, layout)
    assert run.optimizer.qk_clip is None
    run.train(1)
    outcome.plain = run.pieces()
    # A first step has collectives of its own.
    before = dict(counts)
    run.train(1)
    outcome.plain_collectives = {name: counts[name] - before[name] for name in counts}

    run = large_logits(model, with_config(layout, **CLIP), initialized=True)
    clip = run.optimizer.qk_clip
    outcome.tp_rank, outcome.shares_groups = ps.get_tensor_model_parallel_rank(), clip._shares_groups
    watch(run, outcome.maxima)
    for _ in range(STEPS):
        outcome.maxima.append({})
        before = dict(counts)
        outcome.losses += run.train(1)
        outcome.collectives.append({name: counts[name] - before[name] for name in counts})
        outcome.pieces.append(run.pieces())
        outcome.metrics.append((clip.maxima(), clip.counts()))

    settings = dict(initialized=True, lr=0.0, weight_decay=0.0)
    run = large_logits(model, with_config(layout, **CLIP), **settings)
    outcome.clipped_only, outcome.agrees = clip_only(run), agree(run)
    return outcome


def maxima_of(outcomes: list[Outcome], step: int) -> dict[str, list[float]]:
    """Attention module -> largest logit of each head of the model."""
    by_tp_rank: dict[int, dict[str, list[float]]] = {}
    for outcome in outcomes:
        of_rank = by_tp_rank.setdefault(0 if outcome.shares_groups else outcome.tp_rank, {})
        for name, values in outcome.maxima[step].items():
            # All data-parallel ranks have the same, and with shared groups all ranks.
            assert of_rank.setdefault(name, values) == values
    out: dict[str, list[float]] = {}
    for _, of_rank in sorted(by_tp_rank.items()):
        for name, values in of_rank.items():
            out[name] = out.get(name, []) + values
    return out


def by_hand(name: str, whole: Tensor, maxima: dict[str, list[float]], config: Any) -> Tensor:
    """A whole parameter after QK-Clip, written down without the product's code."""
    attention = name.rsplit(".", 2)[0]
    if attention not in maxima or not any(part in name for part in CLIPPED):
        return whole
    gamma = [min(1.0, THRESHOLD / x) if x > 0 else 1.0 for x in maxima[attention]]
    factors = torch.ones(len(whole), dtype=torch.float64)
    row, heads = 0, config.num_attention_heads

    def take(rows: int, factor: float) -> None:
        nonlocal row
        factors[row : row + rows] = factor
        row += rows

    if "linear_qkv" in name:
        queries = heads // config.num_query_groups
        for group in range(config.num_query_groups):
            own = gamma[group * queries : (group + 1) * queries]
            key = max(own) ** (1 - ALPHA)
            for g in own:
                take(config.kv_channels, g / key)
            take(config.kv_channels, key)
            take(config.kv_channels, 1.0)
    for g in gamma if "linear_q_" in name else ():
        take(config.qk_head_dim, g / g ** (1 - ALPHA))
        take(config.qk_pos_emb_head_dim, g)
    for g in gamma if "linear_kv_up_proj" in name else ():
        take(config.qk_head_dim, g ** (1 - ALPHA))
        take(config.v_head_dim, 1.0)
    assert row == len(whole)
    return whole * factors.float().view(-1, *(1,) * (whole.dim() - 1))


RUNS: dict[str, tuple[str, Layout]] = {
    "dense": ("dense", Layout(1)),
    "dense, dp2": ("dense", Layout(2)),
    "dense, tp2": ("dense", Layout(2, tp=2)),
    "dense, tp2 dp2": ("dense", Layout(4, tp=2, sequence_parallel=True)),
    "dense, cp2": ("dense", Layout(2, cp=2)),
    "dense, pp2": ("dense", Layout(2, pp=2)),
    "dense, instances": ("dense", Layout(2, instances=2)),
    # Two ranks to a query group.
    "dense, tp4": ("dense", Layout(4, tp=4)),
    "mtp": ("dense", Layout(1, config=dict(mtp_num_layers=1))),
    "mtp, dp2": ("dense", Layout(2, config=dict(mtp_num_layers=1))),
    "mla": ("mla", Layout(1)),
    "mla, tp2 dp2": ("mla", Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True)),
}
WIDER = ("dense, cp2", "dense, pp2", "dense, instances", "mtp, dp2")


@functools.cache
def outcomes_of(name: str) -> list[Outcome]:
    """Of a session, run once."""
    model, layout = RUNS[name]
    return run_ranks(session, layout.world_size, model, layout)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in WIDER else name for name in RUNS]
)
def test_a_step_with_clipping_is_one_without_and_then_clipping(name: str) -> None:
    model, layout = RUNS[name]
    outcomes = outcomes_of(name)
    config = make_config(model, Layout(1, config=layout.config), torch.float32)
    maxima = maxima_of(outcomes, 0)
    layers = config.num_layers + (config.mtp_num_layers or 0)
    assert len(maxima) == layers and all(len(values) == config.num_attention_heads for values in maxima.values())
    above = [x > THRESHOLD for values in maxima.values() for x in values]
    # With context parallelism the tests' batch is twice as long: all heads have large logits.
    assert any(above) and (layout.cp > 1 or not all(above))
    plain, clipped = assemble([o.plain for o in outcomes]), assemble([o.pieces[0] for o in outcomes])
    changed = 0
    for (parameter, state), value in plain.items():
        expected = by_hand(parameter, value, maxima, config) if state == "param" else value
        assert torch.equal(clipped[parameter, state], expected), (parameter, state)
        changed += not torch.equal(expected, value)
    # Of each layer, queries' and keys' weights, or their fused weight and its bias, which is AdamW's.
    assert changed == 2 * layers


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive) if name in WIDER else name
        for name, (_, layout) in RUNS.items()
        if layout.world_size > 1 and layout.cp == 1
    ],
)
def test_weights_do_not_depend_on_the_layout(name: str) -> None:
    outcomes, (alone,) = outcomes_of(name), outcomes_of(name.split(",")[0])
    for step in range(STEPS):
        for attention, values in maxima_of(outcomes, step).items():
            assert values == pytest.approx(alone.maxima[step][attention], rel=1e-4)
        whole = assemble([o.pieces[step] for o in outcomes])
        for key, value in assemble([alone.pieces[step]]).items():
            if key[1] == "param":
                # Other layouts add gradients up in another order. Newton-Schulz multiplies their roundings, 6e-8 each,
                # by up to 1e3 where singular values are small; an update is 2e-3.
                assert torch.allclose(whole[key], value, rtol=0, atol=1e-4), (step, key)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(alone.losses, abs=1e-4)


@pytest.mark.parametrize("name", ["dense, tp2 dp2", "dense, tp4", "mla"])
def test_one_collective_a_step(name: str) -> None:
    for outcome in outcomes_of(name):
        more = {name: n - outcome.plain_collectives[name] for name, n in outcome.collectives[-1].items()}
        assert {name: n for name, n in more.items() if n} == {"all_reduce": 1}


@pytest.mark.parametrize("name", ["dense, tp2 dp2", "dense, tp4", "mla, tp2 dp2"])
def test_metrics(name: str) -> None:
    outcomes = outcomes_of(name)
    for step in range(STEPS):
        maxima = maxima_of(outcomes, step)
        expected = {f"max_attention_logit/{name}": max(values) for name, values in maxima.items()}
        expected["max_attention_logit"] = max(expected.values())
        # What a log makes of the ranks: the largest of these, and the sum of the counts.
        logged = {name: max(o.metrics[step][0][name] for o in outcomes) for name in expected}
        assert logged == expected
        counts = {n: sum(o.metrics[step][1][n] for o in outcomes) for n in outcomes[0].metrics[step][1]}
        above = sum(x > THRESHOLD for values in maxima.values() for x in values)
        assert counts == {"qk_clipped_heads": above, "qk_nonfinite_heads": 0}


FIRST = "decoder.layers.0.self_attention"


def check_that_logits_came_back(outcomes: list[Outcome], relative: float) -> None:
    seen = []
    # Deeper layers see what clipped ones make of the batch; later pipeline stages have no first layer.
    for before, after in (outcome.clipped_only for outcome in outcomes):
        for old, new in zip(before.get(FIRST, []), after.get(FIRST, []), strict=True):
            assert new == pytest.approx(min(old, THRESHOLD), rel=relative)
            seen.append(old)
    assert max(seen) > 1.1 * THRESHOLD
    assert all(outcome.agrees for outcome in outcomes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in WIDER else name for name in RUNS]
)
def test_logits_come_back_to_the_threshold(name: str) -> None:
    # Weights, queries and keys of a logit are each rounded by 6e-8.
    check_that_logits_came_back(outcomes_of(name), 1e-5)


def in_bf16(rank: int, world_size: int, name: str) -> Outcome:
    model, layout = RUNS[name]
    settings = dict(dtype=torch.bfloat16, lr=0.0, weight_decay=0.0)
    run = large_logits(model, with_config(layout, **CLIP), **settings)
    return Outcome(clipped_only=clip_only(run), agrees=agree(run))


def test_bf16_models_get_what_their_main_parameters_are_clipped_to() -> None:
    name = "mla, tp2 dp2"
    # Each is rounded by 2^-9.
    check_that_logits_came_back(run_ranks(in_bf16, RUNS[name][1].world_size, name), 4 * 2**-9)


class ForbidsReading(TorchDispatchMode):
    """Fails where the host would wait for a number of the device; on a CPU nothing else shows it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    run_ranks(_collect_and_apply_without_reading, 1)


def _collect_and_apply_without_reading(rank: int, world_size: int) -> None:
    run = large_logits("mla", with_config(Layout(1), **CLIP))
    clip = run.optimizer.qk_clip
    run.train(1)  # static tensors are made here
    calls: list[str] = []

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any) -> None:
            with ForbidsReading(), mock.patch.object(Tensor, "tolist", side_effect=AssertionError("tolist")):
                function(*args)
            calls.append(name)

        return call

    clip.collect = watched("collect", clip.collect)
    for part in run.optimizer.chained_optimizers:
        hooks = part.optimizer._optimizer_step_post_hooks
        hooks.update({key: watched("apply", hook) for key, hook in hooks.items()})
    run.train(1)
    assert calls.count("collect") == 1 and calls.count("apply") >= 2
    assert clip.counts()["qk_clipped_heads"] > 0
    with pytest.raises(AssertionError), ForbidsReading():
        clip.largest.item()


def corners(rank: int, world_size: int) -> dict[str, Any]:
    """Evaluations, skipped steps and broken logits, on two data-parallel ranks."""
    run = large_logits("dense", with_config(Layout(2), **CLIP))
    clip, out = run.optimizer.qk_clip, {}
    decided: list[dict[str, list[float]]] = [{}]
    watch(run, decided)
    cores = [attention.core for attention in clip._attentions]

    def recorded() -> list[Any]:
        return [core.current_max_attn_logits for core in cores]

    # As an evaluation leaves it.
    cores[0].current_max_attn_logits = torch.full((4,), 1e9)
    run.train(1)
    out["after an evaluation"] = max(decided[0][FIRST])
    out["largest"] = clip.largest.item(), max(x for values in decided[0].values() for x in values)
    out["forgotten"] = recorded()
    clip.counts()

    for how in ("overflow", "norm"):
        before = run.pieces()
        original = run.optimizer.prepare_grads
        if how == "overflow":
            run.optimizer.prepare_grads = lambda: True
        else:
            run.optimizer.chained_optimizers[0].config.grad_norm_skip_threshold = 1e-9
        decided.append({})
        with pytest.raises(AssertionError):
            run.train(1)  # asserts that the step was successful
        run.optimizer.prepare_grads = original
        run.optimizer.chained_optimizers[0].config.grad_norm_skip_threshold = math.inf
        same = all(torch.equal(a[4], b[4]) for a, b in zip(before, run.pieces(), strict=True))
        out[how] = same, decided[-1], clip.largest.item(), recorded(), clip.counts()["qk_clipped_heads"]

    original = clip._recorded

    def broken() -> Tensor:
        flat = original()
        if rank == 1:
            # Two heads of the first layer; NaN at its other rank only.
            flat[0], flat[1] = math.nan, math.inf
        return flat

    clip._recorded = broken
    decided.append({})
    before = {piece[0]: piece for piece in run.pieces() if piece[1] == "param"}
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
    run.train(1)
    after = {piece[0]: piece for piece in run.pieces() if piece[1] == "param"}
    out["broken"] = (
        decided[-1],
        {name: (piece[3], before[name][4], piece[4]) for name, piece in after.items() if "linear_qkv.weight" in name},
    )
    out["broken counts"] = clip.counts()
    out["agree"] = agree(run)
    return out


def test_evaluations_skipped_steps_and_broken_logits() -> None:
    results = run_ranks(corners, 2)
    for out in results:
        assert THRESHOLD < out["after an evaluation"] < 1e3
        assert out["largest"][0] == out["largest"][1]
        assert out["forgotten"] == [None, None]
        for how in ("overflow", "norm"):
            assert out[how] == (True, {}, 0.0, [None, None], 0)
        maxima, _ = out["broken"]
        assert maxima == results[0]["broken"][0]
        assert maxima[FIRST][:2] == [math.inf, math.inf] and all(map(math.isfinite, maxima[FIRST][2:]))
        assert out["agree"]
    # The first group's heads are the broken ones: its rows stay. Other heads are clipped as ever.
    config = make_config("dense", Layout(1), torch.float32)
    finite = {name: [x if math.isfinite(x) else 0.0 for x in v] for name, v in results[0]["broken"][0].items()}
    for name in results[0]["broken"][1].keys() | results[1]["broken"][1].keys():
        shape = (64, 32)
        before, after = torch.full((2, *shape), math.nan)
        for out in results:
            if name in out["broken"][1]:
                indices, old, new = out["broken"][1][name]
                before.view(-1)[indices], after.view(-1)[indices] = old, new
        assert torch.equal(after, by_hand(name, before, finite, config)), name
    above = sum(x > THRESHOLD for values in finite.values() for x in values)
    counts = [out["broken counts"] for out in results]
    assert counts == [
        {"qk_clipped_heads": above, "qk_nonfinite_heads": 2},
        {"qk_clipped_heads": 0, "qk_nonfinite_heads": 0},
    ]


def unrecorded(rank: int, world_size: int, what: str) -> None:
    run = build("dense", with_config(Layout(1), **CLIP))
    for attention in run.optimizer.qk_clip._attentions:
        attention.core.scale_mask_softmax._forward_pre_hooks.clear()
        if what == "heads":
            attention.core.scale_mask_softmax.register_forward_pre_hook(
                lambda *_, core=attention.core: setattr(core, "current_max_attn_logits", torch.ones(3))
            )
    run.train(1)


@pytest.mark.parametrize(
    ("what", "message"),
    [("none", "got no attention logits in this step"), ("heads", "got logits of 3 heads, expected 4")],
)
def test_logits_that_are_not_there(what: str, message: str) -> None:
    with pytest.raises(RankError, match=rf"RuntimeError: decoder.layers.0.self_attention: {message}"):
        run_ranks(unrecorded, 1, what)


def refused(rank: int, world_size: int, what: str) -> None:
    """The second pipeline stage's last layer cannot be clipped."""
    from megatron.core import parallel_state as ps
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.attention import Attention

    from megatron_muon.megatron.entry.agreement import all_or_none
    from megatron_muon.megatron.model.identity import whole_model_names
    from megatron_muon.megatron.optimizer.attention_clip import QKClip, is_clip_needed

    layout = Layout(2, pp=2, config=dict(CLIP))
    initialize(layout)
    chunks = make_chunks("dense", layout, torch.float32)
    attention: Any = next(m for m in chunks[0].modules() if isinstance(m, Attention))
    if what == "frozen":
        for parameter in attention.linear_qkv.parameters():
            parameter.requires_grad_(False)
    elif rank == 1:
        if what == "normalized":
            attention.k_layernorm = nn.LayerNorm(8)
        elif what == "graph":
            attention.config.cuda_graph_impl = "local"
        elif what == "core":
            del attention.core_attention.current_max_attn_logits
        elif what == "class":
            attention.__class__ = type("DifferentAttention", (Attention,), {"__abstractmethods__": frozenset()})
        else:
            attention.config.qk_clip_threshold = -2.0
    groups = ps.get_data_parallel_group(with_context_parallel=True), ProcessGroupCollection.use_mpu_process_groups()

    def make() -> tuple[bool, bool, bool]:
        clip = QKClip(chunks, whole_model_names(chunks), *groups)
        return clip.asked, clip.clips, clip.records

    is_clip_needed(all_or_none(make))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("normalized", "ValueError", "decoder.layers.1.self_attention: got --qk-clip with queries and keys that are"),
        ("graph", "NotImplementedError", "--cuda-graph-impl: got 'local', expected 'none'"),
        ("core", "NotImplementedError", "decoder.layers.1.self_attention: got core attention CoreAttention, which"),
        ("class", "NotImplementedError", "decoder.layers.1.self_attention: got DifferentAttention, expected Self"),
        ("threshold", "ValueError", "--qk-clip-threshold: got -2.0"),
        ("frozen", "ValueError", "--qk-clip: got a model without attention whose query and key weights are trained"),
    ],
)
def test_what_cannot_be_clipped_is_refused_on_every_rank(what: str, error: str, message: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(refused, 2, what)
    told = {rank: (name, text[: len(message)]) for rank, (name, text, _) in caught.value.errors.items()}
    assert told == dict.fromkeys((0, 1), (error, message))


def test_megatrons_training_loop_clips_once_and_logs(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--qk-clip --qk-clip-threshold 0.02 --qk-clip-alpha 0.4 --log-max-attention-logit --muon-log-interval 1"
    launch_ranks(*MUON, *flags.split(), "--tensorboard-dir", str(tmp_path))
    lines = (tmp_path / FILE_NAME).read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line)["run"] for line in lines]
    assert len(runs) == 4
    for run in runs:
        assert run["max_attention_logit"] > 0.02 and run["qk_clipped_heads"] > 0 and run["qk_nonfinite_heads"] == 0
        layers = [run[f"max_attention_logit/decoder.layers.{layer}.self_attention"] for layer in (0, 1)]
        assert max(layers) == run["max_attention_logit"]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("max_attention_logit")
    # Megatron writes it, in fp32, with what its own clip_qk would have returned.
    assert [e.value for e in events] == pytest.approx([run["max_attention_logit"] for run in runs], rel=1e-6)
