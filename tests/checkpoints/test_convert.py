"""Offline reading and conversion of checkpoints that Megatron wrote, against torch's own reader and the reference."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_muon.checkpoints.contents import Parameter
from megatron_muon.checkpoints.convert import ConversionOptions, convert
from megatron_muon.checkpoints.manifest import file_problem, file_sizes, read_manifest
from megatron_muon.checkpoints.moments import largest_restart_factor
from megatron_muon.checkpoints.reader import COMMON, Checkpoint
from megatron_muon.checkpoints.writer import CheckpointWriter
from megatron_muon.cli import main
from tests.checkpoint_runs import child_processes
from tests.cpu.test_pretrain import COMMON as TRAINING
from tests.cpu.test_pretrain import SCRIPT
from tests.distributed import run_ranks

KINDS = ("adamw", "megatron-muon", "distributed-muon")
FLAGS = {
    "adamw": [],
    "megatron-muon": shlex.split("--optimizer muon --muon-fp32-matmul-prec high --muon-momentum 0.9"),
    "distributed-muon": shlex.split("--distributed-muon --muon-momentum 0.9 --muon-exchange-dtype fp32"),
}
MODEL = shlex.split("""
    --bf16 --swiglu --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 --moe-layer-freq [0,1]
    --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1
    --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable --save-interval 1 --lr-decay-iters 100
""")
STATE = "optimizer.state."


def launch_script(rank: int, world_size: int, port: int, words: list[str]) -> None:
    from megatron_muon import launch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world_size))
    with child_processes():
        launch.main(["--device", "cpu", SCRIPT, *TRAINING, *MODEL, *words])


def train(*words: str, script: Callable[..., None] = launch_script) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_ranks(script, 2, port, list(words))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each optimizer, by Megatron's own save after two steps."""
    root = tmp_path_factory.mktemp("written")
    for kind in KINDS:
        train(*FLAGS[kind], "--train-iters", "2", "--save", str(root / kind), "--save-interval", "2")
    return {kind: root / kind for kind in KINDS}


