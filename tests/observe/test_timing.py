"""Numbers of profiled steps by hand, recordings, and traces that are merged."""

from __future__ import annotations

import json
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from megatron_muon.exchange.phases import BUSY, FLIGHTS
from megatron_muon.observe.timing import recording as recording_module
from megatron_muon.observe.timing.findings import PARTS
from megatron_muon.observe.timing.peaks import arithmetic_ceiling, link_ceiling
from megatron_muon.observe.timing.recording import CudaClock, HostClock, Recording
from megatron_muon.observe.timing.shown import SHOWN, part_phases
from megatron_muon.observe.timing.steps import Spread, Transfer, median_step, rank_step, scalars, summarize_step
from megatron_muon.observe.timing.table import run_summary
from megatron_muon.observe.timing.trace import TraceFile, file_name, read_trace
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks
from megatron_muon.profile.merge import merge
from tests.profiles import KNOWN, MS, PHASES, TRANSFERS, facts, rank_record, recorded, write_traces
from tests.trace_schema import SCHEMA


def test_numbers_of_a_rank_by_hand() -> None:
    got = rank_step(recorded(10**15), KNOWN, {"dense": 0}, step=3, rank=1)
    # In flight from 1 to 5 and from 6 to 8; waited from 4 to 5 and from 6 to 8.
    expected = rank_record(1, 3)
    assert got.numbers == pytest.approx(expected.numbers)
    assert replace(got, numbers={}) == replace(expected, numbers={})


def test_every_phase_is_shown() -> None:
    """In the order of rows, and each in one part of the findings."""
    assert tuple(SHOWN) == (*BUSY, "other", *FLIGHTS)
    assert sorted(name for part in PARTS for name in part_phases(part)) == sorted((*BUSY, "other"))
    assert len({phase.color for phase in SHOWN.values()}) == len(SHOWN)


def test_numbers_of_a_step_by_hand() -> None:
    late = rank_record(
        1,
        3,
        wall_ms=12.0,
        phases={"momentum": 1.0, "newton_schulz": 6.0, "wait": 1.0},
        in_flight_ms=4.0,
        exposed_ms=1.0,
        transfers=(replace(TRANSFERS[0], ms=1.0, sent_bytes=4_000_000), replace(TRANSFERS[1], ms=3.0)),
        sent_bytes=10_000_000,
    )
    got = summarize_step([rank_record(0, 3), late])
    assert got["wall_ms"] == Spread(11.0, 12.0, 1) and got["ns_ms"] == Spread(4.5, 6.0, 1)
    assert got["apply_ms"] == Spread(0.5, 1.0, 0) and got["apply_ms"].imbalance == 2.0
    # Half of 6 ms and a quarter of 4 ms are lost.
    assert got.hidden_share == pytest.approx(1 - 4.0 / 10.0)
    # The gather takes what its last rank sees of it; 8 MB, the most that a rank sends, in 1 ms.
    assert got.rates["gather"] == pytest.approx(8e9)
    assert got.rates["scatter"] == pytest.approx(3e9)
    # 12 GFLOP in 3 + 6 ms.
    assert got.rates["newton_schulz"] == pytest.approx(12e9 / 9e-3)
    assert got.unplanned_bytes == 4_000_000
    assert got.share(["newton_schulz"]) == pytest.approx(4.5 / 11)
    assert got.share(["other", "apply"]) == pytest.approx((2.0 + 0.5) / 11)
    assert scalars(got)["gather_gb_per_s"] == pytest.approx(8.0)
    with pytest.raises(ValueError, match="got steps \\[3, 4\\]"):
        summarize_step([rank_record(0, 3), rank_record(1, 4)])


def test_a_collective_that_moves_nothing_tells_nothing_of_links() -> None:
    empty = Transfer("experts 0 gather 0", "gather", 0, 5.0)
    records = [rank_record(rank, 3) for rank in range(2)]
    got = summarize_step([replace(r, transfers=(*r.transfers, empty)) for r in records])
    for summary in (got, summarize_step(records)):
        assert (summary.rates["gather"], summary.message_bytes["gather"]) == (2e9, 8e6)
    # But ranks may wait for it.
    assert got["gather_ms"].mean == 9.0


def test_medians_leave_the_first_step_out() -> None:
    steps = [summarize_step([rank_record(0, step, wall_ms=wall)]) for step, wall in ((1, 900.0), (2, 10.0), (3, 14.0))]
    got = median_step([*steps, summarize_step([rank_record(0, 4, wall_ms=11.0)])])
    assert (got.step, got.steps, got["wall_ms"].largest) == (4, 3, 11.0)
    assert median_step(steps[:1])["wall_ms"].largest == 900.0


