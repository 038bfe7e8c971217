"""--muon-profile: bytes as planned, training unharmed, traces that are valid, and faults that harm nothing."""

from __future__ import annotations

import errno
import io
import os
import resource
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jsonschema
import pytest
import torch
import torch.distributed as dist

from megatron_muon.exchange.phases import BUSY, LABELS
from megatron_muon.observe.nvml import Sample
from megatron_muon.observe.timing.steps import RankStep, summarize_step
from megatron_muon.observe.timing.trace import file_name, read_trace
from megatron_muon.profile.command import main
from tests.checkpoint_runs import EXACT, build
from tests.distributed import RankError, run_ranks
from tests.models import Layout
from tests.observe.test_step_metrics import Writer, count_collectives
from tests.plans import FREE, traffic
from tests.trace_schema import SCHEMA, load_events

STEPS = 4
TWO = Layout(2)
FOUR = Layout(4, tp=2, sequence_parallel=True, etp=1)
Fault = Literal["unwritable", "full disk", "clock", "dies", "gpu"]


@dataclass
class Session:
    """What a rank saw of a run.

    Attributes:
        pieces: What it stores at the end.
        collectives: Of each step, by name.
        sent: Of each step, bytes to other ranks in `all_to_all_single`s that were asynchronous, by their arguments.
        planned: Bytes of the exchange and of teams that the plans' traffic says.
        watched: Whether a step leaves something behind.
        printed: Standard output.
        errors: Standard error.
        scalars: What the rank's writer got.
        bounds: Of each step, the monotonic clock before and after, in microseconds.
    """

    pieces: Any
    collectives: list[dict[str, int]]
    sent: list[int]
    planned: tuple[int, int]
    watched: bool
    printed: str
    errors: str
    scalars: dict[str, float]
    bounds: list[tuple[float, float]]


def session(
    rank: int,
    world_size: int,
    layout: Layout,
    settings: dict[str, Any],
    fault: Fault | None = None,
    teams: bool = False,
    board: str = "",
) -> Session:
    """`STEPS` steps with a fault on rank 1; `board` is Megatron's TensorBoard directory."""
    from megatron.training import global_vars

    from megatron_muon.plan.build import CostModel

    writer = Writer()
    if rank == world_size - 1:
        global_vars._GLOBAL_TENSORBOARD_WRITER = writer
    if board:
        global_vars._GLOBAL_ARGS = SimpleNamespace(tensorboard_dir=board)
    if teams:
        # Talking costs nothing, so that every matrix is shared.
        CostModel.for_device = lambda device_type, links=None: replace(FREE, device_type=device_type)  # type: ignore[method-assign]
    if fault == "clock":
        time.time = lambda: 1e9 - 1e6 * rank  # set back by days
        time.time_ns = lambda: 10**18
    if fault == "gpu":
        from megatron_muon.megatron.log import profiling

        profiling.open_current_device = lambda: (StandInGPU(rank), "")  # type: ignore[assignment]
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        run = build("moe", layout, muon=replace(EXACT, **settings))
        counts, sent = count_collectives(), count_bytes()
        seen: dict[str, list[Any]] = dict(collectives=[], sent=[], bounds=[])
        for step in range(STEPS):
            if fault == "full disk" and rank == 1 and step == 2:
                fill_disk(Path(settings["profile_dir"]) / file_name(1), writer)
            if fault == "dies" and rank == 1 and step == 3:
                end_in_newton_schulz()
            before, bytes_before, begun = dict(counts), sent[0], time.perf_counter_ns() / 1e3
            run.train(1)
            seen["bounds"].append((begun, time.perf_counter_ns() / 1e3))
            seen["collectives"].append({name: counts[name] - before[name] for name in counts})
            seen["sent"].append(sent[0] - bytes_before)
        if run.optimizer.profiler is not None:
            run.optimizer.profiler.close()
            run.optimizer.profiler.close()
    exchanges = [part.optimizer.exchange for part in run.optimizer.chained_optimizers if part.kind == "muon"]
    return Session(
        pieces=run.pieces(),
        planned=(sum(map(exchange_bytes, exchanges)), sum(map(team_bytes, exchanges))),
        watched=run.optimizer.profiler is not None or any(e.watch is not LABELS for e in exchanges),
        printed=printed.getvalue(),
        errors=errors.getvalue(),
        scalars=writer.scalars,
        **seen,
    )


