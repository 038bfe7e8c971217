"""What `links` measures and how: the home of its defaults and choices. No torch, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from megatron_muon.profile.busbw import Collective

GroupKind = Literal["world", "tp", "dp", "tp_dp", "pp", "ep", "expert_tp", "expert_dp", "expert_tp_dp"]
"""`dp` is data-parallel times context-parallel, within an optimizer instance, as are `expert_dp` and those with `tp`.
`tp_dp` and `expert_tp_dp` are what Distributed Muon exchanges dense and expert matrices over."""
GROUP_KINDS: tuple[GroupKind, ...] = get_args(GroupKind)

Backend = Literal["auto", "nccl", "gloo"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Swept = Literal["all_to_all", "reduce_scatter", "all_gather", "all_reduce", "send_recv"]
"""Collectives measured over a range of sizes; all_to_allv is measured at the sizes of a plan."""
SWEPT: tuple[Swept, ...] = get_args(Swept)
PER_RANK: frozenset[Collective] = frozenset({"all_to_all", "reduce_scatter", "all_gather"})
"""Those whose size is that of all ranks' parts together."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float": 4, "bfloat16": 2, "half": 2})
"""Data types by the name that nccl-tests and torch give them."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Which sizes, and how often.

    Attributes:
        min_bytes: Smallest size.
        max_bytes: Largest size.
        factor: From one size to the next.
        dtype: A key of `DTYPE_BYTES`.
        warmup: Calls that are not timed.
        iterations: Calls that are timed together.

    Raises:
        ValueError: If a value is bad.
    """

    min_bytes: int = 4 << 10
    max_bytes: int = 16 << 20
    factor: int = 4
    dtype: str = "float"
    warmup: int = 5
    iterations: int = 20

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--min-bytes", self.min_bytes, 1),
            ("--max-bytes", self.max_bytes, self.min_bytes),
            ("--factor", self.factor, 2),
            ("--warmup", self.warmup, 0),
            ("--iterations", self.iterations, 1),
        ):
            if value < least:
                raise ValueError(f"{flag}: got {value}, expected at least {least}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"--dtype: got {self.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def counts(self, collective: Collective, world_size: int) -> list[int]:
        """Elements of each size, in nccl-tests' sense; sizes are rounded down to whole elements on each rank.

        Raises:
            ValueError: If the smallest size leaves a rank without an element.
        """
        parts = world_size if collective in PER_RANK else 1
        smallest = parts * self.element_bytes
        if self.min_bytes < smallest:
            raise ValueError(
                f"--min-bytes: got {self.min_bytes}, expected at least {smallest}: one element of "
                f"{self.element_bytes} bytes for each of the {parts} ranks of a group"
            )
        counts = []
        size = self.min_bytes
        while size <= self.max_bytes:
            counts.append(size // smallest)
            size *= self.factor
        return list(dict.fromkeys(counts))


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """Everything that the command line can say.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        ep: Expert-parallel size.
        etp: Expert-tensor-parallel size; None is `tp`.
        instances: Distributed-optimizer instances.
        sweep: Sizes and repetitions.
        groups: Kinds of groups; None takes all of more than one rank.
        collectives: Those swept.
        model: Whose plan gives all_to_allv its split sizes, as for `planning.shapes.load_model`; None: no plan.
        traffic: File of a recorded exchange, instead of a model.
        save_traffic: Where to write such a file.
        exchange_dtype: Of a model's plan; None is Muon's default.
        rounds: How many of a plan's rounds to measure, those that move most first.
        pair_bytes: Sent each way between every two ranks; 0 leaves the pairs out.
        backend: `auto` is NCCL where CUDA works, else Gloo.
        json: Where to write everything.
        plot: Where to draw.
        flight_recorder: Directory for each rank's Flight Recorder dump.

    Raises:
        ValueError: If settings exclude each other, or a value is bad.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    instances: int = 1
    sweep: Sweep = field(default_factory=Sweep)
    groups: tuple[GroupKind, ...] | None = None
    collectives: tuple[Swept, ...] = SWEPT
    model: str | None = None
    traffic: Path | None = None
    save_traffic: Path | None = None
    exchange_dtype: str | None = None
    rounds: int = 2
    pair_bytes: int = 4 << 20
    backend: Backend = "auto"
    json: Path | None = None
    plot: Path | None = None
    flight_recorder: Path | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.traffic is not None:
            raise ValueError("--model, --traffic: got both, expected one of them: both say what is exchanged")
        for flag, value, needs, other in (
            ("--save-traffic", self.save_traffic, "--model", self.model),
            ("--exchange-dtype", self.exchange_dtype, "--model", self.model),
        ):
            if value is not None and other is None:
                raise ValueError(f"{flag}: got {value}, expected it with {needs} only")
        for flag, number, least in (("--rounds", self.rounds, 1), ("--pair-bytes", self.pair_bytes, 0)):
            if number < least:
                raise ValueError(f"{flag}: got {number}, expected at least {least}")
