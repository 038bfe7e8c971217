"""Numbers of profiled steps by hand, traces that are merged, the page, and how it looks in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from megatron_muon.observe.timing import recording as recording_module
from megatron_muon.observe.timing.peaks import arithmetic_ceilings, link_ceiling, read_links
from megatron_muon.observe.timing.ranks import Duty, Transfer, rank_step
from megatron_muon.observe.timing.recording import CudaClock
from megatron_muon.observe.timing.steps import Spread, median_step, scalars, summarize_step
from megatron_muon.observe.timing.table import run_summary
from megatron_muon.observe.timing.trace import TraceFile, file_name, read_trace
from megatron_muon.profile import profile_report as report
from megatron_muon.profile.merge import merge
from tests.profiles import PEAKS, facts, rank_record, recorded, write_traces
from tests.trace_schema import SCHEMA

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_numbers_of_a_rank_by_hand() -> None:
    duty = Duty("dense", 0, 14_000_000, 0, (6_000_000_000,), (10_000_000,), 0)
    got = rank_step(recorded(10**15), [duty], step=3, rank=1, counted=(14_000_000, 0))
    # In flight from 1 to 5 and from 6 to 8; waited from 4 to 5 and from 6 to 8.
    assert got == rank_record(1, 3, in_flight_ms=pytest.approx(6.0), exposed_ms=pytest.approx(3.0))
    assert got.other_ms == pytest.approx(2.0)


def test_numbers_of_a_step_by_hand() -> None:
    late = rank_record(
        1,
        3,
        wall_ms=12.0,
        busy_ms={"momentum": 1.0, "newton_schulz": 6.0, "wait": 1.0},
        in_flight_ms=4.0,
        exposed_ms=1.0,
        transfers=(
            replace(rank_record(1, 3).transfers[0], ms=1.0, sent_bytes=4_000_000),
            replace(rank_record(1, 3).transfers[1], ms=3.0),
        ),
        sent_bytes=10_000_000,
    )
    got = summarize_step([rank_record(0, 3), late])
    assert got.wall_ms == Spread(11.0, 12.0, 1) and got.ns_ms == Spread(4.5, 6.0, 1)
    assert got.busy_ms["apply"] == Spread(0.5, 1.0, 0) and got.busy_ms["apply"].imbalance == 2.0
    # Half of 6 ms and a quarter of 4 ms are lost.
    assert got.hidden_share == pytest.approx(1 - 4.0 / 10.0)
    # The gather takes what its last rank sees of it; 8 MB, the most that a rank sends, in 1 ms.
    assert got.wires["gather"].bytes_per_s == pytest.approx(8e9) and got.wires["gather"].wire_ms == 1.0
    assert got.wires["scatter"].bytes_per_s == pytest.approx(3e9)
    # 6 GFLOP in 3 ms on each.
    assert got.ns_flops_per_s == pytest.approx(2e12)
    assert got.unplanned_bytes == 4_000_000
    assert got.share("newton_schulz") == pytest.approx(4.5 / 11) and got.share("other", "apply") > 0
    assert scalars(got)["gather_gb_per_s"] == pytest.approx(8.0)
    with pytest.raises(ValueError, match="got steps \\[3, 4\\]"):
        summarize_step([rank_record(0, 3), rank_record(1, 4)])


def test_a_collective_that_moves_nothing_tells_nothing_of_links() -> None:
    empty = Transfer("experts 0 gather 0", "gather", 0, 5.0)
    records = [rank_record(rank, 3) for rank in range(2)]
    got = summarize_step([replace(r, transfers=(*r.transfers, empty)) for r in records]).wires["gather"]
    alone = summarize_step(records).wires["gather"]
    assert (got.bytes_per_s, got.collectives, got.message_bytes) == (2e9, 1, 8e6)
    assert (alone.bytes_per_s, alone.collectives, alone.message_bytes) == (2e9, 1, 8e6)
    # But ranks may wait for it: 4 ms of one group and 5 of another.
    assert (got.ms.mean, got.wire_ms) == (9.0, 5.0)


def test_medians_leave_the_first_step_out() -> None:
    steps = [summarize_step([rank_record(0, step, wall_ms=wall)]) for step, wall in ((1, 900.0), (2, 10.0), (3, 14.0))]
    got = median_step([*steps, summarize_step([rank_record(0, 4, wall_ms=11.0)])])
    assert (got.step, got.steps, got.wall_ms.largest) == (4, 3, 11.0)
    assert median_step(steps[:1]).wall_ms.largest == 900.0


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


def test_ceilings(tmp_path: Path) -> None:
    flops, memory = arithmetic_ceilings(torch.device("cpu"), torch.float32)
    assert flops.source == "measured: float32 product of 768 x 768" and flops.per_s > 1e8
    assert memory.source == "measured: copy of 32 MiB" and memory.per_s > 1e8
    assert link_ceiling("NVIDIA H100 80GB HBM3", "cuda", one_node=True).per_s == 450e9
    assert link_ceiling("NVIDIA H100 80GB HBM3", "cuda", one_node=False).per_s == 50e9
    assert link_ceiling("x86_64", "cpu", one_node=True).source == "assumed"


def row(groups: str, collective: str, out_of_place: float, in_place: float | None) -> dict[str, Any]:
    placements = {"out_of_place": out_of_place, "in_place": in_place}
    return {"groups": groups, "collective": collective} | {
        name: None if rate is None else {"busbw_gbps": rate, "algbw_gbps": 99.0, "group_busbw_gbps": [98.0]}
        for name, rate in placements.items()
    }


def test_measured_links_are_read(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    rows = [
        row("tp", "all_to_all", 80.0, None),
        row("tp_dp", "all_to_all", 30.0, None),
        row("tp_dp", "all_to_allv", 31.0, 20.0),
        row("dp", "all_gather", 33.0, 34.0),
        row("dp", "all_reduce", 70.0, 70.0),
    ]
    path.write_text(json.dumps({"version": 1, "rows": rows}))
    got = read_links(str(path))
    assert {name: ceiling.per_s for name, ceiling in got.items()} == {"all_to_all": 31e9, "all_gather": 34e9}
    path.write_text(json.dumps({"rows": rows[:1]}))
    assert read_links(str(path))["all_to_all"].per_s == 80e9


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{"collective": "all_reduce"}]}'])
def test_a_file_that_has_no_links_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"--muon-profile-links: got .*expected what `python -m megatron_muon.profile"):
        read_links(str(path))


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
    assert sorted({event["pid"] for event in content["traceEvents"]}) == [0, 1, 2]


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
        "rank 1's trace ends in the middle: it died, or its disk was full",
        "rank 1 has no step after 3; the last one of others is 4",
    ]


def test_another_runs_files_are_left_out(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 3), 1: range(2, 3), 2: range(2, 3)}, run="old")
    write_traces(tmp_path, {0: range(7, 8), 1: range(7, 8)})
    merged = merge(tmp_path)
    assert sorted(merged.traces) == [0, 1] and sorted(merged.records) == [7]
    assert merged.notes == ["trace.rank00002.json is left out: another run wrote it"]


def test_a_device_without_space_is_given_up_once(tmp_path: Path) -> None:
    (tmp_path / file_name(0)).symlink_to("/dev/full")
    trace = TraceFile(tmp_path / file_name(0), 0, {})
    trace.create()
    assert "No space left on device" in trace.problem
    trace.append(recorded(0), rank_record(0, 2), 0)
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which has no trace.rank\\*.json; train with --muon-profile N"),
        ("{}", "got no trace of --muon-profile"),
        ('{"otherData":{},"traceEvents":[]}', "got no trace of --muon-profile"),
        ('{"displayTimeUnit":"ms","otherData":{"run":"r","rank":0},"traceEvents":[\n]}', "have no step"),
        (
            '{"otherData":{"rank":0},"traceEvents":[{"cat":"step","ph":"X","args":{"record":{"step":1}}}]}',
            "got no record of a profiled step",
        ),
    ],
)
def test_the_report_refuses(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / file_name(0)).write_text(content)
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("report: ")
    with pytest.raises(ValueError, match=message):
        merge(tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 3)})
    path = tmp_path / file_name(0)
    for good, bad in (('"wall_ms":10.0', '"wall_ms":"<b>"'), ('"sent_bytes":14000000', '"sent_bytes":-1')):
        content = path.read_text()
        path.write_text(content.replace(good, bad))
        with pytest.raises(ValueError, match="step 2 has a number that is none; remove the file"):
            merge(tmp_path)
        path.write_text(content)


# The page.

HOSTILE = "<script>document.title='owned'</script>$x$"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks; the host's, the device's and a phase's name are hostile."""
    directory = tmp_path_factory.mktemp("profile <1>")
    peaks = replace(PEAKS, link=replace(PEAKS.link, source=HOSTILE), flops=replace(PEAKS.flops, source=HOSTILE))
    hostile = replace(facts(), device_name=HOSTILE, peaks=peaks)
    write_traces(directory, {0: range(2, 5), 1: range(2, 5)}, hosts={0: HOSTILE, 1: HOSTILE}, run_facts=hostile)
    path = directory / file_name(1)
    path.write_text(path.read_text().replace('"name":"apply"', f'"name":"{HOSTILE}"'))
    assert report.main([str(directory)]) == 0
    return directory / report.DIRECTORY / "index.html"


