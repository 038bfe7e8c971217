"""torch on a machine without CUDA, for code that asks for CUDA devices.

Megatron-Core writes `device="cuda"` and `torch.cuda.current_device()` wherever it makes a tensor. These patches
make such tensors on the CPU. Whatever does not name a CUDA device goes through untouched, and
`torch.cuda.is_available()` stays False: DataLoader, torch.optim and torch.compile decide by it.

The functions themselves are replaced, not a `TorchFunctionMode` pushed: a mode is off inside `backward()`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_muon.megatron.entry.patching import Patch

# The Megatron-Core checks on CUDA_DEVICE_MAX_CONNECTIONS are for devices older than this; they concern kernel queues.
_COMPUTE_CAPABILITY = (10, 0)


def _is_cuda(device: Any) -> bool:
    """Whether `device`, as torch functions take it, names a CUDA device. An integer does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)


def _factory(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A tensor factory whose `device` may name CUDA; pinned memory then is plain memory."""
    if kwargs:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        # Pinning is how a host tensor is made ready for a copy to the device; there is none.
        kwargs.pop("pin_memory", None)
    return original(*args, **kwargs)


def _tensor_to(original: Callable[..., torch.Tensor], self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, where the device may be the first argument."""
    if args and _is_cuda(args[0]):
        args = ("cpu", *args[1:])
    if "device" in kwargs and _is_cuda(kwargs["device"]):
        kwargs["device"] = "cpu"
    return original(self, *args, **kwargs)


def _tensor_cuda(original: Callable[..., torch.Tensor], self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda`: the tensor itself, as for a tensor that is on the device already."""
    return self


_CUDA_TYPE_NAMES = {f"torch.{name}": f"torch.cuda.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}


def _tensor_type(original: Callable[..., Any], self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type()` without arguments: the three names that Megatron-Core's optimizers compare with."""
    result = original(self, *args, **kwargs)
    return _CUDA_TYPE_NAMES.get(result, result) if isinstance(result, str) else result


class Event:
    """`torch.cuda.Event` on a CPU, where recorded work is done: a point in time."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        self.enable_timing = enable_timing
        self._seconds: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Sets the event's time to now."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`.

        Raises:
            RuntimeError: If one of the events was not recorded or was made without `enable_timing`.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise RuntimeError("elapsed_time needs both events made with enable_timing=True")
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("elapsed_time needs both events recorded")
        return (end_event._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        """True: what was recorded is done."""
        return True

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Stream:
    """`torch.cuda.Stream` on a CPU, where work is done when its call returns; streams only keep their identity."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority."""
        return 0, -1

    def record_event(self, event: Event | None = None) -> Event:
        """Records `event`, or a new one, and returns it."""
        event = event if event is not None else Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """True: submitted work is done."""
        return True

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


_DEFAULT_STREAM = Stream()
_current_stream = _DEFAULT_STREAM


def _get_current_stream(device: Any = None) -> Stream:
    return _current_stream


def _get_default_stream(device: Any = None) -> Stream:
    return _DEFAULT_STREAM


def _set_stream(stream: Stream) -> None:
    global _current_stream
    _current_stream = stream


class StreamContext:
    """`torch.cuda.stream(...)`: makes a stream the current one; None leaves it. May be entered again and again."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._previous: list[Stream] = []

    def __enter__(self) -> None:
        self._previous.append(_current_stream)
        if self.stream is not None:
            _set_stream(self.stream)

    def __exit__(self, *exception: object) -> None:
        _set_stream(self._previous.pop())


def _device_count() -> int:
    """One device for each rank of this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="cpu",
        major=_COMPUTE_CAPABILITY[0],
        minor=_COMPUTE_CAPABILITY[1],
        total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        multi_processor_count=os.cpu_count() or 1,
    )


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def patches() -> list[Patch]:
    """The table of torch's device functions. Call it before any of them is replaced."""
    tensors = "tensors asked for on a CUDA device are made on the CPU"
    # Reading the set fills its cache with the originals, by which `with torch.device(...)` knows factories.
    constructors = sorted(f.__name__ for f in _device_constructors() if hasattr(torch, f.__name__))
    like = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
    new = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
    driver, generator = "raises without a driver", "random numbers come from the CPU generator"
    values: tuple[tuple[str, Any, str], ...] = (
        ("Tensor.record_stream", lambda tensor, stream: None, "needs a CUDA stream; here no memory is reused early"),
        ("cuda:current_device", lambda: 0, "raises without a driver; Megatron needs an int"),
        ("cuda:set_device", lambda device: None, driver),
        ("cuda:device_count", _device_count, "at 0 Megatron skips model-parallel set-up and seeds"),
        ("cuda:current_stream", _get_current_stream, driver),
        ("cuda:default_stream", _get_default_stream, driver),
        ("cuda:set_stream", _set_stream, driver),
        ("cuda:stream", StreamContext, "takes only CUDA streams"),
        ("cuda:Stream", Stream, driver),
        ("cuda:Event", Event, "record() raises without a driver"),
        ("cuda:synchronize", lambda device=None: None, driver),
        ("cuda:is_current_stream_capturing", lambda: False, driver),
        ("cuda:get_device_properties", _device_properties, driver),
        ("cuda:get_device_capability", lambda device=None: _COMPUTE_CAPABILITY, driver),
        ("cuda:get_device_name", lambda device=None: "cpu", driver),
        ("cuda:get_rng_state", _get_rng_state, generator),
        ("cuda:set_rng_state", _set_rng_state, generator),
        ("cuda:manual_seed", _manual_seed, generator),
        ("_dynamo.config:disable", True, "torch.compile would build C++ kernels, slowly and with other roundings"),
    )
    return [
        *(Patch(f"torch:{name}", _factory, tensors) for name in (*constructors, *like)),
        *(Patch(f"torch:Tensor.{name}", _factory, tensors) for name in new),
        Patch("torch:Tensor.to", _tensor_to, "a move to CUDA does nothing"),
        Patch("torch:Tensor.cuda", _tensor_cuda, "a move to CUDA does nothing"),
        Patch("torch:Tensor.type", _tensor_type, "optimizers sort parameters by names such as torch.cuda.FloatTensor"),
        *(
            Patch(f"torch{'.' if ':' in target else ':'}{target}", value, why, is_value=True)
            for target, value, why in values
        ),
    ]
