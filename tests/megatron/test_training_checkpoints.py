"""Checkpoints of `--distributed-muon` runs through megatron.training's own save and load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.checkpoints.digest import checksum
from megatron_muon.checkpoints.manifest import read_manifest
from megatron_muon.config import MuonConfig
from megatron_muon.rule.reference import ReferenceMuon
from tests.distributed import RankError
from tests.sources import INSTALLED
from tests.training_runs import MUON, Stop, Trace, differences, launch_ranks, train

FORMATS = {
    "fully_reshardable": "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable",
    "dp_reshardable": "--ckpt-format torch_dist",
    "async fully_reshardable": "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable --async-save "
    "--async-strategy mcore --use-persistent-ckpt-worker",
    "async dp_reshardable": "--ckpt-format torch_dist --async-save --async-strategy mcore --use-persistent-ckpt-worker",
    "legacy": "--ckpt-format torch",
}


@pytest.fixture(scope="module")
def whole() -> list[Trace]:
    """A run that is neither saved nor resumed."""
    traces = launch_ranks(*MUON)
    assert sorted(traces[0].losses) == [0, 1, 2, 3]
    return traces


SELDOM = ("dp_reshardable", "async fully_reshardable")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.exhaustive) if n in SELDOM else n for n in FORMATS])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, whole: list[Trace], name: str) -> None:
    """State after the load, and every later loss and state."""
    layout = [*MUON, *shlex.split(FORMATS[name])]
    # It goes on training while an asynchronous save is under way.
    saving = launch_ranks(*layout, "--save", str(tmp_path), "--save-interval", "2", run=train_and_list_reads)
    if name != "legacy":
        # Checksums come from the writers, of which asynchronous ones are processes of their own.
        read = sorted(word for trace in saving for word in trace.printed.split() if word.startswith("READ:"))
        small = (".metadata", *(("common.pt",) if INSTALLED == "0.18" else ()), "metadata.json")
        assert read == [f"READ:{file}" for file in small for _ in range(2)]
        files = read_manifest(tmp_path / "iter_0000004").files
        assert len(files) == 2 + len(small) and all(
            checksum(tmp_path / "iter_0000004" / n) == e for n, e in files.items()
        )
    assert differences(saving, whole, range(4)) == []
    # Not by --ckpt-step: with legacy files Megatron then takes the optimizer's state of the last iteration.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = launch_ranks(*layout, "--load", str(tmp_path))
    assert sorted(resumed[0].losses) == [2, 3]
    assert differences(resumed, whole, range(2, 4)) == []
    if name == "fully_reshardable":
        check_keys_on_disk(tmp_path / "iter_0000002")


def train_and_list_reads(*arguments: Any) -> Trace:
    """As `train`; the trace says which files this rank has read for its manifests."""
    from megatron_muon.megatron.checkpoint import saving

    original = saving.checksum

    def read(path: Path) -> Any:
        print(f"\nREAD:{path.name}")
        return original(path)

    saving.checksum = read
    return train(*arguments)


def check_keys_on_disk(directory: Path) -> None:
    """Muon's parameters have one whole momentum and main parameter, and no second moment; AdamW's have both moments."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    tensors = load_tensors_metadata(str(directory))
    shapes = {key: tuple(tensor.global_shape) for key, tensor in tensors.items()}
    states: dict[str, set[str]] = {}
    for key in shapes:
        if key.startswith("optimizer.state."):
            _, _, state, name = key.split(".", 3)
            states.setdefault(name, set()).add(state)
            assert shapes[key] == shapes[name], key
    muon = {name for name, kinds in states.items() if "momentum_buffer" in kinds}
    assert muon and all(states[name] == {"param", "momentum_buffer"} for name in muon)
    adam = states.keys() - muon
    assert all(states[name] == {"param", "exp_avg", "exp_avg_sq"} for name in adam)
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= adam
    assert any("linear_qkv" in name for name in muon) and any("experts" in name for name in muon)


FULLY = shlex.split(FORMATS["fully_reshardable"])
# A rank alone stores whole parameters, in any buffer layout.
ALONE = ["--expert-model-parallel-size", "1"]


