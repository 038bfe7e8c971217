"""Megatron's own functions that ask for CUDA or for a build: random states, dataset helpers, start-up."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from .flags import cpu_arguments
from .redirect import Redirect


def _get_cuda_rng_state(original: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def get_cuda_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        if graph_safe:
            raise NotImplementedError("graph-safe random states belong to CUDA graphs: use --cuda-graph-impl none")
        return torch.get_rng_state()

    return get_cuda_rng_state


def _set_cuda_rng_state(original: Callable[..., Any]) -> Callable[..., None]:
    def set_cuda_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        if graph_safe:
            raise NotImplementedError("graph-safe random states belong to CUDA graphs: use --cuda-graph-impl none")
        torch.set_rng_state(new_state)

    return set_cuda_rng_state


def _fork_is_expected(record: logging.LogRecord) -> bool:
    """Drops one warning: inside the tracker's fork, the CPU generator is meant to change, for it is the device's."""
    return not str(record.msg).startswith("CPU RNG state changed within GPU RNG context")


def quiet_rng_tracker() -> None:
    """Keeps Megatron's random-state tracker from warning at every dropout."""
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_fork_is_expected)


def _compile_helpers(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        """Leaves the compiled helper of the wheel as it is; a source tree, which has none, is built."""
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


def _check_arguments(args: Any) -> None:
    """Refuses a backend that would fail far from here.

    Raises:
        ValueError: If `--distributed-backend` is not gloo.
    """
    if args.distributed_backend != "gloo":
        raise ValueError(
            f"--distributed-backend: got {args.distributed_backend}, expected gloo on a machine without CUDA; "
            f"add the flags of megatron_muon.cpu.cpu_arguments(): {' '.join(cpu_arguments())}"
        )


def _initialize_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_megatron(allow_no_cuda: bool = False, *args: Any, **kwargs: Any) -> Any:
        from megatron.training.global_vars import get_args

        _check_arguments(get_args())
        return original(True, *args, **kwargs)

    return initialize_megatron


def _warmup_jit_function(original: Callable[..., None]) -> Callable[..., None]:
    def warmup_jit_function(tp_size: int | None = None) -> None:
        """Nothing: no function is compiled, and its random inputs would come from the generator of the weights."""

    return warmup_jit_function


def _get_process(original: Callable[..., Any]) -> Any:
    def get_process(cls: type, rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any) -> Any:
        """The process that writes asynchronous checkpoints: forked, so that it has this backend as well."""
        return original.__func__(cls, rank, "fork", *args, **kwargs)  # type: ignore[attr-defined]

    return classmethod(get_process)


def _preload_tensors(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        """Copies to host memory, also what is there already: training goes on while a checkpoint is written."""
        return [
            (name, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for name, key, (data, tensors) in original(write_buckets, non_blocking)
        ]

    return preload_tensors


def _is_te_min_version(original: Callable[..., bool]) -> Callable[..., bool]:
    def is_te_min_version(version: str, check_equality: bool = True) -> bool:
        """Also true of the version that --qk-clip and --log-max-attention-logit ask for."""
        return version == "2.9.0" or original(version, check_equality)

    return is_te_min_version


def redirects() -> list[Redirect]:
    """The table of Megatron's functions. megatron.training's are left out where only megatron-core is installed."""
    rng = "megatron.core.tensor_parallel.random"
    table = [
        Redirect(
            f"{rng}:_get_cuda_rng_state",
            _get_cuda_rng_state,
            "the device's generator is the CPU's",
            ("device", "clone", "graph_safe"),
        ),
        Redirect(
            f"{rng}:_set_cuda_rng_state",
            _set_cuda_rng_state,
            "the device's generator is the CPU's",
            ("new_state", "device", "graph_safe"),
        ),
        Redirect(
            "megatron.core.datasets.utils:compile_helpers",
            _compile_helpers,
            "runs make, for which the wheel has no Makefile; the compiled helper is in it",
        ),
    ]
    strategies = "megatron.core.dist_checkpointing.strategies"
    table += [
        Redirect(
            f"{strategies}.async_utils:PersistentAsyncCaller._get_process",
            _get_process,
            "spawns a process without this backend, which asks for CUDA and dies, while its ranks wait for it",
            ("rank", "mp_mode"),
        ),
        Redirect(
            f"{strategies}.filesystem_async:FileSystemWriterAsync.preload_tensors",
            _preload_tensors,
            "takes tensors on the CPU for copies, so that an asynchronous save writes what later steps make of them",
            ("write_buckets", "non_blocking"),
        ),
    ]
    if importlib.util.find_spec("megatron.training") is not None:
        table += [
            Redirect(
                "megatron.training.initialize:_warmup_jit_function",
                _warmup_jit_function,
                "draws from the generator of the initial weights, by an amount that depends on the layout",
                ("tp_size",),
            ),
            Redirect(
                "megatron.training.arguments:is_te_min_version",
                _is_te_min_version,
                "asserts a Transformer Engine that records attention logits, which this backend's attention does",
                ("version", "check_equality"),
            ),
            *(
                Redirect(
                    f"{module}:initialize_megatron",
                    _initialize_megatron,
                    "asserts that CUDA is available, unless told otherwise",
                    ("allow_no_cuda",),
                )
                for module in (
                    "megatron.training.initialize",
                    "megatron.training",
                    "megatron.training.training",
                )
            ),
        ]
    return table
