"""What the ablations' script makes of finished runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import itertools

import ablations
import demo
from ablations import Result, Setting
from demo_report import RunLog

from megatron_muon.observe.metric_names import FILE_NAME


def results() -> list[Result]:
    made = []
    for s in ablations.settings(2):
        loss = 2.0 + abs(s.update_rms - 0.2) + 0.1 * (s.seed - 1234)
        loss += 0.002 if s.momentum_dtype == "bf16" else 0.0
        made.append(Result(s, {10: 3.0, 20: loss}, loss, 0.05 - s.weight_decay / 100))
    return made


def test_settings_of_each_part() -> None:
    def of(*parts: str) -> list[tuple[float, float, str]]:
        return [(s.update_rms, s.weight_decay, s.momentum_dtype) for s in ablations.settings(1, parts)]

    sweep = [(rms, 0.1, "fp32") for rms in (0.05, 0.1, 0.2, 0.4, 0.8)]
    decays = [(0.2, 0.0, "fp32"), (0.2, 1.0, "fp32")]
    assert of("rms") == sweep
    assert of("decay") == [sweep[2], *decays]
    assert of("momentum") == [sweep[2], (0.2, 0.1, "bf16")]
    assert of(*ablations.PARTS) == [*sweep, *decays, (0.2, 0.1, "bf16")]
    assert len({s.name for s in ablations.settings(3)}) == 24


def test_a_settings_flags_come_after_the_demos(tmp_path: Path) -> None:
    """argparse takes the last of two."""
    words = demo.training_flags("muon", steps=9, lr=1e-3, corpus=tmp_path, tensorboard=tmp_path)
    words += Setting(0.4, 0.0, 7, "bf16").flags()
    values = dict(itertools.pairwise(words))
    assert (values["--muon-update-rms"], values["--weight-decay"], values["--seed"]) == ("0.4", "0.0", "7")
    assert values["--muon-momentum-dtype"] == "bf16"


def test_result_of_a_run(tmp_path: Path) -> None:
    record = {"step": 20, "run": {}, "matrices": {"a": {"weight_rms": 0.1}, "b": {"weight_rms": 0.3}}}
    (tmp_path / FILE_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
    log = RunLog(train_loss={step: float(step) for step in range(1, 21)}, validation_loss={10: 3.0, 20: 2.5})
    result = ablations.result_of(Setting(0.2, 0.1, 1), log, tmp_path)
    assert (result.final_loss, result.train_loss, result.weight_rms) == (2.5, 19.5, pytest.approx(0.2))


def test_rows_average_over_seeds() -> None:
    found = ablations.rows(results())
    assert len(found) == 8
    assert found[0] == ("0.05", "0.1", "fp32", "2.200 ± 0.050", "0.0490", "3.355")
    assert found[-2] == ("0.2", "1.0", "fp32", "2.050 ± 0.050", "0.0400", "")
    assert found[-1] == ("0.2", "0.1", "bf16", "2.052 ± 0.050", "0.0490", "")


def test_findings_are_those_of_the_parts_that_ran() -> None:
    assert ablations.findings(results()) == [
        "Target RMS: the loss is lowest at 0.2 (+0.150 at 0.05, +0.600 at 0.8); Moonlight's at 0.2.",
        "Weight decay 0.0 instead of 0.1: loss +0.000, weight RMS +2.0%.",
        "Weight decay 1.0 instead of 0.1: loss +0.000, weight RMS -18.4%.",
        "Momentum in bf16 instead of fp32: loss +0.0020 (by seed: +0.0020, +0.0020).",
    ]
    momentum = {s.name for s in ablations.settings(2, ("momentum",))}
    (finding,) = ablations.findings([r for r in results() if r.setting.name in momentum])
    assert finding.startswith("Momentum in bf16")


class Trained(Exception):
    """A training was started that need not have been."""


def test_an_interrupted_call_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(run: str, flags: list[str], out: Path, progress: object, task: object) -> RunLog:
        if len(trained) == interrupt_at:
            raise KeyboardInterrupt
        # As the demo's own does, which refuses a directory that is there.
        (out / "logs" / run).mkdir(parents=True)
        trained.append(run)
        directory = out / "tensorboard" / run
        directory.mkdir(parents=True)
        record = {"step": 20, "run": {}, "matrices": {"a": {"weight_rms": 0.1}}}
        (directory / FILE_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
        return RunLog(train_loss={1: 4.0}, validation_loss={10: 3.0, 20: 2.0 + len(trained) / 10})

    corpus = [{"name": "train", "sha256": "a"}]
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "prepare_corpus", lambda directory: corpus)
    words = ["ablations.py", "--parts", "decay", "--steps", "20", "--out", str(tmp_path), "--docs", str(tmp_path / "d")]
    monkeypatch.setattr(sys, "argv", words)
    names = [s.name for s in ablations.settings(1, ("decay",))]

    interrupt_at = 2
    with pytest.raises(SystemExit):
        ablations.main()
    said = capsys.readouterr().out
    assert "3 runs of 20 steps, 0 finished before; the others take about 2 min on two cores" in said
    assert trained == names[:2] and not (tmp_path / "results.json").exists()

    interrupt_at = 99
    # As a run that was cut off leaves them.
    (tmp_path / "logs" / names[2]).mkdir(parents=True)
    ablations.main()
    said = capsys.readouterr().out
    assert "3 runs of 20 steps, 2 finished before; the others take about 0 min, by the runs so far" in said
    assert trained == names
    losses = [
        entry["validation_loss"]["20"] for entry in json.loads((tmp_path / "results.json").read_text())["results"]
    ]
    assert losses == [2.1, 2.2, 2.3]
    assert (tmp_path / "d" / "ablations.md").is_file() and (tmp_path / "d" / "ablations.png").is_file()

    # What another corpus or number of steps gave is not taken.
    corpus[0]["sha256"] = "b"
    ablations.main()
    assert trained == names * 2
    monkeypatch.setattr(sys, "argv", [*words[:4], "30", *words[5:]])
    ablations.main()
    assert trained == names * 3


def test_plot_and_document(tmp_path: Path) -> None:
    ablations.plot(results(), tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
    text = ablations.document(results(), 80)
    assert "80 steps, 327,680 bytes, 2 seed(s)" in " ".join(text.split()) and text.count("\n| 0.") == 8
    assert text.count("\n- ") == 4
    assert max(map(len, text.splitlines())) <= 120