@pytest.mark.parametrize(("how", "resumed_at"), [("SIGTERM", 3), ("before the update", 2)])
def test_stopped_run_goes_on_bitwise(tmp_path: Path, whole: list[Trace], how: Stop, resumed_at: int) -> None:
    """By a signal: from the step it came in. Before the update: from the last checkpoint, over the same batches."""
    layout = [*MUON, *FULLY]
    saving = [*layout, "--save", str(tmp_path), "--save-interval", "2", "--exit-signal-handler"]
    if how == "SIGTERM":
        stopped = launch_ranks(*saving, stop=(how, 2))
        assert sorted(stopped[0].losses) == [0, 1, 2]
    else:
        with pytest.raises(RankError, match="stopped before the update"):
            launch_ranks(*saving, stop=(how, 3))
    resumed = launch_ranks(*layout, "--load", str(tmp_path))
    assert sorted(resumed[0].losses) == list(range(resumed_at, 4))
    assert differences(resumed, whole, range(resumed_at, 4)) == []


CHANGED = shlex.split("""
    --lr 2e-2 --weight-decay 0.2 --muon-momentum 0.8 --muon-coefficients polar_express --muon-num-ns-steps 6
    --muon-update-rms 0.3 --adam-beta2 0.9
""")


def test_changed_settings_take_effect_and_are_told_once(tmp_path: Path) -> None:
    layout = [*ALONE, *MUON, *FULLY]
    launch_ranks(*layout, "--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2", world_size=1)
    (run,) = launch_ranks(*layout, *CHANGED, "--override-opt_param-scheduler", "--load", str(tmp_path), world_size=1)
    config = MuonConfig(
        momentum=0.8, coefficients="polar_express", ns_steps=6, update_rms=0.3, ns_dtype="fp32", exchange_dtype="fp32"
    )
    check_muons_step(run, config, lr=2e-2, weight_decay=0.2)
    assert all(group["betas"][1] == 0.9 for group in run.groups[2] if "betas" in group)
    for told in (
        "--lr: 0.01 -> 0.02",
        "--weight-decay: 0.1 -> 0.2",
        "--muon-momentum: 0.95 -> 0.8",
        "--muon-coefficients: keller -> polar_express",
        "--muon-ns-steps: 5 -> 6",
        "--muon-update-rms: 0.2 -> 0.3",
        "--adam-beta1 and --adam-beta2: (0.9, 0.999) -> (0.9, 0.9)",
    ):
        assert run.printed.count(f"megatron_muon: {told}") == 1, told


def check_muons_step(run: Trace, config: MuonConfig, *, lr: float, weight_decay: float) -> None:
    """Iteration 2's update of the matrices that are one logical matrix, from the momenta around it."""
    before, after = run.states[2], run.states[3]
    names = [name for name, state in before if state == "momentum_buffer" and "linear_proj" in name]
    assert len(names) == 2
    reference = ReferenceMuon({}, {}, config)
    for name in names:
        momentum = after[name, "momentum_buffer"]
        gradient = momentum - config.momentum * before[name, "momentum_buffer"]
        direction = (gradient + config.momentum * momentum).view(32, 32)
        update = reference.update(name, direction).view(-1)
        expected = before[name, "param"] * (1 - lr * weight_decay) - lr * update
        torch.testing.assert_close(after[name, "param"], expected, rtol=0, atol=1e-6)


