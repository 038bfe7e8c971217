"""The registry of splits: every row's update is the reference's on unfused matrices, and bad rows are refused."""

from __future__ import annotations

import io
import itertools
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout as PlannedLayout
from megatron_muon.estimate.stages import stage_specs
from megatron_muon.matrices.fused import (
    WHOLE,
    Cut,
    FusedQkv,
    GatedMlp,
    LatentDown,
    Section,
    Split,
    parts_of,
    pattern,
    spec_from_split,
)
from megatron_muon.matrices.user_rows import load_split_rows
from tests.distributed import RankError, run_ranks
from tests.models import MIXER_SIZES, MODELS, Layout, initialize, make_chunks, optimizer_config, wrap
from tests.optimizer.test_exactness import EXACT, check_counts, check_layout
from tests.paths import DOCS, EXAMPLES

# Two query groups over four tensor-parallel ranks: query heads, keys and values lie on different ranks.
MORE_RANKS_THAN_GROUPS = Layout(4, tp=4)
TP2_DP2 = Layout(4, tp=2)
EXPERT_TP = Layout(4, tp=2, ep=2, etp=2, sequence_parallel=True)
EXPERT_DP = Layout(4, ep=2)
Case = tuple[str, Layout, dict[str, str]]
CASES: dict[str, Case] = {
    "gated attention, groups": ("gated attention", TP2_DP2, dict(qkv_split="group")),
    "heads on several ranks": ("gated attention", MORE_RANKS_THAN_GROUPS, dict(qkv_split="head")),
    "latent heads": ("mla lora", TP2_DP2, dict(mla_split="head")),
    "fused latents, parts": ("mla fused", TP2_DP2, dict(mla_split="part")),
    "multi-token prediction": ("mtp", Layout(1), dict(mla_split="head")),
    "grouped experts": ("grouped", Layout(2, ep=2), {}),
    "stacked experts": ("stacked", EXPERT_TP, {}),
}
MODES: dict[str, list[dict[str, str]]] = {
    "dense": [dict(qkv_split=mode) for mode in ("none", "qkv", "group", "head")],
    "odd": [dict(qkv_split=mode) for mode in ("group", "head")],
    "gated attention": [dict(qkv_split=mode) for mode in ("none", "qkv", "group", "head")],
    "mla": [dict(mla_split=mode) for mode in ("none", "part", "head")],
    "mla lora": [dict(mla_split=mode) for mode in ("none", "part", "head")],
    "mla fused": [dict(mla_split=mode) for mode in ("none", "part", "head")],
    "mtp": [dict(mla_split=mode) for mode in ("none", "head")],
    "grouped": [{}],
    "stacked": [{}],
}
LAYOUTS = {
    "one rank": Layout(1),
    "dp3": Layout(3),
    "tp2": Layout(2, tp=2),
    "tp4": MORE_RANKS_THAN_GROUPS,
    "tp2 dp2": TP2_DP2,
}
EXPERT_LAYOUTS = {"ep2 etp2": EXPERT_TP, "ep2 edp2": EXPERT_DP, "tp2 ep2 etp1": Layout(4, tp=2, ep=2, etp=1)}


def every_case() -> list[Any]:
    out = []
    for model, modes in MODES.items():
        layouts = {**LAYOUTS, **(EXPERT_LAYOUTS if model in ("grouped", "stacked", "mla", "mtp") else {})}
        for layout_name, layout in layouts.items():
            if (layout.tp > 1 and "ep" in layout_name) or model not in ("dense", "gated attention", "odd"):
                # Megatron wants sequence parallelism for experts under tensor parallelism.
                layout = replace(layout, sequence_parallel=layout.tp > 1)
            for mode in modes:
                name = " ".join((model, layout_name, *mode.values()))
                out.append(pytest.param(model, layout, mode, marks=pytest.mark.exhaustive, id=name))
    return out


@pytest.mark.parametrize(
    ("model", "layout", "settings"), [*(pytest.param(*case, id=name) for name, case in CASES.items()), *every_case()]
)
def test_equals_reference_bitwise(model: str, layout: Layout, settings: dict[str, Any]) -> None:
    results = run_ranks(check_layout, layout.world_size, model, layout, replace(EXACT, **settings), False)
    for rank, result in enumerate(results):
        assert result["worst"]["muon"] == result["worst"]["momentum"] == 0.0, (rank, result)
    check_counts(results, layout)


