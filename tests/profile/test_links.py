"""`links`: bytes as planned, bandwidths by hand, slow ranks named, and the planner's file, on Gloo ranks."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_muon.config import TORCH_DTYPES, MuonConfig
from megatron_muon.estimate.groups import PlanSettings, distinct_stages, matrix_groups, stage_plans
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout
from megatron_muon.observe.console import as_text
from megatron_muon.plan.build import CostModel
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks, load_links
from megatron_muon.profile import links_command
from megatron_muon.profile.command import main
from megatron_muon.profile.links_command import Found, Request, links_of, show
from megatron_muon.profile.measure import Meter, Timing
from megatron_muon.profile.pairs import Pairs, tournament
from megatron_muon.profile.process_groups import (
    Groups,
    choose_kinds,
    group_sizes,
    layout_for,
    make_groups,
    release_groups,
)
from megatron_muon.profile.settings import LinkSettings
from megatron_muon.profile.traffic import SentBytes, Traffic, busiest_bytes, model_traffic, plan_traffic
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
QUICK = LinkSettings(min_bytes=1 << 10, max_bytes=4 << 10, warmup=1, iterations=2, pair_bytes=0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL)
    return str(path)


# -- formulas --------------------------------------------------------------------------------------------------------


def timing(what: str, rank_us: tuple[float | None, ...], sizes: tuple[int, ...] = (8_000_000, 8_000_000)) -> Timing:
    """Over two groups of two ranks."""
    return Timing("dp", ((0, 2), (1, 3)), what, sizes, rank_us)


def test_bandwidths_by_hand() -> None:
    """8 MB, slowest rank 1 with 400 us: 20 GB/s, half of it on the bus; the other group has 200 us."""
    found = timing("all_to_all", (200.0, 400.0, 160.0, 250.0))
    assert found.slowest_us == 400.0 and found.algbw == pytest.approx(20.0)
    assert found.group_busbw == pytest.approx((20.0, 10.0))
    # A group that moves less has less.
    assert replace(found, sizes_bytes=(8_000_000, 2_000_000)).group_busbw == pytest.approx((20.0, 2.5))


def test_uneven_all_to_all_by_hand() -> None:
    """Rank 1 owns most: it receives 5 + 1 + 7 bytes, the most that any rank sends or receives."""
    matrix = ((2, 5, 0), (3, 1, 4), (0, 7, 1))
    assert busiest_bytes(matrix) == 13
    assert busiest_bytes(((4, 4), (4, 4))) == 8 and busiest_bytes(()) == 0


def test_sizes_of_a_sweep() -> None:
    settings = LinkSettings(min_bytes=1000, max_bytes=64_000)
    # Whole elements for each of three ranks: 1000 / 12, 4000 / 12, ...
    assert settings.counts(3) == [83, 333, 1333, 5333]


def test_the_planners_figures_by_hand(tmp_path: Path) -> None:
    """Two hosts of two ranks: tp lies within them, tp_dp and dp span them, of which Muon exchanges over tp_dp."""
    group = object()
    groups = [
        Groups(("tp",), ((0, 1), (2, 3)), group),  # type: ignore[arg-type]
        Groups(("dp",), ((0, 2), (1, 3)), group),  # type: ignore[arg-type]
        Groups(("tp_dp",), ((0, 1, 2, 3),), group),  # type: ignore[arg-type]
    ]
    timings = [
        Timing("tp", ((0, 1), (2, 3)), "all_to_all", (1000, 1000), (5.0, 6.0, 7.0, 8.0)),
        Timing("tp", ((0, 1), (2, 3)), "all_to_all", (8_000_000, 8_000_000), (100.0, 100.0, 200.0, 200.0)),
        Timing("tp", ((0, 1), (2, 3)), "dense transfer 0", (9_000_000, 9_000_000), (1.0, 1.0, 1.0, 1.0)),
        Timing("dp", ((0, 2), (1, 3)), "all_to_all", (8_000_000, 8_000_000), (1.0, 1.0, 1.0, 1.0)),
        Timing("tp_dp", ((0, 1, 2, 3),), "all_to_all", (1000,), (30.0, 31.0, 32.0, 33.0)),
        Timing("tp_dp", ((0, 1, 2, 3),), "all_to_all", (8_000_000,), (400.0, 300.0, 300.0, 300.0)),
    ]
    got = links_of(timings, groups, ["a", "a", "b", "b"], source="here", launch_us=4.5)
    # 8 MB * 1/2 in 200 us; 8 MB * 3/4 in 400 us.
    assert got == MeasuredLinks("here", LinkFigures(20.0, 8.0), LinkFigures(15.0, 33.0), 4.5)
    one_host = links_of(timings, groups, ["a"] * 4, source="here", launch_us=4.5)
    assert one_host.intra_node == LinkFigures(15.0, 33.0) and one_host.inter_node is None
    path = tmp_path / "links.json"
    path.write_text(json.dumps(got.to_json()))
    assert load_links(path) == got


# -- layouts and plans -----------------------------------------------------------------------------------------------


def test_layout_takes_what_is_left_for_data_parallelism() -> None:
    layout = layout_for(16, LinkSettings(tp=2, pp=2, ep=4, etp=1, instances=2))
    assert layout.dp == 4
    assert group_sizes(layout) == dict(
        world=16, tp=2, dp=2, tp_dp=4, pp=2, ep=4, expert_tp=1, expert_dp=1, expert_tp_dp=1
    )
    assert choose_kinds(layout, None) == ["tp", "dp", "tp_dp", "pp", "ep"]
    assert choose_kinds(layout_for(1, LinkSettings()), None) == ["world"]
    # Without expert parallelism experts have no groups of their own.
    assert choose_kinds(layout_for(4, LinkSettings(tp=2)), None) == ["tp", "dp", "tp_dp"]


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
        for plans in stage_plans(matrix_groups(layers, layout, settings, bucket_size)):
            planned += [plan for plan in plans for _ in range(len(stages) * layout.instances)]
    assert sorted(total_sent_bytes(t) for t in traffic) == sorted(
        tuple(4 * n for n in plan.sent_numel()) for plan in planned
    )
    assert sum(map(sum, (total_sent_bytes(t) for t in traffic))) > 0


def sent_bytes(matrix: SentBytes) -> tuple[int, ...]:
    """What each rank sends to other ranks."""
    return tuple(sum(row) - row[rank] for rank, row in enumerate(matrix))


def total_sent_bytes(traffic: Traffic) -> tuple[int, ...]:
    """What each rank sends to others in a step."""
    each = [sent_bytes(matrix) for matrix in traffic.transfers]
    return tuple(map(sum, zip(*each, strict=True)))


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
    found = Found((), rank, MeasuredLinks("here", None, None, 4.0))
    text = as_text(lambda to: show(found, Request(Layout(dp=4), (), ()), to), 80)
    assert "- median within a host: 3.5 GB/s each way\n- below 0.7 of the median: rank 3\n" in text
    assert next(line.split() for line in text.splitlines() if " - " in line) == ["0", "-", "3", "2", "0.57"]


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


def run_links(settings: LinkSettings) -> tuple[int, str, str]:
    """The exit code, and what this rank printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = links_command.run(settings)
    release_groups()
    return code, out.getvalue(), err.getvalue()


