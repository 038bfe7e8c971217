"""The scaling-law study: which runs it needs, FLOPs, fits of synthetic data, and a ladder of seconds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

from scaling_law import cli, schedule, study, tables
from scaling_law.corpus import prepare
from scaling_law.fit import Curve, compare, fit_law
from scaling_law.flops import count
from scaling_law.ladder import OPTIMIZERS, Ladder, Model, Run, Variant, load_ladder
from scaling_law.runner import Result, parse_log

TINY = EXAMPLES / "scaling_law" / "tiny.yaml"
PAPER = EXAMPLES / "scaling_law" / "moonlight.yaml"
MODEL = "{name: a, layers: 1, hidden: 8, heads: 2, ffn: 8, batch_size: 1}"
MODELS = (Model("a", 1, 8, 2, 16, 4, learning_rate=0.01), Model("b", 2, 16, 2, 32, 4))
LADDER = Ladder(
    "test",
    MODELS,
    seeds=(1, 2),
    learning_rate=0.02,
    sequence_length=16,
    batch_models=("a",),
    decay_models=("b",),
    decays=(0.0,),
    variant_models=("b",),
    variants=(Variant("normuon", ("--muon-variant", "normuon")), Variant("no decay", weight_decay=0.0)),
)


def bowl(run: Run) -> float:
    """A loss with one best learning rate: 0.04 for AdamW, 0.01 for Muon, which is better."""
    best = 0.04 if run.optimizer == "adamw" else 0.01
    return 2 + math.log2(run.learning_rate / best) ** 2 / 100 - 0.1 * (run.optimizer == "muon") + run.seed / 1000


def complete(ladder: Ladder, loss: Callable[[Run], float]) -> tuple[dict[Run, float], list[list[Run]]]:
    """Answers what a study asks for until it asks for nothing; returns the losses and what it asked each time."""
    losses: dict[Run, float] = {}
    asked = []
    while runs := schedule.needed(ladder, losses):
        asked.append(runs)
        losses |= {run: loss(run) for run in runs}
    return losses, asked


def test_sweeps_until_both_neighbours_are_worse_then_seeds_then_variants() -> None:
    losses, asked = complete(LADDER, bowl)
    # Rates are tried outwards from the start of each model, each run once.
    assert [run.learning_rate for run in asked[0]] == [0.01, 0.01, 0.02, 0.02]
    everything = [run for runs in asked for run in runs]
    assert len(everything) == len(set(everything)) == len(losses)
    for model in MODELS:
        assert schedule.sweep(LADDER, model, "adamw", losses).best == 0.04
        assert schedule.sweep(LADDER, model, "muon", losses).best == 0.01
        for optimizer, best in (("adamw", 0.04), ("muon", 0.01)):
            tried = schedule.sweep(LADDER, model, optimizer, losses).losses
            assert {best / 2, best, best * 2} <= tried.keys()
    curves = schedule.curves(LADDER, losses)
    assert curves["muon"].rates == {"a": 0.04, "b": 0.04} and curves["muon_tuned"].rates == {"a": 0.01, "b": 0.01}
    assert curves["adamw"].losses == {"a": (2.001, 2.002), "b": (2.001, 2.002)}
    at_rate = [run for run in everything if run.model == "a" and run.batch_size != 4]
    assert {(run.optimizer, run.batch_size) for run in at_rate} == {(o, b) for o in ("adamw", "muon") for b in (2, 8)}
    variants = [run for run in everything if run.variant]
    assert {(run.model, run.variant, run.weight_decay, run.seed) for run in variants} == {
        ("b", name, decay, seed) for name, decay in (("normuon", 0.1), ("no decay", 0.0)) for seed in (1, 2)
    }


def test_diverged_runs_move_the_sweep_down_and_a_wrong_start_is_named() -> None:
    losses, _ = complete(LADDER, lambda run: math.inf if run.learning_rate > 0.005 else bowl(run))
    assert schedule.sweep(LADDER, MODELS[0], "adamw", losses).best == 0.005
    with pytest.raises(RuntimeError, match=r"a, adamw: the best learning rate so far is .*set learning_rate"):
        complete(LADDER, lambda run: 1 / run.learning_rate)


def test_keys_tell_runs_apart() -> None:
    run = LADDER.base(MODELS[0], "muon", 0.01, 1)
    others = [
        replace(run, learning_rate=0.0100001),
        replace(run, batch_size=8),
        replace(run, weight_decay=0.0),
        replace(run, seed=2),
        replace(run, variant="normuon"),
        replace(run, optimizer="adamw"),
        replace(run, model="b"),
    ]
    assert len({r.key for r in [run, *others]}) == 8
    assert LADDER.megatron_flags(replace(run, variant="normuon"))[-2:] == ["--muon-variant", "normuon"]


def test_flops_are_those_counted_by_hand() -> None:
    run = LADDER.base(MODELS[0], "muon", 0.01, 1)
    steps, tokens = LADDER.steps(run), LADDER.steps(run) * 4 * 16
    # One layer: Q, K, V and output 8 x 8; gate, up and down 8 x 16. 6 operations a weight and token.
    weights = 4 * 64 + 3 * 128
    assert MODELS[0].parameters == weights + 3 * 8
    assert steps == round(20 * MODELS[0].parameters / 64)
    found = count(LADDER, run)
    assert found.matrices == 6 * weights * tokens
    # Scores and weighted values: 8 wide, (16 + 1) / 2 positions, 2 operations each, three passes.
    assert found.attention == 3 * 2 * 2 * 8.5 * 8 * tokens
    assert found.embeddings == 6 * 8 * 256 * tokens
    # m <= n, a = n / m: (20 a + 10) m^3 for five steps.
    assert found.newton_schulz == steps * (4 * 30 + 3 * 50) * 8**3
    assert count(LADDER, replace(run, optimizer="adamw")).newton_schulz == 0


def test_parameters_are_those_of_the_paper() -> None:
    """Moonlight names its models by parameters without embeddings (arXiv 2502.16982, table 2)."""
    expected = {"399M": 399e6, "545M": 545e6, "822M": 822e6, "1.1B": 1.1e9, "1.5B": 1.5e9}
    for model in load_ladder(PAPER).models:
        assert model.parameters == pytest.approx(expected.pop(model.name), rel=0.04)
    assert expected == {}


def curve(a: float, b: float, floor: float = 0.0, noise: float = 0.0, seed: int = 0) -> Curve:
    random = np.random.default_rng(seed)
    flops = np.geomspace(1e-9, 1e-6, 5)
    return {
        f"m{i}": (float(c), tuple(floor + a * c**-b * np.exp(noise * random.standard_normal(3))))
        for i, c in enumerate(flops)
    }


@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_fits_recover_a_known_exponent(floor: float) -> None:
    points = curve(0.5, 0.11, floor)
    form = "irreducible" if floor else "power"
    law = fit_law([c for c, _ in points.values()], [losses[0] for _, losses in points.values()], form)
    assert law.b == pytest.approx(0.11, rel=1e-4)
    assert law.irreducible == pytest.approx(floor, abs=1e-3)
    assert law.flops(float(law.loss(1e-7))) == pytest.approx(1e-7)


def test_ratio_and_its_interval_hold_the_truth() -> None:
    """Muon's law is AdamW's at 0.52 of the FLOPs: a factor of 0.52 in C is one of 0.52^b in a."""
    adamw, muon = curve(0.5, 0.11, noise=0.003, seed=1), curve(0.5 * 0.52**0.11, 0.11, noise=0.003, seed=2)
    found = compare(adamw, muon, "power", draws=300)
    assert found.middle.low < 0.52 < found.middle.high
    assert found.middle.value == pytest.approx(0.52, rel=0.1)
    assert found.exponents["adamw"].low < 0.11 < found.exponents["adamw"].high
    exact = compare(curve(0.5, 0.11), curve(0.5 * 0.52**0.11, 0.11), "power", draws=20)
    assert all(band.value == pytest.approx(0.52) for band in exact.ratio)
    with pytest.raises(ValueError, match="expected the same ones"):
        compare(adamw, dict(list(muon.items())[:-1]), "power")


def test_log_of_megatron_is_read() -> None:
    text = (
        " [2026-11-24 20:00:00.000000] iteration        2/       4 | consumed samples: 8 | elapsed time per iteration "
        "(ms): 30.5 | learning rate: 1.0E-03 | global batch size: 4 | lm loss: 5.500000E+00 | loss scale: 1.0 |\n"
        " validation loss at iteration 4 | lm loss value: 5.250000E+00 | lm loss PPL: 1.9E+02 | \n"
    )
    assert parse_log(text, 4) == (5.25, {2: 5.5}, 30.5)
    assert parse_log(text, 5) is None


@pytest.mark.parametrize(
    "content, message",
    [
        ("name: x\nmodels: []\nseeds: [1]\nlearning_rate: 1", "models: got"),
        (f"name: x\nseeds: []\nlearning_rate: 1\nmodels: [{MODEL}]", "seeds: got"),
        ("name: x\nrates: 3", "got rates, expected keys among"),
        ("- a", "expected a mapping"),
    ],
)
def test_a_wrong_ladder_is_refused(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_ladder(path)
    assert cli.main(["fit", "--ladder", str(path)]) == 2
    assert "scaling_law: " in capsys.readouterr().out


def test_tables_and_figures_are_made_of_raw_results(tmp_path: Path) -> None:
    ladder = load_ladder(TINY)
    losses, _ = complete(ladder, lambda run: bowl(run) - 0.1 * math.log10(ladder.model(run.model).parameters))
    made = study.Study(ladder, {run: Result(run, loss, {1: 5.0}, 1.0, 2.0) for run, loss in losses.items()})
    path = tmp_path / "results.json"
    study.write(made, path)
    assert study.read(ladder, path).losses == losses
    for command in ("fit", "plot", "report"):
        assert cli.main([command, "--ladder", "tiny.yaml", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "scaling_law.md").read_text()
    assert tables.headline(made) in page and "At equal loss Muon needs" in page
    assert {p.name for p in tmp_path.glob("*.png")} == {f"scaling_law_{n}.png" for n in ("rates", "loss", "ratio")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard library's sources alone."""
    directory = tmp_path_factory.mktemp("corpus")
    prepare(directory)
    return directory