MIXER_ROWS = f"""
- match: "*.mixer.in_proj.weight"
  on_each_rank: true
  parts: {{{", ".join(f"{label}: {rows}" for label, rows in MIXER_SIZES.items())}}}
"""


def test_users_row_gives_a_fused_weight_to_muon(tmp_path: Path) -> None:
    """Mamba's in_proj, which is AdamW's by default, as z, x, B, C and dt over two tensor-parallel ranks."""
    rows = tmp_path / "splits.yaml"
    rows.write_text(MIXER_ROWS)
    layout = Layout(2, tp=2)
    for settings in ({}, {"splits": str(rows)}):
        results = run_ranks(check_layout, 2, "mixers", layout, replace(EXACT, **settings), False)
        for result in results:
            assert result["worst"]["muon"] == result["worst"]["momentum"] == 0.0, result
            assert result["worst"]["adam"] <= 1e-6, result
        check_counts(results, layout)


# Parts of single parameters, against rows written down by hand.


def rows_of(split: Split, rows: int, pieces: int = 1, cols: int = 1) -> dict[str, list[tuple[tuple[int, int], ...]]]:
    """Label -> the rows on each piece."""
    parts = parts_of("w", split, rows, cols, pieces)
    return {part.label: [part.rows_in(piece) for piece in range(pieces)] for part in parts}


def test_megatrons_qkv_layout() -> None:
    """Two query groups on a rank, each with 2 query heads, a key and a value head of 3 rows."""
    split = FusedQkv.of_heads(2, 3).split(MuonConfig())
    assert rows_of(split, 24) == {"q": [((0, 6), (12, 18))], "k": [((6, 9), (18, 21))], "v": [((9, 12), (21, 24))]}
    gates = FusedQkv.of_heads(2, 3, gate=True).split(MuonConfig())
    assert rows_of(gates, 18) == {"q": [((0, 6),)], "gate": [((6, 12),)], "k": [((12, 15),)], "v": [((15, 18),)]}


def test_a_query_group_over_two_ranks() -> None:
    """Megatron shards the rows of all groups evenly: the first rank has three of the four query heads."""
    split = FusedQkv.of_heads(4, 2).split(MuonConfig(qkv_split="head"))
    assert rows_of(split, 6, pieces=2) == {"q": [((0, 6),), ((0, 2),)], "k": [(), ((2, 4),)], "v": [(), ((4, 6),)]}
    spec = spec_from_split("w", (6, 5), split, tp_size=2, partition_dim=0)
    assert [spec.logical_shape(part) for part in range(3)] == [(4, 2, 5), (1, 2, 5), (1, 2, 5)]


def test_gate_and_up() -> None:
    assert rows_of(GatedMlp().split(MuonConfig()), 4, pieces=2) == {"gate": [((0, 2),)] * 2, "up": [((2, 4),)] * 2}
    interleaved = GatedMlp(interleave=2).split(MuonConfig())
    assert rows_of(interleaved, 8, pieces=2) == {"gate": [((0, 2), (4, 6))] * 2, "up": [((2, 4), (6, 8))] * 2}


def test_fused_latents_over_two_ranks() -> None:
    """[its queries; its keys and values] on each rank; the rotary key is the end of the second, on the last rank."""
    split = LatentDown(kv=6, rope=2, q=4).split(MuonConfig(mla_split="part"))
    expected = {"q": [((0, 2),)] * 2, "kv": [((2, 6),), ((2, 4),)], "k_rope": [(), ((4, 6),)]}
    assert rows_of(split, 6, pieces=2) == expected


def test_stacked_experts() -> None:
    spec = spec_from_split("w", (2, 4, 3), GatedMlp().split(MuonConfig()), tp_size=2, partition_dim=0)
    assert spec.shape == (8, 3)
    assert [(part.label, part.rows) for part in spec.parts] == [
        ("expert0.gate", ((0, 2),)),
        ("expert0.up", ((2, 4),)),
        ("expert1.gate", ((4, 6),)),
        ("expert1.up", ((6, 8),)),
    ]
    assert spec.joined_shape(0) == (4, 3)


