"""What links and arithmetic could reach: from a data sheet, measured here, or as the planner assumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from megatron_muon.observe.timing.recording import clock_for
from megatron_muon.plan.links_file import MeasuredLinks
from megatron_muon.plan.machines import REACHED, gpu_model_named


@dataclass(frozen=True)
class Ceiling:
    """The best rate that is known.

    Attributes:
        per_s: Bytes or FLOPs per second.
        source: Where the rate is from: a data sheet, a measurement, or an assumption.
    """

    per_s: float
    source: str


@dataclass(frozen=True)
class RunFacts:
    """What stays the same over a run, and what its times are compared with.

    Attributes:
        device_type: `torch.device.type`.
        device_name: Name of the device, from the driver.
        world_size: Number of ranks.
        rounds: Number of rounds of the optimizer that has most.
        overlap_param_gather: Whether parameters are gathered in the next forward pass.
        link: One rank's link to the others of its exchange group, in bytes of one direction.
        flops: Matrix products in Newton-Schulz's dtype.
        settings: `MuonConfig`'s fields.
    """

    device_type: str
    device_name: str
    world_size: int
    rounds: int
    overlap_param_gather: bool
    link: Ceiling
    flops: Ceiling
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> RunFacts:
        """The inverse of `to_json`.

        Raises:
            ValueError: If `content` is something else.
        """
        try:
            return cls(**{**content, "link": Ceiling(**content["link"]), "flops": Ceiling(**content["flops"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"got no facts of a profiled run: {error}") from None


def link_ceiling(device_name: str, device_type: str, *, one_node: bool, links: MeasuredLinks | None = None) -> Ceiling:
    """The link of a rank: measured if there is a file, else from the data sheet, else what planning assumes.

    Args:
        device_name: Name of the device, from the driver.
        device_type: `torch.device.type`.
        one_node: Whether the ranks that exchange are all in one node.
        links: Content of the file of `--muon-links`; None without one.
    """
    figures = None if links is None else links.intra_node if one_node else links.inter_node
    if figures is not None:
        return Ceiling(1e9 * figures.bandwidth_gb_per_s, "measured links")
    machine = gpu_model_named(device_name)
    if machine is not None:
        rate = machine.nvlink_bytes_per_s if one_node else machine.network_bytes_per_s
        return Ceiling(rate, f"{machine.name} data sheet, {'NVLink' if one_node else 'network'}")
    reached = REACHED["cuda" if device_type == "cuda" else "cpu"]
    return Ceiling(reached.node_bytes_per_s if one_node else reached.bytes_per_s, "assumed")


def arithmetic_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """FLOPs of a device: from the data sheet for bf16 on a known GPU, else measured here.

    A measurement takes a few products of two 768 x 768 matrices and draws no random numbers.

    Args:
        device: Device that runs Newton-Schulz.
        dtype: Dtype of its products.
    """
    machine = gpu_model_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if machine is not None and dtype == torch.bfloat16:
        return Ceiling(machine.bf16_flops_per_s, f"{machine.name} data sheet")
    size, repeats = 768, 4
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(a)
    clock = clock_for(device)
    marks = [clock.mark()]
    for _ in range(repeats):
        torch.mm(a, a, out=out)
        marks.append(clock.mark())
    times = clock.read(marks)
    product_ns = min(after - before for before, after in pairwise(times))
    return Ceiling(2e9 * size**3 / product_ns, f"measured: {str(dtype).removeprefix('torch.')} product of {size} rows")
