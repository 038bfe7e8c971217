"""NCCL_DEBUG=INFO logs: which transports NCCL chose between which ranks, what it found of the hardware, and warnings.

Source: the format strings of libnccl 2.30, and NCCL's user guide, "Logging" (subsystems INIT, GRAPH, P2P, SHM, NET,
TUNING).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(
    r"(?P<host>[^\s:]+):(?P<pid>\d+):\d+(?: \[\d+\])? (?:\S+:\d+ )?NCCL (?P<level>INFO|WARN) (?P<text>.*)"
)
_VERSION = re.compile(r"NCCL version (\S+)")
_COMPLETE = re.compile(r"rank (\d+) nranks (\d+) cudaDev (\d+) .*?commId (\S+) - Init COMPLETE")
_NODES = re.compile(r"nRanks (\d+) nNodes (\d+) localRanks (\d+)")
_NETWORK = re.compile(r"Using network (\S+)")
_CHANNEL = re.compile(
    r"Channel \d+(?:/\d+)? : (?P<source>\d+)\[\S+?\] -> (?P<target>\d+)\[\S+?\](?: \[(?P<side>send|receive)\])? "
    r"via (?P<transport>.+)"
)
_CHANNELS = re.compile(r"(\d+) coll channels, \d+ collnet channels, (\d+) nvls channels, (\d+) p2p channels")
_ALGORITHM = re.compile(r"(\w+): (\d+) Bytes -> Algo (\w+) proto (\w+)")
_SYSTEM = re.compile(r"=== System : maxBw ([\d.]+) totalBw ([\d.]+) ===")
_PATTERN = re.compile(r"Pattern (\d+), crossNic \d+, nChannels (\d+), bw ([\d.]+)/([\d.]+), type (\w+)/(\w+)")
_RDMA = re.compile(r"GPU Direct RDMA (Enabled|Disabled) for HCA \d+ '([^']+)'")
# nccl's enumeration of graph patterns.
_PATTERNS = {"1": "balanced tree", "2": "split tree", "3": "tree", "4": "ring", "5": "NVLS", "6": "CollNet direct"}


@dataclass
class LogFacts:
    """What logs say, over all processes whose lines are in them.

    Attributes:
        versions: NCCL's.
        hosts: Seen in lines.
        communicators: Communicator's hash -> number of ranks.
        shapes: (ranks, nodes, ranks on a node) of communicators.
        networks: That NCCL chose.
        sides: (source, target, transport, `send`, `receive` or "") -> lines; ranks are those of their communicator.
        channels: (collective, NVLS, point-to-point) channels of a communicator.
        algorithms: (collective, bytes, algorithm, protocol) -> how often.
        systems: (best, total) GB/s that NCCL reckons a GPU's links with.
        graphs: (pattern, channels, GB/s within a node, GB/s between nodes, link type within, between).
        rdma: (adapter, enabled).
        warnings: Texts -> how often.
    """

    versions: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    communicators: dict[str, int] = field(default_factory=dict)
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    networks: set[str] = field(default_factory=set)
    sides: Counter[tuple[int, int, str, str]] = field(default_factory=Counter)
    channels: set[tuple[int, int, int]] = field(default_factory=set)
    algorithms: Counter[tuple[str, int, str, str]] = field(default_factory=Counter)
    systems: set[tuple[float, float]] = field(default_factory=set)
    graphs: set[tuple[str, int, float, float, str, str]] = field(default_factory=set)
    rdma: set[tuple[str, bool]] = field(default_factory=set)
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def links(self) -> dict[tuple[int, int, str], int]:
        """(source, target, transport) -> channels. Over a network both ends say so, if both have logs."""
        out: dict[tuple[int, int, str], int] = {}
        for (source, target, transport, _), count in sorted(self.sides.items()):
            out[source, target, transport] = max(count, out.get((source, target, transport), 0))
        return out

    @property
    def transports(self) -> Counter[str]:
        """Transport -> pairs of ranks, in one direction, that use it."""
        return Counter(transport for _, _, transport in self.links)


def transport_name(text: str) -> str:
    """A transport without the number of the device and details: `P2P/CUMEM`, `NET/IB/GDRDMA`, `SHM`."""
    parts = text.strip().split("/")
    if parts[0] == "NET":
        # NET/<plugin>/<device>[/GDRDMA][/Shared]; libraries name the plugin IBext_v8 and the like.
        return "/".join(["NET", *parts[1:2], *(["GDRDMA"] if "GDRDMA" in parts else [])])
    if parts[0] == "P2P":
        return "/".join(parts[:2])
    return parts[0]


def read_log(paths: Iterable[Path]) -> LogFacts:
    """Reads logs; lines that are not NCCL's are passed over.

    Raises:
        OSError: If a file cannot be read.
    """
    facts = LogFacts()
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if version := _VERSION.search(line):
                    facts.versions.add(version.group(1))
                if found := _LINE.search(line):
                    facts.hosts.add(found["host"])
                    if found["level"] == "WARN":
                        facts.warnings[found["text"].strip()] += 1
                    else:
                        _read(facts, found["text"])
    return facts


def _read(facts: LogFacts, text: str) -> None:
    if channel := _CHANNEL.search(text):
        name, side = transport_name(channel["transport"]), channel["side"] or ""
        facts.sides[int(channel["source"]), int(channel["target"]), name, side] += 1
    elif complete := _COMPLETE.search(text):
        facts.communicators[complete.group(4)] = int(complete.group(2))
    elif nodes := _NODES.search(text):
        ranks, num_nodes, local = map(int, nodes.groups())
        facts.shapes[ranks, num_nodes, local] += 1
    elif channels := _CHANNELS.search(text):
        collective, nvls, p2p = map(int, channels.groups())
        facts.channels.add((collective, nvls, p2p))
    elif algorithm := _ALGORITHM.search(text):
        name, size, algo, protocol = algorithm.groups()
        facts.algorithms[name, int(size), algo, protocol] += 1
    elif system := _SYSTEM.search(text):
        facts.systems.add((float(system.group(1)), float(system.group(2))))
    elif pattern := _PATTERN.search(text):
        kind, count, near, far, near_type, far_type = pattern.groups()
        facts.graphs.add((_PATTERNS.get(kind, kind), int(count), float(near), float(far), near_type, far_type))
    elif network := _NETWORK.search(text):
        facts.networks.add(network.group(1))
    elif rdma := _RDMA.search(text):
        facts.rdma.add((rdma.group(2), rdma.group(1) == "Enabled"))


def hints(facts: LogFacts) -> list[str]:
    """What the transports mean where they are not the fastest."""
    seen = facts.transports
    out = []
    if any(name.startswith("NET/Socket") for name in seen) or "Socket" in facts.networks:
        out.append(
            "NET/Socket: NCCL found no RDMA network; data between nodes goes over TCP (check NCCL_IB_HCA, drivers)"
        )
    slow = [name for name in seen if name.startswith("NET/IB") and not name.endswith("GDRDMA")]
    if slow:
        out.append(
            f"{', '.join(slow)} without GDRDMA: the network reads host memory (check nvidia-peermem, dma-buf, ACS)"
        )
    if "SHM" in seen:
        out.append(
            "SHM: GPUs of a node talk through host memory; no NVLink or PCIe peer access (check NCCL_P2P_DISABLE, ACS)"
        )
    return out


def slowest_first(facts: LogFacts) -> Sequence[tuple[str, int]]:
    """Transports with their pairs of ranks, likely slowest first."""
    order = ("NET/Socket", "NET", "SHM", "P2P")

    def place(name: str) -> tuple[int, str]:
        return next((i for i, prefix in enumerate(order) if name.startswith(prefix)), len(order)), name

    return sorted(facts.transports.items(), key=lambda item: place(item[0]))
