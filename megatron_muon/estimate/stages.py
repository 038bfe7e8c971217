"""A model under a parallel layout: which matrices, as pieces of which shape, the ranks of a pipeline stage store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.models import Layer, MatrixShape, Model
from megatron_muon.matrices.fused import FusedQkv, spec_from_split
from megatron_muon.matrices.spec import MatrixSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TransformerImpl = Literal["transformer_engine", "local"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks are laid out, in Megatron-Core's order: tensor parallel fastest, then data parallel, then pipeline.

    Attributes:
        dp: Data-parallel times context-parallel size: the ranks that hold the same piece of the dense weights.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        ep: Expert-parallel size.
        etp: Expert-tensor-parallel size; None takes `tp`, as Megatron does.
        instances: Distributed-optimizer instances; each shards over dp / instances ranks.
        layers_per_stage: Transformer layers of each stage; None divides them as evenly as possible.

    Raises:
        ValueError: If sizes do not divide.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    instances: int = 1
    layers_per_stage: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "ep", "instances"):
            self._check_positive(name, getattr(self, name))
        self._check_positive("etp", self.expert_tp)
        if self.dp * self.tp % (self.ep * self.expert_tp):
            raise ValueError(
                f"ep x etp: got {self.ep} x {self.expert_tp}, expected a divisor of dp x tp = {self.dp} x {self.tp}, "
                "the ranks of a pipeline stage (etp is tp unless given)"
            )
        for name, size in (("dp", self.dp), ("expert data-parallel size dp x tp / (ep x etp)", self.expert_dp)):
            if size % self.instances:
                raise ValueError(f"instances: got {self.instances}, expected a divisor of {name} = {size}")

    @staticmethod
    def _check_positive(name: str, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        return self.dp * self.tp // (self.ep * self.expert_tp)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that reports show."""
        return {
            "ranks": self.num_ranks,
            "dp": self.dp,
            "tp": self.tp,
            "pp": self.pp,
            "ep": self.ep,
            "etp": self.expert_tp,
        }

    @property
    def has_expert_groups(self) -> bool:
        """Experts have buffers and groups of their own; otherwise Megatron treats them as dense weights."""
        return self.ep > 1 or self.expert_tp != self.tp

    @property
    def num_ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def stage_ranks(self) -> int:
        """Ranks of one stage within one optimizer instance: those that share the stage's work."""
        return self.dp * self.tp // self.instances


@dataclass(frozen=True)
class GroupShape:
    """The ranks that share one kind of matrices within an optimizer instance, tensor-parallel rank fastest.

    Attributes:
        expert: These are the experts' groups.
        dp: Ranks that each buffer is sharded over.
        tp: Ranks that a matrix is split over.
        ep: Expert-parallel ranks; each has such a grid of its own, all alike.
    """

    expert: bool
    dp: int
    tp: int
    ep: int

    @property
    def tp_ranks(self) -> tuple[int, ...]:
        """Tensor-parallel rank of each rank of the grid."""
        return tuple(range(self.tp)) * self.dp

    @property
    def size(self) -> int:
        return self.dp * self.tp

    @property
    def stride(self) -> int:
        """Distance in global rank between neighbours of the data-parallel group."""
        return self.tp * self.ep

    def places(self, ep_rank: int = 0) -> NDArray[np.int64]:
        """Place of each rank of the group among the stage's ranks."""
        # Here, since layouts are checked before numpy is imported.
        import numpy as np

        dp_rank, tp_rank = np.divmod(np.arange(self.size), self.tp)
        places: NDArray[np.int64] = (dp_rank * self.ep + ep_rank) * self.tp + tp_rank
        return places


