"""`links`: bytes as planned, bandwidths by hand, results checked and a broken collective found, on Gloo ranks."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.config import TORCH_DTYPES, MuonConfig
from megatron_muon.estimate.estimates import distinct_stages, stage_kinds, stage_plans
from megatron_muon.estimate.schemes import PlanSettings
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout
from megatron_muon.observe.timing.peaks import read_links
from megatron_muon.plan.build import CostModel
from megatron_muon.profile import links_command, links_table
from megatron_muon.profile.busbw import (
    COLLECTIVES,
    all_to_allv_size_bytes,
    bus_bandwidth_gbps,
    bus_factor,
    exchanged_bytes,
)
from megatron_muon.profile.collectives import (
    OPERATIONS,
    Buffers,
    Operation,
    Placement,
    Task,
    count_wrong,
    gathered_values,
    summands,
    summed,
)
from megatron_muon.profile.command import main
from megatron_muon.profile.links import Row, Timing
from megatron_muon.profile.pairs import Pairs, tournament
from megatron_muon.profile.process_groups import choose_kinds, group_sizes, layout_for
from megatron_muon.profile.settings import DTYPE_BYTES, SWEPT, LinkSettings, Sweep
from megatron_muon.profile.traffic import Traffic, load_traffic, model_traffic, plan_traffic, run_traffic, save_traffic
from tests.distributed import run_ranks
from tests.estimate.test_plan_model import HF_MLA

MODEL = """
name: small
layers:
  - repeat: 2
    matrices:
      - {name: self_attention.linear_proj, shape: [24, 24], split: columns, unit: 4}
      - {name: self_attention.linear_qkv, shape: [48, 24], split: rows, parts: {q: 8, k: 2, v: 2}}
      - {name: mlp.router, shape: [4, 24], router: true}
      - {name: mlp.experts.linear_fc1, shape: [40, 24], split: rows, gated: true, experts: 4}
      - {name: mlp.experts.linear_fc2, shape: [24, 20], split: columns, experts: 4}
