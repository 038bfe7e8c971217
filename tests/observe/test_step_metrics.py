"""Logged metrics against direct computation on whole matrices; what a step costs that is not logged; the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.cli import main
from megatron_muon.observe import metrics_report as report
from megatron_muon.observe.metric_names import FILE_NAME, METRICS, by_kind, kind
from megatron_muon.observe.step_metrics import spectrum, summarize_ranks
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
    (record,) = report.read(tmp_path / FILE_NAME)
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
    assert record["run"]["max_logit"] == layout.world_size - 1
    assert record["run"]["ns_ms_max"] > 0
    # Of three steps and one gather of a sample, one step and the gather; with one rank a stage, nothing is sent.
    sent = max(r["sent"] for r in results)
    assert (sent / 3 if layout.pp == 1 else 0) <= record["run"]["sent_bytes_max"] <= sent


def test_writers_get_scalars_and_histograms(tmp_path: Path) -> None:
    layout = Layout(2)
    results = run_ranks(session, 2, layout, dict(log_interval=3, metrics_dir=str(tmp_path)))
    (record,) = report.read(tmp_path / FILE_NAME)
    scalars, histograms, wandb = results[-1]["writers"]
    assert results[0]["writers"] == ({}, {}, {})
    for metric in METRICS:
        for of_kind, values in by_kind(record["matrices"], metric).items():
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
    assert kind("decoder.layers.12.self_attention.linear_qkv.weight.q") == "self_attention.linear_qkv.weight.q"
    assert kind("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight.up") == (
        "mlp.experts.local_experts.linear_fc1.weight.up"
    )
    assert kind("decoder.layers.3.mlp.experts.linear_fc2.weight11") == "mlp.experts.linear_fc2.weight"
    assert kind("head.weight") == "head.weight"


# The report.

HOSTILE = "decoder.layers.0.<script>alert('$x$')</script>.weight"


def record(step: int) -> str:
    matrices = {
        name: {"update_rms": 0.2 + step / 100, "stable_rank": 3.0} for name in (HOSTILE, "decoder.layers.1.mlp.weight")
    }
    matrices[HOSTILE]["momentum_norm"] = math.nan
    return json.dumps(
        {"step": step, "run": {"ns_ms_max": 4.0, "<b>": 1.0, "logit": 2.0, "logit/<b>": 2.0}, "matrices": matrices}
    )


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run <1>" / "tensorboard"
    directory.mkdir(parents=True)
    lines = [record(10), record(20), record(20), record(30)]
    (directory / FILE_NAME).write_text("\n".join([*lines, record(40)[:50]]), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert "3 logged steps" in capsys.readouterr().out
    out = directory / report.DIRECTORY
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "ranks.png", "stable_rank.png", "update_rms.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.glob("*.png"))
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "run &lt;1&gt;" in page and "&lt;script&gt;" in page
    # Self-contained, and the last step's values.
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    assert "<td>0.5</td>" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "expected one muon_metrics.jsonl"), ("", "got no record"), ("nonsense\n{}\n", "line 1 is no record")],
)
def test_report_refuses(tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().out