def tensors_of(run: Path, iteration: int = 2) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by torch's reader."""
    directory = run / f"iter_{iteration:07d}"
    entries = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        key: torch.full(entry.size, 7, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


MATRICES = {
    *(f"decoder.layers.{i}.self_attention.linear_{part}.weight" for i in (0, 1) for part in ("qkv", "proj")),
    *("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"),
    *(f"decoder.layers.1.mlp.experts.experts.linear_fc{i}.weight" for i in (1, 2)),
    "decoder.layers.1.mlp.router.weight",
}


@pytest.mark.parametrize(("source", "target"), itertools.permutations(KINDS, 2))
def test_converts(written: dict[str, Path], tmp_path: Path, source: Any, target: Any) -> None:
    before = tensors_of(written[source])
    convert(written[source], tmp_path / "out", ConversionOptions(source, target, momentum=0.9))
    after = tensors_of(tmp_path / "out")

    main_of = {kind: f"{STATE}{'fp32_param' if kind == 'megatron-muon' else 'param'}." for kind in KINDS}
    names = {key.removeprefix(main_of[source]) for key in before if key.startswith(main_of[source])}
    assert names > MATRICES
    expected = {key: value for key, value in before.items() if not key.startswith(STATE)}
    for name in names:
        expected[main_of[target] + name] = before[main_of[source] + name]
        if name not in MATRICES:
            if target == "megatron-muon":
                expected[f"{STATE}param.{name}"] = before[main_of[source] + name]
            for state in ("exp_avg.", "exp_avg_sq."):
                expected[STATE + state + name] = before[STATE + state + name]
        elif target == "adamw":
            mean = before[f"{STATE}momentum_buffer.{name}"]
            mean = mean if source == "megatron-muon" else mean / (1 / (1 - 0.9))
            expected[f"{STATE}exp_avg.{name}"] = mean
            expected[f"{STATE}exp_avg_sq.{name}"] = squares_for(mean, stacked=mean.dim() - 2)
        else:
            mean = before[STATE + ("exp_avg." if source == "adamw" else "momentum_buffer.") + name]
            # A mean gradient, but for Distributed Muon a sum.
            if source == "distributed-muon":
                mean = mean / (1 / (1 - 0.9))
            expected[f"{STATE}momentum_buffer.{name}"] = mean / (1 - 0.9) if target == "distributed-muon" else mean
    assert after.keys() == expected.keys()
    (iteration,) = (tmp_path / "out").glob("iter_*")
    manifest = read_manifest(iteration)
    assert manifest is not None and manifest.files.keys() == file_sizes(iteration).keys()
    assert all(file_problem(iteration, name, entry) is None for name, entry in manifest.files.items())
    for key, value in expected.items():
        assert after[key].dtype == value.dtype, key
        if ".exp_avg_sq." in key:
            # One number per matrix, of sums in another order.
            torch.testing.assert_close(after[key], value, rtol=1e-6, atol=0, msg=key)
        else:
            assert torch.equal(after[key], value), key


def squares_for(mean: Tensor, stacked: int) -> Tensor:
    """`exp_avg_sq` with which AdamW's third update of each matrix has an RMS of 0.2, by AdamW's own formula."""
    rest = tuple(range(stacked, mean.dim()))
    rms = (mean.double() / (1 - 0.9**3)).square().mean(rest, keepdim=True).sqrt()
    return ((rms / 0.2) ** 2 * (1 - 0.999**3)).float().expand(mean.shape)


@pytest.mark.parametrize("source", ["megatron-muon", "distributed-muon"])
def test_zeros_for_adamw(written: dict[str, Path], tmp_path: Path, source: Any) -> None:
    convert(written[source], tmp_path / "out", ConversionOptions(source, "adamw", start="zeros"))
    after = tensors_of(tmp_path / "out")
    for name in MATRICES:
        for state in ("exp_avg", "exp_avg_sq"):
            zeros = after[f"{STATE}{state}.{name}"]
            assert not zeros.any() and zeros.dtype == torch.float32 and zeros.shape == after[name].shape


def test_inspect(written: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        assert main(["inspect", str(written[kind]), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["optimizer"] == kind and found["iteration"] == 2
        assert (found["layout"]["tp"], found["layout"]["ep"], found["layout"]["world_size"]) == (2, 2, 2)
        tensors = tensors_of(written[kind])
        rows = {row["name"]: row for row in found["rows"]}
        assert {n for n, row in rows.items() if row["optimizer"] == "muon"} == (MATRICES if kind != "adamw" else set())
        for name, row in rows.items():
            assert tuple(row["shape"]) == tuple(tensors[name].shape) and row["dtype"] == "bfloat16"
            assert row["norms"]["weight"] == pytest.approx(tensors[name].double().norm().item(), rel=1e-6)
        momentum = rows["output_layer.weight"]["norms"]["exp_avg"]
        assert momentum == pytest.approx(tensors[f"{STATE}exp_avg.output_layer.weight"].norm().item(), rel=1e-5)
    assert main(["inspect", str(written["adamw"]), "--no-norms"]) == 0
    assert "tp=2 pp=1" in capsys.readouterr().out


def test_command(written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(written["distributed-muon"]), str(tmp_path / "out"), "--from", "distributed-muon"]
    assert main([*words, "--to", "adamw"]) == 0
    assert "9 parameters keep Muon's mean gradient as exp_avg" in capsys.readouterr().out
    words[2] = str(tmp_path / "zeros")
    assert main([*words, "--to", "adamw", "--momentum", "zeros"]) == 0
    said = capsys.readouterr().out
    assert "9 parameters start with" in said and "up to 6.57 times" in said
    for bad, message in {
        ("--to", "adamw"): "which exists, expected a new directory",
        ("--to", "distributed-muon"): "expected another optimizer",
    }.items():
        words[2] = str(tmp_path / ("out" if "exists" in message else "new"))
        assert main([*words, *bad]) == 2
        assert message in capsys.readouterr().err
    words[4] = "adamw"
    assert main([*words, "--to", "megatron-muon"]) == 2
    assert "--from: got adamw, expected distributed-muon" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "zeros"]


def test_restart_factor() -> None:
    """Against AdamW itself: a steady gradient, no bias correction, zero moments."""
    first = second = largest = 0.0
    for _ in range(400):
        first, second = 0.9 * first + 0.1, 0.999 * second + 0.001
        largest = max(largest, first / second**0.5)
    assert largest_restart_factor(0.9, 0.999) == pytest.approx(largest)
    assert largest_restart_factor(0.9, 0.95) < 1.2


@pytest.mark.parametrize(
    ("name", "shape", "ours", "upstreams"),
    [
        ("decoder.layers.mlp.linear_fc1.weight", (2, 8, 4), True, True),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 4, 8, 4), True, True),
        ("decoder.layers.input_layernorm.weight", (2, 8), False, False),
        ("decoder.layers.0.mlp.shared_experts.linear_fc2.weight", (8, 4), True, True),
        ("decoder.layers.0.mixer.conv1d.weight", (8, 1, 4), False, False),
        ("embedding.position_embeddings.weight", (8, 4), False, True),
        ("output_layer.weight", (8, 4), False, False),
    ],
)
def test_routes_by_name_and_shape(name: str, shape: tuple[int, ...], ours: bool, upstreams: bool) -> None:
    parameter = Parameter(name, shape, {})
    assert parameter.is_muons("distributed-muon") is ours
    assert parameter.is_muons("megatron-muon") is upstreams
    assert not parameter.is_muons("adamw")


def synthetic(directory: Path, rows: int, tensors: int) -> None:
    """An AdamW checkpoint whose tensors are of one chunk each."""
    writer = CheckpointWriter(directory)
    value = io.BytesIO()
    torch.save(torch.zeros(rows, 1024), value)
    size = torch.Size((rows, 1024))
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), size)
    entry = TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])
    for number in range(tensors):
        for prefix in ("", *(f"{STATE}{state}." for state in ("param", "exp_avg", "exp_avg_sq"))):
            key = f"{prefix}decoder.layers.{number}.mlp.linear_fc2.weight"
            value.seek(0)
            writer.copy(MetadataIndex(key, (0, 0)), value, entry)
    group = {"wd_mult": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "step": 4.0}
    optimizer = {"optimizer": {"param_groups": [group]}, "param_state_sharding_type": "fully_reshardable"}
    content = {"distrib_optim_sharding_type": "fully_reshardable"}
    writer.add_object(COMMON, {"optimizer": optimizer, "iteration": 4, "content_metadata": content})
    writer.finish(b'{"sharded_backend": "torch_dist"}')