def grids(layout: Layout) -> tuple[GroupShape, GroupShape]:
    """The dense and the expert grid of a stage, within one optimizer instance."""
    return (
        GroupShape(False, layout.dp // layout.instances, layout.tp, 1),
        GroupShape(True, layout.expert_dp // layout.instances, layout.expert_tp, layout.ep),
    )


def split_layers(num_layers: int, layout: Layout) -> tuple[int, ...]:
    """Transformer layers of each pipeline stage: the layout's own, or as even as possible, longer stages first.

    Raises:
        ValueError: If there are fewer layers than stages, or the layout's own numbers do not fit the model.
    """
    own = layout.layers_per_stage
    if own is None:
        if num_layers < layout.pp:
            raise ValueError(f"pp: got {layout.pp} stages for {num_layers} layers, expected at most one per layer")
        short, longer = divmod(num_layers, layout.pp)
        return tuple(short + (stage < longer) for stage in range(layout.pp))
    if len(own) != layout.pp or min(own) < 1 or sum(own) != num_layers:
        raise ValueError(
            f"layers per stage: got {', '.join(map(str, own))}, expected {layout.pp} positive numbers that add up to "
            f"{num_layers}"
        )
    return own


def check_experts(model: Model, layout: Layout) -> None:
    """Raises ValueError if the model's experts do not fit the layout."""
    if not model.expert_counts and (layout.ep > 1 or layout.expert_tp != layout.tp):
        raise ValueError(
            f"ep, etp: got {layout.ep}, {layout.expert_tp}, but {model.name} has no routed experts; leave them unset"
        )
    for experts in model.expert_counts:
        if experts % layout.ep:
            raise ValueError(f"ep: got {layout.ep}, expected a divisor of {model.name}'s {experts} experts")


def stage_specs(
    layers: Sequence[Layer], layout: Layout, config: MuonConfig, impl: TransformerImpl = "transformer_engine"
) -> tuple[tuple[MatrixSpec, ...], tuple[MatrixSpec, ...]]:
    """The matrices that a rank of a pipeline stage stores, as the plugin describes them, in Megatron-Core's order.

    Args:
        layers: The stage's layers.
        layout: The layout.
        config: Which fused weights are split, what becomes of routers, and whether tensor-parallel pieces are joined.
        impl: Megatron's `--transformer-impl`. `transformer_engine` stands for grouped experts and MLA down projections
            that every tensor-parallel rank stores whole; `local` for one module per expert and split projections.

    Returns:
        Dense matrices and experts'; where experts have no groups of their own, they are among the dense ones.

    Raises:
        ValueError: If a matrix does not divide over its tensor-parallel ranks.
    """
    if impl not in get_args(TransformerImpl):
        raise ValueError(f"transformer impl: got {impl!r}, expected one of {', '.join(get_args(TransformerImpl))}")
    dense: list[MatrixSpec] = []
    experts: list[MatrixSpec] = []
    for index, layer in enumerate(layers):
        for shape, name in _parameters(layer, layout.ep, impl):
            if shape.router and config.router != "muon":
                continue
            is_expert = bool(shape.experts)
            tp = layout.expert_tp if is_expert else layout.tp
            spec = _local_spec(f"decoder.layers.{index}.{name}", shape, tp, config, impl)
            (experts if is_expert and layout.has_expert_groups else dense).append(spec)
    return tuple(dense), tuple(experts)


def _parameters(layer: Layer, ep: int, impl: TransformerImpl) -> Iterator[tuple[MatrixShape, str]]:
    """A layer's parameters on one expert-parallel rank, with their names, in order."""
    for num_experts, matrices in groupby(layer, key=lambda m: m.experts):
        if not num_experts:
            yield from ((m, f"{m.name}.weight") for m in matrices)
            continue
        run = tuple(matrices)
        local = range(num_experts // ep)
        if impl == "transformer_engine":
            # One module for all experts, so that all their first weights come before all their second ones.
            yield from ((m, f"{m.name}.weight{expert}") for m in run for expert in local)
            continue
        for expert in local:
            for m in run:
                module, _, linear = m.name.rpartition(".")
                yield m, f"{module}.local_experts.{expert}.{linear}.weight"


def _local_spec(name: str, shape: MatrixShape, tp: int, config: MuonConfig, impl: TransformerImpl) -> MatrixSpec:
    rows, cols, dim = shape.rows, shape.cols, shape.tp_dim
    if tp == 1 or (shape.whole_in_te and impl == "transformer_engine"):
        dim = None
    if dim is not None:
        extent = (rows, cols)[dim]
        units = extent // shape.unit
        # Megatron lets several tensor-parallel ranks share a query group, as many each.
        shared = isinstance(shape.kind, FusedQkv) and tp % units == 0 and extent % tp == 0
        if extent % (shape.unit * tp) and not shared:
            raise ValueError(
                f"{name}: {units} {shape.unit_name} do not divide over tensor-parallel size {tp}; choose a divisor"
                f"{' or a multiple' if isinstance(shape.kind, FusedQkv) else ''}"
            )
        rows, cols = (rows // tp, cols) if dim == 0 else (rows, cols // tp)
    return spec_from_split(
        name,
        (rows, cols),
        shape.kind.split(config),
        tp_size=tp,
        partition_dim=dim,
        tp_joined=config.tp_mode == "exact",
    )
