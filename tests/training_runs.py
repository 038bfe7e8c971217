"""Runs of `megatron.training.pretrain` through the launcher, with exact losses and the optimizers' exact state."""

from __future__ import annotations

import io
import os
import shlex
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tests.checkpoint_runs import STATES, child_processes
from tests.distributed import run_ranks
from tests.paths import PRETRAIN_GPT as SCRIPT

# Experts over two ranks and dense parameters sharded over both: two AdamW-like and two Muon-like kinds of buffers.
MODEL = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 4 --tokenizer-type NullTokenizer --vocab-size 63 --mock-data
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2
    --expert-model-parallel-size 2 --expert-tensor-parallel-size 1
""")
TRAINING = shlex.split("""
    --lr 1e-2 --lr-decay-style constant --weight-decay 0.1 --train-iters 4 --log-interval 1 --eval-interval 100
    --eval-iters 1 --use-distributed-optimizer
""")
MUON = ["--distributed-muon", "--muon-exchange-dtype", "fp32"]


# How a run is stopped in a step: by a signal to one rank, or by a failure once gradients are accumulated.
Stop = Literal["SIGTERM", "before the update"]


@dataclass
class Trace:
    """What a rank saw of a run.

    Attributes:
        losses: Iteration, counted from 0 -> the exact training losses of its step, by name.
        states: Iteration -> what the optimizers stored before its step, by (parameter, state).
        groups: Iteration -> the optimizers' parameter groups during its step, without parameters.
        printed: Everything the rank printed.
    """

    losses: dict[int, dict[str, float]] = field(default_factory=dict)
    states: dict[int, dict[tuple[str, str], torch.Tensor]] = field(default_factory=dict)
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    printed: str = ""


def train(
    rank: int, world_size: int, port: int, script: str, arguments: list[str], stop: tuple[Stop, int] | None
) -> Trace:
    """Launches a script in this rank. `stop`: how, and in which iteration's step, it is stopped."""
    from megatron.training import training

    from megatron_muon import launch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world_size))
    trace = Trace()
    training.train_step = _recording(training.train_step, trace, rank, stop)
    printed = io.StringIO()
    with child_processes(), redirect_stdout(printed):
        try:
            launch.main(["--device", "cpu", script, *arguments])
        except SystemExit as end:  # as Megatron ends after a signal or --exit-interval
            assert not end.code
    trace.printed = printed.getvalue()
    return trace


def _recording(
    original: Callable[..., Any], trace: Trace, rank: int, stop: tuple[Stop, int] | None
) -> Callable[..., Any]:
    def train_step(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, iteration = args[2], args[3], kwargs["iteration"]
        trace.states[iteration] = stored(model, optimizer)
        trace.groups[iteration] = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        if stop == ("SIGTERM", iteration) and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop == ("before the update", iteration):
            optimizer.step = _fail
        out = original(*args, **kwargs)
        trace.losses[iteration] = {name: torch.as_tensor(value).double().sum().item() for name, value in out[0].items()}
        return out

    return train_step


def _fail() -> None:
    raise RuntimeError("stopped before the update")


def stored(model: list[Any], optimizer: Any) -> dict[tuple[str, str], torch.Tensor]:
    """Copies of main parameters and states that this rank's optimizers store, by parameter name and state."""
    names = {p: f"{index}.{name}" for index, chunk in enumerate(model) for name, p in chunk.named_parameters()}
    out = {}
    for part in _parts(optimizer):
        if hasattr(part, "model_param_gbuf_map"):
            pairs = [(p, part._get_main_param_and_optimizer_states(p)) for p in part.model_param_gbuf_map]
        else:
            groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            mains = [pair for models, mains in groups for pair in zip(models, mains, strict=True)]
            pairs = [(p, {"param": main, **part.optimizer.state[main]}) for p, main in mains]
        for parameter, states in pairs:
            for state, value in states.items():
                if state in STATES:
                    out[names[parameter], state] = value.detach().clone()
    return out


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, whose members may be chains."""
    chain = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if chain is None else [part for member in chain for part in _parts(member)]


def launch_ranks(
    *arguments: str,
    world_size: int = 2,
    stop: tuple[Stop, int] | None = None,
    script: str = SCRIPT,
    model: Sequence[str] = MODEL,
    run: Callable[..., Trace] = train,
) -> list[Trace]:
    """Runs a script on ranks of their own; one trace a rank. `run` is `train` or a function around it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    traces: list[Trace] = run_ranks(run, world_size, port, script, [*model, *TRAINING, *arguments], stop)
    return traces


def differences(traces: list[Trace], others: list[Trace], iterations: range) -> list[str]:
    """Where two runs at one layout are not bitwise the same, before and in the steps of `iterations`."""
    out = []
    for rank, (a, b) in enumerate(zip(traces, others, strict=True)):
        for at in iterations:
            if a.losses[at] != b.losses[at]:
                out.append(f"rank {rank}, iteration {at}: losses {a.losses[at]} and {b.losses[at]}")
            if a.states[at].keys() != b.states[at].keys():
                out.append(f"rank {rank}, iteration {at}: states {a.states[at].keys() ^ b.states[at].keys()}")
            out += [
                f"rank {rank}, iteration {at}: {state} of {name}"
                for name, state in a.states[at].keys() & b.states[at].keys()
                if not torch.equal(a.states[at][name, state], b.states[at][name, state])
            ]
    return out