def peak_growth_bytes(rank: int, world_size: int, source: Path, target: Path) -> int:
    """How far the resident memory rises during a conversion."""
    # Reads what the conversion imports, and resets the kernel's high-water mark.
    _ = Checkpoint(source).common
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    convert(source, target, ConversionOptions("adamw", "distributed-muon"))
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_needs_less_memory_than_two_of_the_largest_tensor(tmp_path: Path) -> None:
    largest = 160 << 20
    synthetic(tmp_path / "iter_0000004", rows=largest // 4096, tensors=2)
    (growth,) = run_ranks(peak_growth_bytes, 1, tmp_path / "iter_0000004", tmp_path / "out")
    # The whole checkpoint is eight times the largest tensor.
    assert largest // 2 < growth < 2 * largest


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/never",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("code in the metadata", r"names posix\.system"),
        ("code in common_state", r"common_state cannot be read"),
        ("path outside", r"'\.\./outside', expected a file inside the checkpoint"),
        ("truncated", r"__0_0\.distcp: has \d+ bytes, expected .* or more for .*; the file is truncated"),
        ("missing", r"__0_0\.distcp: missing, expected it to hold"),
        ("wrong dtype", r"got shape \(4, 1024\) and torch\.float32, expected \(4, 1024\) and torch\.bfloat16"),
        ("legacy", r"saved with --ckpt-format torch_dist"),
    ],
)
def test_refuses(tmp_path: Path, damage: str, message: str) -> None:
    directory = tmp_path / "iter_0000004"
    synthetic(directory, rows=4, tensors=1)
    shard, metadata = directory / "__0_0.distcp", directory / ".metadata"
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    if damage == "code in the metadata":
        metadata.write_bytes(pickle.dumps(Evil()))
    elif damage == "truncated":
        os.truncate(shard, 100)
    elif damage == "missing":
        shard.unlink()
    elif damage == "legacy":
        metadata.unlink()
    elif damage == "code in common_state":
        torch.save([Evil()], shard)
        info = _StorageInfo(shard.name, 0, shard.stat().st_size)
        entries = Metadata({COMMON: BytesStorageMetadata()}, storage_data={MetadataIndex(COMMON): info})
        metadata.write_bytes(pickle.dumps(entries))
    else:
        loaded = pickle.loads(metadata.read_bytes())
        at = MetadataIndex(key, (0, 0))
        if damage == "path outside":
            shard.rename(tmp_path / "outside")
            loaded.storage_data[at].relative_path = "../outside"
        else:
            chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 1024)))
            loaded.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(torch.bfloat16), torch.Size((4, 1024)), [chunk]
            )
        metadata.write_bytes(pickle.dumps(loaded))
    with pytest.raises(ValueError, match=message):
        checkpoint = Checkpoint(directory)
        list(checkpoint.chunks(key) if damage != "code in common_state" else checkpoint.common)
