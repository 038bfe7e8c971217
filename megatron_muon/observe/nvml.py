"""Power, clocks and throttling of a GPU, read through NVML before and after a profiled step.

Everything works without a driver, without the package nvidia-ml-py, and with devices that lack a value: what cannot be
read is left out. Counters of links are left to `nvidia-smi nvlink` and DCGM.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# nvmlClocksEventReasons*: why a clock is below its best. Bit 0, an idle device, costs nothing.
THROTTLE_REASONS: Mapping[int, str] = MappingProxyType(
    {
        0x002: "application clocks",
        0x004: "software power cap",
        0x008: "hardware slowdown",
        0x010: "sync boost",
        0x020: "software thermal",
        0x040: "hardware thermal",
        0x080: "hardware power brake",
        0x100: "display clocks",
    }
)


Sample = Mapping[str, int]
"""What NVML reports of a device at one time: `time_ns` on the monotonic clock, and what the device has of `power_mw`,
`energy_mj` since the driver was loaded, `sm_clock_mhz`, and `throttle_reasons` as bits of `THROTTLE_REASONS`.
"""


def throttle_names(reasons: int) -> tuple[str, ...]:
    """Names of the bits that are set, unknown ones as numbers, without the bit of an idle device."""
    known = [name for bit, name in THROTTLE_REASONS.items() if reasons & bit]
    unknown = reasons & ~(1 | sum(THROTTLE_REASONS))
    return (*known, *([f"{unknown:#x}"] if unknown else []))


def between(before: Sample, after: Sample) -> tuple[dict[str, float], tuple[str, ...]]:
    """The device from one sample to a later one.

    Returns:
        What the device has of `power_w`, the mean by the energy, otherwise of the two samples, and of `sm_clock_mhz`,
        the lower one of the two clocks; and the reasons for low clocks at either time.
    """

    def both(name: str) -> list[int]:
        return [sample[name] for sample in (before, after) if name in sample]

    numbers: dict[str, float] = {}
    if powers := both("power_mw"):
        numbers["power_w"] = sum(powers) / len(powers) / 1e3
    energies = both("energy_mj")
    # An energy that fell was reset.
    passed_ns = after["time_ns"] - before["time_ns"]
    if len(energies) == 2 and energies[1] > energies[0] and passed_ns > 0:
        numbers["power_w"] = 1e6 * (energies[1] - energies[0]) / passed_ns
    if clocks := both("sm_clock_mhz"):
        numbers["sm_clock_mhz"] = min(clocks)
    reasons = 0
    for value in both("throttle_reasons"):
        reasons |= value
    return numbers, throttle_names(reasons)


class NvmlDevice:
    """A GPU as NVML sees it; made by `open_device`."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._nvml, self._handle = pynvml, handle

    def sample(self) -> Sample:
        """Reads everything, in a few calls of the driver. Never raises for what the device lacks."""
        found = {"time_ns": time.monotonic_ns()}
        for name, function, *args in (
            ("power_mw", "nvmlDeviceGetPowerUsage"),
            ("energy_mj", "nvmlDeviceGetTotalEnergyConsumption"),
            ("sm_clock_mhz", "nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            ("throttle_reasons", "nvmlDeviceGetCurrentClocksEventReasons"),
        ):
            # nvidia-ml-py, the driver or the device may not have it.
            with contextlib.suppress(AttributeError, self._nvml.NVMLError):
                found[name] = int(getattr(self._nvml, function)(self._handle, *args))
        return found


def open_device(uuid_or_index: str | int) -> tuple[NvmlDevice | None, str]:
    """A GPU by its UUID (`GPU-...`) or NVML index.

    CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not NVML's: use the UUID where torch knows it.

    Returns:
        The device and "", or None and one line with the reason.
    """
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "pynvml":
            raise
        return None, "NVML: nvidia-ml-py is not installed (pip install nvidia-ml-py); no power or clocks"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: no NVIDIA driver ({error}); no power or clocks"
    by_name = isinstance(uuid_or_index, str)
    find = pynvml.nvmlDeviceGetHandleByUUID if by_name else pynvml.nvmlDeviceGetHandleByIndex
    try:
        return NvmlDevice(pynvml, find(uuid_or_index)), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: no device {uuid_or_index} ({error}); no power or clocks"


def open_current_device() -> tuple[NvmlDevice | None, str]:
    """torch's current CUDA device, as `open_device` returns it; without CUDA, NVML's first device."""
    import torch

    if not torch.cuda.is_available():
        return open_device(0)
    return open_device(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