def traffic_of_a_run(world_size: int) -> list[Traffic]:
    """What the exchanges of a real optimizer send, this rank's."""
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer
    from tests.models import Layout as RunLayout
    from tests.models import initialize, make_chunks, optimizer_config, wrap

    layout, muon = RunLayout(world_size, tp=2, ep=2, etp=1), MuonConfig()
    initialize(layout)
    chunks = make_chunks("mla", layout, torch.bfloat16)
    tag_parameters(chunks, muon)
    optimizer = get_megatron_optimizer(optimizer_config(layout, torch.bfloat16), wrap(chunks, layout), muon=muon)
    own = []
    for part in optimizer.chained_optimizers:
        if part.kind == "muon":
            exchange = part.optimizer.exchange
            expert = any(not getattr(p, "allreduce", True) for buffer in part.buffers for p in buffer.params)
            ranks = dist.get_process_group_ranks(exchange.group)
            own.append(plan_traffic(exchange.plan, expert=expert, ranks=ranks, itemsize=exchange.dtype.itemsize))
    return own


def exchanged(rank: int, world_size: int, settings: LinkSettings) -> list[int]:
    """Bytes that a real exchange of the dense plan sends on this rank, of each all-to-all."""
    from megatron_muon.exchange.exchange import Exchange

    layout = layout_for(world_size, settings)
    planned = PlanSettings(
        muon=MuonConfig(exchange_dtype="fp32"),
        impl="local",
        cost=CostModel.for_device("cpu"),
        gpus_per_node=world_size,
    )
    ((layers, bucket_size),) = distinct_stages(load_model(str(settings.model)), layout, planned)
    # The dense matrices come first.
    (plan,), *_ = stage_plans(matrix_groups(layers, layout, planned, bucket_size))
    exchange = Exchange(plan, None, TORCH_DTYPES["fp32"], torch.device("cpu"))
    sent = [0]
    for transfer in range(exchange.wire.num_transfers):
        exchange.start(transfer)
        exchange.finish(transfer)
        sent.append(exchange.stats.bytes_sent)
    return [after - before for before, after in itertools.pairwise(sent)]


