"""NCCL's and torch's own facts, from samples (tests/samples/README.md says which were recorded) and real dumps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.profile import flight_recorder, inspector, nccl_facts, nccl_log
from megatron_muon.profile.command import main
from tests.distributed import run_ranks
from tests.paths import TESTS

SAMPLES = TESTS / "samples"
RECORDED = SAMPLES / "flight_recorder"


def dumps(directory: Path = RECORDED) -> list[flight_recorder.Dump]:
    return [flight_recorder.load_dump(path) for path in sorted(directory.iterdir())]


def changed(tmp_path: Path, change: Any) -> list[flight_recorder.Dump]:
    """The recorded dumps, rank 1's after `change(content)`."""
    directory = Path(shutil.copytree(RECORDED, tmp_path / "changed"))
    path = directory / "flight_recorder_rank1.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return dumps(directory)


def test_flight_recorder_sample() -> None:
    """The recorded run measured each collective twice (timed, checked) at 64 KiB in each placement it has."""
    found = {(c.name, c.group): c for c in flight_recorder.calls(dumps()) if c.group == "3"}
    kib = 1 << 10
    # The size of all_to_all and all_reduce is the input's; an all_gather's input is the half that the rank adds, in two
    # placements. Gloo does its reduce_scatter as an all_reduce of the whole, in two placements.
    expected = {"all_to_all": (2, 128 * kib), "all_gather": (4, 128 * kib), "all_reduce": (2 + 4, 384 * kib)}
    for name, (count, size) in expected.items():
        call = found[f"gloo:{name}", "3"]
        assert (call.count, call.bytes, call.ranks, call.duration_ms) == (count, size, (0, 1), None)
    assert flight_recorder.findings(dumps()) == []


def test_rank_behind(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        (number,) = {str(e["pg_id"]) for e in content["entries"] if e["process_group"][0] == "3"}
        content["pg_status"][number]["last_completed_collective"] = "15"

    assert flight_recorder.findings(changed(tmp_path, change)) == ["group 3: others completed call 18, but rank 1 15"]


def test_unfinished_call(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        entry = [e for e in content["entries"] if e["process_group"][0] == "3"][-1]
        entry["retired"] = False

    (text,) = flight_recorder.findings(changed(tmp_path, change))
    assert text == "rank 1 waits in gloo:all_reduce, collective 18 of group 3"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("profiling_name", "gloo:broadcast", "ranks [1]: gloo:broadcast [[16384]]"),
        ("input_sizes", [[7]], "ranks [1]: gloo:all_reduce [[7]]"),
    ],
)
def test_ranks_that_issue_different_collectives(tmp_path: Path, key: str, value: Any, text: str) -> None:
    def change(content: Any) -> None:
        entry = [e for e in content["entries"] if e["process_group"][0] == "3"][-1]
        entry[key] = value

    (found,) = flight_recorder.findings(changed(tmp_path, change))
    assert found == f"group 3, collective 18: ranks [0]: gloo:all_reduce [[16384]]; {text}"


def test_lost_entries(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        del content["entries"][:4]

    assert flight_recorder.findings(changed(tmp_path, change)) == [
        "the buffer was too small: 4 older entries are gone; raise TORCH_FR_BUFFER_SIZE"
    ]


def real_dumps(rank: int, world_size: int, directory: str) -> tuple[bytes, str]:
    import torch
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    flight_recorder.switch_on()
    dist.all_reduce(torch.zeros(10))
    dist.all_to_all_single(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16))
    missing = flight_recorder.write_dump(Path(directory), rank)
    return bytes(c10d._dump_fr_trace()), missing


def test_real_dumps_as_json_and_as_pickle(tmp_path: Path) -> None:
    """Of two Gloo ranks; torch's pickle has stack traces besides, and both say the same of the calls."""
    results = run_ranks(real_dumps, 2, str(tmp_path))
    assert [missing for _, missing in results] == ["", ""]
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    for rank, (content, _) in enumerate(results):
        (pickles / f"nccl_trace_rank_{rank}").write_bytes(content)
    from_json, from_pickle = dumps_of_files(tmp_path), dumps(pickles)
    assert flight_recorder.calls(from_json) == flight_recorder.calls(from_pickle)
    found = {c.name: (c.count, c.bytes) for c in flight_recorder.calls(from_pickle)}
    assert found["gloo:all_reduce"] == (1, 40) and found["gloo:all_to_all"] == (1, 8)
    assert nccl_facts.collect(pickles).problems == []


def dumps_of_files(directory: Path) -> list[flight_recorder.Dump]:
    return [flight_recorder.load_dump(path) for path in sorted(directory.iterdir()) if path.is_file()]


