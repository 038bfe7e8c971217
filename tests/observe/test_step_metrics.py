"""Logged metrics against direct computation on whole matrices; what a step costs that is not logged; the log's line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.megatron.log.metrics_log import LINE_WIDTH, log_line
from megatron_muon.newton_schulz.coefficients import AOL_SIGMA_MAX, coefficients, evaluate
from megatron_muon.observe.metric_names import FILE_NAME, METRICS, by_layer_kind, layer_kind, orthogonality_range
from megatron_muon.observe.step_metrics import spectrum, summarize_ranks
from megatron_muon.profile.run_files import read_metrics
from tests.checkpoint_runs import EXACT, LR, WEIGHT_DECAY, Whole, assemble, build
from tests.distributed import run_ranks
from tests.logical import logical_matrices
from tests.models import Layout

COLLECTIVES = ("all_to_all_single", "all_reduce", "gather_object", "all_gather_object", "broadcast", "all_gather")


class Writer:
    """Stands in for TensorBoard's and for W&B."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.histograms: dict[str, list[float]] = {}
        self.logged: dict[str, Any] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.histograms[tag] = values.tolist()

    def Histogram(self, values: list[float]) -> list[float]:
        return list(values)

    def log(self, content: dict[str, Any], step: int) -> None:
        self.logged = content


def count_collectives() -> dict[str, int]:
    counts = dict.fromkeys(COLLECTIVES, 0)

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name, getattr(dist, name)))
    return counts


def session(rank: int, world_size: int, layout: Layout, settings: dict[str, Any]) -> dict[str, Any]:
    """Three steps; returns what is stored after each, collectives of each, and what a writer got."""
    from megatron.core import parallel_state as ps
    from megatron.training import global_vars

    writer, wandb = Writer(), Writer()
    if rank == world_size - 1:
        global_vars._GLOBAL_TENSORBOARD_WRITER, global_vars._GLOBAL_WANDB_WRITER = writer, wandb
    muon = replace(EXACT, **settings)
    run = build("moe", layout, muon=muon)
    if settings.get("log_interval"):
        run.optimizer.metrics.sources.append(lambda: {"max_logit": float(rank)})
    counts = count_collectives()
    pieces, collectives, places = [run.pieces()], [], []
    for _ in range(3):
        before = dict(counts)
        run.train(1)
        collectives.append({name: counts[name] - before[name] for name in counts})
        pieces.append(run.pieces())
    for place in run.places:
        places.append((place.name, logical_matrices(place, run.chunks[0].config, muon)))
    stats = [part.optimizer.exchange.stats for part in run.optimizer.chained_optimizers if part.kind == "muon"]
    return dict(
        pieces=pieces,
        collectives=collectives,
        places=dict(places),
        writers=(writer.scalars, writer.histograms, wandb.logged),
        sent=sum(s.bytes_sent + s.team_bytes_sent for s in stats),
        optimizers=len(stats),
        last=ps.get_pipeline_model_parallel_rank(),
    )


def expected_metrics(before: Whole, after: Whole, name: str, rows: list[int]) -> dict[str, float]:
    """Of one logical matrix, from whole parameters before and after a step, and the momentum after it."""
    w, momentum = (s[name, key][rows].double() for s, key in ((before, "param"), (after, "momentum_buffer")))
    moved = w * (1 - LR * WEIGHT_DECAY) - after[name, "param"][rows].double()
    update = moved / LR
    o = update / (0.2 * math.sqrt(max(w.shape)))
    short = o if w.shape[0] <= w.shape[1] else o.mT
    identity = torch.eye(len(short), dtype=torch.float64)
    return dict(
        update_rms=update.square().mean().sqrt().item(),
        update_to_weight=(moved.norm() / w.norm()).item(),
        weight_rms=w.square().mean().sqrt().item(),
        momentum_norm=momentum.norm().item(),
        orthogonality_error=((short @ short.mT - identity).norm() / math.sqrt(len(short))).item(),
    )


