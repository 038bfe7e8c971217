"""Megatron's own functions that ask for CUDA or for a build: random states, dataset helpers, start-up."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_muon.megatron.entry.kernels import compile_helpers
from megatron_muon.megatron.entry.patching import Patch

from .flags import cpu_arguments


def _check_not_graph_safe(graph_safe: bool) -> None:
    if graph_safe:
        raise NotImplementedError("graph-safe random states belong to CUDA graphs: use --cuda-graph-impl none")


def _get_cuda_rng_state(
    original: Callable[..., Any], device: Any = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    _check_not_graph_safe(graph_safe)
    return torch.get_rng_state()


def _set_cuda_rng_state(
    original: Callable[..., Any], new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False
) -> None:
    _check_not_graph_safe(graph_safe)
    torch.set_rng_state(new_state)


def _fork_is_expected(record: logging.LogRecord) -> bool:
    """Drops one warning: inside the tracker's fork, the CPU generator is meant to change, for it is the device's."""
    return not str(record.msg).startswith("CPU RNG state changed within GPU RNG context")


def quiet_rng_tracker() -> None:
    """Keeps Megatron's random-state tracker from warning at every dropout."""
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_fork_is_expected)


def _initialize_megatron(original: Callable[..., Any], allow_no_cuda: bool = False, *args: Any, **kwargs: Any) -> Any:
    """Refuses a distributed backend that would fail far from here, and allows to start without CUDA."""
    from megatron.training.global_vars import get_args

    backend = get_args().distributed_backend
    if backend != "gloo":
        raise ValueError(
            f"--distributed-backend: got {backend}, expected gloo on a machine without CUDA; "
            f"add the flags of megatron_muon.cpu.cpu_arguments(): {' '.join(cpu_arguments())}"
        )
    return original(True, *args, **kwargs)


def _get_process(
    original: Callable[..., Any], cls: type, rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any
) -> Any:
    """The process that writes asynchronous checkpoints: forked, so that it has this backend as well."""
    return original(cls, rank, "fork", *args, **kwargs)


def _preload_tensors(original: Callable[..., list[Any]], write_buckets: list[Any], non_blocking: bool = True) -> Any:
    """Copies to host memory, also what is there already: training continues while a checkpoint is written."""
    return [
        (name, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for name, key, (data, tensors) in original(write_buckets, non_blocking)
    ]


def _is_te_min_version(original: Callable[..., bool], version: str, check_equality: bool = True) -> bool:
    """Also true of the version that --qk-clip and --log-max-attention-logit ask for."""
    return version == "2.9.0" or original(version, check_equality)


_RNG = "megatron.core.tensor_parallel.random"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_CORE = (
    Patch(
        f"{_RNG}:_get_cuda_rng_state",
        _get_cuda_rng_state,
        "the device's generator is the CPU's",
        ("device", "clone", "graph_safe"),
    ),
    Patch(
        f"{_RNG}:_set_cuda_rng_state",
        _set_cuda_rng_state,
        "the device's generator is the CPU's",
        ("new_state", "device", "graph_safe"),
    ),
    Patch(
        "megatron.core.datasets.utils:compile_helpers",
        compile_helpers,
        "runs make, for which the wheel has no Makefile; the compiled helper is in it",
    ),
    Patch(
        f"{_STRATEGIES}.async_utils:PersistentAsyncCaller._get_process",
        _get_process,
        "spawns a process without this backend, which asks for CUDA and dies, while its ranks wait for it",
        ("rank", "mp_mode"),
    ),
    Patch(
        f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync.preload_tensors",
        _preload_tensors,
        "takes tensors on the CPU for copies, so that an asynchronous save writes what later steps make of them",
        ("write_buckets", "non_blocking"),
    ),
)
_TRAINING = (
    Patch(
        "megatron.training.initialize:_warmup_jit_function",
        lambda original, *args, **kwargs: None,
        "draws from the generator of the initial weights, by an amount that depends on the layout",
    ),
    Patch(
        "megatron.training.arguments:is_te_min_version",
        _is_te_min_version,
        "asserts a Transformer Engine that records attention logits, which this backend's attention does",
        ("version", "check_equality"),
    ),
    *(
        Patch(
            f"{module}:initialize_megatron",
            _initialize_megatron,
            "asserts that CUDA is available, unless told otherwise",
            ("allow_no_cuda",),
        )
        for module in ("megatron.training.initialize", "megatron.training", "megatron.training.training")
    ),
)


def patches() -> tuple[Patch, ...]:
    """The table of Megatron's functions; megatron.training's are left out where only megatron-core is installed."""
    return _CORE if importlib.util.find_spec("megatron.training") is None else (*_CORE, *_TRAINING)
