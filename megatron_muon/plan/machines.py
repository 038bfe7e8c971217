"""Nominal and assumed rates of links and arithmetic: the only home of such numbers. No torch, no ranks.

Predictions assume no contention, all GPUs of a node on one NVLink switch and one network adapter per GPU, both used at
once. They are meant for comparing schemes, and for telling milliseconds from tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GPUS_PER_NODE = 8
LINK_EFFICIENCY = 0.8
"""Assumed share of the nominal bandwidth that collectives of large buffers reach."""
COMPUTE_EFFICIENCY = 0.6
"""Assumed share of the nominal bf16 rate that Newton-Schulz's products reach."""
MEMORY_EFFICIENCY = 0.8
"""Assumed share of the nominal memory bandwidth that element-wise kernels reach."""


@dataclass(frozen=True)
class GpuModel:
    """A GPU in a node of eight, by its data sheet.

    Attributes:
        name: The GPU.
        nvlink_bytes_per_s: One direction, per GPU.
        network_bytes_per_s: One direction, per GPU, between nodes.
        bf16_flops_per_s: Dense tensor-core rate.
        memory_bytes_per_s: Of its memory.
        source: Where the numbers are from.
    """

    name: str
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    bf16_flops_per_s: float
    memory_bytes_per_s: float
    source: str

    def newton_schulz_ms(self, flops: float) -> float:
        """Predicted time of a rank's Newton-Schulz products."""
        return 1e3 * flops / (self.bf16_flops_per_s * COMPUTE_EFFICIENCY)

    def memory_ms(self, traffic_bytes: float) -> float:
        """Predicted time of element-wise kernels and copies that read and write so many bytes."""
        return 1e3 * traffic_bytes / (self.memory_bytes_per_s * MEMORY_EFFICIENCY)


_NVLINK4 = "NVLink 4: 900 GB/s, half each way; ConnectX-7: 400 Gb/s"
GPU_MODELS = (
    GpuModel("H100", 450e9, 50e9, 989e12, 3.35e12, f"NVIDIA H100 SXM and DGX H100 data sheets. {_NVLINK4}"),
    GpuModel("H200", 450e9, 50e9, 989e12, 4.8e12, f"NVIDIA H200 SXM and DGX H200 data sheets. {_NVLINK4}"),
    GpuModel(
        "B200",
        900e9,
        50e9,
        2250e12,
        8e12,
        "NVIDIA DGX B200 data sheet. NVLink 5: 1.8 TB/s, half each way; ConnectX-7: 400 Gb/s",
    ),
)


@dataclass(frozen=True)
class Reached:
    """What a rank reaches in practice, where planning has to choose between computing and communicating.

    Attributes:
        flops_per_s: Of Newton-Schulz's matrix products.
        bytes_per_s: Sent to ranks of other nodes.
        node_bytes_per_s: Sent to ranks of its node.
        latency_s: Time of a small all-to-all between nodes.
        node_latency_s: Time of a small all-to-all within a node.
        launch_s: Time that a small kernel adds to a stream.
    """

    flops_per_s: float
    bytes_per_s: float
    node_bytes_per_s: float
    latency_s: float
    node_latency_s: float
    launch_s: float


REACHED: Mapping[str, Reached] = MappingProxyType(
    {
        # An H100 node with eight 400 Gb/s network cards: about 40 % of the bf16 peak for products of a few thousand
        # rows, 80 % of a card's 50 GB/s and two thirds of NVLink's 450 GB/s. Latencies and the launch are assumed, on
        # the high side of what NCCL and CUDA reach; measure them with `python -m megatron_muon.profile links`.
        "cuda": Reached(400e12, 40e9, 300e9, latency_s=40e-6, node_latency_s=20e-6, launch_s=4e-6),
        # One core, and Gloo over a loopback device.
        "cpu": Reached(50e9, 1e9, 1e9, latency_s=300e-6, node_latency_s=300e-6, launch_s=5e-6),
    }
)
"""By `torch.device.type`. Cautious where `GpuModel`'s predictions are optimistic."""


def gpu_model_named(device_name: str) -> GpuModel | None:
    """The model of a GPU with this name from the driver, such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    return next((machine for machine in GPU_MODELS if machine.name in device_name), None)
