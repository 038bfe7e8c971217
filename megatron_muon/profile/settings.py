"""What `profile links` measures: its defaults and choices. No torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

GroupKind = Literal["world", "tp", "dp", "tp_dp", "pp", "ep", "expert_tp", "expert_dp", "expert_tp_dp"]
"""Process groups of a layout. `dp` is data-parallel times context-parallel, within an optimizer instance; `expert_dp`
and the products with `tp` likewise. Muon exchanges dense matrices over `tp_dp`, experts over `expert_tp_dp`.
"""
GROUP_KINDS: tuple[GroupKind, ...] = get_args(GroupKind)

Backend = Literal["auto", "nccl", "gloo"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

FACTOR = 4
"""From one size of a sweep to the next."""
ELEMENT_BYTES = 4
"""Sweeps send fp32."""


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """Everything that the command line of `links` sets.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        ep: Expert-parallel size.
        etp: Expert-tensor-parallel size; None is `tp`.
        instances: Distributed-optimizer instances.
        groups: Kinds of groups; None takes all of more than one rank.
        min_bytes: Smallest size of an all-to-all: what a rank sends, its own part included.
        max_bytes: Largest size.
        warmup: Number of calls that are not timed.
        iterations: Number of calls that are timed together.
        model: Model as for `megatron_muon plan`, for the split sizes of the exchange's all-to-alls; None: no plan.
        exchange_dtype: Dtype of the model's exchange; None is Muon's default.
        transfers: Number of the plan's transfers to measure, those that move most first.
        pair_bytes: Bytes sent each way between every two ranks; 0 leaves the pairs out.
        backend: Communication library; `auto` is NCCL where CUDA works, else Gloo.
        json: Where the links file for the planner goes.

    Raises:
        ValueError: If settings exclude each other, or a value is out of range.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    instances: int = 1
    groups: tuple[GroupKind, ...] | None = None
    min_bytes: int = 1 << 10
    max_bytes: int = 16 << 20
    warmup: int = 5
    iterations: int = 20
    model: str | None = None
    exchange_dtype: str | None = None
    transfers: int = 4
    pair_bytes: int = 4 << 20
    backend: Backend = "auto"
    json: Path | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--min-bytes", self.min_bytes, 1),
            ("--max-bytes", self.max_bytes, self.min_bytes),
            ("--warmup", self.warmup, 0),
            ("--iterations", self.iterations, 1),
            ("--transfers", self.transfers, 1),
            ("--pair-bytes", self.pair_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{flag}: got {value}, expected at least {least}")
        if self.exchange_dtype is not None and self.model is None:
            raise ValueError(f"--exchange-dtype: got {self.exchange_dtype}, expected it together with --model only")
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise ValueError(f"--json: got {self.json}, expected a file in a directory that exists")

    def counts(self, world_size: int) -> list[int]:
        """fp32 elements that a rank sends to each rank of a group, for each size.

        Raises:
            ValueError: If the smallest size leaves a rank without an element.
        """
        smallest = ELEMENT_BYTES * world_size
        if self.min_bytes < smallest:
            raise ValueError(
                f"--min-bytes: got {self.min_bytes}, expected at least {smallest}: one element of {ELEMENT_BYTES} "
                f"bytes for each of the {world_size} ranks of a group"
            )
        sizes = [self.min_bytes]
        while sizes[-1] * FACTOR <= self.max_bytes:
            sizes.append(sizes[-1] * FACTOR)
        return list(dict.fromkeys(size // smallest for size in sizes))