def test_adamws_checkpoint_goes_on_under_muon(tmp_path: Path) -> None:
    """Weights and the other parameters' state bitwise; momentum from exp_avg, or zero; never without being told."""
    layout = [*ALONE, *FULLY]
    (adamw,) = launch_ranks(*layout, "--save", str(tmp_path), "--save-interval", "2", world_size=1)
    load = [*layout, *MUON, "--load", str(tmp_path), "--ckpt-step", "2"]
    for how, factor in (("momentum", 1 / (1 - 0.95)), ("fresh", 0.0)):
        (muon,) = launch_ranks(*load, "--muon-init-from-adamw", how, world_size=1)
        assert sorted(muon.losses) == [2, 3]
        assert muon.losses[2] == adamw.losses[2]
        assert f"--muon-init-from-adamw {how}: the checkpoint is AdamW's" in muon.printed
        for (name, state), value in muon.states[2].items():
            if state == "momentum_buffer":
                expected = adamw.states[2][name, "exp_avg"]
                torch.testing.assert_close(value, expected * factor, rtol=1e-6, atol=0)
                assert expected.any()
            else:
                assert torch.equal(value, adamw.states[2][name, state]), (name, state)
    with pytest.raises(RankError, match="add --muon-init-from-adamw momentum"):
        launch_ranks(*load, world_size=1)


def test_adamws_flat_buckets_are_refused_under_muon(tmp_path: Path) -> None:
    layout = [*ALONE, "--ckpt-format", "torch_dist"]
    launch_ranks(*layout, "--save", str(tmp_path), "--save-interval", "1", "--exit-interval", "1", world_size=1)
    with pytest.raises(RankError, match="resume it once with AdamW and --dist-ckpt-optim-fully-reshardable"):
        launch_ranks(*layout, *MUON, "--muon-init-from-adamw", "fresh", "--load", str(tmp_path), world_size=1)


def test_muons_checkpoint_goes_back_to_adamw_without_its_state(tmp_path: Path) -> None:
    layout = [*ALONE, *FULLY]
    (muon,) = launch_ranks(*layout, *MUON, "--save", str(tmp_path), "--save-interval", "2", world_size=1)
    load = [*layout, "--load", str(tmp_path), "--ckpt-step", "2"]
    (adamw,) = launch_ranks(*load, "--no-load-optim", world_size=1)
    assert sorted(adamw.losses) == [2, 3] and adamw.losses[2] == muon.losses[2]
    assert all(torch.equal(value, muon.states[2][key]) for key, value in adamw.states[2].items())
    with pytest.raises(RankError, match="got a checkpoint of Distributed Muon, expected one of AdamW"):
        launch_ranks(*load, world_size=1)


OPTIONS = {
    "resume": [],
    "finetune": ["--finetune"],
    "no-load-optim": ["--no-load-optim"],
    "override": shlex.split("--override-opt_param-scheduler --lr-warmup-iters 3"),
    "checkpoint scheduler": shlex.split("--use-checkpoint-opt_param-scheduler --lr-warmup-iters 3"),
    "checkpoint args": ["--use-checkpoint-args"],
}


@pytest.mark.exhaustive
def test_megatrons_options_do_what_they_do_with_adamw(tmp_path: Path) -> None:
    """Which iterations run, at which learning rates, from which weights, and whether optimizer state was loaded."""
    layout = [*ALONE, *FULLY]
    seen: dict[str, dict[str, Any]] = {}
    for optimizer, flags in (("adamw", []), ("muon", MUON)):
        directory = str(tmp_path / optimizer)
        (saved,) = launch_ranks(*layout, *flags, "--save", directory, "--save-interval", "2", world_size=1)
        seen[optimizer] = {}
        for option, words in OPTIONS.items():
            load = ["--load", directory, "--ckpt-step", "2"]
            (run,) = launch_ranks(*layout, *flags, *words, *load, world_size=1)
            seen[optimizer][option] = behaviour(run, saved)
    assert seen["muon"] == seen["adamw"]
    assert len({str(value) for value in seen["adamw"].values()}) >= 4


def behaviour(run: Trace, saved: Trace) -> dict[str, Any]:
    first = min(run.losses)
    loaded = {
        state: all(
            torch.equal(value, saved.states[2][name, s]) for (name, s), value in run.states[first].items() if s == state
        )
        for state in ("param", "exp_avg")
    }
    held = {state for _, state in run.states[first]}
    learning_rates = {at: groups[0]["lr"] for at, groups in run.groups.items()}
    return {"iterations": sorted(run.losses), "lr": learning_rates, "loaded": loaded, "has moments": "exp_avg" in held}
