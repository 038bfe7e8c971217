"""Runs that load what `convert` wrote, and runs that go on from another optimizer's checkpoint at other layouts.

Where nothing is said of it, experts lie on two ranks and dense parameters are sharded over both.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muon.checkpoints.convert import ConversionOptions, convert
from megatron_muon.checkpoints.reader import Checkpoint
from megatron_muon.config import MuonConfig
from megatron_muon.megatron.checkpoint.adoption import load_base_checkpoint
from megatron_muon.megatron.entry import active
from megatron_muon.state_keys import MEAN, MOMENTUM, PARAM, PREFIX, SECOND_MOMENT, OptimizerKind, state_key
from tests.checkpoints.test_convert import tensors_of
from tests.distributed import RankError
from tests.training_runs import MUON, SCRIPT, Trace, differences, launch_ranks

FULLY = shlex.split("--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable")
# The same for every run, since Megatron refuses a schedule of another length.
SCHEDULE = shlex.split("--train-iters 6 --lr-decay-iters 6")
UPSTREAM = shlex.split("--optimizer muon --muon-fp32-matmul-prec high --muon-momentum 0.95")
BY_PROVIDER = str(Path(SCRIPT).with_name("cpu_pretrain_gpt_by_provider.py"))


def run(*words: str, until: int, world_size: int = 2, script: str = SCRIPT) -> list[Trace]:
    """Trains until an iteration, and saves it if told where."""
    last = ["--exit-interval", str(until)]
    return launch_ranks(*FULLY, *SCHEDULE, *words, *last, world_size=world_size, script=script)


def switch(source: Path, target: Path, start: OptimizerKind, end: OptimizerKind) -> str:
    convert(source, target, ConversionOptions(start, end, momentum=None if end == "adamw" else 0.95))
    return str(target)


def by_state(traces: list[Trace], at: int, state: str) -> dict[str, Tensor]:
    """What the ranks store of a state before the step of an iteration, by parameter: their slices one after another."""
    pieces: dict[str, list[Tensor]] = {}
    for rank, trace in enumerate(traces):
        for (name, kind), value in trace.states[at].items():
            if kind == state:
                # An expert's name is that on its rank.
                pieces.setdefault(f"{rank}.{name}" if "experts" in name else name, []).append(value.reshape(-1))
    return {name: torch.cat(values) for name, values in pieces.items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether `others` has all of `some`, bitwise."""
    return bool(some) and all(torch.equal(value, others[name]) for name, value in some.items())


def test_adamw_to_muon_and_back(tmp_path: Path) -> None:
    """AdamW, converted to Distributed Muon, goes on as by launch flag; converted back, as AdamW."""
    run("--save", str(tmp_path / "adamw"), "--save-interval", "2", until=2)
    adopt = ["--load", str(tmp_path / "adamw"), "--muon-init-from-adamw", "momentum"]
    adopted = run(*MUON, *adopt, until=4)
    converted = switch(tmp_path / "adamw", tmp_path / "muon", "adamw", "distributed-muon")
    muon = run(*MUON, "--load", converted, "--save", str(tmp_path / "muon"), "--save-interval", "3", until=4)
    assert sorted(muon[0].losses) == [2, 3]
    assert differences(muon, adopted, range(2, 4)) == []

    (tmp_path / "muon" / "latest_checkpointed_iteration.txt").write_text("3")
    adamw = run("--load", switch(tmp_path / "muon", tmp_path / "back", "distributed-muon", "adamw"), until=5)
    assert sorted(adamw[0].losses) == [3, 4]
    assert [trace.losses[3] for trace in adamw] == [trace.losses[3] for trace in muon]
    check_back(adamw, muon, at=3)


