"""The demo's parts: corpus, flags, report, the driver's handling of processes. The runs themselves: `make demo`."""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from tests.paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import demo
import demo_report
import stdlib_corpus
from demo_report import RunLog


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small standard library: 25 modules m00.py to m24.py, one of them empty, and what is to be skipped."""
    root = tmp_path / "stdlib"
    root.mkdir()
    for number in range(25):
        (root / f"m{number:02}.py").write_text("" if number == 3 else f"x = {number}  # é\n", encoding="utf-8")
    for skipped in ("test/t.py", "site-packages/s.py", "json/tests/t.py", "encodings/cp1.py", "_sysconfigdata_x.py"):
        (root / skipped).parent.mkdir(parents=True, exist_ok=True)
        (root / skipped).write_text("skipped\n", encoding="utf-8")
    (root / "json" / "a.py").write_text("inside = 1\n", encoding="utf-8")
    return root


def test_corpus_is_sorted_split_and_the_same_every_time(sources: Path, tmp_path: Path) -> None:
    files = stdlib_corpus.source_files(sources)
    assert [path.name for path in files] == ["a.py", *(f"m{number:02}.py" for number in range(25))]
    split = stdlib_corpus.split_files(files)
    # Of 26 files number 10 is held out, counted from 0; the next would be number 30.
    assert [path.name for path in split["valid"]] == ["m09.py"]
    assert len(split["train"]) == 25 and split["valid"][0] not in split["train"]

    first = stdlib_corpus.prepare(tmp_path / "one", sources)
    again = stdlib_corpus.prepare(tmp_path / "two", sources)
    assert first == again
    assert (tmp_path / "one/train.bin").read_bytes() == (tmp_path / "two/train.bin").read_bytes()
    expected = b"x = 9  # \xc3\xa9\n\0"
    described = json.loads((tmp_path / "one" / stdlib_corpus.DESCRIPTION).read_text(encoding="utf-8"))
    assert [stdlib_corpus.Split(**split) for split in described] == first
    valid = first[1]
    assert (valid.name, valid.files, valid.num_bytes) == ("valid", 1, len(expected))
    assert valid.sha256 == hashlib.sha256(expected).hexdigest()


def test_corpus_round_trips_through_megatrons_indexed_dataset(sources: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stdlib_corpus.prepare(tmp_path / "corpus", sources)
    files = stdlib_corpus.split_files(stdlib_corpus.source_files(sources))["train"]
    dataset = IndexedDataset(str(tmp_path / "corpus" / "train"))
    assert len(dataset) == len(files)
    assert dataset.document_indices.tolist() == list(range(len(files) + 1))
    for index, path in enumerate(files):
        document = dataset[index]
        assert document.dtype == np.uint8
        assert document.tobytes() == path.read_bytes() + b"\0"


def test_corpus_refuses_what_would_blur_documents_or_hold_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="document 1: got a byte 0"):
        stdlib_corpus.write_dataset([b"fine", b"not\0fine"], tmp_path / "bad")
    (tmp_path / "one.py").write_text("1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="got 1 Python sources, expected more than 10"):
        stdlib_corpus.prepare(tmp_path / "corpus", tmp_path)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (5.0, 10.0),  # the first point is low enough already
        (3.5, 15.0),  # half way from 4 at 10 to 3 at 20
        (3.0, 20.0),  # exactly a point
        (2.75, 22.5),  # a quarter of the way from 3 at 20 to 2 at 30: the first crossing, not the one after the bump
        (1.9, None),
    ],
)
def test_steps_to_reach(target: float, expected: float | None) -> None:
    curve = {30: 2.0, 10: 4.0, 20: 3.0, 40: 2.9, 50: 2.0}  # not in order: the reader promises none
    assert demo_report.steps_to_reach(curve, target) == expected


def _log(losses: dict[int, float], state_bytes: tuple[dict[str, int], ...] = ()) -> RunLog:
    steps = range(1, max(losses) + 1)
    return RunLog(
        train_loss={step: 5.0 / step for step in steps},
        validation_loss=losses,
        learning_rate=dict.fromkeys(steps, 0.25),
        step_s={step: 9.0 if step == 2 else 0.5 for step in steps if step > 1},  # the first is not logged
        optimizer_s={step: 9.0 if step <= 2 else 0.001 * step for step in steps},
        state_bytes=state_bytes,
    )


def test_summary_against_values_by_hand() -> None:
    adamw = _log({2: 4.0, 4: 3.0}, ({"AdamW": 100}, {"AdamW": 104}))
    muon = _log({2: 3.5, 4: 2.5}, ({"AdamW": 20, "ShardedMuon": 40}, {"AdamW": 22, "ShardedMuon": 38}))
    summary = demo_report.summarize({"adamw": adamw, "muon": muon}, tokens_per_step=1000)
    assert summary["adamw"]["final_validation_loss"] == 3.0
    assert summary["adamw"]["tokens_to_adamw_loss"] == summary["adamw"]["tokens"] == 4000
    assert summary["muon"]["tokens_to_adamw_loss"] == 3000  # 3.0 lies half way between steps 2 and 4
    assert summary["muon"]["optimizer_step_ms"] == pytest.approx(3.5)  # median of steps 3 and 4
    assert summary["muon"]["step_ms"] == pytest.approx(500.0)
    assert summary["muon"]["tokens_per_s"] == pytest.approx(2000.0)
    shown = _rendered(summary)
    assert "3,000 (75%)" in shown
    assert "100 to 104" in shown and " 60 " in shown


def test_summary_says_when_adamws_loss_was_not_reached_or_is_unknown() -> None:
    adamw, muon = _log({4: 3.0}), _log({2: 4.0, 4: 3.25})
    summary = demo_report.summarize({"adamw": adamw, "muon": muon}, tokens_per_step=10)
    assert summary["muon"]["tokens_to_adamw_loss"] is None
    assert "never" in _rendered(summary)

    alone = demo_report.summarize({"muon": muon}, tokens_per_step=10)
    assert alone["muon"]["tokens_to_adamw_loss"] is None
    assert "AdamW was not run" in _rendered(alone)

    with pytest.raises(ValueError, match="run adamw: got no validation loss"):
        demo_report.summarize({"adamw": RunLog()}, tokens_per_step=10)


def test_summary_of_fp8_beside_bf16() -> None:
    bf16, fp8 = _log({2: 4.0, 4: 2.5}), _log({2: 4.5, 4: 2.625})
    summary = demo_report.summarize({"muon": bf16, "muon_mxfp8": fp8}, tokens_per_step=10)
    assert (summary["muon"]["loss_minus_bf16"], summary["muon_mxfp8"]["loss_minus_bf16"]) == (None, 0.125)
    shown = _rendered(summary)
    assert "that minus bf16's" in shown and "+0.1250" in shown and "Muon, FP8 mxfp8" in shown
    assert "minus bf16" not in _rendered(demo_report.summarize({"muon": bf16}, tokens_per_step=10))
    assert "minus bf16" not in _rendered(demo_report.summarize({"muon_mxfp8": fp8}, tokens_per_step=10))


def _rendered(summary: dict[str, dict[str, Any]]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(demo_report.table(summary))
    return capture.get()


def test_report_files(tmp_path: Path) -> None:
    logs = {"adamw": _log({2: 4.0, 4: 3.0}), "muon": _log({2: 3.5, 4: 2.5})}
    demo_report.write_report(tmp_path, logs, {"tokens_per_step": 1000, "learning_rate": 0.25})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["setup"]["learning_rate"] == 0.25
    assert report["runs"]["muon"]["tokens_to_adamw_loss"] == 3000
    with (tmp_path / "loss.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], int(row["step"])) for row in rows] == [(r, s) for r in logs for s in (1, 2, 3, 4)]
    assert rows[5] == {
        "run": "muon",
        "step": "2",
        "tokens": "2000",
        "train_loss": "2.5",
        "validation_loss": "3.5",
        "learning_rate": "0.25",
        "step_ms": "9000.00",
        "optimizer_ms": "9000.00",
    }
    assert rows[4]["step_ms"] == "" and rows[4]["validation_loss"] == ""
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_reader_follows_a_run_as_it_is_written(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    reader = demo_report.RunReader(tmp_path / "board")
    assert reader.read() == RunLog()
    writer = SummaryWriter(tmp_path / "board")
    writer.add_scalar("lm loss", 5.5, 1)
    writer.add_scalar("optimizer-time", 0.25, 1)
    writer.flush()
    log = reader.read()
    assert (log.train_loss, log.optimizer_s, log.validation_loss, log.state_bytes) == ({1: 5.5}, {1: 0.25}, {}, ())
    writer.add_scalar("lm loss", 4.5, 2)
    writer.add_scalar("lm loss validation", 4.25, 2)
    writer.flush()
    for rank in (10, 9):
        (tmp_path / "board" / f"optimizer.rank{rank}.json").write_text(json.dumps({"AdamW": rank}), encoding="utf-8")
    log = reader.read()
    assert (log.train_loss, log.validation_loss) == ({1: 5.5, 2: 4.5}, {2: 4.25})
    assert log.state_bytes == ({"AdamW": 9}, {"AdamW": 10})  # by rank, not by name
    writer.close()


def _flags(run: str, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"steps": 50, "lr": 1e-3, "corpus": Path("c"), "tensorboard": Path("t")}
    return demo.training_flags(run, **{**settings, **changes})


def test_runs_differ_in_the_optimizer_only() -> None:
    adamw, muon = _flags("adamw"), _flags("muon")
    assert muon[: len(adamw)] == adamw
    assert muon[len(adamw) :][0] == "--distributed-muon"


@pytest.mark.parametrize("recipe", demo.FP8_RECIPES)
def test_fp8_runs_differ_from_muons_in_the_recipe_only(recipe: str) -> None:
    run = f"muon_{recipe}"
    assert _flags(run) == [*_flags("muon"), "--muon-moe-fp8", recipe]
    assert run in demo_report.LABELS and run in demo_report.COLORS


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "mxfp8", "blockwise"])
def test_the_model_takes_the_recipes_that_are_offered(recipe: str) -> None:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_muon.megatron.entry.fp8_checks import check_arguments_fp8

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    args = parser.parse_args([*_flags("adamw"), "--transformer-impl", "local"])
    check: Any = functools.partial(check_arguments_fp8, args, recipe, cpu=True)
    if recipe in demo.FP8_RECIPES:
        check()
    else:
        with pytest.raises(ValueError, match=r"moe-shared-expert-intermediate-size 128 / .* got 64 on a rank"):
            check()


def test_flags_are_megatrons_and_make_a_moonlight() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    args = parser.parse_args(_flags("adamw"))  # exits on an unknown flag
    assert args.moe_layer_freq == [0, 1, 1, 1] and args.num_layers == 4
    assert (args.multi_latent_attention, args.kv_lora_rank, args.q_lora_rank) == (True, 64, None)
    assert (args.moe_router_score_function, args.moe_router_enable_expert_bias) == ("sigmoid", True)
    assert args.moe_router_bias_update_rate == 1e-3
    assert (args.tensor_model_parallel_size, args.expert_model_parallel_size) == (2, 2)
    assert args.bf16 and args.swiglu and args.untie_embeddings_and_output_weights
    assert (args.weight_decay, args.lr, args.min_lr, args.lr_warmup_iters) == (0.1, 1e-3, 1e-4, 5)
    # An evaluation is one batch of the whole validation sample.
    assert args.eval_iters == 1 and args.eval_global_batch_size == demo.VALIDATION_BATCH


@pytest.mark.parametrize(("change", "message"), [({"steps": 1}, "--steps: got 1"), ({"lr": 0.0}, "--lr: got 0.0")])
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _flags("adamw", **change)


def test_command_launches_the_script_on_four_ranks_of_the_cpu() -> None:
    words = demo.command(["--lr", "1"], Path("logs"))
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    script = str(EXAMPLES / "pretrain_mini_moonlight.py")
    assert words[words.index("megatron_muon.launch") :] == [
        "megatron_muon.launch", "--device", "cpu", script, "--lr", "1",
    ]  # fmt: skip


def test_failure_shows_the_end_of_the_log_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    (tmp_path / "torchrun.log").write_text(
        "Failures:\n  rank      : 1 (local_rank: 1)\nRoot Cause (first observed failure):\n  rank      : 2 (local)\n",
        encoding="utf-8",
    )
    for rank in range(3):
        directory = tmp_path / "none_x" / "attempt_0" / str(rank)
        directory.mkdir(parents=True)
        (directory / "stderr.log").write_text(f"first\nrank {rank} says why\n", encoding="utf-8")
    message = demo.failure_message("muon", 1, tmp_path, lines=1)
    assert message.startswith("run muon ended with exit code 1") and message.endswith("\nrank 2 says why")


def test_failure_before_any_rank_shows_torchruns_own_log(tmp_path: Path) -> None:
    (tmp_path / "torchrun.log").write_text("no such option\n", encoding="utf-8")
    assert demo.failure_message("adamw", 2, tmp_path).endswith("\nno such option")


def _train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> RunLog:
    """`demo.train` with a program of our own in torchrun's place."""
    monkeypatch.setattr(demo, "command", lambda flags, logs, script: [sys.executable, "-c", program])
    with Progress(disable=True) as progress:
        return demo.train("adamw", [], tmp_path, progress, progress.add_task("x", total=1))


