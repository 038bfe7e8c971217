"""A checkpoint of any layout goes on at any other: every element bitwise, and the losses of an uninterrupted run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Session, assemble, play, with_config
from tests.distributed import run_ranks
from tests.models import Layout

LAYOUTS: dict[str, Layout] = {
    name: with_config(layout, num_layers=4)
    for name, layout in {
        "dp4": Layout(4),
        "tp2 dp2": Layout(4, tp=2, sequence_parallel=True, etp=1),
        "pp2 dp2": Layout(4, pp=2),
        "tp2 pp2": Layout(4, tp=2, pp=2, sequence_parallel=True, etp=1),
        "ep2 dp2": Layout(4, ep=2),
        "ep4": Layout(4, ep=4),
        "ep2 etp2": Layout(4, ep=2, tp=2, etp=2, sequence_parallel=True),
        # With two stages, a batch of sends and receives would mix up the messages of both directions.
        "vpp": Layout(2, pp=2, vpp=2, config=dict(overlap_p2p_comm=True, batch_p2p_comm=False)),
        "instances": Layout(4, instances=2),
        "buckets": Layout(2, ddp=dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=3000)),
        "dp2": Layout(2),
    }.items()
}
NAMES = list(LAYOUTS)
# Every layout saves once and loads once; each load's run saves for the next one.
RING = list(zip(NAMES, NAMES[1:] + NAMES[:1]))


@dataclass
class Saved:
    """A checkpoint, the whole state in it, and the losses of the run that went on after saving it."""

    directory: Path
    expected: Path
    losses: list[float]


class Store:
    """Checkpoints by layout, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.saved = root, {}  # type: ignore[var-annotated]

    def get(self, name: str) -> Saved:
        if name not in self.saved:
            self.play(name, None)
        return self.saved[name]

    def play(self, name: str, source: Saved | None) -> None:
        """Runs a session at a layout, from a checkpoint or anew, and checks it against the run that saved that."""
        keep = name not in self.saved
        layout = LAYOUTS[name]
        directory = self.root / name.replace(" ", "_")
        session = Session("moe", layout, save_to=directory if keep else None)
        if source is not None:
            session = dataclasses.replace(session, load_from=source.directory, expected=source.expected)
        results = run_ranks(play, layout.world_size, session)
        for rank, result in enumerate(results):
            assert result["differences"] == [], f"rank {rank}"
            assert result["before"] == results[0]["before"]
        if source is not None:
            # Layouts add up the same numbers in another order: a few units in the last place of a loss of about 4.
            assert results[0]["before"] == pytest.approx(source.losses, rel=1e-6)
        if keep:
            expected = directory.with_suffix(".whole")
            torch.save(assemble([result["pieces"] for result in results]), expected)
            self.saved[name] = Saved(directory, expected, results[0]["after"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    yield Store(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("source", "target"), RING)
def test_reshards(store: Store, source: str, target: str) -> None:
    store.play(target, store.get(source))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("source", "target"), [pair for pair in permutations(NAMES, 2) if pair not in RING])
def test_reshards_all_pairs(store: Store, source: str, target: str) -> None:
    store.play(target, store.get(source))
