"""Counters, power and clocks of a GPU, read through NVML before and after a profiled step.

Everything works without a driver, without the package nvidia-ml-py, and with devices that lack a counter: a value that
cannot be read is None.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Counter:
    """A running count of bytes that NVML keeps for a device.

    Attributes:
        field_id: NVML's number of the field.
        scope: Links that are summed.
        unit_bytes: Bytes of one count.
        limit_bytes_per_s: More than today's links carry in one direction; a larger difference is an error.
    """

    field_id: int
    scope: int
    unit_bytes: int
    limit_bytes_per_s: float


# Source: nvml.h, NVML_FI_DEV_NVLINK_THROUGHPUT_* (payload, "in KiB", all links) and NVML_FI_DEV_PCIE_COUNT_* ("value
# can be wrapped").
_ALL_LINKS = 0xFFFFFFFF
COUNTERS: Mapping[str, Counter] = MappingProxyType(
    {
        "nvlink_data_sent_bytes": Counter(138, _ALL_LINKS, 1024, 1.8e12),
        "nvlink_data_received_bytes": Counter(139, _ALL_LINKS, 1024, 1.8e12),
        "pcie_sent_bytes": Counter(197, 0, 1, 128e9),
        "pcie_received_bytes": Counter(198, 0, 1, 128e9),
    }
)

# nvmlValueType_t -> member of the union, bits of a count that wraps around.
_VALUE_TYPES = {1: ("uiVal", 32), 2: ("ulVal", 64), 3: ("ullVal", 64)}

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


@dataclass(frozen=True)
class Reading:
    """A counter at one time.

    Attributes:
        count: Value in the counter's unit.
        bits: Bits of the count; beyond them it starts at zero again.
    """

    count: int
    bits: int


@dataclass(frozen=True)
class Sample:
    """What NVML reports of a device at one time.

    Attributes:
        time_ns: Time on the monotonic clock.
        readings: Reading of each of `COUNTERS`; None where the device has none.
        power_mw: Power in milliwatts.
        energy_mj: Energy since the driver was loaded, in millijoules.
        sm_clock_mhz: Clock of the multiprocessors.
        throttle_reasons: Bits of `THROTTLE_REASONS`.
    """

    time_ns: int
    readings: Mapping[str, Reading | None]
    power_mw: int | None = None
    energy_mj: int | None = None
    sm_clock_mhz: int | None = None
    throttle_reasons: int | None = None


@dataclass(frozen=True)
class Difference:
    """What happened between two samples of a device.

    Attributes:
        seconds: Time between them.
        counted_bytes: Bytes of each of `COUNTERS`; None where they cannot be known.
        mean_power_w: Mean power, from the energy, otherwise of the two samples.
        sm_clock_mhz: Lower one of the two clocks.
        throttled: Reasons for low clocks at either time.
    """

    seconds: float
    counted_bytes: Mapping[str, int | None]
    mean_power_w: float | None
    sm_clock_mhz: int | None
    throttled: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The attributes as plain values, with the counters among them."""
        plain = asdict(self)
        return {**plain.pop("counted_bytes"), **plain, "throttled": list(self.throttled)}


def throttle_names(reasons: int | None) -> tuple[str, ...]:
    """Names of the bits that are set, unknown ones as numbers, without the bit of an idle device."""
    if reasons is None:
        return ()
    known = [name for bit, name in THROTTLE_REASONS.items() if reasons & bit]
    unknown = reasons & ~(1 | sum(THROTTLE_REASONS))
    return (*known, *([f"{unknown:#x}"] if unknown else []))


def counted_bytes(counter: Counter, before: Reading | None, after: Reading | None, seconds: float) -> int | None:
    """Bytes that a counter counted between two readings.

    A count that fell has wrapped around or was reset; it has wrapped if the links could have carried the difference.
    A short count that may have wrapped more than once tells nothing.

    Args:
        counter: Counter of both readings.
        before: Reading at the start.
        after: Reading at the end.
        seconds: Time between the readings.

    Returns:
        The bytes; None if they cannot be known.
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
    clocks = [c for c in (before.sm_clock_mhz, after.sm_clock_mhz) if c is not None]
    return Difference(
        seconds=seconds,
        counted_bytes={
            name: counted_bytes(counter, before.readings.get(name), after.readings.get(name), seconds)
            for name, counter in COUNTERS.items()
        },
        mean_power_w=power,
        sm_clock_mhz=min(clocks, default=None),
        throttled=throttle_names(reasons[0] | reasons[-1]) if reasons else (),
    )


class NvmlDevice:
    """A GPU as NVML sees it; made by `open_device`."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._nvml, self._handle = pynvml, handle

    def sample(self) -> Sample:
        """Reads everything, in a few calls of the driver. Never raises for what the device lacks."""
        return Sample(
            time.monotonic_ns(),
            self._readings(),
            power_mw=self._ask("nvmlDeviceGetPowerUsage"),
            energy_mj=self._ask("nvmlDeviceGetTotalEnergyConsumption"),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            throttle_reasons=self._ask("nvmlDeviceGetCurrentClocksEventReasons"),
        )

    def _readings(self) -> dict[str, Reading | None]:
        wanted = [(counter.field_id, counter.scope) for counter in COUNTERS.values()]
        readings: dict[str, Reading | None] = dict.fromkeys(COUNTERS)
        try:
            values = self._nvml.nvmlDeviceGetFieldValues(self._handle, wanted)
        except self._nvml.NVMLError:
            return readings
        for name, value in zip(COUNTERS, values, strict=True):
            # The call succeeds as a whole although single fields fail; their values are then undefined.
            if value.nvmlReturn == self._nvml.NVML_SUCCESS and value.valueType in _VALUE_TYPES:
                member, bits = _VALUE_TYPES[value.valueType]
                readings[name] = Reading(int(getattr(value.value, member)), bits)
        return readings

    def _ask(self, function: str, *args: Any) -> int | None:
        """What a function returns; None if nvidia-ml-py, the driver or the device does not have it."""
        call = getattr(self._nvml, function, None)
        try:
            return None if call is None else int(call(self._handle, *args))
        except self._nvml.NVMLError:
            return None


def load_nvml() -> tuple[Any | None, str]:
    """The initialized pynvml module and "", or None and one line with the reason."""
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "pynvml":
            raise
        return None, "NVML: nvidia-ml-py is not installed (pip install nvidia-ml-py); no counters, power or clocks"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: no NVIDIA driver ({error}); no counters, power or clocks"
    return pynvml, ""


def open_device(uuid_or_index: str | int) -> tuple[NvmlDevice | None, str]:
    """A GPU by its UUID (`GPU-...`) or NVML index.

    CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not NVML's: use the UUID where torch knows it.

    Returns:
        The device and "", or None and one line with the reason.
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
        return None, f"NVML: no device {uuid_or_index} ({error}); no counters, power or clocks"
    return NvmlDevice(pynvml, handle), ""


def open_current_device() -> tuple[NvmlDevice | None, str]:
    """torch's current CUDA device, as `open_device` returns it; without CUDA, NVML's first device."""
    import torch

    if not torch.cuda.is_available():
        return open_device(0)
    return open_device(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
