"""What is in a checkpoint: parameters, who updates them, their norms, and the layout that wrote it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from megatron_muon.checkpoints.contents import model_keys, optimizer_kind, parameters, sharding
from megatron_muon.checkpoints.moments import sum_of_squares
from megatron_muon.checkpoints.param_groups import source_momentum
from megatron_muon.checkpoints.reader import Checkpoint, Progress, dtype_name, no_progress
from megatron_muon.state_keys import FP32_PARAM, MOMENTUM, PARAM

# Names in Megatron's args, in the order in which they are printed.
_LAYOUT = {
    "world_size": "world_size",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "dp": "data_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


@dataclass(frozen=True)
class InspectedParameter:
    """A parameter of the model. `optimizer` is muon, adamw or none; `norms` are Frobenius norms by state."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: int
    optimizer: str
    states: dict[str, str]
    norms: dict[str, float]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `layout` is as the checkpoint's args say; empty where it has none."""

    directory: str
    optimizer: str
    sharding: str
    iteration: int | None
    momentum: float | None
    layout: dict[str, int]
    rows: tuple[InspectedParameter, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def inspect(checkpoint: Checkpoint, *, norms: bool = True, progress: Progress = no_progress) -> Inspection:
    """Reads a checkpoint's metadata and, for norms, each of its tensors once, one chunk at a time.

    Raises:
        ValueError: If something in it is missing or damaged.
    """
    common, kind = checkpoint.common, optimizer_kind(checkpoint)
    args = common.get("args")
    layout = {short: getattr(args, name, None) for short, name in _LAYOUT.items()}
    trained = parameters(checkpoint)
    tensors = checkpoint.tensors
    names = sorted({*model_keys(tensors), *(trained if kind is not None else ())})
    rows = []
    for number, name in enumerate(names):
        progress(name, number, len(names))
        states = dict(trained[name].states) if name in trained else {}
        weight = {"weight": name} if name in tensors else {}
        keys = {**weight, **states}
        first = tensors[next(iter(keys.values()))]
        rows.append(
            InspectedParameter(
                name=name,
                shape=tuple(first.size),
                dtype=dtype_name(first.properties.dtype),
                chunks=len(first.chunks),
                optimizer="muon" if MOMENTUM in states else "adamw" if states else "none",
                states={state: dtype_name(tensors[key].properties.dtype) for state, key in sorted(states.items())},
                norms={state: _norm(checkpoint, key) for state, key in keys.items()} if norms else {},
            )
        )
    progress("done", len(names), len(names))
    return Inspection(
        directory=str(checkpoint.directory),
        optimizer=kind or "none",
        sharding=sharding(checkpoint),
        iteration=common.get("iteration"),
        momentum=source_momentum(common),
        layout={short: int(size) for short, size in layout.items() if size is not None},
        rows=tuple(rows),
    )


def _norm(checkpoint: Checkpoint, key: str) -> float:
    squares = 0.0
    for _, chunk in checkpoint.chunks(key):
        if chunk.is_floating_point():
            squares += sum_of_squares(chunk)
        del chunk
    return math.sqrt(squares)


def print_inspection(found: Inspection) -> None:
    """Prints a table of the parameters under a line for each general fact."""
    from megatron_muon.observe.console import console, table

    layout = " ".join(f"{name}={size}" for name, size in found.layout.items()) or "not recorded"
    facts = {
        "checkpoint": found.directory,
        "optimizer": f"{found.optimizer}, state {found.sharding}",
        "iteration": found.iteration,
        "momentum": found.momentum,
        "written by": layout,
    }
    out = console()
    for name, value in facts.items():
        if name != "momentum" or value is not None:
            out.print(f"{name:12} {value}", soft_wrap=True)
    rows = []
    for row in found.rows:
        states = [state for state in row.states if state not in (PARAM, FP32_PARAM)]
        shape = "x".join(str(size) for size in row.shape)
        first = (row.name, shape, row.dtype, row.optimizer, _number(row.norms.get("weight")))
        numbers = [_number(row.norms.get(state)) for state in states]
        rows.append((*first, "\n".join(states), "\n".join(numbers)))
    out.print(table(("parameter", "shape", "dtype", "optimizer", "weight norm", "state", "state norm"), rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