class Malicious:
    """What a pickle may do when it is loaded with pickle.load."""

    def __reduce__(self) -> Any:
        return os.system, ("echo harmed",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nccl_trace_rank_0"
    path.write_bytes(pickle.dumps({"version": "2.10", "pg_config": {}, "entries": [Malicious()]}))
    with pytest.raises(ValueError, match=r"it names posix\.system, expected plain values only"):
        flight_recorder.load_dump(path)
    assert main(["facts", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert "harmed" not in out and "posix.system" in err


def test_inspector_sample() -> None:
    facts = nccl_facts.collect(SAMPLES / "inspector")
    assert facts.problems == [] and len(facts.operations) == 16
    reduce, scatter = inspector.summaries(facts.operations)
    assert (reduce.collective, reduce.num_ranks, reduce.num_nodes, reduce.count) == ("AllReduce", 4, 2, 8)
    # Times of both all-reduces: 2684 2700 3090 3100 3120 3290 3300 3310.
    assert reduce.median_us == (3100 + 3120) / 2
    # 256 MiB in 3310 us at the slowest, times 2 (4 - 1) / 4.
    assert reduce.lowest_busbw_gbps == pytest.approx(268435456 / 3310e-6 / 1e9 * 1.5, abs=1e-5)
    assert (scatter.median_us, scatter.count) == ((1400 + 1410) / 2, 8)
    (late,) = inspector.late_ranks(facts.operations)
    assert (late.rank, late.host, late.times_last, late.count) == (3, "node-02", 3, 4)
    # 3300 - 2684, 3103.3 - 2700, 1490 - 1345.
    assert late.waited_us == pytest.approx((3100 + 3120 + 3090) / 3 - 2700)


def test_inspector_file_that_was_cut_off(tmp_path: Path) -> None:
    (source,) = (SAMPLES / "inspector").glob("*pid1639453.log")
    text = source.read_text()
    (tmp_path / "a.log").write_text(text[:-100])
    operations, notes = inspector.load_operations(tmp_path / "a.log")
    assert len(operations) == 3 and "line 4, the last one, was cut off" in notes[0]
    (tmp_path / "b.log").write_text("{" + text)
    with pytest.raises(ValueError, match="line 1 is no record of NCCL Inspector"):
        inspector.load_operations(tmp_path / "b.log")


def test_inspector_of_another_version(tmp_path: Path) -> None:
    (source,) = (SAMPLES / "inspector").glob("*pid1639453.log")
    (tmp_path / "a.log").write_text(source.read_text().replace("v4.0", "v9.0"))
    _, notes = inspector.load_operations(tmp_path / "a.log")
    assert notes == ["a.log: format v9.0, known are v4.0"]


def test_nccl_log_sample() -> None:
    log = nccl_facts.collect(SAMPLES / "nccl_log").log
    assert log is not None
    assert log.versions == {"2.30.3+cuda13.0"} and log.hosts == {"node-01", "node-02"} and log.networks == {"IB"}
    assert log.communicators == {"0x49bbd7790311d5eb": 4} and log.shapes == {(4, 2, 2): 2}
    assert log.links == {
        (0, 1, "P2P/CUMEM"): 2,
        (3, 0, "NET/IB/GDRDMA"): 2,  # rank 0 receives into the GPU
        (3, 0, "NET/IB"): 2,  # rank 3 sends from host memory
        (3, 2, "SHM"): 1,
    }
    assert log.channels == {(2, 0, 2)}
    assert log.graphs == {("ring", 2, 40.0, 24.0, "NVL", "PIX"), ("balanced tree", 2, 40.0, 24.0, "NVL", "PIX")}
    assert log.algorithms == {("AllReduce", 33554432, "RING", "SIMPLE"): 2}
    assert log.rdma == {("mlx5_0", True), ("mlx5_1", False)}
    assert log.warnings == {"Failed to initialize any NET plugin": 1}
    assert [hint.split(":")[0] for hint in nccl_log.hints(log)] == ["NET/IB without GDRDMA", "SHM"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("P2P/CUMEM/read", "P2P/CUMEM"),
        ("P2P/direct pointer/read", "P2P/direct pointer"),
        ("P2P/indirect/3[3]", "P2P/indirect"),
        ("SHM/direct/direct", "SHM"),
        ("NET/IBext_v8/0/GDRDMA", "NET/IBext_v8/GDRDMA"),
        ("NET/IB/1(4)/GDRDMA/Shared", "NET/IB/GDRDMA"),
        ("NET/Socket/0", "NET/Socket"),
    ],
)
def test_transport_names(text: str, name: str) -> None:
    assert nccl_log.transport_name(text) == name


def test_socket_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("h:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0\n")
    log = nccl_log.read_log([tmp_path / "a.log"])
    assert [hint.split(":")[0] for hint in nccl_log.hints(log)] == ["NET/Socket"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["facts", str(SAMPLES), "--json", str(tmp_path / "facts.json")]) == 0
    out = capsys.readouterr().out
    for text in ("Flight Recorder: 2 ranks, 104 entries", "all ranks issued and completed the same"):
        assert text in out
    for text in ("rank 3 on node-02 came last in 3 of 4", "NET/IB/GDRDMA", "WARN (1 times) Failed to initialize"):
        assert text in out
    content = json.loads((tmp_path / "facts.json").read_text())
    assert content["flight_recorder"]["ranks"] == [0, 1] and content["inspector"]["late_ranks"][0]["rank"] == 3
    assert [3, 2, "SHM", 1] in content["nccl_log"]["links"]


def test_text_from_files_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.log").write_text("h:1:2 [0] NCCL WARN \x1b[2J[bold]cleared[/bold]\x07\n")
    assert main(["facts", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "?[2J[bold]cleared[/bold]?" in out and "\x1b" not in out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["facts", str(tmp_path / "nothing")]) == 2
    assert "expected a directory" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("nothing of NCCL's")
    assert main(["facts", str(tmp_path)]) == 2
    assert "has no Flight Recorder dump" in capsys.readouterr().err
    for name in ("rank0.json", "rank.json"):
        (tmp_path / name).write_text('{"pg_config": {}, "entries": []}')
    assert main(["facts", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "rank0.json: is no Flight Recorder dump: KeyError 'version'" in err and "a name without a rank" in err


def test_dumps_of_two_jobs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        shutil.copytree(RECORDED, tmp_path / name)
    assert main(["facts", str(tmp_path)]) == 1
    assert "got dumps of ranks [0, 0, 1, 1], expected one of each" in capsys.readouterr().err