def check_back(adamw: list[Trace], muon: list[Trace], at: int) -> None:
    """AdamW starts from Muon's weights, the others' moments, and moments of the matrices that give RMS 0.2."""
    before, after = ({s: by_state(t, at, s) for s in (PARAM, "exp_avg", "exp_avg_sq")} for t in (muon, adamw))
    assert after[PARAM].keys() == before[PARAM].keys() == after["exp_avg"].keys()
    assert same(before[PARAM], after[PARAM])
    assert same(before["exp_avg"], after["exp_avg"]) and same(before["exp_avg_sq"], after["exp_avg_sq"])
    momenta = by_state(muon, at, MOMENTUM)
    assert momenta.keys() == after[PARAM].keys() - before["exp_avg"].keys()
    for name, momentum in momenta.items():
        mean, square = after["exp_avg"][name], after["exp_avg_sq"][name]
        torch.testing.assert_close(mean, momentum * (1 - 0.95), rtol=1e-6, atol=0)
        corrected = (mean.double() / (1 - 0.9 ** (at + 1)), square.double() / (1 - 0.999 ** (at + 1)))
        rms = (corrected[0] / corrected[1].sqrt()).square().mean().sqrt()
        assert rms.item() == pytest.approx(0.2, rel=1e-5), name
    check_adamws_step(adamw, at, list(momenta))


def check_adamws_step(traces: list[Trace], at: int, names: list[str]) -> None:
    """By AdamW's own formula, the update in iteration `at` is that of its step at + 1: the count has gone on."""
    before = by_state(traces, at, PARAM)
    after = {state: by_state(traces, at + 1, state) for state in (PARAM, "exp_avg", "exp_avg_sq")}
    assert names
    for name in names:
        mean, square = (after[state][name].double() for state in ("exp_avg", "exp_avg_sq"))
        direction = mean / (1 - 0.9 ** (at + 1)) / ((square / (1 - 0.999 ** (at + 1))).sqrt() + 1e-8)
        expected = before[name].double() * (1 - 1e-2 * 0.1) - 1e-2 * direction
        torch.testing.assert_close(after[PARAM][name].double(), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "script",
    [pytest.param(SCRIPT, marks=pytest.mark.exhaustive, id="by config"), pytest.param(BY_PROVIDER, id="by provider")],
)
def test_megatrons_muon_to_distributed_and_back(tmp_path: Path, script: str) -> None:
    """In bf16, which Megatron's Muon needs; its AdamW shards its state or not by how a script makes a model."""
    first = run("--bf16", *UPSTREAM, "--save", str(tmp_path / "first"), "--save-interval", "1", until=2, script=script)
    (tmp_path / "first" / "latest_checkpointed_iteration.txt").write_text("1")
    converted = switch(tmp_path / "first", tmp_path / "ours", "megatron-muon", "distributed-muon")
    save = ["--save", str(tmp_path / "ours"), "--save-interval", "2"]
    ours = run("--bf16", *MUON, "--load", converted, *save, until=3)
    assert sorted(ours[0].losses) == [1, 2]
    check_same_state(first, ours, at=1, upstream=first)

    (tmp_path / "ours" / "latest_checkpointed_iteration.txt").write_text("2")
    converted = switch(tmp_path / "ours", tmp_path / "last", "distributed-muon", "megatron-muon")
    last = run("--bf16", *UPSTREAM, "--load", converted, until=4, script=script)
    assert sorted(last[0].losses) == [2, 3]
    check_same_state(ours, last, at=2, upstream=last)


def check_same_state(before: list[Trace], after: list[Trace], at: int, upstream: list[Trace]) -> None:
    """Losses, main parameters and AdamW's moments bitwise, and its step; Megatron's momentum is a mean, ours a sum."""
    assert [trace.losses[at] for trace in before] == [trace.losses[at] for trace in after]
    for state in (PARAM, "exp_avg", "exp_avg_sq"):
        old, new = by_state(before, at, state), by_state(after, at, state)
        assert old.keys() == new.keys() and same(old, new), state
    # Weights of AdamW's that are decayed: those of the vocabulary.
    check_adamws_step(after, at, [name for name in by_state(after, at, MEAN) if "norm" not in name])
    old, new = by_state(before, at, MOMENTUM), by_state(after, at, MOMENTUM)
    assert old.keys() == new.keys() and old
    factor = 1 / (1 - 0.95) if upstream is before else 1 - 0.95
    for name, value in old.items():
        torch.testing.assert_close(new[name], value * factor, rtol=1e-6, atol=0, msg=name)
        assert value.any()