def test_page(page: Path) -> None:
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "bandwidth.png", "index.html", "phases.png", "roofline.png", "timeline.png", "trace.json",
    ]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in page.parent.glob("*.png"))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text and "profile &lt;1&gt;" in text
    # Nothing is fetched: no address but those of pictures that the page holds.
    assert text.count("data:image/png;base64,") == 4 and "http" not in text and "src=" in text
    assert text.count("src=") == 4
    assert "Bottleneck: " in text and "<td>Newton-Schulz</td>" in text
    jsonschema.validate(json.loads((page.parent / "trace.json").read_text()), SCHEMA)


def test_a_step_can_be_chosen(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(page.parent.parent)
    assert report.main([directory, "--out", str(tmp_path), "--step", "4"]) == 0
    assert report.main([directory, "--out", str(tmp_path), "--step", "5"]) == 2
    assert "--step: got 5, expected a profiled step: 2, 3, 4" in capsys.readouterr().out


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on PATH (Debian: apt install chromium)")
def test_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "page.png"
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/user"]
    address = page.as_uri()
    subprocess.run(
        [str(CHROMIUM), *arguments, "--window-size=1200,2600", f"--screenshot={picture}", address],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    dom = subprocess.run(
        [str(CHROMIUM), *arguments, "--dump-dom", address], check=True, capture_output=True, timeout=120, text=True
    ).stdout
    assert "owned" not in dom.split("<body>")[0] and dom.count("<img") == 4
    image = Image.open(picture).convert("RGB")
    assert image.size == (1200, 2600)
    colors = {color for _, color in image.getcolors(maxcolors=2**24) or ()}
    # The timeline's Newton-Schulz and param gather's bar, in matplotlib's tab:red and the text's black.
    assert {(214, 39, 40), (0, 0, 0), (255, 255, 255)} <= colors


def test_summary_of_a_run_is_text() -> None:
    text = run_summary(summarize_step([rank_record(0, 2), rank_record(1, 2)]), facts())
    assert "Bottleneck: " in text and all(len(line) <= 110 for line in text.splitlines() if line.startswith("│"))


def test_records_survive_a_trace(tmp_path: Path) -> None:
    write_traces(tmp_path, {0: range(2, 3)})
    assert read_trace(tmp_path / file_name(0)).records() == {2: rank_record(0, 2)}