def test_train_raises_what_a_failing_run_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(demo.RunFailed, match=r"(?s)exit code 3; .*it is broken"):
        _train(tmp_path, monkeypatch, "import sys; print('it is broken'); sys.exit(3)")


def test_interrupt_stops_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"

    class Interrupted(demo_report.RunReader):
        def read(self) -> RunLog:
            if pid_file.exists() and pid_file.read_text():
                raise KeyboardInterrupt
            return RunLog()

    monkeypatch.setattr(demo_report, "RunReader", Interrupted)
    program = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, monkeypatch, program)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_optimizer_watch_counts_state_tensors() -> None:
    import pretrain_mini_moonlight

    watch = pretrain_mini_moonlight.OptimizerWatch()
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.ones(2, 3)
    torch.optim.AdamW([weight]).step()
    # Two fp32 moments of 6 elements, and the fp32 step count.
    assert watch.state_bytes() == {"AdamW": 2 * 6 * 4 + 4}
    other = torch.nn.Parameter(torch.ones(5))
    other.grad = torch.ones(5)
    torch.optim.SGD([other], lr=0.1, momentum=0.9).step()
    assert watch.state_bytes() == {"AdamW": 52, "SGD": 20}


def test_repeated_validation_set_reads_the_same_samples() -> None:
    from pretrain_mini_moonlight import Repeated

    class Letters(list[str]):
        index_split = "valid"

    repeated = Repeated(Letters("abcde"), period=2, num_samples=5)
    assert [repeated[index] for index in range(len(repeated))] == ["a", "b", "a", "b", "a"]
    assert repeated.split == "valid"
    with pytest.raises(ValueError, match="got 6 samples, expected at most 5"):
        Repeated(Letters("abcde"), period=6, num_samples=6)