@pytest.mark.parametrize(
    ("split", "rows", "pieces", "message"),
    [
        (
            FusedQkv.of_heads(2, 3).split(MuonConfig()),
            20,
            1,
            "w: 20 rows do not divide into repetitions of 6 (q) + 3 (k) + 3 (v) = 12 rows; check the head and query "
            "group counts, or switch the split off",
        ),
        (GatedMlp().split(MuonConfig()), 7, 2, "w: 7 rows on a rank are not 2 equal parts: gate + up"),
        (
            LatentDown(kv=5, rope=2, q=4).split(MuonConfig()),
            6,
            2,
            "w: 6 rows on each of 2 tensor-parallel ranks are not 4 (q) + 7 (kv), expected 12 rows in all, of each "
            "part as many on every rank",
        ),
        (Split(((Section("", cut=Cut(1, count=3)),),)), 4, 1, "w: 8 columns do not divide into 3 blocks of equal size"),
        (
            Split(((Section("a", 2, Cut(0, count=3)), Section("b", 2)),)),
            4,
            1,
            "w.a: 2 rows do not divide into 3 blocks of equal size",
        ),
    ],
)
def test_split_that_does_not_divide(split: Split, rows: int, pieces: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parts_of("w", split, rows, 8, pieces)
    assert str(error.value) == message


def test_blockwise_pieces_must_be_alike() -> None:
    split = FusedQkv.of_heads(4, 2).split(MuonConfig())
    with pytest.raises(NotImplementedError) as error:
        spec_from_split("w", (6, 5), split, tp_size=2, partition_dim=0, tp_joined=False)
    assert str(error.value) == (
        "w: its 2 tensor-parallel pieces have different rows of 8 (q) + 2 (k) + 2 (v), and tp_mode blockwise needs "
        "pieces that are alike; choose tp_mode exact, or switch the split off"
    )
    assert spec_from_split("w", (12, 5), split, tp_size=2, partition_dim=0, tp_joined=False).logical_shape(0) == (
        2,
        8,
        5,
    )


@pytest.mark.parametrize("groups", [((Section("a", 2), Section("b")),), ((Section("a"), Section("b")),), ((),)])
def test_sizes_are_given_of_all_parts_or_of_none(groups: Any) -> None:
    with pytest.raises(ValueError, match="expected rows of all parts or, in groups of one, of none"):
        Split(groups)


def test_kinds_that_no_setting_changes() -> None:
    assert WHOLE.split(MuonConfig()) is WHOLE
    assert pattern((("a", 2),)).split(MuonConfig(qkv_split="head")) == pattern((("a", 2),))


# A user's rows.


def test_example() -> None:
    example = EXAMPLES / "splits.yaml"
    by_parts, by_heads, adam = load_split_rows(str(example))
    assert (by_parts.name, by_parts.match, by_parts.optimizer, by_parts.priority) == (
        "Mamba in_proj by parts",
        "*.mixer.in_proj.weight",
        "muon",
        1,
    )
    # Two ranks store [their z, x, B, C, dt] each.
    rows = rows_of(by_parts.split, 8512 // 2, pieces=2)
    assert rows["B"] == [((4096, 4160),)] * 2 and rows["dt"] == [((4224, 4256),)] * 2
    spec = spec_from_split("w", (64, 256), by_heads.split, tp_size=2, partition_dim=1)
    assert (spec.tile_grid(0), spec.tile_shape(0)) == ((1, 4), (64, 128))
    assert (adam.name, adam.optimizer) == ("row 3 (decoder.layers.0.mlp.*)", "adam")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("match: a", "got dict at the top, expected a list of rows"),
        ("[]", "got list at the top, expected a list of rows"),
        ("- a", "row 1: got 'a', expected a mapping with match, name,"),
        ("- {match: a, split: b}", "row 1: got unknown split, expected match, name,"),
        ("- {optimizer: adam}", "row 1: match: got None, expected a glob"),
        ("- {match: a, name: ''}", "row 1 (a): name: got '', expected a name"),
        ("- {match: a, optimizer: sgd}", "row 1 (a): optimizer: got 'sgd', expected muon or adam"),
        ("- {match: a, optimizer: adam, block: 2}", "row 1 (a): got optimizer adam and a split, expected one or"),
        ("- {match: a, priority: 0}", "row 1 (a): priority: got 0, expected a positive integer"),
        ("- {match: a, on_each_rank: 1, parts: {b: 2}}", "row 1 (a): on_each_rank: got 1, expected true or false"),
        ("- {match: a, on_each_rank: true}", "row 1 (a): on_each_rank: got true, expected it only with parts"),
        ("- {match: a, parts: [b]}", "row 1 (a): parts: got ['b'], expected label: rows"),
        ("- {match: a, parts: {b: 2}, heads: 2}", "row 1 (a): got block or heads beside parts, expected them in each"),
        ("- {match: a, parts: {b: -1}}", "row 1 (a): parts: b: rows: got -1, expected a positive integer"),
        ("- {match: a, parts: {b: {block: 1}}}", "row 1 (a): parts: b: rows: got none, expected how many rows"),
        ("- {match: a, parts: {b: {rows: 2, size: 1}}}", "row 1 (a): parts: b: got unknown size, expected rows,"),
        ("- {match: a, block: 2, heads: 2}", "row 1 (a): got block and heads, expected one or the other"),
        ("- {match: a, block: two}", "row 1 (a): block: got 'two', expected a positive integer"),
        ("- {match: a, block: true}", "row 1 (a): block: got True, expected a positive integer"),
        ("- {match: a, heads: 2, along: 1}", "row 1 (a): along: got 1, expected rows or columns"),
        ("- {match: a, along: rows}", "row 1 (a): along: got 'rows', expected it only with block or heads"),
        ("- {match: a, name: b}\n- {match: c, name: b}", "got several rows of the name b, expected each once"),
    ],
)
def test_bad_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "splits.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_split_rows(str(path))
    assert str(error.value).startswith(f"--muon-splits {path}: ") and message in str(error.value)


