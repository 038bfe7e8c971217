"""NVML through the real pynvml, on a stub library with two GPUs, and without a driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.observe.nvml import between, open_device, throttle_names
from tests.paths import ROOT, TESTS


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
import json
from megatron_muon.observe.nvml import between, open_device
device, problem = open_device({device!r})
assert device is not None and problem == "", problem
before, after = device.sample(), device.sample()
print(json.dumps([before, after, between(before, after)]))
"""


def test_a_device(stub: Path) -> None:
    before, after, state = with_stub(stub, SAMPLES.format(device=0))
    assert (before["power_mw"], before["sm_clock_mhz"]) == (700000, 1980)
    assert state == [{"power_w": 700.0, "sm_clock_mhz": 1980}, ["software power cap"]]
    # The stub has no such function.
    assert "energy_mj" not in before and 0 < before["time_ns"] < after["time_ns"]


def test_a_device_that_lacks_values_by_uuid(stub: Path) -> None:
    before, _, state = with_stub(stub, SAMPLES.format(device="GPU-stub-1"))
    assert "power_mw" not in before
    assert state == [{"sm_clock_mhz": 1980}, []]


def test_device_that_is_not_there(stub: Path) -> None:
    code = "import json; from megatron_muon.observe.nvml import open_device; print(json.dumps(open_device('GPU-x')))"
    device, problem = with_stub(stub, code)
    assert device is None and problem.startswith("NVML: no device GPU-x (")


def test_without_a_driver() -> None:
    """One clear line, and nothing raises."""
    device, problem = open_device(0)
    if device is not None:
        pytest.skip("there is a driver")
    assert problem == "NVML: no NVIDIA driver (NVML Shared Library Not Found); no power or clocks"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "pynvml":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    device, problem = open_device(0)
    assert device is None and problem.startswith("NVML: nvidia-ml-py is not installed (pip install nvidia-ml-py)")


def test_power_is_that_of_the_energy() -> None:
    """1500 J in 2 s are 750 W, whatever the power was at both ends; the lower clock, and reasons of both."""
    before = dict(time_ns=10**9, power_mw=100_000, energy_mj=5_000_000, sm_clock_mhz=1980, throttle_reasons=0x4)
    after = dict(time_ns=3 * 10**9, power_mw=300_000, energy_mj=6_500_000, sm_clock_mhz=1200, throttle_reasons=0x40)
    numbers, throttled = between(before, after)
    assert numbers == {"power_w": 750.0, "sm_clock_mhz": 1200}
    assert throttled == ("software power cap", "hardware thermal")
    assert between(after, before)[0]["power_w"] == 200.0, "an energy that fell was reset"
    assert between({"time_ns": 0, "power_mw": 100_000}, {"time_ns": 10**9, "power_mw": 300_000}) == (
        {"power_w": 200.0},
        (),
    )


def test_throttle_names() -> None:
    assert throttle_names(0x1) == ()
    assert throttle_names(0x8 | 0x2000) == ("hardware slowdown", "0x2000")