class StandInGPU:
    """What `NvmlDevice` is to the profiler. Rank 1 is hot and slow."""

    def __init__(self, rank: int) -> None:
        self.rank, self.seconds = rank, 0

    def sample(self) -> Sample:
        self.seconds += 1
        hot = 0x41 * self.rank
        return {
            "time_ns": self.seconds * 10**9,
            "power_mw": 400_000,
            "sm_clock_mhz": 1980 - 500 * self.rank,
            "throttle_reasons": hot,
        }


def count_bytes() -> list[int]:
    """One number: bytes that this rank's all-to-alls have sent to other ranks, exchange's and teams'."""
    total, original = [0], dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        # Megatron's own, of tokens, are called with names.
        if len(args) == 4 and kwargs.get("async_op"):
            _, send, _, splits = args
            total[0] += (sum(splits) - splits[dist.get_rank(kwargs["group"])]) * send.element_size()
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    return total


def exchange_bytes(exchange: Any) -> int:
    """Sent to others by the plan's traffic, element by element of its rounds' matrices."""
    total = 0
    for round_index in range(exchange.num_rounds):
        for scatter in (False, True):
            row = traffic(exchange.plan, round_index, scatter=scatter)[exchange.rank]
            total += sum(numel for peer, numel in enumerate(row) if peer != exchange.rank)
    return total * exchange.dtype.itemsize


def team_bytes(exchange: Any) -> int:
    return sum(part[exchange.rank] for part in exchange.plan.team_sent_bytes())


def fill_disk(trace: Path, writer: Writer) -> None:
    """Lets this file grow by a part of a step: the next one is refused in the middle, as on a full disk.

    TensorBoard's is full altogether.
    """

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.add_scalar = refuse  # type: ignore[method-assign]
    size = trace.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 8, resource.RLIM_INFINITY))


def end_in_newton_schulz() -> None:
    from megatron_muon.optimizer import step

    step.orthogonalized_update = lambda *args: os._exit(1)


def settings(directory: Path, every: int = 2) -> dict[str, Any]:
    return dict(profile=every, profile_dir=str(directory))


@pytest.fixture(scope="module")
def plain() -> list[Session]:
    """Two ranks without profiling."""
    return run_ranks(session, 2, TWO, {})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Session], Path]:
    directory = tmp_path_factory.mktemp("two") / "made" / "for it"
    return run_ranks(session, 2, TWO, settings(directory)), directory


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Session], Path]:
    """Four ranks, all of whose matrices are shared by teams."""
    directory = tmp_path_factory.mktemp("four")
    return run_ranks(session, 4, FOUR, settings(directory), None, True), directory


def records(directory: Path, rank: int) -> dict[int, RankStep]:
    return read_trace(directory / file_name(rank)).records()


