"""What a logged step measures on this rank.

A `MetricsRecorder` observes one step of a `ShardedMuon`. It keeps sums on the device and turns them into numbers once
the step is over. A rank's numbers are its shares of sums over all ranks, which `combine` adds up. The work of
measuring is a phase of its own, `metrics`, so that a profile of the same step does not count it as Muon's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_muon.config import MuonConfig, owner_factor
from megatron_muon.exchange.exchange import Exchange
from megatron_muon.matrices.shares import logical_views
from megatron_muon.matrices.slice_elements import SliceElements

# Share of one rank in the sums of a parameter's part, or of one sampled logical matrix: name -> quantity -> number.
Sums = dict[str, dict[str, float]]


@dataclass
class MetricsRecorder:
    """Collects one step's numbers.

    Attributes:
        muon: The optimizer's settings.
        names: Name of each parameter in the whole model, by index.
        exchange: Exchange of the optimizer.
        bytes_before: Bytes that this rank had sent when the step began.
    """

    muon: MuonConfig
    names: Mapping[int, str]
    exchange: Exchange
    watches: bool = field(default=True, init=False)
    bytes_before: int = field(init=False)
    _found: list[tuple[str, str, Tensor]] = field(default_factory=list)
    _spans: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bytes_before = self._bytes_sent()

    def _bytes_sent(self) -> int:
        stats = self.exchange.stats
        return stats.bytes_sent + stats.team_bytes_sent

    def name(self, index: int, part: int) -> str:
        """The name of a part of a parameter, such as `...linear_qkv.weight.q`."""
        spec = self.exchange.plan.matrices[index].spec
        label = spec.parts[part].label
        return ".".join(filter(None, (self.names.get(index, spec.name), label)))

    def slices(self, quantity: str, values: Mapping[int, Tensor], elements: Mapping[int, SliceElements]) -> None:
        """See `StepObserver`."""
        with self.exchange.watch.phase("metrics"):
            for index, value in values.items():
                self._slice_squares(quantity, index, elements[index], value)

    def _slice_squares(self, quantity: str, index: int, elements: SliceElements, values: Tensor) -> None:
        """Adds a slice's squares to the sums of the parameter's parts, and with `update_sq` counts its elements.

        Args:
            quantity: Name of the values, with `_sq`.
            index: Index of the parameter.
            elements: Elements of the slice.
            values: One for each element, of any floating dtype; not mutated.
        """
        parts = len(elements.spec.parts)
        total = torch.zeros(parts, dtype=torch.float64, device=values.device)
        count = torch.zeros_like(total)
        for chunk in elements.chunks():
            part = elements.parts(chunk)
            total.index_add_(0, part, values[chunk].double().square_())
            count.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))
        for part_index in range(parts):
            name = self.name(index, part_index)
            self._found.append((name, quantity, total[part_index]))
            if quantity == "update_sq":
                self._found.append((name, "numel", count[part_index]))

    def learning_rates(self, rates: Mapping[int, float]) -> None:
        """See `StepObserver`; each part of a parameter has the parameter's rate."""
        for index, lr in rates.items():
            for part in range(len(self.exchange.plan.matrices[index].spec.parts)):
                self._found.append((self.name(index, part), "lr", torch.tensor(lr, dtype=torch.float64)))

    def orthogonality(self, index: int, part: int, views: Sequence[Tensor]) -> None:
        """Adds |O O^T - I|_F^2 / min(rows, cols) of each logical matrix that an owner has made.

        Args:
            index: Index of the parameter.
            part: Index of the part.
            views: Updates of whole logical matrices, already scaled; not mutated.
        """
        name = self.name(index, part)
        with self.exchange.watch.phase("metrics"):
            for view in views:
                rows, cols = view.shape
                gram = _short_gram(view.float() / owner_factor(rows, cols, self.muon))
                gram.diagonal().sub_(1.0)
                self._found.append((name, "orthogonality_sq", gram.double().square_().sum() / min(rows, cols)))
                self._found.append((name, "orthogonality_count", torch.ones((), dtype=torch.float64)))

    @contextmanager
    def newton_schulz(self) -> Iterator[None]:
        """Times what runs inside, on a GPU with events, so that it need not be waited for."""
        if self.exchange.device.type == "cuda":
            event: Any = torch.cuda.Event
            begin, end = (event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._spans.append((started, time.perf_counter()))

    def weights(self, slices: Mapping[int, Tensor], turn: int) -> None:
        """Samples weights: one round's are gathered to their owners, and each owner decomposes one matrix.

        Collective: one all-to-all over the exchange's ranks, also of ranks that own nothing.

        Args:
            slices: Parameter index -> this rank's slice of the weight.
            turn: Number of the logged step; rounds and matrices are sampled in turn.
        """
        plan = self.exchange.plan
        if not plan.rounds:
            return
        round_index = turn % len(plan.rounds)
        members = {i: slices[i] for i in plan.rounds[round_index] if i in slices}
        parts = self.exchange.collect(round_index, members)
        candidates = [
            (item, view)
            for item, collected in sorted(parts.items())
            # A member of a team has a band only.
            if plan.team(item) is None
            for view in logical_views(plan.spec(item), item.part, collected)
        ]
        if candidates:
            item, view = candidates[turn // len(plan.rounds) % len(candidates)]
            name = self.name(item.matrix, item.part)
            for quantity, value in spectrum(view.float()).items():
                self._found.append((name, quantity, value.cpu()))

    def finish(self) -> tuple[Sums, dict[str, float]]:
        """This rank's sums, and what it spent. Waits for the device."""
        numbers = (
            torch.stack([value.to(self.exchange.device) for *_, value in self._found]).tolist() if self._found else []
        )
        sums: Sums = {}
        for (name, quantity, _), number in zip(self._found, numbers, strict=True):
            entry = sums.setdefault(name, {})
            entry[quantity] = number if quantity in _NOT_SUMMED else entry.get(quantity, 0.0) + number
        if self.exchange.device.type == "cuda":
            torch.cuda.synchronize(self.exchange.device)
            ns_ms = sum(begin.elapsed_time(end) for begin, end in self._spans)
        else:
            ns_ms = 1e3 * sum(end - begin for begin, end in self._spans)
        flops = self.exchange.plan.rank_flops[self.exchange.rank]
        return sums, {"ns_ms": ns_ms, "sent_bytes": self._bytes_sent() - self.bytes_before, "ns_flops": flops}


# The same on every rank that knows it, or known to one rank only.
_NOT_SUMMED = frozenset({"lr", "stable_rank", "svd_entropy"})


def spectrum(matrix: Tensor) -> dict[str, Tensor]:
    """Stable rank and SVD entropy of a matrix.

    Stable rank is |W|_F^2 / sigma_1^2. The entropy is that of the squared singular values over their sum, divided by
    its largest value: 1 if all are equal, 0 if only one is not zero. Source: arXiv 2502.16982.

    The squares are the eigenvalues of the Gram matrix on the short side: a decomposition of min(rows, cols)^3, where
    singular values would take many times that. Squares below 1e-7 of the largest are lost, which neither number sees.

    Args:
        matrix: 2-D, fp32; not mutated. A zero matrix gives NaN for both.
    """
    squares = torch.linalg.eigvalsh(_short_gram(matrix).double()).clamp_min_(0.0)
    share = squares / squares.sum()
    entropy = -torch.special.xlogy(share, share).sum() / max(math.log(len(share)), 1e-12)
    return {"stable_rank": squares.sum() / squares[-1], "svd_entropy": entropy}


def _short_gram(matrix: Tensor) -> Tensor:
    """The Gram matrix on the shorter side."""
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def combine(shares: Iterable[Sums]) -> dict[str, dict[str, float]]:
    """Adds up the ranks' sums and makes the metrics of each part of a parameter.

    Returns:
        Name -> metric -> value: `update_rms` (before the learning rate), `update_to_weight` (norm of lr * update over
        that of the weight), `weight_rms`, `momentum_norm`, `orthogonality_error` (root mean square over the part's
        logical matrices), and of sampled weights `stable_rank` and `svd_entropy`.
    """
    total: Sums = {}
    for sums in shares:
        for name, entry in sums.items():
            into = total.setdefault(name, {})
            for quantity, number in entry.items():
                into[quantity] = number if quantity in _NOT_SUMMED else into.get(quantity, 0.0) + number
    out = {}
    for name, entry in sorted(total.items()):
        metrics: dict[str, float] = {key: entry[key] for key in ("stable_rank", "svd_entropy") if key in entry}
        if entry.get("numel"):
            metrics["update_rms"] = math.sqrt(entry["update_sq"] / entry["numel"])
            metrics["weight_rms"] = math.sqrt(entry["weight_sq"] / entry["numel"])
            metrics["momentum_norm"] = math.sqrt(entry["momentum_sq"])
            if entry["weight_sq"] > 0:
                metrics["update_to_weight"] = entry["lr"] * math.sqrt(entry["update_sq"] / entry["weight_sq"])
        if entry.get("orthogonality_count"):
            metrics["orthogonality_error"] = math.sqrt(entry["orthogonality_sq"] / entry["orthogonality_count"])
        out[name] = metrics
    return out


def summarize_ranks(spent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest value over the ranks, and its ratio to the mean."""
    out = {}
    for key in ("ns_ms", "ns_flops", "sent_bytes"):
        values = [rank[key] for rank in spent]
        mean = sum(values) / len(values)
        out[f"{key}_max"] = max(values)
        out[f"{key}_imbalance"] = max(values) / mean if mean > 0 else 1.0
    return out