LABELS = {"linear_qkv": ("q", "k", "v"), "linear_fc1": ("gate", "up")}
LAYOUTS = {
    "tp2 dp2": Layout(4, tp=2, sequence_parallel=True, etp=1),
    "ep2 dp2": Layout(4, ep=2),
    "pp2": Layout(2, pp=2),
    "instances": Layout(4, instances=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_are_those_of_whole_matrices(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    results = run_ranks(session, layout.world_size, layout, dict(log_interval=2, metrics_dir=str(tmp_path)))
    (record,) = read_metrics(tmp_path / FILE_NAME)
    assert record["step"] == 2
    # After the first step and after the second, which was logged.
    before, after = (assemble([r["pieces"][at] for r in results]) for at in (1, 2))
    places = {name: rows for r in results for name, rows in r["places"].items()}
    matrices = [name for name, state in after if state == "momentum_buffer"]
    checked, sampled = set(), 0
    for matrix in matrices:
        labels = next((labels for part, labels in LABELS.items() if part in matrix), ("",))
        rows = places[matrix] or [list(range(len(after[matrix, "param"])))]
        for label, of_label in zip(labels, rows, strict=True):
            entry = record["matrices"][f"{matrix}.{label}" if label else matrix]
            checked.add(f"{matrix}.{label}" if label else matrix)
            for metric, value in expected_metrics(before, after, matrix, of_label).items():
                # Updates are recovered from weights of size 1, which round by 6e-8, in steps of 2e-3.
                assert entry[metric] == pytest.approx(value, rel=1e-3), (matrix, label, metric)
            if "stable_rank" in entry:
                sampled += 1
                sigma = torch.linalg.svdvals(after[matrix, "param"][of_label].double())
                share = sigma**2 / (sigma**2).sum()
                assert entry["stable_rank"] == pytest.approx((1 / share[0]).item(), rel=1e-4)
                entropy = -(share * share.log()).sum() / math.log(len(share))
                assert entry["svd_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert checked == set(record["matrices"]) and sampled > 0
    low, high = orthogonality_range("keller", 5)
    assert record["expected"] == {"update_rms": 0.2, "orthogonality_error": [low, high]}
    assert record["run"]["max_logit"] == layout.world_size - 1
    assert record["run"]["ns_ms_max"] > 0
    # Of three steps and one gather of a sample, one step and the gather; with one rank a stage, nothing is sent.
    sent = max(r["sent"] for r in results)
    assert (sent / 3 if layout.pp == 1 else 0) <= record["run"]["sent_bytes_max"] <= sent


def test_writers_get_scalars_and_histograms(tmp_path: Path) -> None:
    layout = Layout(2)
    results = run_ranks(session, 2, layout, dict(log_interval=3, metrics_dir=str(tmp_path)))
    (record,) = read_metrics(tmp_path / FILE_NAME)
    scalars, histograms, wandb = results[-1]["writers"]
    assert results[0]["writers"] == ({}, {}, {})
    for metric in METRICS:
        for of_kind, values in by_layer_kind(record["matrices"], metric).items():
            tag = f"muon_{metric}/{of_kind}"
            assert scalars[tag] == wandb[tag] == pytest.approx(sum(values) / len(values))
            assert histograms[tag] == pytest.approx(values) and wandb[f"{tag}/histogram"] == values
    assert len(histograms["muon_update_rms/mlp.experts.local_experts.linear_fc1.weight.gate"]) == 4
    assert scalars["muon/ns_ms_max"] == wandb["muon/ns_ms_max"] == record["run"]["ns_ms_max"]


def test_a_step_that_is_not_logged_costs_nothing(tmp_path: Path) -> None:
    layout = LAYOUTS["ep2 dp2"]
    off = run_ranks(session, 4, layout, {})
    on = run_ranks(session, 4, layout, dict(log_interval=2, metrics_dir=str(tmp_path)))
    for without, with_log in zip(off, on, strict=True):
        plain, logged = without["collectives"], with_log["collectives"]
        assert plain[0] == logged[0] and plain[2] == logged[2] and plain[1] == plain[2]
        more = {name: logged[1][name] - plain[1][name] for name in COLLECTIVES if logged[1][name] != plain[1][name]}
        # One gather of weights for each optimizer, unless nothing moves in the round.
        assert 1 <= more.pop("all_to_all_single") <= with_log["optimizers"]
        assert more == {"gather_object": 1}
        # Nor does it change what is trained.
        for a, b in zip(without["pieces"][3], with_log["pieces"][3], strict=True):
            assert a[:2] == b[:2] and torch.equal(a[4], b[4])
    assert not any(Path.cwd().glob(FILE_NAME))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 5), (6, 6)])
def test_spectrum(shape: tuple[int, int]) -> None:
    flat = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    short = min(shape)
    equal = spectrum(flat.U @ flat.Vh)
    assert equal["stable_rank"].item() == pytest.approx(short)
    assert equal["svd_entropy"].item() == pytest.approx(1.0 if short > 1 else 0.0, abs=1e-6)
    sigma = torch.zeros(short)
    sigma[0] = 3.0
    single = spectrum(flat.U @ sigma.diag() @ flat.Vh)
    assert single["stable_rank"].item() == pytest.approx(1.0)
    assert single["svd_entropy"].item() == pytest.approx(0.0, abs=1e-6)


def test_summary_of_ranks_by_hand() -> None:
    spent = [dict(ns_ms=1.0, ns_flops=4, sent_bytes=0), dict(ns_ms=3.0, ns_flops=4, sent_bytes=0)]
    assert summarize_ranks(spent) == dict(
        ns_ms_max=3.0,
        ns_ms_imbalance=1.5,
        ns_flops_max=4,
        ns_flops_imbalance=1.0,
        sent_bytes_max=0,
        sent_bytes_imbalance=1.0,
    )


def test_kinds() -> None:
    assert layer_kind("decoder.layers.12.self_attention.linear_qkv.weight.q") == "self_attention.linear_qkv.weight.q"
    assert layer_kind("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight.up") == (
        "mlp.experts.local_experts.linear_fc1.weight.up"
    )
    assert layer_kind("decoder.layers.3.mlp.experts.linear_fc2.weight11") == "mlp.experts.linear_fc2.weight"
    assert layer_kind("head.weight") == "head.weight"


@pytest.mark.parametrize(
    ("name", "steps"), [("keller", 5), ("you", 5), ("polar_express", 5), ("deepseek_v4", 10), ("aol", 4)]
)
def test_the_range_of_a_coefficient_set(name: str, steps: int) -> None:
    """A matrix with a spectrum as the range assumes, orthogonalized for real, lies within it."""
    low, high = orthogonality_range(name, steps)
    largest = AOL_SIGMA_MAX if name == "aol" else 1.0
    for top in (0.0, -0.5, -1.0):
        sigma = largest * torch.logspace(top, top - 0.5, 4000, dtype=torch.float64)
        mapped = torch.tensor([evaluate(coefficients(name, steps), s) for s in sigma.tolist()], dtype=torch.float64)
        error = (mapped.square() - 1).square().mean().sqrt().item()
        assert low - 1e-3 <= error <= high + 1e-3
    assert 0 <= low <= high < 1


def test_kellers_range_is_what_was_measured() -> None:
    """A training run's matrices have 0.31 to 0.37."""
    low, high = orthogonality_range("keller", 5)
    assert (round(low, 2), round(high, 2)) == (0.25, 0.42)


def test_the_logs_line_is_short() -> None:
    names = [f"decoder.layers.{i}.self_attention.linear_qkv.weight.q" for i in range(2)]
    values = dict.fromkeys(METRICS, 0.123456)
    matrices = {names[0]: values, names[1]: {**values, "update_rms": 0.2}}
    run = {"ns_ms_max": 12.345678, "ns_flops_max": 1e12, "max_attention_logit": 31.5, "qk_nonfinite_heads": 0.0}
    line = log_line(123456, matrices, run)
    assert line == (
        "megatron_muon: step 123456: update rms 0.123 to 0.2, orthogonality 0.123 to 0.123, max attention logit 31.5"
    )
    assert len(line) <= LINE_WIDTH
    # What is wrong comes first.
    wrong = log_line(1, matrices, {**run, "qk_nonfinite_heads": 2.0})
    assert wrong.startswith("megatron_muon: step 1: qk nonfinite heads 2, update rms 0.123 to 0.2, ")
    assert len(wrong) <= LINE_WIDTH
