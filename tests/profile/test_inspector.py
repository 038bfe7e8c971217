"""NCCL Inspector's files, from samples (tests/samples/README.md says how they were made)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_muon.profile import inspector
from megatron_muon.profile.command import main
from tests.paths import TESTS

SAMPLES = TESTS / "samples" / "inspector"


def test_sample(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    records = [r for path in sorted(SAMPLES.iterdir()) for r in inspector.load_records(path)[0]]
    assert len(records) == 16
    (late,) = inspector.late_ranks(records)
    assert (late.rank, late.host, late.times_last, late.count) == (3, "node-02", 3, 4)
    # 3300 - 2684, 3103.3 - 2700, 1490 - 1345.
    assert late.waited_us == pytest.approx((3100 + 3120 + 3090) / 3 - 2700)
    for width in ("80", "100", "160"):
        monkeypatch.setenv("COLUMNS", width)
        assert main(["inspector", str(SAMPLES)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= int(width)
        # Median of 2684 2700 3090 3100 3120 3290 3300 3310; 256 MiB in 3310 us at the slowest, times 2 (4 - 1) / 4.
        reduce = next(line.split() for line in lines if "AllReduce" in line)
        assert reduce == ["AllReduce", "4", "2", "268435456", "8", "3110", "129.5", "121.6"]
        assert "rank 3 on node-02 came last in 3 of 4 collectives" in " ".join(" ".join(lines).split())


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    (source,) = SAMPLES.glob("*pid1639453.log")
    text = source.read_text()
    (tmp_path / "a.log").write_text(text[:-100])
    records, notes = inspector.load_records(tmp_path / "a.log")
    assert len(records) == 3 and "line 4, the last one, was cut off" in notes[0]
    (tmp_path / "b.log").write_text("{" + text)
    with pytest.raises(ValueError, match="line 1 is not a record of NCCL Inspector"):
        inspector.load_records(tmp_path / "b.log")
    (tmp_path / "c.log").write_text(text.replace("v4.0", "v9.0"))
    assert inspector.load_records(tmp_path / "c.log")[1] == ["c.log: format v9.0, known are v4.0"]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # names fold on a narrow screen
    assert main(["inspector", str(tmp_path / "nothing")]) == 2
    assert "expected a directory with files of NCCL Inspector" in capsys.readouterr().err
    (source,) = SAMPLES.glob("*pid1639453.log")
    (tmp_path / "a.log").write_text(source.read_text().replace("AllReduce", "\\u001b[2J[bold]All[/bold]"))
    (tmp_path / "notes.txt").write_text("nothing of NCCL's")
    assert main(["inspector", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "?[2J[bold]All[/bold]" in out and "\x1b" not in out and "notes.txt: got no record" in err
