"""Counters, power and clocks of a GPU, read through NVML around the phases of a measurement.

Everything here goes on without a driver, without the nvidia-ml-py package, and with devices that lack a counter: what
cannot be read is None, with the reason beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

ALL_LINKS = 0xFFFFFFFF
"""The scope that sums a device's NVLinks."""


@dataclass(frozen=True)
class Counter:
    """A running count of bytes that NVML keeps for a device.

    Attributes:
        field_id: NVML's number of it.
        scope: NVML's scope: which of the links.
        unit_bytes: Bytes of one count.
        limit_bytes_per_s: More than today's links carry in one direction, so that a difference that would mean more
            is none.
    """

    field_id: int
    scope: int
    unit_bytes: int
    limit_bytes_per_s: float


# Source: nvml.h, NVML_FI_DEV_NVLINK_THROUGHPUT_* ("in KiB") and NVML_FI_DEV_PCIE_COUNT_* ("value can be wrapped").
# `data` is payload, `raw` counts protocol overhead as well.
_NVLINK_LIMIT, _PCIE_LIMIT = 1.8e12, 128e9
COUNTERS: Mapping[str, Counter] = MappingProxyType(
    {
        "nvlink_data_sent_bytes": Counter(138, ALL_LINKS, 1024, _NVLINK_LIMIT),
        "nvlink_data_received_bytes": Counter(139, ALL_LINKS, 1024, _NVLINK_LIMIT),
        "nvlink_raw_sent_bytes": Counter(140, ALL_LINKS, 1024, _NVLINK_LIMIT),
        "nvlink_raw_received_bytes": Counter(141, ALL_LINKS, 1024, _NVLINK_LIMIT),
        "pcie_sent_bytes": Counter(197, 0, 1, _PCIE_LIMIT),
        "pcie_received_bytes": Counter(198, 0, 1, _PCIE_LIMIT),
    }
)

# nvmlValueType_t -> member of the union, bits of a count that wraps around.
_VALUE_TYPES = {1: ("uiVal", 32), 2: ("ulVal", 64), 3: ("ullVal", 64)}

# nvmlClocksEventReasons*: why a clock is below what it could be. Those that cost speed; idle is none.
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


@dataclass(frozen=True)
class Reading:
    """A counter at one time.

    Attributes:
        count: In the counter's unit.
        bits: Of the count; beyond them it starts at zero again.
    """

    count: int
    bits: int


@dataclass(frozen=True)
class Sample:
    """What NVML says of a device at one time.

    Attributes:
        time_ns: On the monotonic clock.
        readings: By name of `COUNTERS`; None where the device has none.
        power_mw: Milliwatts.
        energy_mj: Since the driver was loaded, in millijoules.
        sm_clock_mhz: Of the multiprocessors.
        memory_clock_mhz: Of the memory.
        throttle_reasons: Bits of `THROTTLE_REASONS`.
        problems: For each value that is None, why.
    """

    time_ns: int
    readings: Mapping[str, Reading | None]
    power_mw: int | None = None
    energy_mj: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: int | None = None
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """What happened between two samples of a device.

    Attributes:
        seconds: Between them.
        counted_bytes: By name of `COUNTERS`; None where it cannot be known.
        mean_power_w: From the energy, or else of the two samples.
        sm_clock_mhz: Lower one of the two.
        memory_clock_mhz: Lower one of the two.
        throttled: Reasons at either time.
    """

    seconds: float
    counted_bytes: Mapping[str, int | None]
    mean_power_w: float | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    throttled: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return {
            "seconds": self.seconds,
            **self.counted_bytes,
            "mean_power_w": self.mean_power_w,
            "sm_clock_mhz": self.sm_clock_mhz,
            "memory_clock_mhz": self.memory_clock_mhz,
            "throttled": list(self.throttled),
        }


def throttle_names(reasons: int | None) -> tuple[str, ...]:
    """Names of the bits that are set, unknown ones as numbers; idle is not among them."""
    if reasons is None:
        return ()
    known = [name for bit, name in THROTTLE_REASONS.items() if reasons & bit]
    unknown = reasons & ~(1 | sum(THROTTLE_REASONS))
    return (*known, *([f"{unknown:#x}"] if unknown else []))


def counted_bytes(counter: Counter, before: Reading | None, after: Reading | None, seconds: float) -> int | None:
    """Bytes that a counter counted between two readings.

    A count that fell has wrapped around, or was reset; only what the links could have carried is taken for the former.
    A short count that may have wrapped more than once says nothing, whether or not it fell.

    Args:
        counter: Which one.
        before: At the start.
        after: At the end.
        seconds: Between the readings.

    Returns:
        The bytes; None if there is no telling.
    """
    if before is None or after is None or before.bits != after.bits or seconds < 0:
        return None
    possible = counter.limit_bytes_per_s * seconds
    modulus = 1 << after.bits
    if possible >= modulus * counter.unit_bytes:
        return None
    counted = (after.count - before.count) % modulus * counter.unit_bytes
    # Readings lag behind the calls that ask for them: a short phase may count a little more than it had time for.
    return counted if after.count >= before.count or counted <= 2 * possible + counter.unit_bytes else None