def test_a_phase_of_few_steps_is_not_in_the_median_step() -> None:
    """Metrics of one profiled step in three, and of two in three."""
    for logged, found in ((1, False), (2, True)):
        phases = [{**PHASES, "metrics": 5.0}] * logged + [PHASES] * (3 - logged)
        steps = [summarize_step([rank_record(0, 2 + at, phases=each)]) for at, each in enumerate(phases)]
        assert ("metrics_ms" in median_step(steps).spreads) == found


def test_devices_of_a_step_by_hand() -> None:
    """NVML knows two of three ranks' devices: power is their mean, the clock the lower one."""
    hot = rank_record(2, 3, power_w=700.0, sm_clock_mhz=1200, throttled=("hardware thermal",))
    got = summarize_step([rank_record(0, 3), rank_record(1, 3, power_w=500.0, sm_clock_mhz=1980), hot])
    assert (got["power_w"], got.sm_clock_mhz) == (Spread(600.0, 700.0, 2), 1200)
    assert got.throttled == ("rank 2: hardware thermal",)
    found = scalars(median_step([got]))
    assert (found["power_w_mean"], found["sm_clock_mhz_min"], found["throttled_ranks"]) == (600.0, 1200, 1)


def test_events_of_a_gpu_are_brought_to_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in device whose clock runs from another zero: 7 s are 100 ns after what the host reads at the anchor."""
    now = iter((1.0, 1.5, 7.0))
    synchronized: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = next(now)

        def synchronize(self) -> None:
            synchronized.append(self)

        def elapsed_time(self, other: Event) -> float:
            return other.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(recording_module.time, "perf_counter_ns", lambda: 10**9)
    clock = CudaClock(torch.device("cuda"))
    marks = [clock.mark(), clock.mark()]
    assert not synchronized, "a mark waits for nothing"
    assert clock.read(marks) == [10**9 - 6_000_000, 10**9 - 5_500_000]


def test_ceilings() -> None:
    flops = arithmetic_ceiling(torch.device("cpu"), torch.float32)
    assert flops.source == "measured: float32 product of 768 rows" and flops.per_s > 1e8
    assert link_ceiling("NVIDIA H100 80GB HBM3", "cuda", one_node=True).per_s == 450e9
    assert link_ceiling("NVIDIA H100 80GB HBM3", "cuda", one_node=False).per_s == 50e9
    assert link_ceiling("x86_64", "cpu", one_node=True).source == "assumed"


def test_measured_links_come_first() -> None:
    links = MeasuredLinks("here", LinkFigures(310.0, 18.0), None, 4.0)
    got = link_ceiling("NVIDIA H100 80GB HBM3", "cuda", one_node=True, links=links)
    assert (got.per_s, got.source) == (310e9, "measured links")
    assert link_ceiling("NVIDIA H100 80GB HBM3", "cuda", one_node=False, links=links).per_s == 50e9


# Traces.


def test_hosts_clocks_are_aligned(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 4), 1: range(2, 4), 2: range(2, 4)}, hosts={0: "b", 1: "a", 2: "b"})
    merged = merge(tmp_path)
    begins = {
        rank: [event["ts"] for event in merged.aligned(rank) if event.get("cat") == "step"] for rank in merged.traces
    }
    # Rank 0's host is a day ahead of rank 1's; ranks begin 1 ms apart.
    assert begins[1] == [ts + 1e3 for ts in begins[0]] and begins[2] == [ts + 2e3 for ts in begins[0]]
    merged.write_trace(tmp_path / "all.json")
    content = json.loads((tmp_path / "all.json").read_text())
    jsonschema.validate(content, SCHEMA)
    assert sorted({event["pid"] for event in content}) == [0, 1, 2]


def test_what_a_dead_rank_leaves_is_used(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 5), 1: range(2, 5), 2: range(2, 5)}, run_facts=facts(world_size=4))
    broken = tmp_path / file_name(1)
    content = broken.read_text()
    # In the middle of the last step's record.
    broken.write_text(content[: content.rindex('"record"') + 40])
    merged = merge(tmp_path)
    assert merged.traces[1].broken and sorted(merged.traces[1].records()) == [2, 3]
    assert merged.traces[1].info["host"] == "host"
    assert [summary.step for summary in merged.summaries()] == [2, 3]
    assert merged.notes == [
        "1 of 4 ranks have no trace here: 3",
        "rank 1's trace ends in the middle of a line: the rank died",
        "rank 1 has no step after 3; the last one of others is 4",
    ]


def test_another_runs_files_are_left_out(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 3), 1: range(2, 3), 2: range(2, 3)}, run="old")
    write_traces(tmp_path, {0: range(7, 8), 1: range(7, 8)})
    merged = merge(tmp_path)
    assert sorted(merged.traces) == [0, 1] and sorted(merged.records) == [7]
    assert merged.notes == ["trace.rank00002.json is left out, since another run wrote it"]


def test_a_device_without_space_is_given_up_once(tmp_path: Path) -> None:
    (tmp_path / file_name(0)).symlink_to("/dev/full")
    trace = TraceFile(tmp_path / file_name(0), 0, {})
    trace.create()
    assert "No space left on device" in trace.problem
    trace.append(recorded(0), rank_record(0, 2), 0)
    assert Path("/dev/full").is_char_device()


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    for content, message in (
        ("{}", "got no trace of --muon-profile"),
        ('[\n{"ph":"M","name":"run","args":{}},\n', "got no trace of --muon-profile"),
        ('[\n{"ph":"M","name":"run","args":{"run":"r","rank":0}},\n', "traces that have no step"),
        (
            '[\n{"ph":"M","name":"run","args":{"rank":0}},\n{"cat":"step","ph":"X","args":{"record":{"step":1}}},\n',
            "got no record of a profiled step",
        ),
    ):
        (tmp_path / file_name(0)).write_text(content)
        with pytest.raises(ValueError, match=message):
            merge(tmp_path)


def test_invalid_numbers_are_refused(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 3)})
    path = tmp_path / file_name(0)
    for good, bad in (('"wall_ms":10.0', '"wall_ms":"<b>"'), ('"sent_bytes":14000000', '"sent_bytes":-1')):
        content = path.read_text()
        path.write_text(content.replace(good, bad))
        with pytest.raises(ValueError, match="step 2 has an invalid number; remove the file"):
            merge(tmp_path)
        path.write_text(content)


def test_a_step_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A stand-in for a disk that takes a part of a step before it is full."""
    write_traces(tmp_path, {0: range(2, 3)})
    path = tmp_path / file_name(0)
    before = path.read_bytes()
    trace = TraceFile(path, 0, {})
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard[1]))
    try:
        trace.append(recorded(0), rank_record(0, 3), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and "rank 0 cannot write its profile" in trace.problem


def test_records_survive_a_trace(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 3)})
    trace = read_trace(tmp_path / file_name(0))
    assert trace.records() == {2: rank_record(0, 2)} and not trace.broken