"""
QUICK = Sweep(min_bytes=1 << 10, max_bytes=4 << 10, factor=4, warmup=1, iterations=2)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL)
    return str(path)


# -- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "expected"),
    [
        # 8 ranks, 1 GB (1e9) in 10 ms: 100 GB/s algorithm bandwidth.
        ("all_reduce", 175.0),
        ("all_gather", 87.5),
        ("reduce_scatter", 87.5),
        ("all_to_all", 87.5),
        ("all_to_allv", 87.5),
        ("broadcast", 100.0),
        ("send_recv", 100.0),
    ],
)
def test_bus_bandwidth(collective: Any, expected: float) -> None:
    assert bus_bandwidth_gbps(collective, 10**9, 0.01, 8) == pytest.approx(expected, rel=1e-12)
    assert {c for c in COLLECTIVES if bus_factor(c, 1) != 0} == {"broadcast", "send_recv"}


def test_uneven_all_to_all_by_hand() -> None:
    """Rank 1 owns most: it receives 5 + 1 + 7 elements, the most that any rank sends or receives."""
    traffic = [[2, 5, 0], [3, 1, 4], [0, 7, 1]]
    assert all_to_allv_size_bytes(traffic, 2) == 13 * 2
    assert exchanged_bytes(traffic, 2) == (10, 14, 14)
    even = [[4] * 3] * 3
    assert all_to_allv_size_bytes(even, 4) == 3 * 4 * 4
    assert all_to_allv_size_bytes([], 4) == 0


def test_bad_arguments_of_formulas() -> None:
    with pytest.raises(ValueError, match="seconds: got 0"):
        bus_bandwidth_gbps("all_reduce", 1, 0, 2)
    with pytest.raises(ValueError, match="world_size: got 0"):
        bus_factor("all_reduce", 0)
    with pytest.raises(ValueError, match="collective: got 'all'"):
        bus_factor("all", 2)  # type: ignore[arg-type]


def row(collective: Any, rank_us: list[float], wrong: int = 0, **changes: Any) -> Row:
    """A row over two groups of two ranks."""
    timings: dict[Placement, Timing | None] = {
        "out_of_place": Timing(tuple(rank_us), wrong, (None,) * len(rank_us)),
        "in_place": None,
    }
    sizes = (8_000_000, 8_000_000)
    made = Row("dp", ((0, 2), (1, 3)), collective, "", 8_000_000, 1_000_000, "float", "none", sizes, (), timings)
    return replace(made, **changes)


def test_row_by_hand() -> None:
    """8 MB, slowest rank 1 with 400 us: 20 GB/s, half of it on the bus; its group is the slower one."""
    found = row("all_gather", [200.0, 400.0, 160.0, 250.0])
    assert found.algbw("out_of_place") == pytest.approx(20.0) and found.busbw("out_of_place") == pytest.approx(10.0)
    assert found.group_busbw("out_of_place") == pytest.approx([20.0, 10.0])
    # A group that moves less in the same time has less.
    smaller = replace(found, group_sizes_bytes=(8_000_000, 2_000_000))
    assert smaller.group_busbw("out_of_place") == pytest.approx([20.0, 2.5])
    assert found.busbw("in_place") is None
    timing = found.timings["out_of_place"]
    assert timing is not None and (timing.slowest_rank, timing.imbalance) == (1, 400 / 225)
    assert links_table.row_line(found).split() == (
        ["8000000", "1000000", "float", "none", "-1", "400.00", "20.00", "10.00", "0"] + ["N/A"] * 4
    )
    assert links_table.straggler_line([found]) == (
        "# largest size: slowest rank 1, 1.78 of the median time; slowest group [1 3], bus bandwidth 10.00, best 20.00"
    )
    lines = list(links_table.table_lines([found, row("all_gather", [100.0] * 4, wrong=3)]))
    assert lines[0] == "# all_gather over dp: 2 groups of 2 ranks at the same time: [0 2], [1 3]"
    # 10 and 40 GB/s.
    assert lines[-3:-1] == ["# Out of bounds values : 3 FAILED", "# Avg bus bandwidth    : 25"]
    columns = "size count type redop root time algbw busbw #wrong time algbw busbw #wrong"
    assert lines[2].lstrip("# ").split() == columns.split()


# -- sizes and values ------------------------------------------------------------------------------------------------


def test_sizes_are_swept_as_in_nccl_tests() -> None:
    sweep = Sweep(min_bytes=1000, max_bytes=64_000, factor=4)
    assert sweep.counts("all_reduce", 3) == [250, 1000, 4000, 16000]
    # Whole elements on each of three ranks: 1000 / 12, 4000 / 12, ...
    assert sweep.counts("all_gather", 3) == [83, 333, 1333, 5333]
    assert Sweep(min_bytes=8, max_bytes=8, dtype="bfloat16").counts("all_to_all", 4) == [1]


@pytest.mark.parametrize("world_size", [1, 2, 7, 64, 65, 200])
@pytest.mark.parametrize("name", DTYPE_BYTES)
def test_sums_are_exact_in_every_type_and_order(world_size: int, name: str) -> None:
    dtype: torch.dtype = getattr(torch, name)
    task = Task("all_reduce", 0, world_size, 0, dtype, torch.device("cpu"), None)
    start, numel = 300, 1500
    terms = torch.stack([summands(rank, start, numel, task) for rank in range(world_size)])
    for order in (range(world_size), reversed(range(world_size))):
        total = torch.zeros(numel, dtype=dtype)
        for rank in order:
            total += terms[rank]
        assert torch.equal(total, summed(start, numel, task))
    # Values depend on rank and place, or a mix-up would not show.
    assert summed(0, 1500, task).unique().numel() > 1
    assert not torch.equal(summands(0, 0, 256, task), summands(0, 1, 256, task))


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_what_is_sent_depends_on_sender_receiver_and_place(world_size: int) -> None:
    """So that parts that reach another rank, lie in another's place, or are shifted, count as wrong."""
    task = Task("all_to_all", 0, world_size, 0, torch.bfloat16, torch.device("cpu"), None)
    reference = gathered_values(0, 1, 300, task)
    others = [(source, 1) for source in range(1, world_size)] + [(0, t) for t in range(world_size) if t != 1]
    for source, target in others:
        assert count_wrong(gathered_values(source, target, 300, task), reference) == 300
    assert count_wrong(reference[:-1], reference[1:]) == 299
    assert count_wrong(torch.full((300,), float("nan")), reference) == 300