def sent_by(record: RankStep) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes (of the exchange, of teams): as counted, and as planned."""
    n = record.numbers
    return (n["sent_bytes"], n["team_bytes"]), (n["planned_bytes"], n["planned_team_bytes"])


def same_training(some: list[Session], others: list[Session]) -> bool:
    return all(
        a[:2] == b[:2] and torch.equal(a[4], b[4])
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one.pieces, other.pieces, strict=True)
    )


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_bytes_are_the_plans(ranks: str, request: pytest.FixtureRequest) -> None:
    sessions, directory = request.getfixturevalue(ranks)
    for rank, seen in enumerate(sessions):
        found = records(directory, rank)
        assert sorted(found) == [2, 4]
        for step, record in found.items():
            counted, planned = sent_by(record)
            assert counted == planned == seen.planned
            # And those that the collectives were called with.
            assert sum(counted) == seen.sent[step - 1] > 0
            assert sum(transfer.sent_bytes for transfer in record.transfers) == counted[0]
    assert (sum(seen.planned[1] for seen in sessions) > 0) == (ranks == "four")


def test_training_is_bitwise_the_same(plain: list[Session], two: tuple[list[Session], Path]) -> None:
    assert same_training(plain, two[0])
    for without, profiled in zip(plain, two[0], strict=True):
        # Steps that are not due issue what they always do; the others, one gather of numbers more.
        assert [c == p for c, p in zip(without.collectives, profiled.collectives)] == [True, False, True, False]
        for step in (1, 3):
            more = {n: c - without.collectives[step][n] for n, c in profiled.collectives[step].items()}
            assert {name: count for name, count in more.items() if count} == {"all_gather_object": 1}
    assert not any(seen.watched for seen in plain)


def test_a_flag_left_unset_leaves_nothing_behind(plain: list[Session]) -> None:
    assert all(not s.printed.count("Optimizer step") and not s.scalars and not s.watched for s in plain)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_traces_are_valid(ranks: str, request: pytest.FixtureRequest) -> None:
    sessions, directory = request.getfixturevalue(ranks)
    for rank, seen in enumerate(sessions):
        events = load_events(directory / file_name(rank))
        jsonschema.validate(events, SCHEMA)
        steps = [e for e in events if e.get("cat") == "step"]
        assert [e["name"] for e in steps] == ["step 2", "step 4"]
        for event in steps:
            begun, ended = seen.bounds[event["args"]["record"]["step"] - 1]
            assert begun <= event["ts"] <= event["ts"] + event["dur"] <= ended
        inside = [e for e in events if e["ph"] == "X" and e not in steps]
        for whole in steps:
            within = [e for e in inside if e["args"]["step"] == whole["args"]["step"]]
            names = {e["name"] for e in within}
            assert {"momentum", "pack", "wait", "unpack", "newton_schulz", "apply", "param_gather"} <= names
            assert ("teams" in names) == (ranks == "four")
            # One after the other, within the step. Times are decimal microseconds of nanoseconds.
            at = whole["ts"]
            for event in sorted(within, key=lambda e: e["ts"]):
                assert event["ts"] >= at - 1e-3
                at = event["ts"] + event["dur"]
            assert at <= whole["ts"] + whole["dur"] + 1e-3
        begun_ids = [e["id"] for e in events if e["ph"] == "b"]
        assert len(set(begun_ids)) == len(begun_ids) > 0
        assert begun_ids == [e["id"] for e in events if e["ph"] == "e"]


def test_log_and_writers(two: tuple[list[Session], Path]) -> None:
    sessions, directory = two
    first, last = sessions
    assert first.printed.count("Optimizer step, step") == 2 and last.printed.count("Optimizer step") == 0
    # Once, although asked twice.
    assert first.printed.count("Optimizer step, median of 2 steps") == first.printed.count("Bottleneck: ") == 1
    assert "bytes as planned" in first.printed and "UNPLANNED" not in first.printed
    assert first.errors == last.errors == "" and first.scalars == {}
    summary = summarize_step([records(directory, rank)[4] for rank in range(2)])
    assert last.scalars["muon_profile/sent_bytes_max"] == summary["sent_bytes"].largest > 0
    assert last.scalars["muon_profile/newton_schulz_ms_max"] == summary["newton_schulz_ms"].largest
    assert last.scalars["muon_profile/exchange_hidden_share"] == summary.hidden_share


LAYOUTS = {
    "one rank": Layout(1),
    "pp2": Layout(2, pp=2),
    "ep2 dp2": Layout(4, ep=2),
    "instances": Layout(4, instances=2),
    "overlap": Layout(2, ddp=dict(overlap_grad_reduce=True, overlap_param_gather=True)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    plain = run_ranks(session, layout.world_size, layout, {})
    sessions = run_ranks(session, layout.world_size, layout, settings(tmp_path))
    assert same_training(plain, sessions)
    for rank, seen in enumerate(sessions):
        found = records(tmp_path, rank)
        jsonschema.validate(load_events(tmp_path / file_name(rank)), SCHEMA)
        assert sorted(found) == [2, 4]
        for step, record in found.items():
            counted, _ = sent_by(record)
            assert counted == seen.planned and sum(counted) == seen.sent[step - 1]
            assert ("param_gather_ms" in record.numbers) == (name in ("ep2 dp2", "instances"))
    assert main(["report", str(tmp_path)]) == 0


def test_what_the_driver_reports(tmp_path: Path, plain: list[Session]) -> None:
    """Sampled before and after the phases of a profiled step, on a stand-in for the device."""
    sessions = run_ranks(session, 2, TWO, settings(tmp_path), "gpu")
    assert same_training(plain, sessions)
    for rank in range(2):
        for record in records(tmp_path, rank).values():
            assert record.numbers["power_w"] == 400.0
            assert record.throttled == (("hardware thermal",) if rank else ())
    printed = " ".join(sessions[0].printed.split())
    assert printed.count("400 W a GPU; SM clocks from 1480 MHz") == 3
    assert printed.count("SLOWED DOWN rank 1: hardware thermal") == 3
    scalars = {name.partition("/")[2]: value for name, value in sessions[1].scalars.items()}
    assert (scalars["power_w_mean"], scalars["sm_clock_mhz_min"], scalars["throttled_ranks"]) == (400.0, 1480.0, 1)


def test_metrics_of_a_profiled_step_are_a_phase_of_their_own(tmp_path: Path) -> None:
    """Steps 2 and 4 are profiled, step 4 is logged as well."""
    both = {**settings(tmp_path), "log_interval": 4, "metrics_dir": str(tmp_path)}
    run_ranks(session, 2, TWO, both)
    for rank in range(2):
        found = records(tmp_path, rank)
        logged = found[4].numbers
        assert logged["metrics_ms"] > 0 and "metrics_ms" not in found[2].numbers
        assert sum(logged.get(f"{name}_ms", 0.0) for name in BUSY) <= logged["wall_ms"]


def test_without_a_driver_one_line_says_so(two: tuple[list[Session], Path]) -> None:
    sessions, directory = two
    assert [s.printed.count("megatron_muon: NVML: ") for s in sessions] == [1, 0]
    assert all("power_w" not in record.numbers for rank in range(2) for record in records(directory, rank).values())


# Faults.


def test_an_unwritable_directory_is_said_once(tmp_path: Path, plain: list[Session]) -> None:
    (tmp_path / "file").write_text("")
    sessions = run_ranks(session, 2, TWO, settings(tmp_path / "file" / "below"))
    assert same_training(plain, sessions)
    said = [line for s in sessions for line in s.errors.splitlines() if "megatron_muon" in line]
    assert len(said) == 1 and "rank 0 cannot write its profile to" in said[0] and "(and 1 other ranks)" in said[0]
    # What needs no file is still there.
    assert sessions[0].printed.count("Optimizer step, step") == 2 and "muon_profile/step_ms_max" in sessions[1].scalars


def test_a_disk_that_fills_up_leaves_the_steps_before(tmp_path: Path, plain: list[Session]) -> None:
    sessions = run_ranks(session, 2, TWO, settings(tmp_path, every=1), "full disk")
    assert same_training(plain, sessions)
    assert sessions[0].errors == "" and sessions[1].errors.count("rank 1 cannot write its profile") == 1
    assert sessions[1].errors.count("rank 1 cannot log its profile") == 1
    trace = read_trace(tmp_path / file_name(1))
    jsonschema.validate(load_events(trace.path), SCHEMA)
    assert not trace.broken and sorted(trace.records()) == [1, 2]
    assert sorted(records(tmp_path, 0)) == [1, 2, 3, 4]


def test_a_clock_that_is_set_is_not_looked_at(tmp_path: Path, plain: list[Session]) -> None:
    """And without a directory of their own, traces go to TensorBoard's."""
    sessions = run_ranks(session, 2, TWO, dict(profile=2), "clock", False, str(tmp_path))
    assert same_training(plain, sessions)
    for rank, seen in enumerate(sessions):
        events = list(read_trace(tmp_path / "muon_profile" / file_name(rank)).steps())
        assert len(events) == 2
        for event in events:
            begun, ended = seen.bounds[event["args"]["record"]["step"] - 1]
            assert begun <= event["ts"] <= event["args"]["sync_us"] <= ended


def test_a_rank_that_dies_ends_the_run_and_leaves_whole_traces(tmp_path: Path) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(session, 2, TWO, settings(tmp_path, every=1), "dies")
    # The other one neither hangs nor hides what happened: its collective fails, as without a profile.
    assert error.value.errors[1][0] == "EOFError" and error.value.errors[0][0] == "RuntimeError"
    for rank in range(2):
        trace = read_trace(tmp_path / file_name(rank))
        assert not trace.broken and sorted(trace.records()) == [1, 2, 3]


def test_links_that_cannot_be_read_are_refused_on_every_rank(tmp_path: Path) -> None:
    missing = str(tmp_path / "links.json")
    with pytest.raises(RankError) as error:
        run_ranks(session, 2, TWO, {**settings(tmp_path), "links": missing})
    assert sorted(error.value.errors) == [0, 1]
    for name, message, _ in error.value.errors.values():
        assert name == "ValueError" and message.startswith(f"--muon-links {missing}: ")
    assert not list(tmp_path.iterdir())