def difference(before: Sample, after: Sample) -> Difference:
    """What happened from one sample to a later one of the same device."""
    seconds = (after.time_ns - before.time_ns) / 1e9
    powers = [p for p in (before.power_mw, after.power_mw) if p is not None]
    power = sum(powers) / len(powers) / 1e3 if powers else None
    if before.energy_mj is not None and after.energy_mj is not None and after.energy_mj > before.energy_mj:
        power = (after.energy_mj - before.energy_mj) / 1e3 / seconds if seconds > 0 else power
    reasons = [r for r in (before.throttle_reasons, after.throttle_reasons) if r is not None]
    return Difference(
        seconds=seconds,
        counted_bytes={
            name: counted_bytes(counter, before.readings.get(name), after.readings.get(name), seconds)
            for name, counter in COUNTERS.items()
        },
        mean_power_w=power,
        sm_clock_mhz=_lower(before.sm_clock_mhz, after.sm_clock_mhz),
        memory_clock_mhz=_lower(before.memory_clock_mhz, after.memory_clock_mhz),
        throttled=throttle_names(reasons[0] | reasons[-1]) if reasons else (),
    )


def _lower(a: int | None, b: int | None) -> int | None:
    return min((v for v in (a, b) if v is not None), default=None)


class NvmlDevice:
    """A GPU as NVML sees it. Made by `open_device`, which says why if there is none."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._nvml, self._handle = pynvml, handle

    def sample(self) -> Sample:
        """Reads everything, in a few driver calls. Never raises for what the device lacks."""
        problems: dict[str, str] = {}
        time_ns = time.monotonic_ns()
        readings = self._readings(problems)
        nvml = self._nvml
        return Sample(
            time_ns,
            readings,
            power_mw=self._ask(problems, "power_mw", "nvmlDeviceGetPowerUsage"),
            energy_mj=self._ask(problems, "energy_mj", "nvmlDeviceGetTotalEnergyConsumption"),
            sm_clock_mhz=self._ask(problems, "sm_clock_mhz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(problems, "memory_clock_mhz", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            throttle_reasons=self._ask(problems, "throttle_reasons", "nvmlDeviceGetCurrentClocksEventReasons"),
            problems=problems,
        )

    @cached_property
    def name(self) -> str:
        """Its product name, or why there is none."""
        try:
            return str(self._nvml.nvmlDeviceGetName(self._handle))
        except self._nvml.NVMLError as error:
            return f"unnamed ({error})"

    def _readings(self, problems: dict[str, str]) -> dict[str, Reading | None]:
        wanted = [(counter.field_id, counter.scope) for counter in COUNTERS.values()]
        readings: dict[str, Reading | None] = dict.fromkeys(COUNTERS)
        try:
            values = self._nvml.nvmlDeviceGetFieldValues(self._handle, wanted)
        except self._nvml.NVMLError as error:
            problems.update(dict.fromkeys(COUNTERS, str(error)))
            return readings
        for name, value in zip(COUNTERS, values, strict=True):
            # The call succeeds as a whole although single fields fail, whose value is then undefined.
            if value.nvmlReturn != self._nvml.NVML_SUCCESS:
                problems[name] = str(self._nvml.NVMLError(value.nvmlReturn))
            elif value.valueType not in _VALUE_TYPES:
                problems[name] = f"value type {value.valueType}, expected an unsigned number"
            else:
                member, bits = _VALUE_TYPES[value.valueType]
                readings[name] = Reading(int(getattr(value.value, member)), bits)
        return readings

    def _ask(self, problems: dict[str, str], name: str, function: str, *args: Any) -> int | None:
        call = getattr(self._nvml, function, None)
        if call is None:
            problems[name] = f"this nvidia-ml-py has no {function}"
            return None
        try:
            return int(call(self._handle, *args))
        except self._nvml.NVMLError as error:
            problems[name] = str(error)
            return None


def load_nvml() -> tuple[Any | None, str]:
    """The initialized pynvml module and "", or None and one line that says why there is none."""
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "pynvml":
            raise
        return None, "NVML: nvidia-ml-py is not installed (pip install nvidia-ml-py); no counters, power and clocks"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: no NVIDIA driver ({error}); no counters, power and clocks"
    return pynvml, ""


def open_device(uuid_or_index: str | int) -> tuple[NvmlDevice | None, str]:
    """A GPU by its UUID (`GPU-...`) or NVML index.

    CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not NVML's: ask by UUID where torch knows it.

    Args:
        uuid_or_index: Which one.

    Returns:
        The device and "", or None and one line that says why there is none.
    """
    pynvml, problem = load_nvml()
    if pynvml is None:
        return None, problem
    try:
        if isinstance(uuid_or_index, str):
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid_or_index)
        else:
            handle = pynvml.nvmlDeviceGetHandleByIndex(uuid_or_index)
    except pynvml.NVMLError as error:
        return None, f"NVML: no device {uuid_or_index} ({error}); no counters, power and clocks"
    return NvmlDevice(pynvml, handle), ""


def open_current_device() -> tuple[NvmlDevice | None, str]:
    """The GPU that torch's current CUDA device is; as `open_device`. Without CUDA, NVML's first one if it has any."""
    import torch

    if not torch.cuda.is_available():
        return open_device(0)
    return open_device(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