# -- layouts and plans -----------------------------------------------------------------------------------------------


def test_layout_takes_what_is_left_for_data_parallelism() -> None:
    layout = layout_for(16, tp=2, pp=2, ep=4, etp=1, instances=2)
    assert layout.dp == 4
    assert group_sizes(layout) == dict(
        world=16, tp=2, dp=2, tp_dp=4, pp=2, ep=4, expert_tp=1, expert_dp=1, expert_tp_dp=1
    )
    assert choose_kinds(layout, None) == ["tp", "dp", "tp_dp", "pp", "ep"]
    assert choose_kinds(layout_for(1, tp=1, pp=1, ep=1, etp=None, instances=1), None) == ["world"]
    # Without expert parallelism experts have no groups of their own.
    assert choose_kinds(layout_for(4, tp=2, pp=1, ep=1, etp=None, instances=1), None) == ["tp", "dp", "tp_dp"]


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, tp=2, ep=2, etp=1), Layout(dp=4, tp=1, pp=2, ep=2, instances=2), Layout(dp=3, tp=2)],
    ids=str,
)
def test_traffic_is_that_of_the_plans(layout: Layout, model: str) -> None:
    """Bytes over all rounds are the plans' own count, and groups cover every rank once for each kind."""
    muon = MuonConfig(exchange_dtype="fp32")
    traffic = model_traffic(model, layout, muon)
    for expert in {t.expert for t in traffic}:
        ranks = sorted(r for t in traffic if t.expert == expert for r in t.ranks)
        assert ranks == list(range(layout.num_ranks))
    settings = PlanSettings(muon=muon)  # of a GPU, as model_traffic's default
    planned = []
    for (layers, bucket_size), stages in distinct_stages(load_model(model), layout, settings).items():
        for _, _, plans in stage_plans(stage_kinds(layers, layout, settings), settings, bucket_size):
            planned += [plan for plan in plans for _ in range(len(stages) * layout.instances)]
    assert sorted(total_sent_bytes(t) for t in traffic) == sorted(
        tuple(4 * n for n in plan.sent_numel()) for plan in planned
    )
    assert sum(map(sum, (total_sent_bytes(t) for t in traffic))) > 0


def total_sent_bytes(traffic: Traffic) -> tuple[int, ...]:
    """What each rank sends to others in a step."""
    each = [exchanged_bytes(m, traffic.element_bytes) for r in traffic.rounds for m in (r.gather, r.scatter)]
    return tuple(map(sum, zip(*each, strict=True)))


def test_recorded_traffic(tmp_path: Path, model: str) -> None:
    layout, path = Layout(dp=2, tp=2, ep=2, etp=1), tmp_path / "traffic.json"
    traffic = model_traffic(model, layout, MuonConfig())
    save_traffic(path, traffic)
    assert load_traffic(path, layout) == traffic
    with pytest.raises(ValueError, match="expected groups of 6 that cover 6 ranks; give the layout of the run"):
        load_traffic(path, Layout(dp=3, tp=2))


