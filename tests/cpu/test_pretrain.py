"""`megatron.training.pretrain`, called by a plain Megatron script, from arguments to checkpoint, on the CPU backend."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from megatron_muon import cpu
from tests.checkpoint_runs import child_processes
from tests.distributed import RankError, run_ranks
from tests.paths import PRETRAIN_GPT as SCRIPT

COMMON = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --train-iters 4
    --tokenizer-type NullTokenizer --vocab-size 63 --mock-data
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --use-distributed-optimizer --log-interval 1 --eval-interval 4
    --eval-iters 1 --attention-dropout 0 --hidden-dropout 0
""")
MOE = shlex.split("""
    --bf16 --swiglu --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 --multi-latent-attention --kv-lora-rank 16
    --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 --rope-type rope --overlap-grad-reduce --overlap-param-gather
""")
TP2 = shlex.split("--tensor-model-parallel-size 2 --sequence-parallel")
EP2 = shlex.split("--expert-model-parallel-size 2 --expert-tensor-parallel-size 1")


def pretrain(rank: int, world_size: int, port: int, arguments: list[str]) -> dict[str, list[float]]:
    """Runs the script in this rank; returns the printed losses by what they are the losses of."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world_size))
    sys.argv = [SCRIPT, *arguments]
    printed = io.StringIO()
    with child_processes(), redirect_stdout(printed):
        runpy.run_path(SCRIPT, run_name="__main__")
    losses: dict[str, list[float]] = {"train": [], "valid": []}
    for line in printed.getvalue().splitlines():
        if found := re.search(r"iteration +\d+/ .*lm loss: (\S+)", line):
            losses["train"].append(float(found[1]))
        elif found := re.search(r"validation loss at iteration \d+ \| lm loss value: (\S+)", line):
            losses["valid"].append(float(found[1]))
    return losses


def run(world_size: int, *arguments: str) -> dict[str, list[float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Megatron logs on the last rank.
    result: dict[str, list[float]] = run_ranks(pretrain, world_size, port, [*COMMON, *arguments, *cpu.cpu_arguments()])[
        -1
    ]
    return result


def test_a_tensor_parallel_run_prints_the_losses_of_one_rank() -> None:
    # The vocabulary is padded to this times the tensor-parallel size.
    one = run(1, "--make-vocab-size-divisible-by", "64")
    assert len(one["train"]) == 4 and len(one["valid"]) == 1
    assert one["train"][0] > one["train"][-1]
    two = run(2, *TP2, "--make-vocab-size-divisible-by", "32")
    # Printed with seven digits; fp32 differs in the last.
    assert two["train"] == pytest.approx(one["train"], rel=1e-6)
    assert two["valid"] == pytest.approx(one["valid"], rel=1e-6)


def test_moe_and_mla_in_bf16_resume_from_a_checkpoint_with_the_same_losses(tmp_path: Path) -> None:
    layout = [*MOE, *TP2, *EP2]
    layout += ["--ckpt-format", "torch_dist"]
    whole = run(2, *layout, "--save", str(tmp_path), "--save-interval", "2")
    assert whole["train"][0] > whole["train"][-1]
    resumed = run(2, *layout, "--load", str(tmp_path), "--ckpt-step", "2")
    # Of a run's second iteration Megatron prints the mean with its first, whose sum it does not reset.
    assert resumed["train"] == [whole["train"][2], pytest.approx(sum(whole["train"][2:]) / 2, abs=1e-6)]
    assert resumed["valid"] == whole["valid"]


def test_another_backend_than_gloo_is_refused() -> None:
    with pytest.raises(RankError, match="--distributed-backend: got nccl, expected gloo") as raised:
        run_ranks(pretrain, 1, 0, [*COMMON, *cpu.cpu_arguments(), "--distributed-backend", "nccl"])
    assert {error for error, _, _ in raised.value.errors.values()} == {"ValueError"}
