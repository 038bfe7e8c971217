"""How the GPUs of a host hang together, as NVML tells it: NVLink, PCIe, NUMA. Printed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_muon.observe.nvml import load_nvml

# nvmlGpuTopologyLevel_t, in the words of `nvidia-smi topo -m`.
LEVELS: Mapping[int, str] = MappingProxyType({0: "X", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"})
_REMOTE = MappingProxyType({0: "GPU", 1: "NPU", 2: "NVSwitch"})


@dataclass(frozen=True)
class Gpu:
    """A GPU's own links; None where NVML does not know.

    Attributes:
        index: NVML's.
        name: Product name.
        bus_id: PCI bus.
        pcie: Current generation and width.
        numa_node: Of its memory.
        nvlinks: What is at the other ends of its active NVLinks, and how many of them.
    """

    index: int
    name: str
    bus_id: str
    pcie: tuple[int, int] | None
    numa_node: int | None
    nvlinks: Mapping[str, int]

    def __str__(self) -> str:
        pcie = f"PCIe gen {self.pcie[0]} x{self.pcie[1]}" if self.pcie else "PCIe unknown"
        links = ", ".join(f"{count} NVLinks to {remote}" for remote, count in sorted(self.nvlinks.items()))
        numa = "NUMA unknown" if self.numa_node is None else f"NUMA node {self.numa_node}"
        return f"GPU{self.index} {self.name} {self.bus_id}: {links or 'no NVLink'}; {pcie}; {numa}"


def topology_lines() -> list[str]:
    """The host's GPUs and, for each pair, the path between them; one line with the reason if NVML is not there."""
    nvml, problem = load_nvml()
    if nvml is None:
        return [problem]
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return [f"NVML: cannot list devices ({error})"]
    gpus = [_gpu(nvml, index, handle) for index, handle in enumerate(handles)]
    lines = ["NVML topology", *map(str, gpus)]
    if len(gpus) > 1:
        lines.append("      " + "".join(f"{f'GPU{g.index}':>6}" for g in gpus))
        for a, row in zip(gpus, handles, strict=True):
            lines.append(f"{f'GPU{a.index}':<6}" + "".join(f"{_path(nvml, row, other):>6}" for other in handles))
        lines.append(
            "PIX, PXB: one or several PCIe switches; PHB: host bridge; NODE: one NUMA node; SYS: between nodes"
        )
    return lines


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    generation = _known(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle)
    width = _known(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle)
    pci = _known(nvml, "nvmlDeviceGetPciInfo", handle)
    links: Counter[str] = Counter()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if not _known(nvml, "nvmlDeviceGetNvLinkState", handle, link):
            continue
        kind = _known(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        remote = _REMOTE.get(kind, "unknown")
        if remote == "GPU":
            other = _known(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
            remote = f"GPU {_text(other.busId)}" if other is not None else remote
        links[remote] += 1
    return Gpu(
        index=index,
        name=str(_known(nvml, "nvmlDeviceGetName", handle) or "unnamed"),
        bus_id=_text(pci.busId) if pci is not None else "bus unknown",
        pcie=(generation, width) if generation is not None and width is not None else None,
        numa_node=_known(nvml, "nvmlDeviceGetNumaNodeId", handle),
        nvlinks=dict(links),
    )


def _path(nvml: Any, a: Any, b: Any) -> str:
    if a is b:
        return "X"
    level = _known(nvml, "nvmlDeviceGetTopologyCommonAncestor", a, b)
    return LEVELS.get(level, "?")


def _known(nvml: Any, function: str, *args: Any) -> Any:
    """What a function returns; None if the device, the driver or pynvml does not have it."""
    call = getattr(nvml, function, None)
    try:
        return call(*args) if call is not None else None
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