def traffic_of_a_run(rank: int, world_size: int, path: str) -> list[Traffic]:
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer
    from tests.models import Layout as RunLayout
    from tests.models import initialize, make_chunks, optimizer_config, wrap

    layout, muon = RunLayout(world_size, tp=2, ep=2, etp=1), MuonConfig()
    initialize(layout)
    chunks = make_chunks("mla", layout, torch.bfloat16)
    tag_parameters(chunks, muon)
    optimizer = get_megatron_optimizer(optimizer_config(layout, torch.bfloat16), wrap(chunks, layout), muon=muon)
    traffic = run_traffic(optimizer)
    if rank == 0:
        save_traffic(Path(path), traffic)
    return traffic


def test_traffic_of_a_run_is_that_of_its_model(tmp_path: Path) -> None:
    """What a real optimizer exchanges, recorded and read again, is what is planned from the model's configuration."""
    recorded = run_ranks(traffic_of_a_run, 4, str(tmp_path / "traffic.json"))
    layout = Layout(dp=2, tp=2, ep=2, etp=1)
    (tmp_path / "config.json").write_text(json.dumps(HF_MLA))
    planned = model_traffic(str(tmp_path / "config.json"), layout, MuonConfig(), device_type="cpu", ranks_per_node=4)
    assert [t.expert for t in planned] == [False, True, True]
    assert recorded == [planned] * 4 and load_traffic(tmp_path / "traffic.json", layout) == planned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("version"), "without version 1 and exchanges"),
        (lambda c: c["exchanges"][0].pop("dtype"), r"exchanges\[0\]: expected expert, ranks, dtype and rounds"),
        (lambda c: c["exchanges"][0].update(dtype="fp4"), "dtype: got 'fp4', expected one of bf16"),
        (lambda c: c["exchanges"][0]["rounds"][0]["gather"].pop(), r"rounds\[0\]\.gather: expected 4 rows of 4 counts"),
        (lambda c: c["exchanges"][0]["rounds"][0]["scatter"][1].__setitem__(0, -1), r"rounds\[0\]\.scatter: expected"),
        (lambda c: c["exchanges"][0]["ranks"].__setitem__(0, 3), "expected groups of 4 that cover 4 ranks"),
    ],
)
def test_bad_recorded_traffic(tmp_path: Path, model: str, change: Callable[[Any], Any], message: str) -> None:
    layout, path = Layout(dp=2, tp=2, ep=2, etp=1), tmp_path / "traffic.json"
    save_traffic(path, model_traffic(model, layout, MuonConfig()))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_traffic(path, layout)


# -- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_every_rank_meets_every_other_once(world_size: int) -> None:
    rounds = tournament(world_size)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(world_size), 2))
    for pairs in rounds:
        met = [rank for pair in pairs for rank in pair]
        assert len(met) == len(set(met))
    assert len(rounds) == world_size - 1 + world_size % 2


def pairs_of(slow: dict[tuple[int, int], float], hosts: str = "aaaa", between: float = 10.0) -> Pairs:
    """Four ranks with 10 GB/s within a host, `between` hosts otherwise, but for some links, as both ends saw it."""

    def rate(a: int, b: int) -> float:
        return slow.get((min(a, b), max(a, b)), 10.0 if hosts[a] == hosts[b] else between)

    return Pairs(1, tuple(tuple(None if a == b else rate(a, b) for b in range(4)) for a in range(4)), tuple(hosts))


def test_slow_links_and_ranks_are_named() -> None:
    assert (pairs_of({}).slow_ranks, pairs_of({}).slow_links) == ((), ())
    one = pairs_of({(1, 2): 5.0})
    assert (one.slow_ranks, one.slow_links) == ((), ((1, 2),))
    # All links of rank 3; that between 0 and 1 besides. The median is that of all six: (3 + 4) / 2.
    rank = pairs_of({(0, 3): 2.0, (1, 3): 2.0, (2, 3): 3.0, (0, 1): 4.0})
    assert rank.medians == {True: 3.5}
    assert rank.rank_ratios == pytest.approx((4 / 3.5, 4 / 3.5, 10 / 3.5, 2 / 3.5))
    assert (rank.slow_ranks, rank.slow_links) == ((3,), ())
    lines = list(links_table.pairs_lines(rank))
    assert lines[2].split() == ["0", "-", "4.00", "10.00", "2.00", "1.14"]
    assert lines[-3:] == [
        "# median within a host: 3.50",
        "# slowest link 0 - 3: 2.00, 0.57 of the median of its kind",
        "# below 0.7 of the median: rank 3",
    ]