@pytest.fixture
def ladder_of_seconds(tmp_path: Path) -> Path:
    """`tiny.yaml` with two models of two steps each and one seed."""
    text = TINY.read_text().split("models:")[0].replace("seeds: [1234, 1235, 1236]", "seeds: [1]")
    text = text.replace("validation_sequences: 512", "validation_sequences: 4")
    rows = [
        f"  - {{name: {name}, layers: 1, hidden: {hidden}, heads: 1, ffn: 32, batch_size: 2, tokens: 1024}}"
        for name, hidden in (("s", 16), ("m", 32))
    ]
    ladder = tmp_path / "ladder.yaml"
    ladder.write_text("\n".join([f"{text}models:", *rows, "muon_flags:" + TINY.read_text().split("muon_flags:")[1]]))
    return ladder


def trained(ladder: Path, out: Path, corpus: Path) -> study.Study:
    """Runs the command and reads its raw results."""
    assert cli.main(["run", "--ladder", str(ladder), "--out", str(out), "--corpus", str(corpus)]) == 0
    return study.read(load_ladder(ladder), out / "results.json")


def results_written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/result.json")}


def test_runs_train_and_are_not_repeated(
    ladder_of_seconds: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of each optimizer through megatron.training; the second call trains nothing and gives the same."""
    ladder = load_ladder(ladder_of_seconds)
    wanted = [ladder.base(ladder.models[0], optimizer, 0.02, 1) for optimizer in OPTIMIZERS]
    monkeypatch.setattr(schedule, "needed", lambda _, losses: [run for run in wanted if run not in losses])
    made = trained(ladder_of_seconds, tmp_path / "out", corpus)
    assert list(made.results) == sorted(wanted, key=lambda run: run.key)
    # Bytes at random cost log(256) = 5.5 nats; both optimizers have learned a little, and not the same.
    assert all(4 < result.loss < 5.55 and result.step_ms > 0 for result in made.results.values())
    assert len(set(made.losses.values())) == 2
    before = results_written(tmp_path / "out")
    assert len(before) == 2
    assert trained(ladder_of_seconds, tmp_path / "out", corpus).losses == made.losses
    assert results_written(tmp_path / "out") == before


@pytest.mark.exhaustive
def test_a_ladder_of_seconds_trains_and_resumes(ladder_of_seconds: Path, tmp_path: Path, corpus: Path) -> None:
    """Every run that the sweeps ask for."""
    made = trained(ladder_of_seconds, tmp_path / "out", corpus)
    ladder = load_ladder(ladder_of_seconds)
    assert schedule.needed(ladder, made.losses) == []
    before = results_written(tmp_path / "out")
    assert trained(ladder_of_seconds, tmp_path / "out", corpus).losses == made.losses
    assert results_written(tmp_path / "out") == before
