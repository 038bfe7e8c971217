"""Training steps with FP8 primary weights and known gradients, compared with a full re-quantization of the oracle's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_muon.config import MuonConfig
from megatron_muon.rule.reference import ReferenceMuon
from tests.checkpoint_runs import EXACT, LR, WEIGHT_DECAY, Run, Whole, build, spoil
from tests.logical import is_muons, logical_matrices
from tests.models import Layout, Place, initial_value, make_config
from tests.optimizer.test_exactness import gradient

Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
MODEL = "te-moe"
# What delayed scaling has learned: large enough that some of the weights saturate.
DELAYED_SCALE = 1024.0


def fp8_layout(layout: Layout, recipe: Recipe | None, **ddp: Any) -> Layout:
    """A layout whose model has FP8 primary weights of a recipe; None: bf16 weights."""
    if recipe is None:
        return replace(layout, ddp={**layout.ddp, **ddp})
    gathered = dict(fp8_param_gather=True, reuse_grad_buf_for_mxfp8_param_ag=recipe == "mxfp8")
    return replace(
        layout,
        config={**layout.config, "fp8": "e4m3", "fp8_recipe": recipe, "fp8_param": True},
        ddp={**layout.ddp, **gathered, **ddp},
    )


def build_fp8(layout: Layout, recipe: Recipe | None, **settings: Any) -> Run:
    """A run under `fp8_layout(layout, recipe)`, without clipping unless `settings` say so."""
    if recipe is not None:
        settings |= dict(fp8_recipe=recipe, reuse_grad_buf_for_mxfp8_param_ag=recipe == "mxfp8")
    return build(MODEL, fp8_layout(layout, recipe), dtype=torch.bfloat16, **{"clip_grad": 0.0, **settings})


def is_fp8(parameter: Tensor) -> bool:
    from transformer_engine.pytorch.tensor import QuantizedTensor

    return isinstance(parameter, QuantizedTensor)


def update(run: Run, steps: int) -> None:
    """Steps with gradients that depend on the parameter and the step alone."""
    for _ in range(steps):
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        for place in run.places:
            quantizer = getattr(place.parameter, "_quantizer", None)
            if hasattr(quantizer, "amax"):
                # As TE does in every forward pass: it takes the maximum into its history, and makes the scale of that.
                quantizer.amax.zero_()
                quantizer.scale.fill_(DELAYED_SCALE)
            if place.parameter.requires_grad:
                place.parameter.main_grad.copy_(place.shard(gradient(place, run.step)))  # type: ignore[attr-defined]
        successful, _, _ = run.optimizer.step()
        assert successful
        for chunk in run.chunks:
            if chunk.ddp_config.overlap_param_gather:
                run.optimizer.prepare_model_params_for_param_sync()
                chunk.start_param_sync(force_sync=True)
        run.step += 1


def initial_matrix(place: Place) -> Tensor:
    """The whole main parameter that a run begins with."""
    return initial_value(place.name, place.shape, rows_differ=True).to(torch.bfloat16).float()


def oracle_of(run: Run, muon: MuonConfig = EXACT) -> ReferenceMuon:
    """The oracle after this run's steps, on whole matrices of this rank's model."""
    places = [place for place in run.places if is_muons(place, muon) and place.parameter.requires_grad]
    config = make_config(MODEL, run.layout, torch.bfloat16)
    rows = {place.name: found for place in places if (found := logical_matrices(place, config, muon)) is not None}
    whole = {place.name: initial_matrix(place) for place in places}
    oracle = ReferenceMuon(whole, rows, muon)
    for step in range(run.step):
        oracle.step({place.name: gradient(place, step) for place in places}, lr=LR, weight_decay=WEIGHT_DECAY)
    return oracle


def stored_tensors(parameter: Any) -> dict[str, Tensor]:
    """The tensors that an FP8 parameter is made of: bytes and inverse scales, of one or both directions.

    Without what TE's matrix products want beside the scales of the blocks: it is never read as a scale, and the two
    ways to quantize fill it differently.
    """
    names = [name for name, _ in type(parameter)._INNER_TENSORS]
    rows, cols = parameter.shape
    # Rows and columns of a block, by direction.
    match type(parameter).__name__:
        case "Float8Tensor":
            blocks = {}
        case "Float8BlockwiseQTensor":
            blocks = {"_rowwise_scale_inv": (-(-rows // 128), -(-cols // 128))}
            blocks["_columnwise_scale_inv"] = blocks["_rowwise_scale_inv"][::-1]
        case "MXFP8Tensor":
            blocks = {"_rowwise_scale_inv": (rows, cols // 32), "_columnwise_scale_inv": (rows // 32, cols)}
        case kind:
            raise NotImplementedError(kind)
    out = {}
    for name in names:
        if (value := getattr(parameter, name)) is not None:
            height, width = blocks.get(name, (None, None))
            out[name] = value[:height, :width] if name in blocks else value
    return out


def requantized(parameter: Any, matrix: Tensor) -> dict[str, Tensor]:
    """What `parameter` must hold: all of `matrix`, rounded to bf16 as TE does it, quantized at once."""
    quantizer = parameter._quantizer.copy()
    amax = {}
    if hasattr(quantizer, "amax"):
        quantizer.amax = torch.zeros_like(quantizer.amax)
        amax["amax"] = quantizer.amax
    return {**stored_tensors(quantizer(matrix.to(torch.bfloat16))), **amax}


@dataclass
class Compared:
    """What a rank found after its steps.

    Attributes:
        matrices: FP8 parameters of this rank.
        elements: Their elements.
        mismatches: By tensor (`_data`, `_scale_inv`, ...): elements unlike those of the re-quantized oracle.
        main: Largest difference of the fp32 main slices and momenta to the oracle's.
        bf16: Largest difference of Muon's other parameters (the router) to the oracle's, rounded to bf16.
        slices: Of each FP8 parameter: name, columns, and the flat range that this rank stores; None if it has none.
        saturated: Bytes that are the largest value or its negative.
    """

    matrices: int = 0
    elements: int = 0
    mismatches: dict[str, int] = field(default_factory=dict)
    main: float = 0.0
    bf16: float = 0.0
    slices: list[tuple[str, int, tuple[int, int] | None]] = field(default_factory=list)
    saturated: int = 0


def compare(run: Run) -> Compared:
    """Compares a rank's FP8 parameters, main parameters and momenta with the oracle after the same steps."""
    from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer

    oracle, out = oracle_of(run), Compared()
    whole = {name: dict(param=w, momentum_buffer=oracle.momenta[name]) for name, w in oracle.parameters.items()}
    ranges: dict[nn.Parameter, tuple[int, int]] = {}
    for part in run.optimizer.chained_optimizers:
        if isinstance(part, MuonDistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                span = part._get_model_param_range_map(parameter)["param"]
                ranges[parameter] = (span.start, span.end)
    for name, state, _, indices, value in run.pieces():
        if name in whole:
            expected = whole[name][state].reshape(-1)[indices]
            out.main = max(out.main, float((value - expected).abs().max()))
    for place in run.places:
        if place.name not in whole:
            continue
        expected = place.shard(whole[place.name]["param"])
        if not is_fp8(place.parameter):
            out.bf16 = max(out.bf16, float((place.parameter.float() - expected.bfloat16().float()).abs().max()))
            continue
        _compare_bytes(place, expected, out)
        out.slices.append((place.name, expected.shape[1], ranges.get(place.parameter)))
    return out


def _compare_bytes(place: Place, expected: Tensor, out: Compared) -> None:
    parameter: Any = place.parameter
    got = stored_tensors(parameter)
    if hasattr(parameter._quantizer, "amax"):
        got["amax"] = parameter._quantizer.amax
    wanted = requantized(parameter, expected)
    assert got.keys() == wanted.keys(), (place.name, got.keys(), wanted.keys())
    out.matrices += 1
    out.elements += expected.numel()
    for name, tensor in got.items():
        assert tensor.shape == wanted[name].shape, (place.name, name)
        out.mismatches[name] = out.mismatches.get(name, 0) + int((tensor != wanted[name]).sum())
    data = got.get("_data", got.get("_rowwise_data"))
    assert data is not None
    out.saturated += int(((data & 0x7F) == 0x7E).sum())


@contextmanager
def maxima_not_reduced() -> Iterator[None]:
    """Takes the all-reduce of maxima out, so that every rank scales by those of its own slices."""
    all_reduce = dist.all_reduce

    def without_max(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        return None if op == dist.ReduceOp.MAX else all_reduce(tensor, op=op, **kwargs)

    with mock.patch("torch.distributed.all_reduce", without_max):
        yield


@dataclass(frozen=True)
class Session:
    """What `train_and_compare` does.

    Attributes:
        layout: The ranks' layout.
        recipe: Of the primary weights.
        steps: Updates before the comparison.
        reduced: Whether maxima are reduced over the data-parallel ranks.
        hopper: Whether TE finds a device that needs transposed copies for its matrix products.
        frozen: Pattern of the names of parameters that are not trained.
    """

    layout: Layout
    recipe: Recipe
    steps: int = 2
    reduced: bool = True
    hopper: bool = False
    frozen: str | None = None


def train_and_compare(rank: int, world_size: int, session: Session) -> Compared:
    """What one rank of a test does."""
    with ExitStack() as stack:
        if session.hopper:
            stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *device: (9, 0)))
        if not session.reduced:
            stack.enter_context(maxima_not_reduced())
        run = build_fp8(session.layout, session.recipe, frozen=session.frozen)
        update(run, session.steps)
        return compare(run)


