"""FP8 primary weights of real Transformer Engine modules, after Muon's updates on fp32 slices.

Every rank compares every FP8 parameter it has, byte for byte and scale for scale, with the oracle's updated matrix
quantized at once; the oracle (`reference.py`) knows no ranks and no FP8.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.models import Layout
from tests.te.fp8_runs import Compared, Recipe, Session, train_and_compare

RECIPES: tuple[Recipe, ...] = ("delayed", "tensorwise", "blockwise", "mxfp8")
# Buckets of a multiple of 2^16 elements, which is no multiple of a row: shards begin within rows.
CUT: dict[str, Any] = dict(pad_buckets_for_high_nccl_busbw=True)
LAYOUTS = {
    "one rank": Layout(1),
    "dp2": Layout(2, ddp=CUT),
    "ep2": Layout(2, ep=2, ddp=CUT),
    "dp4": Layout(4, ddp=CUT),
    "ep2 edp2": Layout(4, ep=2, ddp=CUT),
    "tp2 dp2": Layout(4, tp=2, etp=1, ep=2, sequence_parallel=True),
}
# Those that run in `make test-te`; the others are exhaustive.
SHORT = {
    *((recipe, "one rank") for recipe in RECIPES),
    ("delayed", "ep2 edp2"),
    ("tensorwise", "dp2"),
    ("blockwise", "dp4"),
    ("blockwise", "ep2 edp2"),
    ("mxfp8", "dp2"),
}


def played(layout: Layout, recipe: Recipe, **settings: Any) -> list[Compared]:
    session = Session(layout, recipe, **settings)
    results: list[Compared] = run_ranks(train_and_compare, layout.world_size, session)
    for rank, result in enumerate(results):
        print(f"rank {rank}: {result.matrices} matrices, {result.elements} elements, unlike: {result.mismatches}")
    return results


def total(results: list[Compared]) -> Counter[str]:
    """Mismatches over all ranks, by tensor."""
    return sum((Counter(result.mismatches) for result in results), Counter())


def cuts(results: list[Compared]) -> tuple[int, int]:
    """How many slices begin within a row, and within a block of 128 x 128."""
    begins = [(at[0], cols) for result in results for _, cols, at in result.slices if at is not None and at[0] > 0]
    return sum(at % cols != 0 for at, cols in begins), sum(at // cols % 128 != 0 for at, cols in begins)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        pytest.param(recipe, name, marks=() if (recipe, name) in SHORT else pytest.mark.exhaustive)
        for recipe in RECIPES
        for name in LAYOUTS
    ],
)
def test_bytes_are_those_of_the_requantized_oracle(recipe: Recipe, name: str) -> None:
    results = played(LAYOUTS[name], recipe)
    assert [(result.main, result.bf16) for result in results] == [(0.0, 0.0)] * len(results)
    assert sum(total(results).values()) == 0
    assert all(result.matrices >= 10 for result in results)
    if name in ("dp2", "dp4", "ep2 edp2"):
        in_rows, in_blocks = cuts(results)
        assert in_rows >= 1 and in_blocks >= 1, (in_rows, in_blocks)


@pytest.mark.parametrize(("recipe", "name"), [("tensorwise", "dp2"), ("blockwise", "dp4")])
def test_bytes_differ_where_maxima_are_not_reduced(recipe: Recipe, name: str) -> None:
    """What the comparison is worth: with each rank's own maxima, matrices that lie on several ranks are wrong."""
    results = played(LAYOUTS[name], recipe, reduced=False)
    # The update itself needs no FP8.
    assert [result.main for result in results] == [0.0] * len(results)
    wrong = total(results)
    of_bytes = wrong["_data"] + wrong["_rowwise_data"]
    elements = sum(result.elements for result in results)
    print(f"{of_bytes / elements:.1%} of the bytes differ")
    # Most matrices lie on one rank, whose maxima are theirs.
    assert of_bytes > 0
    assert wrong["_scale_inv"] + wrong["_rowwise_scale_inv"] > 0


def test_delayed_scalings_history_differs_where_maxima_are_not_reduced() -> None:
    """Its bytes come of the scale of before; the maximum is what the next scale is made of."""
    wrong = total(played(LAYOUTS["dp4"], "delayed", reduced=False))
    assert wrong["_data"] == 0
    assert wrong["amax"] > 0


# Each parameter has its own bucket, and parameters are gathered while the next forward pass would run.
OVERLAP: dict[str, Any] = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=32)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_overlapped_gather(recipe: Recipe) -> None:
    results = played(Layout(2, ddp=OVERLAP), recipe)
    assert [(result.main, result.bf16) for result in results] == [(0.0, 0.0)] * 2
    assert sum(total(results).values()) == 0


@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("blockwise", marks=pytest.mark.exhaustive)])
def test_ranks_that_store_nothing_take_part(recipe: Recipe) -> None:
    """One matrix in a bucket of 2^16 elements over four ranks: the first two store it, the others only padding."""
    results = played(Layout(4, ddp=CUT), recipe, frozen=r"^(?!.*layers\.0\.mlp\.linear_fc2)")
    stored = [[at for _, _, at in result.slices] for result in results]
    assert stored[0][0] is not None and stored[-1] == [None]
    assert [result.matrices for result in results] == [1] * 4
    assert sum(total(results).values()) == 0


@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("delayed", marks=pytest.mark.exhaustive)])
def test_transposes_for_hopper(recipe: Recipe) -> None:
    results = played(LAYOUTS["dp2"], recipe, hopper=True)
    assert all("_transpose" in result.mismatches for result in results)
    assert sum(total(results).values()) == 0