def test_resumed_run_differs_in_layout_and_where_it_begins() -> None:
    from megatron.training.arguments import add_megatron_arguments

    muon = _flags("muon", steps=160)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    parser.add_argument("--distributed-muon", action="store_true")
    parser.add_argument("--muon-ns-dtype")
    saved = parser.parse_args([*muon, *demo.saving_flags(160, Path("k"))])
    resumed = parser.parse_args(demo.resuming_flags(muon, 160, Path("k"), Path("t2")))
    assert (saved.save, saved.save_interval, saved.dist_ckpt_optim_fully_reshardable) == ("k", 150, True)
    changed = {name: value for name, value in vars(resumed).items() if value != getattr(saved, name)}
    assert changed == {
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 4,
        "micro_batch_size": 4,  # four data-parallel ranks, one micro-batch each
        "eval_micro_batch_size": 16,
        "load": "k",
        "ckpt_step": 150,
        "tensorboard_dir": "t2",
        "save": None,
        "save_interval": None,
        "dist_ckpt_optim_fully_reshardable": False,
    }
    assert [demo.saved_step(steps) for steps in (2, 3, 20, 21, 160)] == [1, 2, 10, 11, 150]


def test_continuation_by_hand() -> None:
    whole = RunLog(train_loss={1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    found = demo_report.continuation(whole, RunLog(train_loss={4: 2.25, 3: 3.125}), saved_step=2)
    assert found == {
        "saved_step": 2,
        "steps": [3, 4],
        "resumed": [3.125, 2.25],
        "uninterrupted": [3.0, 2.0],
        "largest_difference": 0.25,
    }
    told = demo_report.told(found, "TP2", "TP1")
    assert told.startswith("Muon saved after step 2 at TP2, resumed at TP1:\n")
    assert "resumed        3.1250 at step 3, 2.2500 at step 4\n" in told
    assert "uninterrupted  3.0000 at step 3, 2.0000 at step 4\n" in told
    assert told.endswith("largest difference over steps 3 to 4: 0.2500 nats/byte")


@pytest.mark.parametrize("steps", [{}, {1: 5.0}, {3: 3.0}, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}])
def test_run_that_did_not_go_on_from_its_checkpoint_is_refused(steps: dict[int, float]) -> None:
    whole = RunLog(train_loss={1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    with pytest.raises(ValueError, match=r"expected \[3, 4\], those after its checkpoint"):
        demo_report.continuation(whole, RunLog(train_loss=steps), saved_step=2)


@pytest.mark.exhaustive
def test_demo_resumes_muon_at_another_layout(tmp_path: Path) -> None:
    """The whole demo but AdamW's run, in 20 steps: what it reports is what the TensorBoard files say."""
    console = Console(width=200)
    with console.capture() as capture:
        demo.run_demo(["muon"], 20, 8e-3, tmp_path / "out", console)
    resumed = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["setup"]["resumed"]
    logs = {run: demo_report.RunReader(tmp_path / "out" / "tensorboard" / run).read() for run in ("muon", "resumed")}
    assert resumed["steps"] == list(range(11, 21)) == sorted(logs["resumed"].train_loss)
    differences = [abs(logs["muon"].train_loss[step] - logs["resumed"].train_loss[step]) for step in resumed["steps"]]
    assert resumed["largest_difference"] == max(differences)
    # The other layout adds up in another order, in bf16: 0.0009. The steps lower the loss by more than is allowed.
    assert max(differences) < 0.005 < logs["muon"].train_loss[11] - logs["muon"].train_loss[20]
    assert f"largest difference over steps 11 to 20: {max(differences):.4f}" in capture.get()