class Ticks(HostClock):
    """A clock that advances by a millisecond at each mark; `on_host` as a GPU's."""

    on_host = False

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += MS
        return self.now

    def read(self, marks: Any) -> list[int]:
        return list(marks)


class Work:
    """A collective that must not be asked for a future: on a GPU that takes a stream of its own."""

    def wait(self) -> None:
        pass


def test_a_collective_on_a_gpu_ends_at_its_wait() -> None:
    recording = Recording(Ticks())
    work = recording.collective("gather", 0, 8, Work, "dense")  # begins at 2
    recording.collective("scatter", 1, 8, Work, "dense")  # begins at 3, nobody waits for it
    with recording.phase("newton_schulz", 0, "dense"):  # 4 to 5
        pass
    with recording.phase("wait", 0, "dense"):  # 6 to 7
        assert isinstance(work, Work)
    found = recording.finish()
    assert [(f.name, f.start_ns // MS, f.stop_ns // MS) for f in found.flights] == [("gather", 2, 7)]
    assert [(s.name, s.start_ns // MS, s.stop_ns // MS) for s in found.busy] == [
        ("newton_schulz", 4, 5),
        ("wait", 6, 7),
    ]


def test_a_phase_within_another_is_not_counted_twice() -> None:
    """Metrics are measured while momentum is updated: 3 ms of each, none of them both."""
    recording = Recording(Ticks())
    with recording.phase("momentum", 0, "dense"):  # 2
        with recording.phase("metrics", None, "dense"):  # 3 to 4
            pass
        with recording.phase("metrics", None, "dense"):  # 5 to 6
            pass
    found = recording.finish()  # 7
    spans = [(s.name, s.start_ns // MS, s.stop_ns // MS) for s in found.busy]
    assert spans == [
        ("momentum", 2, 3),
        ("metrics", 3, 4),
        ("momentum", 4, 5),
        ("metrics", 5, 6),
        ("momentum", 6, 7),
    ]
    numbers = rank_step(found, KNOWN, {}, step=1, rank=0).numbers
    assert (numbers["momentum_ms"], numbers["metrics_ms"]) == (3.0, 2.0)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_summary_of_a_run_fits(width: int) -> None:
    text = run_summary(summarize_step([rank_record(0, 2), rank_record(1, 2)]), facts(), width)
    assert "- Bottleneck: " in text and max(map(len, text.splitlines())) <= width
    assert "…" not in text and " 7.63 MiB " in text and ("gather (in flight)" in text or width == 80)
    # Flags are not divided.
    assert "--muon-ns-backend emerging" in " ".join(text.split())
