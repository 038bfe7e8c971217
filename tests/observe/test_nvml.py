"""NVML through the real pynvml, on a stub library with two GPUs, and without a driver; differences of counters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from megatron_muon.observe.nvml import (
    COUNTERS,
    Counter,
    Reading,
    Sample,
    counted_bytes,
    difference,
    load_nvml,
    open_device,
    throttle_names,
)
from tests.paths import ROOT, TESTS

KIB, NVLINK, PCIE = 1024, COUNTERS["nvlink_data_sent_bytes"], COUNTERS["pcie_sent_bytes"]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the stub library."""
    directory = tmp_path_factory.mktemp("nvml")
    source = TESTS / "nvml_stub.c"
    command = ["cc", "-shared", "-fPIC", "-o", str(directory / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return directory


def with_stub(stub: Path, code: str) -> Any:
    """What `code` prints as JSON, in a process that finds the stub library."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SAMPLES = """
import dataclasses, json
from megatron_muon.observe.nvml import difference, open_device
device, problem = open_device({device!r})
assert device is not None and problem == "", problem
before, after = device.sample(), device.sample()
print(json.dumps([*map(dataclasses.asdict, (before, after)), difference(before, after).to_json()]))
"""


def test_device_with_nvlink(stub: Path) -> None:
    before, after, between = with_stub(stub, SAMPLES.format(device=0))
    assert before["readings"]["nvlink_data_sent_bytes"] == {"count": 2**40, "bits": 64}
    assert before["readings"]["pcie_sent_bytes"] == {"count": 0xFFFFFFF0, "bits": 32}
    assert after["readings"]["pcie_sent_bytes"] == {"count": 0xFFFFFFF0 + 100 - 2**32, "bits": 32}
    # KiB for NVLink, bytes for PCIe, which has wrapped around; 2000 a reading, and the field's number more.
    assert between["nvlink_data_sent_bytes"] == 2000 * KIB
    assert between["nvlink_data_received_bytes"] == 2001 * KIB
    assert between["pcie_sent_bytes"] == 100
    # What the device lacks: a field of an unknown type, and a function.
    assert between["pcie_received_bytes"] is None and before["energy_mj"] is None
    assert (before["power_mw"], before["sm_clock_mhz"]) == (700000, 1980)
    assert between["mean_power_w"] == 700.0 and between["throttled"] == ["software power cap"]
    assert 0 < before["time_ns"] < after["time_ns"]


def test_device_without_counters_by_uuid(stub: Path) -> None:
    before, _, between = with_stub(stub, SAMPLES.format(device="GPU-stub-1"))
    assert set(before["readings"].values()) == {None} and before["power_mw"] is None
    assert between["mean_power_w"] is None and between["sm_clock_mhz"] == 1980 and between["throttled"] == []


def test_device_that_is_not_there(stub: Path) -> None:
    code = "import json; from megatron_muon.observe.nvml import open_device; print(json.dumps(open_device('GPU-x')))"
    device, problem = with_stub(stub, code)
    assert device is None and problem.startswith("NVML: no device GPU-x (")


def test_without_a_driver() -> None:
    """One clear line, and nothing raises. This machine has none; one that has is tested by `-m gpu`."""
    module, problem = load_nvml()
    if module is not None:
        pytest.skip("there is a driver")
    assert problem == "NVML: no NVIDIA driver (NVML Shared Library Not Found); no counters, power or clocks"
    assert open_device(0) == (None, problem)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name == "pynvml":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    module, problem = load_nvml()
    assert module is None and problem.startswith("NVML: nvidia-ml-py is not installed (pip install nvidia-ml-py)")


@pytest.mark.parametrize(
    ("counter", "before", "after", "seconds", "expected"),
    [
        (NVLINK, Reading(100, 64), Reading(350, 64), 1.0, 250 * KIB),
        (NVLINK, Reading(100, 64), Reading(100, 64), 1.0, 0),
        # 32 bits of bytes, one turn: 2^32 - 50 -> 30.
        (PCIE, Reading(2**32 - 50, 32), Reading(30, 32), 0.001, 80),
        # A 64-bit count that falls was reset: no link carries 2^64 KiB in a second.
        (NVLINK, Reading(5000, 64), Reading(10, 64), 1.0, None),
        # So was a 32-bit one, if what it would mean exceeds the link: 4.29 GB in a millisecond.
        (PCIE, Reading(5000, 32), Reading(10, 32), 0.001, None),
        # In a second a PCIe link can carry 2^32 bytes many times over.
        (PCIE, Reading(0, 32), Reading(1000, 32), 1.0, None),
        # KiB last longer: 4.4 TB.
        (NVLINK, Reading(2**32 - 1, 32), Reading(1, 32), 1.0, 2 * KIB),
        (NVLINK, Reading(0, 32), Reading(1, 32), 3.0, None),
        (NVLINK, None, Reading(1, 64), 1.0, None),
        (NVLINK, Reading(1, 64), None, 1.0, None),
        (NVLINK, Reading(1, 32), Reading(2, 64), 1.0, None),
        (NVLINK, Reading(1, 64), Reading(2, 64), -1.0, None),
    ],
)
def test_counted_bytes(
    counter: Counter, before: Reading | None, after: Reading | None, seconds: float, expected: int | None
) -> None:
    assert counted_bytes(counter, before, after, seconds) == expected


def sample(time_ns: int, **values: Any) -> Sample:
    return Sample(time_ns, MappingProxyType(dict.fromkeys(COUNTERS)), **values)


def test_difference_takes_power_from_the_energy() -> None:
    """1500 J in 2 s are 750 W, whatever the power was at both ends; clocks are the lower ones, reasons both."""
    before = sample(10**9, power_mw=100_000, energy_mj=5_000_000, sm_clock_mhz=1980, throttle_reasons=0x4)
    after = sample(3 * 10**9, power_mw=300_000, energy_mj=6_500_000, sm_clock_mhz=1200, throttle_reasons=0x40)
    found = difference(before, after)
    assert (found.seconds, found.mean_power_w, found.sm_clock_mhz) == (2.0, 750.0, 1200)
    assert found.throttled == ("software power cap", "hardware thermal")
    without = difference(sample(0, power_mw=100_000), sample(10**9, power_mw=300_000))
    assert without.mean_power_w == 200.0 and without.throttled == () and set(without.counted_bytes) == set(COUNTERS)


def test_throttle_names() -> None:
    assert throttle_names(0x1) == () and throttle_names(None) == ()
    assert throttle_names(0x8 | 0x2000) == ("hardware slowdown", "0x2000")