DOCUMENTED = ("moonlight-16b", "deepseek-v3", "qwen3-8b")


def shapes_of_a_layer(model: str, muon: MuonConfig) -> dict[str, str]:
    """Parameter -> its parts and logical shapes, as docs/matrices.md writes them."""
    out = {}
    for spec in itertools.chain(*stage_specs(load_model(model).layers[-1:], PlannedLayout(), muon)):
        name = spec.name.removeprefix("decoder.layers.0.").removesuffix("0").removesuffix(".weight")
        parts = [(f"{part.label} ".lstrip(), spec.logical_shape(index)) for index, part in enumerate(spec.parts)]
        out[name] = "; ".join(f"{label}{count} x ({rows}, {cols})" for label, (count, rows, cols) in parts)
    return out


def test_shapes_in_the_docs() -> None:
    """Every row of the table of shapes is what the planner makes of published models, and none is missing."""
    text = (DOCS / "matrices.md").read_text()
    table = text.split("## Shapes")[1].split("\n## ")[0].splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("| `")]
    rows = {cells[0]: cells[1:] for cells in lines}
    plain = {model: shapes_of_a_layer(model, MuonConfig()) for model in DOCUMENTED}
    heads = {m: shapes_of_a_layer(m, MuonConfig(qkv_split="head", mla_split="head")) for m in DOCUMENTED}
    expected: dict[str, list[str]] = {}
    for name in {name for shapes in plain.values() for name in shapes if ".weight" not in name}:
        cells, cut = ([shapes[m].get(name, "") for m in DOCUMENTED] for shapes in (plain, heads))
        expected[f"`{name}`"] = cells
        if cut != cells:
            expected[f"`{name}`, `head`"] = cut
    assert rows == expected


# What does not fit a model is refused on every rank, also on a pipeline stage that has no such parameter.