def test_links_between_hosts_are_compared_with_each_other() -> None:
    """Two hosts of two: the network at a tenth is no fault, but half of that is, and half of what hosts have within."""
    assert pairs_of({}, "aabb", 1.0).slow_links == () and pairs_of({}, "aabb", 1.0).slow_ranks == ()
    network = pairs_of({(1, 2): 0.5}, "aabb", 1.0)
    assert network.medians == {True: 10.0, False: 1.0}
    assert (network.slow_ranks, network.slow_links) == ((), ((1, 2),))
    # 5 GB/s is five times what the network does, but 0.67 of (5 + 10) / 2.
    within = pairs_of({(0, 1): 5.0}, "aabb", 1.0)
    assert (within.medians[True], within.slow_ranks, within.slow_links) == (7.5, (), ((0, 1),))


# -- on ranks --------------------------------------------------------------------------------------------------------


def broken(operation: Operation) -> Operation:
    """The same with one element wrong on the last rank of each group."""

    def run(task: Task, buffers: Buffers) -> None:
        operation.run(task, buffers)
        if task.rank == task.world_size - 1:
            buffers.receive[-1] += 1

    return replace(operation, run=run)


def measure(rank: int, world_size: int, settings: LinkSettings, breaks: bool = False) -> tuple[int, str, str]:
    """The exit code, and what the rank printed."""
    operations = {name: broken(o) for name, o in OPERATIONS.items()} if breaks else OPERATIONS
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = links_command.run(settings, operations)
    return code, out.getvalue(), err.getvalue()


def rows_of(path: Path) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return content


def test_two_ranks(tmp_path: Path) -> None:
    settings = LinkSettings(
        sweep=replace(QUICK, dtype="bfloat16"),
        pair_bytes=4096,
        json=tmp_path / "links.json",
        plot=tmp_path / "links.png",
        flight_recorder=tmp_path / "recorder",
    )
    (code, out, err), (code1, out1, _) = run_ranks(measure, 2, settings)
    assert (code, code1, err, out1) == (0, 0, "", "")
    rows = rows_of(tmp_path / "links.json")
    # Both sizes of every collective, over the one kind of groups that two data-parallel ranks have.
    assert [(r["collective"], r["size_bytes"]) for r in rows] == [(c, s) for c in SWEPT for s in (1024, 4096)]
    assert {r["groups"] for r in rows} == {"dp=tp_dp"} and {r["type"] for r in rows} == {"bfloat16"}
    for found in rows:
        per_rank = found["collective"] in ("all_to_all", "all_gather", "reduce_scatter")
        assert found["count"] == found["size_bytes"] // 2 // (2 if per_rank else 1)
        there = {p for p in ("out_of_place", "in_place") if found[p] is not None}
        expected = {
            "all_reduce": {"in_place"},
            "all_to_all": {"out_of_place"},
            "send_recv": {"out_of_place"},
        }
        assert there == expected.get(found["collective"], {"out_of_place", "in_place"})
        for placement in there:
            timing = found[placement]
            assert timing["wrong"] == 0 and timing["time_us"] == max(timing["rank_us"]) and len(timing["rank_us"]) == 2
            algbw = found["size_bytes"] / timing["time_us"] / 1e3
            factor = {"all_reduce": 1.0, "send_recv": 1.0}.get(found["collective"], 0.5)
            assert timing["busbw_gbps"] == pytest.approx(algbw * factor)
    # What --muon-profile-links takes from it.
    for name, ceiling in read_links(str(tmp_path / "links.json")).items():
        timings = [r[p] for r in rows if r["collective"] == name for p in ("out_of_place", "in_place") if r[p]]
        assert ceiling.per_s == pytest.approx(1e9 * max(t["busbw_gbps"] for t in timings))
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "recorder").iterdir()) == [
        "flight_recorder_rank0.json",
        "flight_recorder_rank1.json",
    ]
    assert out.count("# Out of bounds values : 0 OK") == len(SWEPT)
    assert "# ranks 2 dp 2 tp 1 pp 1 ep 1 etp 1; gloo on cpu" in out and "# slowest link 0 - 1" in out
    # One line without a driver.
    assert sum("NVML" in line for line in out.splitlines()) == 1 or "NVML topology" in out


