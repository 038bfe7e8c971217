"""Errors of this package end a launched run as argparse's do: one line once per node, exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_muon import cpu, launch
from megatron_muon.megatron.entry import messages
from tests.paths import ROOT as REPOSITORY
from tests.seams import seams_removed_afterwards


@pytest.fixture(autouse=True)
def _process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cpu, "install", lambda: None)
    monkeypatch.delenv(messages.TRACEBACK_VARIABLE, raising=False)
    with seams_removed_afterwards():
        yield


PARSING = "from megatron.training.arguments import parse_args\nparse_args()\n"


def launch_script(directory: Path, text: str, *words: str) -> None:
    path = directory / "train.py"
    path.write_text(text)
    launch.main(["--device", "cpu", str(path), *words])


def test_a_bad_value_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--distributed-muon", "--use-distributed-optimizer", "--muon-momentum", "2")
    with pytest.raises(SystemExit) as left:
        launch_script(tmp_path, PARSING, *words)
    assert left.value.code == 2
    # torch may have logged something before.
    assert capsys.readouterr().err.endswith(
        "megatron_muon: error: --muon-momentum: got 2.0, expected in [0, 1); correct or omit it "
        "(MEGATRON_MUON_TRACEBACK=1 shows where)\n"
    )


def test_the_variable_brings_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(messages.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match=r"^--use-distributed-optimizer: got False"):
        launch_script(tmp_path, PARSING, "--distributed-muon")


def test_errors_of_others_are_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that another library raises in a call of this package's."""
    with pytest.raises(ValueError, match=r"^mine$"):
        launch_script(tmp_path, "raise ValueError('mine')")
    with pytest.raises(ValueError, match="Invalid literal"):
        launch_script(tmp_path, "from fractions import Fraction\nimport megatron_muon\nFraction('x')")
    assert "error" not in capsys.readouterr().err


def test_once_per_node(tmp_path: Path) -> None:
    """Under torchrun, of whichever process comes first."""
    path = tmp_path / "train.py"
    path.write_text(PARSING)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "megatron_muon.launch", "--device", "cpu", str(path), "--distributed-muon"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != messages.TRACEBACK_VARIABLE},
    )
    assert done.returncode != 0
    assert done.stderr.count("megatron_muon: error: --use-distributed-optimizer: got False") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "arguments.py" not in done.stderr


def test_a_process_that_is_not_the_first_waits_and_then_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(messages.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit):
        messages.stop(ValueError("first\nsecond"))
    assert len(waited) == 1 and waited[0] > 1
    assert capsys.readouterr().err.startswith("megatron_muon: error: first second (")


def test_ranks_are_described() -> None:
    assert messages.describe_ranks([3, 0, 1, 2, 7, 5, 8]) == "0-3, 5, 7, 8"