def refuse(rank: int, world_size: int, paths: list[str], settings: dict[str, Any], layout: Layout, model: str) -> None:
    """Builds an optimizer in a way that must be refused; counts that nothing of Muon's was exchanged."""
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    initialize(layout)
    muon = replace(EXACT, **settings, splits=paths[min(rank, len(paths) - 1)] if paths else "")
    chunks = make_chunks(model, layout, torch.float32)
    tag_parameters(chunks, muon)
    get_megatron_optimizer(optimizer_config(layout, torch.float32), wrap(chunks, layout), muon=muon)


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
PIPELINE = Layout(2, pp=2)
REFUSED: dict[str, tuple[list[str], dict[str, Any], Layout, str, list[str]]] = {
    "overlap": (
        ["- {match: '*.layers.1.*qkv.weight', name: first}\n- {match: '*.layers.1.*', optimizer: adam, name: second}"],
        {},
        PIPELINE,
        "ValueError",
        [f"{QKV}: matched by 2 rows of priority 1, first, second, expected one; narrow a match or give a row a higher"],
    ),
    "no match": (
        ["- {match: '*qkv.weight', name: qkv}\n- {match: '*.mixer.*'}"],
        {},
        PIPELINE,
        "ValueError",
        ["row 2 (*.mixer.*): match: got '*.mixer.*', which matches no parameter of the model on any rank"],
    ),
    "no matrix": (
        ["- {match: '*.layers.1.*qkv.*', name: everything}"],
        {},
        PIPELINE,
        "ValueError",
        ["linear_qkv.bias: everything gives it to Muon, but it has shape (64,); Muon needs a matrix"],
    ),
    "does not divide": (
        [f"- {{match: {QKV}, name: thirds, parts: {{a: 3, b: 4}}}}"],
        {},
        PIPELINE,
        "ValueError",
        ["row thirds: ", QKV, "64 rows do not divide into repetitions of 3 (a) + 4 (b) = 7 rows"],
    ),
    "another file": (
        ["- {match: '*qkv.weight'}", "- {match: '*proj.weight'}"],
        {},
        Layout(2),
        "RuntimeError",
        ["the ranks have different settings: ", "0.yaml", "1.yaml", "splits"],
    ),
    "blockwise": (
        [],
        dict(tp_mode="blockwise"),
        MORE_RANKS_THAN_GROUPS,
        "NotImplementedError",
        ["row fused QKV: ", QKV.replace("1", "0"), "its 4 tensor-parallel pieces", "choose tp_mode exact"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(case: str, tmp_path: Path) -> None:
    texts, settings, layout, error, words = REFUSED[case]
    paths = []
    for number, text in enumerate(texts):
        paths.append(str(tmp_path / f"{number}.yaml"))
        Path(paths[-1]).write_text(text)
    with pytest.raises(RankError) as caught:
        run_ranks(refuse, layout.world_size, paths, settings, layout, "dense")
    assert sorted(caught.value.errors) == list(range(layout.world_size))
    for kind, message, _ in caught.value.errors.values():
        assert kind == error
        for word in words:
            assert word in message


def test_builtin_rows_exclude_each_other() -> None:
    """Each parameter of every test model is of one row, of the kind it should be; and every row is met."""
    (found,) = run_ranks(rows_by_model, 1)
    assert found.pop("overlaps") == []
    met = {row for rows in found.values() for row in rows.values()}
    assert met == {
        "embedding or output",
        "router",
        "convolution",
        "Mamba in_proj",
        "GatedDeltaNet",
        "fused QKV",
        "gated MLP",
        "MLA query",
        "MLA key-value",
        "MLA down",
        "MLA output",
        "matrix",
        "no matrix",
    }
    moe, layer = found["mla fused"], "decoder.layers.1"
    assert moe[f"{layer}.self_attention.linear_qkv_down_proj.weight"] == "MLA down"
    assert moe[f"{layer}.mlp.shared_experts.linear_fc1.weight"] == "gated MLP"
    assert moe[f"{layer}.mlp.shared_experts.linear_fc2.weight"] == "matrix"
    assert moe[f"{layer}.mlp.router.weight"] == "router"
    assert found["stacked"][f"{layer}.mlp.experts.linear_fc1.weight"] == "gated MLP"
    assert found["stacked"][f"{layer}.mlp.experts.linear_fc2.weight"] == "matrix"
    assert found["grouped"][f"{layer}.mlp.experts.linear_fc1.weight3"] == "gated MLP"
    mtp = found["mtp"]
    assert mtp["mtp.layers.0.eh_proj.weight"] == "matrix"
    of_mtp = {name.split(".")[-2]: row for name, row in mtp.items() if name.startswith("mtp.")}
    assert of_mtp["linear_q_up_proj"] == "MLA query"
    mixers = found["mixers"]
    assert mixers["decoder.layers.0.mixer.conv1d_weight"] == "convolution"
    assert mixers["decoder.layers.0.mixer.out_proj.weight"] == "matrix"
    assert mixers["decoder.layers.0.delta.out_proj.weight"] == "GatedDeltaNet"


def rows_by_model(rank: int, world_size: int) -> dict[str, Any]:
    """For each test model, the row of each parameter; and those with several."""
    from megatron_muon.megatron.model.identity import named_parameters
    from megatron_muon.megatron.model.registry import registry

    layout = Layout(1)
    initialize(layout)
    out: dict[str, Any] = {"overlaps": []}
    # Transformer Engine's modules have tests of their own, where it is installed.
    for model in (name for name in MODELS if not name.startswith("te")):
        out[model] = {}
        for entry in named_parameters(make_chunks(model, layout, torch.float32)):
            rows = registry("").matching(entry)
            out[model][entry.whole_name] = rows[0].name
            if len(rows) > 1:
                out["overlaps"].append((model, entry.whole_name, [row.name for row in rows]))
    return out


# The table of parameters.


def table_of(rank: int, world_size: int, layout: Layout) -> tuple[str, list[Any]]:
    """What a rank prints at start-up, and (flops by rank, ranks) of its plans."""
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    muon = replace(EXACT, log_params=True, mla_split="head")
    initialize(layout)
    chunks = make_chunks("mla", layout, torch.float32)
    tag_parameters(chunks, muon)
    printed = io.StringIO()
    with redirect_stdout(printed):
        built = get_megatron_optimizer(optimizer_config(layout, torch.float32), wrap(chunks, layout), muon=muon)
    plans = []
    for part in built.chained_optimizers:
        if part.kind == "muon":
            plan = part.optimizer.exchange.plan
            plans.append((plan.rank_flops, tuple(dist.get_process_group_ranks(part.grid.group))))
    return printed.getvalue(), plans


def test_table_of_parameters() -> None:
    layout = Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True)
    results = run_ranks(table_of, 4, layout)
    assert [text for text, _ in results[1:]] == ["", "", ""]
    table = results[0][0].rpartition("───")[2].partition("Newton-Schulz in all")[0]
    # A name that does not repeat stands for the lines below it as well.
    names, parts = [], {}
    for line in table.strip("\n ").splitlines():
        *name, optimizer, row, part, shape, owners, flops = re.split(" {2,}", line.strip())
        names += name
        parts[names[-1], part] = (optimizer, row, shape, owners, flops)
    attention = "decoder.layers.0.self_attention"
    # Four heads of 8 + 4 rows of queries; hidden 32; values of 6 columns a head.
    assert parts[f"{attention}.linear_q_proj.weight", "q_nope"][:3] == ("Muon", "MLA query", "4 x (8, 32)")
    assert parts[f"{attention}.linear_q_proj.weight", "q_rope"][:3] == ("Muon", "MLA query", "4 x (4, 32)")
    assert parts[f"{attention}.linear_proj.weight", "-"][:3] == ("Muon", "MLA output", "4 x (32, 6)")
    assert parts["embedding.word_embeddings.weight", "-"] == ("AdamW", "embedding or output", "(32, 32)", "-", "-")
    # All four experts, two on each expert-parallel rank.
    experts = [name for name in names if "local_experts" in name and "fc1" in name]
    assert [name.split(".")[6] for name in experts] == ["0", "1", "2", "3"]
    assert len(names) == len(set(names))
    # Owners are global ranks, and what they have to do is what the plans say.
    load: dict[int, float] = {}
    for optimizer, _, _, owners, flops in parts.values():
        if optimizer == "Muon":
            own = [int(rank) for rank in owners.split(", ")]
            for rank in own:
                load[rank] = load.get(rank, 0) + float(flops) / len(own)
    expected: dict[int, float] = {}
    for plan in {plan for _, plans in results for plan in plans}:
        for rank, flops in zip(plan[1], plan[0], strict=True):
            expected[rank] = expected.get(rank, 0) + flops
    assert load.keys() == expected.keys()
    for rank, flops in load.items():
        assert flops == pytest.approx(expected[rank], rel=5e-3)  # printed with three digits