def exchange_and_measure(rank: int, world_size: int, settings: LinkSettings) -> tuple[list[int], int, str]:
    """Bytes that a real exchange of the dense plan sends on this rank in each transfer; `links`' code and errors."""
    from megatron_muon.exchange.exchange import Exchange

    layout = layout_for(world_size, tp=settings.tp, pp=1, ep=settings.ep, etp=settings.etp, instances=1)
    muon = MuonConfig(exchange_dtype="fp32")
    planned = PlanSettings(muon=muon, impl="local", cost=CostModel.for_device("cpu"), gpus_per_node=world_size)
    ((layers, bucket_size),) = distinct_stages(load_model(str(settings.model)), layout, planned)
    kinds = stage_plans(stage_kinds(layers, layout, planned), planned, bucket_size)
    (plan,) = next(plans for grid, _, plans in kinds if not grid.expert)
    exchange = Exchange(plan, None, TORCH_DTYPES["fp32"], torch.device("cpu"))
    sent = [0]
    for transfer in range(exchange.wire.num_transfers):
        exchange.start(transfer)
        exchange.finish(transfer)
        sent.append(exchange.stats.bytes_sent)
    code, _, err = measure(rank, world_size, settings)
    return [after - before for before, after in itertools.pairwise(sent)], code, err