# The vocabulary is padded to 64 in each.
LAYOUTS = {
    "tp2 dp2": "--expert-model-parallel-size 1 --tensor-model-parallel-size 2 --sequence-parallel "
    "--make-vocab-size-divisible-by 32",
    "ep2 dp2": "--make-vocab-size-divisible-by 64",
    "pp2 dp2": "--expert-model-parallel-size 1 --pipeline-model-parallel-size 2 --make-vocab-size-divisible-by 64",
}
PAIRS = [
    pytest.param(a, b, marks=() if (a, b) == ("tp2 dp2", "ep2 dp2") else pytest.mark.exhaustive)
    for a in LAYOUTS
    for b in LAYOUTS
]
# A run that only loads and saves: there is no step to make.
ONCE = shlex.split("--train-iters 2 --lr-decay-iters 2 --eval-iters 0 --save-interval 5")


class Saved:
    """AdamW's checkpoints by layout, each made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def at(self, layout: str) -> Path:
        directory = self.root / layout.replace(" ", "_")
        if not directory.exists():
            words = [*FULLY, *shlex.split(LAYOUTS[layout]), *ONCE, "--save", str(directory)]
            launch_ranks(*words, world_size=4)
        return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("adamw"))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_adopts_at_any_layout(saved: Saved, tmp_path: Path, before: str, after: str) -> None:
    check_adopted(saved.at(before), tmp_path / "muon", LAYOUTS[after], how="momentum")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("how", "variant"), [("fresh", "muon"), ("momentum", "normuon"), ("momentum", "adamuon")])
def test_adopts_as_told(saved: Saved, tmp_path: Path, how: str, variant: str) -> None:
    words = f"{LAYOUTS['pp2 dp2']} --muon-variant {variant}"
    check_adopted(saved.at("tp2 dp2"), tmp_path / "muon", words, how=how, variant=variant)


def check_adopted(source: Path, target: Path, words: str, how: str, variant: str = "muon") -> None:
    """What a run under Muon has when it has loaded AdamW's checkpoint, by what it saves before its first step."""
    adopt = ["--muon-init-from-adamw", how, "--load", str(source), "--save", str(target)]
    launch_ranks(*FULLY, *MUON, *shlex.split(words), *ONCE, *adopt, world_size=4)
    before, after = tensors_of(source), tensors_of(target)
    names = {key.removeprefix(f"{PREFIX}.{PARAM}.") for key in before if key.startswith(f"{PREFIX}.{PARAM}.")}
    expected = {key: value for key, value in before.items() if not key.startswith(f"{PREFIX}.")}
    for name in names:
        expected[state_key(PARAM, name)] = before[state_key(PARAM, name)]
        mean = before[state_key(MEAN, name)]
        if not is_matrix(name):
            expected[state_key(MEAN, name)] = mean
            expected[state_key("exp_avg_sq", name)] = before[state_key("exp_avg_sq", name)]
            continue
        expected[state_key(MOMENTUM, name)] = mean / (1 - 0.95) if how == "momentum" else torch.zeros_like(mean)
        assert mean.any()
        if variant != "muon":
            expected[state_key(SECOND_MOMENT, name)] = torch.zeros_like(mean)
    assert after.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(after[key], value)] == []
    entries = Checkpoint(target).common["optimizer"].values()
    steps = {group["step"] for entry in entries for group in entry["optimizer"]["param_groups"] if "step" in group}
    assert steps == {2}


def is_matrix(name: str) -> bool:
    return not ("norm" in name or name.startswith(("embedding.", "output_layer.")))