@dataclass
class OnRank:
    """What one of four ranks saw.

    Attributes:
        sent: Bytes of a real exchange, by all-to-all.
        found: What was measured with the same plan.
        uneven: Timings of two groups, of which the second has a transfer more.
        refused: `run`'s code and output if ranks have other settings.
        measured: `run`'s code and output otherwise.
        run: Traffic of a real optimizer.
    """

    sent: list[int]
    found: Found
    uneven: list[Timing]
    refused: tuple[int, str, str]
    measured: tuple[int, str, str]
    run: list[Traffic]


PAIR = ((1, 2), (3, 4))


def on_four_ranks(rank: int, world_size: int, settings: LinkSettings) -> OnRank:
    sent = exchanged(rank, world_size, settings)
    request = links_command.prepare(settings, world_size)
    found = links_command.measure(settings, request, torch.device("cpu"))
    (groups,) = (g for g in make_groups(request.layout, ["dp"]) if "dp" in g.kinds)
    one, two = (Traffic(False, ranks, (PAIR,) * n) for n, ranks in ((1, (0, 2)), (2, (1, 3))))
    uneven = list(Meter(settings, torch.device("cpu")).exchange(groups, [one, two], 100))
    release_groups()
    refused = run_links(replace(settings, iterations=1 + rank))
    measured = run_links(replace(settings, pair_bytes=4096))
    return OnRank(sent, found, uneven, refused, measured, traffic_of_a_run(world_size))


