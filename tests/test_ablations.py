"""What the ablations' script makes of finished runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import itertools

import ablations
import demo
from ablations import Result, Setting
from demo_report import RunLog

from megatron_muon.kinds import FILE_NAME


def results() -> list[Result]:
    made = []
    for s in ablations.settings(2):
        loss = 2.0 + abs(s.update_rms - 0.2) + 0.1 * (s.seed - 1234)
        made.append(Result(s, {10: 3.0, 20: loss}, loss, 0.05 - s.weight_decay / 100))
    return made


def test_settings_are_the_sweep_and_the_decays() -> None:
    chosen = ablations.settings(1)
    assert [(s.update_rms, s.weight_decay) for s in chosen] == [
        *((rms, 0.1) for rms in (0.05, 0.1, 0.2, 0.4, 0.8)),
        (0.2, 0.0),
        (0.2, 1.0),
    ]
    assert len({s.name for s in ablations.settings(3)}) == 21


def test_a_settings_flags_come_after_the_demos(tmp_path: Path) -> None:
    """argparse takes the last of two."""
    words = demo.training_flags("muon", steps=9, lr=1e-3, corpus=tmp_path, tensorboard=tmp_path)
    words += Setting(0.4, 0.0, 7).flags()
    values = dict(itertools.pairwise(words))
    assert (values["--muon-update-rms"], values["--weight-decay"], values["--seed"]) == ("0.4", "0.0", "7")


def test_result_of_a_run(tmp_path: Path) -> None:
    record = {"step": 20, "run": {}, "matrices": {"a": {"weight_rms": 0.1}, "b": {"weight_rms": 0.3}}}
    (tmp_path / FILE_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
    log = RunLog(train_loss={step: float(step) for step in range(1, 21)}, validation_loss={10: 3.0, 20: 2.5})
    result = ablations.result_of(Setting(0.2, 0.1, 1), log, tmp_path)
    assert (result.final_loss, result.train_loss, result.weight_rms) == (2.5, 19.5, pytest.approx(0.2))


def test_rows_average_over_seeds() -> None:
    found = ablations.rows(results())
    assert len(found) == 7
    assert found[0] == ("0.05", "0.1", "2.200 ± 0.050", "0.0490", "3.355")
    assert found[-1] == ("0.2", "1.0", "2.050 ± 0.050", "0.0400", "")


def test_plot_and_document(tmp_path: Path) -> None:
    ablations.plot(results(), tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
    text = ablations.document(results(), 80)
    assert "80 steps, 327,680 bytes, 2 seed(s)" in text and text.count("\n| 0.") == 7
    assert max(map(len, text.splitlines())) <= 120