@pytest.mark.exhaustive
def test_other_optimizers_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """One rank: legacy files and torch_dist of each optimizer, and a variant without its second moment."""
    alone = ["--expert-model-parallel-size", "1", *shlex.split("--train-iters 1 --lr-decay-iters 1 --eval-iters 0")]
    formats = {"legacy": ["--ckpt-format", "torch"], "dist": FULLY}
    for form, words in formats.items():
        save = ["--save", str(tmp_path / form), "--save-interval", "1"]
        launch_ranks(*alone, *words, *MUON, *save, world_size=1)
    launch_ranks(*alone, *formats["legacy"], "--save", str(tmp_path / "adamw"), "--save-interval", "1", world_size=1)
    normuon = [*MUON, "--muon-variant", "normuon"]
    resume = "resume it once as {} with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable --save NEW, and "
    for form, flags, message in (
        ("adamw", MUON, resume.format("AdamW") + "continue what that saves with --muon-init-from-adamw"),
        ("legacy", [], resume.format("Distributed Muon") + r"convert what that saves \(python -m megatron_muon"),
        ("legacy", normuon, "--muon-variant: got normuon, expected muon, .* it has no second moment; add"),
        ("legacy", [*MUON, "--ckpt-step", "1"], "--ckpt-step: got 1, expected none with legacy files"),
        ("dist", [], "add --distributed-muon to resume it, or convert it .* --from distributed-muon --to adamw"),
        ("dist", ["--bf16", *UPSTREAM], "convert it .* --from distributed-muon --to megatron-muon"),
        ("dist", normuon, "--muon-variant: got normuon, expected muon, .* it has no second moment; add"),
    ):
        words = formats["dist" if form == "dist" else "legacy"]
        with pytest.raises(RankError, match=message):
            launch_ranks(*alone, *words, *flags, "--load", str(tmp_path / form), world_size=1)


# What legacy files hold, as Megatron writes it, and who wrote it.
LEGACY: dict[str, Any] = {
    "adamw": {"optimizer": {"param_groups": [{"betas": (0.9, 0.999)}]}},
    "adamw with experts": [{"optimizer": {"param_groups": [{"betas": (0.9, 0.999)}]}}] * 2,
    "megatron-muon": [{"optimizer": {"state": {}, "param_groups": [{"momentum": 0.9}]}}, {"optimizer": {}}],
    "distributed-muon": {0: {"optimizer": {"kind": "adam"}}, 1: {"optimizer": {"kind": "muon"}}},
}


@pytest.mark.parametrize("written", LEGACY)
@pytest.mark.parametrize("run_by", ["adamw", "megatron-muon", "distributed-muon", "sgd"])
def test_legacy_files_of_another_optimizer_are_refused(
    written: str, run_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the seam around Megatron's load, which is given what such a load returns."""
    from megatron.training.checkpointing import CheckpointType

    state = ({"optimizer": LEGACY[written]}, "mp_rank_00/model_optim_rng.pt", False, CheckpointType.LEGACY)
    names = {"adamw": "adam", "megatron-muon": "muon", "distributed-muon": "adam", "sgd": "sgd"}
    args = Namespace(optimizer=names[run_by], load="x", ckpt_step=None, finetune=False, no_load_optim=False)
    config = MuonConfig() if run_by == "distributed-muon" else None
    monkeypatch.setattr(active, "_active", config)
    load = partial(load_base_checkpoint, lambda *words, **named: state)
    writer = written.removesuffix(" with experts")
    if run_by in (writer, "sgd"):
        assert load("x", args, False) is not None
    else:
        with pytest.raises(NotImplementedError, match="expected a torch_dist checkpoint to continue"):
            load("x", args, False)
    for passes in ({"finetune": True}, {"no_load_optim": True}):
        assert load("x", Namespace(**{**vars(args), **passes}), False) == state
    assert load("x", args, True) == state
    if config is not None:
        with pytest.raises(NotImplementedError, match="--ckpt-step: got 3, expected none with legacy files"):
            load("x", Namespace(**{**vars(args), "ckpt_step": 3}), False)