def test_four_ranks_exchange_what_the_plan_says(tmp_path: Path, model: str) -> None:
    """TP2 x DP2 with experts over two ranks: dense and expert all-to-alls at their real splits, each checked."""
    settings = LinkSettings(
        tp=2,
        ep=2,
        etp=1,
        model=model,
        exchange_dtype="fp32",
        rounds=100,
        collectives=("reduce_scatter", "all_reduce"),
        sweep=replace(QUICK, max_bytes=1024, iterations=1),
        pair_bytes=0,
        json=tmp_path / "links.json",
        save_traffic=tmp_path / "traffic.json",
    )
    results = run_ranks(exchange_and_measure, 4, settings)
    assert [(code, err) for _, code, err in results] == [(0, "")] * 4
    rows = rows_of(tmp_path / "links.json")
    exchanges = [r for r in rows if r["collective"] == "all_to_allv"]
    assert {r["label"].split()[0] for r in exchanges} == {"dense", "expert"}
    assert all(r["out_of_place"]["wrong"] == 0 and r["in_place"] is None for r in exchanges)
    dense = [r for r in exchanges if r["label"].startswith("dense")]
    assert {r["groups"] for r in dense} == {"tp_dp"} and {str(r["ranks"]) for r in dense} == {"[[0, 1, 2, 3]]"}
    assert [r["label"].split()[-1] for r in dense[:2]] == ["gather", "scatter"]
    sent = [[r["sent_bytes"][0][rank] for r in dense] for rank in range(4)]
    # A transfer of the exchange carries a round's gather and the scatter of the round two before.
    fused = [[0] * (len(each) // 2 + 2) for each in sent]
    for rank, each in enumerate(sent):
        for index, numel in enumerate(each):
            fused[rank][index // 2 + 2 * (index % 2)] += numel
    assert fused == [sent_bytes for sent_bytes, _, _ in results]
    # Routers are stored by both tensor-parallel ranks: one copy goes, two come back.
    assert sum(each[1] for each in sent) > sum(each[0] for each in sent) > 0
    # Experts: two groups of two, one for each expert-parallel rank, which are the expert-data-parallel groups.
    expert = [r for r in exchanges if r["label"].startswith("expert")]
    assert {str(r["ranks"]) for r in expert} == {"[[0, 2], [1, 3]]"}
    traffic = {t.ranks: t for t in load_traffic(tmp_path / "traffic.json", Layout(dp=2, tp=2, ep=2, etp=1)) if t.expert}
    for index, ranks in enumerate(((0, 2), (1, 3))):
        assert tuple(sum(r["sent_bytes"][index][i] for r in expert) for i in (0, 1)) == total_sent_bytes(traffic[ranks])
    # Groups of the same ranks are measured once, in Megatron's rank order.
    swept = {r["groups"]: r["ranks"] for r in rows if r["collective"] == "all_reduce"}
    assert swept == {
        "tp=ep": [[0, 1], [2, 3]],
        "dp=expert_dp=expert_tp_dp": [[0, 2], [1, 3]],
        "tp_dp": [[0, 1, 2, 3]],
    }


def test_stages_with_other_rounds_take_part_where_they_have_them(tmp_path: Path) -> None:
    """Two stages of one rank each with their own traffic: a plan recorded on rank 1 has a round more."""
    path = tmp_path / "traffic.json"
    rounds = [{"gather": [[5]], "scatter": [[6]]}]
    entries = [{"expert": False, "dtype": "bf16", "ranks": [r], "rounds": rounds * (r + 1)} for r in (0, 1)]
    path.write_text(json.dumps({"version": 1, "exchanges": entries}))
    settings = LinkSettings(
        pp=2,
        traffic=path,
        groups=("tp_dp", "pp"),
        collectives=(),
        sweep=QUICK,
        pair_bytes=0,
        json=tmp_path / "links.json",
    )
    with pytest.raises(ValueError, match="--groups: got tp_dp, which has one rank"):
        links_command.prepare(settings, 2)
    # The whole world exchanges in one group of two, and in a second round with another plan's rounds.
    matrix = [[1, 2], [3, 4]]
    pair = {"expert": False, "dtype": "bf16", "ranks": [0, 1], "rounds": [{"gather": matrix, "scatter": matrix}]}
    other = {**pair, "ranks": [2, 3], "rounds": pair["rounds"] * 2}
    path.write_text(json.dumps({"version": 1, "exchanges": [pair, other]}))
    results = run_ranks(measure, 4, replace(settings, groups=("tp_dp",)))
    assert [code for code, _, _ in results] == [0] * 4
    rows = rows_of(tmp_path / "links.json")
    assert [(r["label"], r["ranks"]) for r in rows] == [
        ("dense round 0 gather", [[0, 1], [2, 3]]),
        ("dense round 0 scatter", [[0, 1], [2, 3]]),
        ("dense round 1 gather", [[2, 3]]),
        ("dense round 1 scatter", [[2, 3]]),
    ]
    # Rank 1 sends 3 + 4 elements of 2 bytes, of which 3 to rank 0.
    assert (rows[0]["size_bytes"], rows[0]["count"], rows[0]["sent_bytes"]) == (14, 7, [[4, 6], [4, 6]])
    assert [us is None for us in rows[2]["out_of_place"]["rank_us"]] == [True, True, False, False]


def test_a_broken_collective_is_found(tmp_path: Path) -> None:
    settings = LinkSettings(sweep=replace(QUICK, max_bytes=1024), pair_bytes=0, json=tmp_path / "links.json")
    results = run_ranks(measure, 2, settings, True)
    assert [code for code, _, _ in results] == [1, 1]
    for found in rows_of(tmp_path / "links.json"):
        for placement in ("out_of_place", "in_place"):
            assert found[placement] is None or found[placement]["wrong"] == 1, found["collective"]
    assert results[0][1].count("FAILED") == len(SWEPT)


def differ(rank: int, world_size: int) -> tuple[int, str, str]:
    return measure(rank, world_size, LinkSettings(sweep=replace(QUICK, iterations=1 + rank)))


def test_ranks_with_other_settings_are_refused() -> None:
    results = run_ranks(differ, 2)
    assert [code for code, _, _ in results] == [2, 2]
    assert results[0][2] == "links: ranks [1] have other settings than rank 0; start all with the same command line\n"


def test_a_full_disk_loses_nothing_that_is_printed() -> None:
    """/dev/full refuses every byte."""
    settings = LinkSettings(
        sweep=replace(QUICK, max_bytes=1024), collectives=("all_reduce", "send_recv"), json=Path("/dev/full")
    )
    ((code, out, err),) = run_ranks(measure, 1, settings)
    assert code == 1 and "No space left on device" in err
    # A rank alone sends nothing to itself.
    assert "# all_reduce over world: 1 group of 1 ranks: [0]" in out and "send_recv" not in out


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "0"], "--tp: got 0, expected a positive integer"),
        (["--tp", "3"], "--tp x --pp: got 3 x 1, expected a divisor of the 4 ranks"),
        (["--ep", "3"], "ep x etp: got 3 x 1"),
        (["--instances", "3"], "instances: got 3, expected a divisor of dp = 4"),
        (["--groups", "tp"], "--groups: got tp, which has one rank in this layout"),
        (["-b", "8"], "--min-bytes: got 8, expected at least 16"),
        (["-b", "2M", "-e", "1M"], "--max-bytes: got 1048576, expected at least 2097152"),
        (["-f", "1"], "--factor: got 1, expected at least 2"),
        (["-n", "0"], "--iterations: got 0, expected at least 1"),
        (["-w", "-1"], "--warmup: got -1, expected at least 0"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--backend", "nccl"], "--backend: got nccl, expected gloo, since torch finds no CUDA device here"),
        (["--model", "llama3-8b", "--groups", "dp"], "--model: got it for groups dp, expected tp_dp or expert_tp_dp"),
        (["--model", "gpt-5"], "no built-in model"),
        (["--model", "llama3-8b", "--exchange-dtype", "fp8"], "exchange_dtype: got 'fp8'"),
        (["--exchange-dtype", "bf16"], "--exchange-dtype: got bf16, expected it with --model only"),
        (["--save-traffic", "t.json"], "--save-traffic: got t.json, expected it with --model only"),
        (["--traffic", "nowhere.json"], "--traffic: cannot read nowhere.json"),
        (["--traffic", "a", "--model", "b"], "--model, --traffic: got both"),
        (["--json", "/nowhere/links.json"], "--json: got /nowhere/links.json, expected a file in a directory that"),
        (["--plot", "/"], "--plot: got /, expected a file"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused on every rank before a process group is made: here there is nobody to make one with."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main(["links", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not dist.is_initialized()


@pytest.mark.parametrize("text", ["", "x", "-1", "1T", "nan", "inf"])
def test_bad_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["links", f"--max-bytes={text}"])
    assert "expected a size in bytes such as 8, 64K or 1G" in capsys.readouterr().err


def test_plan_of_another_group_is_refused(model: str) -> None:
    layout, settings = Layout(dp=2), PlanSettings()
    ((layers, bucket_size),) = distinct_stages(load_model(model), layout, settings)
    ((_, _, (plan,)),) = stage_plans(stage_kinds(layers, layout, settings), settings, bucket_size)
    with pytest.raises(ValueError, match="ranks: got 3, expected the plan's 2"):
        plan_traffic(plan, expert=False, ranks=range(3), dtype="bf16")