def save(rank: int, world_size: int, layout: Layout, recipe: Recipe | None, directory: Path, sharding: str) -> Any:
    """Two steps, a checkpoint, and what this rank then stores."""
    run = build_fp8(layout, recipe)
    update(run, 2)
    run.save(directory, sharding)
    return run.pieces()


@dataclass
class Resumed:
    """What a rank found after a load.

    Attributes:
        differences: Main parameters and states unlike those saved, by name.
        checked: How many were compared.
        after: After one more step; of a run in bf16, only what is not FP8.
        adam: Then, the largest difference of AdamW's parameters to those of torch's, as of `adam_differences`.
    """

    differences: list[str]
    checked: int
    after: Compared
    adam: float


def resume(
    rank: int, world_size: int, layout: Layout, recipe: Recipe | None, directory: Path, sharding: str, whole: Whole
) -> Resumed:
    """Loads into other weights, compares with what was saved, and goes on for a step."""
    run = build_fp8(layout, recipe)
    spoil(run)
    run.load(directory, sharding)
    pieces = run.pieces()
    differences = [
        f"{state} of {name}"
        for name, state, _, indices, value in pieces
        if not torch.equal(value, whole[name, state].reshape(-1)[indices])
    ]
    update(run, 1)
    return Resumed(differences, len(pieces), compare(run), adam_differences(run)[1])


