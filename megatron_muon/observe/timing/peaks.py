"""What links, arithmetic and memory could do: by data sheet, as measured, or as assumed where there is neither."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_muon.observe.timing.recording import clock_for
from megatron_muon.plan.machines import REACHED, gpu_model_named


@dataclass(frozen=True)
class Ceiling:
    """A rate that no better one is known than.

    Attributes:
        per_s: Bytes or FLOPs per second.
        source: Where it is from: a data sheet, a measurement here, or an assumption.
    """

    per_s: float
    source: str


@dataclass(frozen=True)
class Peaks:
    """What a run's numbers are compared with.

    Attributes:
        link: One rank's link to the others of its exchange group, in bytes of one direction.
        measured_link: Largest all-to-all bus bandwidth that `python -m megatron_muon.profile links` measured; None
            without its file.
        measured_all_gather: The same of all-gathers.
        flops: Of products in Newton-Schulz's dtype.
        memory: Of the memory that they read.
    """

    link: Ceiling
    measured_link: Ceiling | None
    measured_all_gather: Ceiling | None
    flops: Ceiling
    memory: Ceiling

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Peaks:
        """The inverse of `to_json`.

        Raises:
            TypeError: If it is none.
        """
        ceilings: dict[str, Any] = {n: None if value is None else Ceiling(**value) for n, value in content.items()}
        return cls(**ceilings)


def link_ceiling(device_name: str, device_type: str, *, one_node: bool) -> Ceiling:
    """The link of a rank: by data sheet, or what planning assumes where there is none.

    Args:
        device_name: As the driver calls it.
        device_type: `torch.device.type`.
        one_node: Whether the ranks that exchange are all in one node.
    """
    machine = gpu_model_named(device_name)
    if machine is not None:
        rate = machine.nvlink_bytes_per_s if one_node else machine.network_bytes_per_s
        return Ceiling(rate, f"{machine.name} data sheet, {'NVLink' if one_node else 'network'}")
    reached = REACHED["cuda" if device_type == "cuda" else "cpu"]
    return Ceiling(reached.node_bytes_per_s if one_node else reached.bytes_per_s, "assumed")


def arithmetic_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[Ceiling, Ceiling]:
    """(FLOPs, memory) of a device: by data sheet for bf16 on a known GPU, else measured here.

    Measuring takes a product of two 768 x 768 matrices and a copy of 32 MiB, a few times; it draws no random numbers.

    Args:
        device: What runs Newton-Schulz.
        dtype: Its dtype.
    """
    machine = gpu_model_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if machine is not None and dtype == torch.bfloat16:
        source = f"{machine.name} data sheet"
        return Ceiling(machine.bf16_flops_per_s, source), Ceiling(machine.memory_bytes_per_s, source)
    size, repeats = 768, 4
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(a)
    block = torch.zeros(2**23, dtype=torch.float32, device=device)
    other = torch.empty_like(block)
    clock = clock_for(device)
    marks = []
    for _ in range(repeats):
        marks.append(clock.mark())
        torch.mm(a, a, out=out)
        marks.append(clock.mark())
        other.copy_(block)
    times = clock.read([*marks, clock.mark()])
    product_ns = min(times[2 * i + 1] - times[2 * i] for i in range(repeats))
    copy_ns = min(times[2 * i + 2] - times[2 * i + 1] for i in range(repeats))
    name = str(dtype).removeprefix("torch.")
    return (
        Ceiling(2e9 * size**3 / product_ns, f"measured: {name} product of {size} x {size}"),
        Ceiling(2e9 * block.nbytes / copy_ns, "measured: copy of 32 MiB"),
    )


# The groups that exchange, and those that gather parameters, as `profile links` names them; others stand in for them.
_LINK_GROUPS = MappingProxyType({"all_to_all": "tp_dp", "all_gather": "dp"})


def read_links(path: str) -> dict[str, Ceiling]:
    """The largest bus bandwidths in a file of `python -m megatron_muon.profile links`: `all_to_all`, `all_gather`.

    Of the groups that issue these in a step if they were measured, else of all.

    Raises:
        ValueError: If the file cannot be read or has no all-to-all in it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(_bad_links(path, str(error))) from None
    out = {}
    for name, groups in _LINK_GROUPS.items():
        rows = [row for row in _rows(content) if str(row["collective"]).startswith(name)]
        preferred = [row for row in rows if groups in str(row.get("groups")).split("=")] or rows
        if rates := [rate for row in preferred for rate in _busbw(row)]:
            out[name] = Ceiling(1e9 * max(rates), f"measured, {Path(path).name}")
    if "all_to_all" not in out:
        raise ValueError(_bad_links(path, "no all_to_all with a busbw"))
    return out


def _bad_links(path: str, got: str) -> str:
    return (
        f"--muon-profile-links: got {path!r} ({got}), expected what `python -m megatron_muon.profile links --json "
        "FILE` writes; make one, or omit the flag"
    )


def _rows(content: Any) -> list[Mapping[str, Any]]:
    rows = content.get("rows") if isinstance(content, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping) and "collective" in row] if isinstance(rows, list) else []


def _busbw(row: Mapping[str, Any]) -> Iterator[float]:
    """GB/s, out of place and in place."""
    for placement in row.values():
        if isinstance(placement, Mapping):
            rate = placement.get("busbw_gbps")
            if isinstance(rate, int | float) and math.isfinite(rate) and rate > 0:
                yield float(rate)


@dataclass(frozen=True)
class RunFacts:
    """What does not change over a run, and what findings depend on beside its times.

    Attributes:
        device_type: `torch.device.type`.
        device_name: As the driver calls it.
        world_size: Ranks of the run.
        rounds: Of the optimizer that has most.
        overlap_param_gather: Whether parameters are gathered in the next forward pass.
        settings: `MuonConfig`'s fields.
        peaks: What rates are compared with.
    """

    device_type: str
    device_name: str
    world_size: int
    rounds: int
    overlap_param_gather: bool
    peaks: Peaks
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> RunFacts:
        """The inverse of `to_json`.

        Raises:
            ValueError: If it is none.
        """
        try:
            return cls(**{**content, "peaks": Peaks.from_json(content["peaks"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"got no facts of a profiled run: {error}") from None