def test_on_four_ranks(tmp_path: Path, model: str) -> None:
    """TP2 x DP2 with experts over two ranks: real splits on Megatron's groups, slow pairs, and the planner's file."""
    path = tmp_path / "links.json"
    layout = Layout(dp=2, tp=2, ep=2, etp=1)
    settings = replace(QUICK, tp=2, ep=2, etp=1, model=model, exchange_dtype="fp32", transfers=100, json=path)
    results: list[OnRank] = run_ranks(on_four_ranks, 4, settings)

    # The exchange that is measured is the one that a real exchange does.
    timings = results[0].found.timings
    assert all(r.found.timings == timings for r in results)
    request = links_command.prepare(settings, 4)
    (dense,) = (t for t in request.traffic if not t.expert)
    replayed = [sent_bytes(matrix) for matrix in dense.transfers]
    assert [[step[rank] for step in replayed] for rank in range(4)] == [r.sent for r in results]
    # Routers are stored by both tensor-parallel ranks: one copy goes, two come back.
    assert sum(replayed[-1]) > sum(replayed[0]) > 0
    exchanges = [t for t in timings if "transfer" in t.what]
    assert [t.what for t in exchanges[:2]] == ["dense transfer 0", "dense transfer 1"]
    assert {(t.groups, t.ranks) for t in exchanges if t.what.startswith("dense")} == {("tp_dp", ((0, 1, 2, 3),))}
    assert {t.ranks for t in exchanges if t.what.startswith("expert")} == {((0, 2), (1, 3))}
    assert [t.sizes_bytes for t in exchanges[:2]] == [(busiest_bytes(m),) for m in dense.transfers[:2]]
    # Groups of the same ranks are measured once, in Megatron's rank order, at both sizes.
    swept = [t for t in timings if t.what == "all_to_all"]
    assert {t.groups: t.ranks for t in swept} == {
        "tp=ep": ((0, 1), (2, 3)),
        "dp=expert_dp=expert_tp_dp": ((0, 2), (1, 3)),
        "tp_dp": ((0, 1, 2, 3),),
    }
    assert [t.sizes_bytes[0] for t in swept] == [1024, 4096] * 3
    assert all(us is not None and us > 0 for t in timings for us in t.rank_us)

    # Groups with fewer transfers wait in the others.
    uneven = results[0].uneven
    assert [(t.what, t.ranks) for t in uneven] == [
        ("dense transfer 0", ((0, 2), (1, 3))),
        ("dense transfer 1", ((1, 3),)),
    ]
    assert uneven[0].sizes_bytes == (7, 7) and [us is None for us in uneven[1].rank_us] == [True, False, True, False]

    message = "megatron_muon links: ranks [1, 2, 3] have other settings than rank 0; start all with the same command"
    assert [r.refused[0] for r in results] == [2] * 4 and results[0].refused[2].startswith(message)
    assert [r.measured[0] for r in results] == [0] * 4 and all(r.measured[1:] == ("", "") for r in results[1:])
    assert "4 x CPU, gloo" in results[0].measured[1] and "tp=ep: 2 groups at the same time" in results[0].measured[1]
    assert "- below 0.7 of the median: " in results[0].measured[1] and results[0].measured[2] == ""
    links = load_links(path)
    assert links.intra_node is not None and links.intra_node.bandwidth_gb_per_s > 0 and links.inter_node is None
    assert links.launch_us is not None and links.launch_us > 0

    # What a real optimizer exchanges is what is planned from the model's configuration.
    (tmp_path / "config.json").write_text(json.dumps(HF_MLA))
    planned = model_traffic(str(tmp_path / "config.json"), layout, MuonConfig(), device_type="cpu", ranks_per_node=4)
    assert [t.expert for t in planned] == [False, True, True]
    assert sorted({t for r in results for t in r.run}, key=lambda t: (t.expert, t.ranks)) == planned


def test_a_full_disk_loses_nothing_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process without torchrun; /dev/full refuses every byte."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("WORLD_SIZE")
    code, out, err = run_links(replace(QUICK, json=Path("/dev/full")))
    assert code == 1 and "No space left on device" in err and "world: 1 group, [0]" in out
    assert not dist.is_initialized()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables_fit(width: int) -> None:
    timings = tuple(
        Timing("dp=expert_dp=expert_tp_dp", ((0, 2), (1, 3)), what, (16_777_216, 16_777_216), (1e5, 1e5, 2e5, 3e5))
        for what in ("all_to_all", "expert transfer 100")
    )
    found = Found(timings, pairs_of({}), MeasuredLinks("x", LinkFigures(1.0, 2.0), None, 4.0))
    text = as_text(lambda to: show(found, Request(Layout(dp=4), (), ()), to), width)
    assert max(map(len, text.splitlines())) <= width and text.count("300000.0") == 2 and "16777216" in text


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
        (["-n", "0"], "--iterations: got 0, expected at least 1"),
        (["-w", "-1"], "--warmup: got -1, expected at least 0"),
        (["--transfers", "0"], "--transfers: got 0"),
        (["--backend", "nccl"], "--backend: got nccl, expected gloo, since torch finds no CUDA device here"),
        (["--model", "llama3-8b", "--groups", "dp"], "--model: got it for groups dp, expected tp_dp or expert_tp_dp"),
        (["--model", "gpt-5"], "no built-in model"),
        (["--model", "llama3-8b", "--exchange-dtype", "fp8"], "exchange_dtype: got 'fp8'"),
        (["--exchange-dtype", "bf16"], "--exchange-dtype: got bf16, expected it together with --model only"),
        (["--json", "/nowhere/links.json"], "--json: got /nowhere/links.json, expected a file in a directory that"),
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
    ((plan,),) = stage_plans(matrix_groups(layers, layout, settings, bucket_size))
    with pytest.raises(ValueError, match="ranks: got 3, expected the plan's 2"):
        plan_traffic(plan, expert=False, ranks=range(3), itemsize=2)