def adam_differences(run: Run) -> tuple[int, float]:
    """Compares AdamW's main parameters of a rank with torch's AdamW on whole tensors, after the same steps.

    Returns:
        The slices compared, and the largest difference, in units of each parameter's largest value.
    """
    places = [place for place in run.places if not is_muons(place, EXACT)]
    whole = {place.name: nn.Parameter(initial_matrix(place)) for place in places}
    config = run.optimizer.config
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in whole.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in whole.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    for step in range(run.step):
        for place in places:
            whole[place.name].grad = gradient(place, step)
        adam.step()
    compared, worst = 0, 0.0
    for name, state, _, indices, value in run.pieces():
        if name in whole and state == "param":
            expected = whole[name].detach()
            compared += 1
            difference = (value - expected.reshape(-1)[indices]).abs().max()
            worst = max(worst, float(difference / expected.abs().max()))
    return compared, worst


def adam_parameters(rank: int, world_size: int, layout: Layout) -> tuple[str, int, float]:
    """The class of AdamW's inner optimizer, and `adam_differences` after three steps."""
    run = build_fp8(layout, None)
    update(run, 3)
    (part,) = (part for part in run.optimizer.chained_optimizers if part.kind == "adam")
    kind = type(part.optimizer)
    return f"{kind.__module__}.{kind.__qualname__}", *adam_differences(run)
