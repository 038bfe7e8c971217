"""The launcher runs a script as python would, with the plugin's flags, and completes what a CPU needs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from megatron_muon import cpu, launch
from megatron_muon.config import Group, MuonConfig
from megatron_muon.megatron.entry import active
from tests.distributed import RankError, run_ranks
from tests.paths import PRETRAIN_GPT as PRETRAIN
from tests.paths import ROOT as REPOSITORY
from tests.seams import seams_removed_afterwards
from tests.sources import INSTALLED, unpack


@pytest.fixture(autouse=True)
def _process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    # The test process itself stays without the backend.
    monkeypatch.setattr(cpu, "install", lambda: None)
    monkeypatch.setenv("MEGATRON_MUON_TRACEBACK", "1")
    with seams_removed_afterwards():
        yield


def script(directory: Path, text: str) -> str:
    path = directory / "train.py"
    path.write_text(text)
    return str(path)


REQUIRED = (("--distributed-backend", "gloo"), ("--use-cpu-initialization", None), ("--num-workers", "0"))


class TestMergeArguments:
    @pytest.mark.parametrize(
        ("given", "added", "kept"),
        [
            ([], ["--distributed-backend", "gloo", "--use-cpu-initialization", "--num-workers", "0"], []),
            (
                ["--distributed-backend", "gloo", "--lr", "1"],
                ["--use-cpu-initialization", "--num-workers", "0"],
                [],
            ),
            (["--distributed-backend=gloo", "--num-workers=0", "--use-cpu-initialization"], [], []),
            (
                ["--num-workers", "2"],
                ["--distributed-backend", "gloo", "--use-cpu-initialization"],
                ["--num-workers 2"],
            ),
            # argparse takes the last of a flag that repeats.
            (
                ["--distributed-backend", "nccl", "--distributed-backend", "gloo"],
                ["--use-cpu-initialization", "--num-workers", "0"],
                [],
            ),
        ],
    )
    def test_adds_what_is_missing(self, given: list[str], added: list[str], kept: list[str]) -> None:
        assert launch.merge_arguments(given, REQUIRED) == ([*given, *added], added, kept)

    @pytest.mark.parametrize("given", [["--distributed-backend", "nccl"], ["--distributed-backend=nccl"]])
    def test_refuses_contradictions(self, given: list[str]) -> None:
        with pytest.raises(ValueError, match=r"^--distributed-backend: got 'nccl', expected 'gloo'.*omit it"):
            launch.merge_arguments(given, REQUIRED)

    def test_every_required_flag_exists_in_megatron(self) -> None:
        from tests.megatron.test_arguments import stock_parser

        known = stock_parser()._option_string_actions
        for flag, value in cpu.REQUIRED_FLAGS:
            assert (known[flag].nargs == 0) == (value is None), flag


class TestMain:
    def test_runs_the_script_as_python_would(self, tmp_path: Path) -> None:
        (tmp_path / "beside.py").write_text("value = 41")
        report = tmp_path / "report.json"
        path = script(
            tmp_path,
            f"""
import json, sys
import beside
import __main__
json.dump(
    {{
        "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "beside": beside.value,
        "main": __main__.__dict__ is globals(),
    }},
    open({str(report)!r}, "w"),
)
""",
        )
        launch.main(["--device", "cpu", path, "--device", "x", "--help"])
        got = json.loads(report.read_text())
        required = cpu.cpu_arguments()
        assert got["argv"] == [path, "--device", "x", "--help", *required]
        assert (got["name"], got["file"], got["path"], got["beside"]) == ("__main__", path, str(tmp_path), 41)
        assert got["main"]

    @pytest.mark.parametrize("leave", ["sys.exit(7)", "raise KeyError('mine')"])
    def test_the_scripts_end_is_the_launchers(self, leave: str, tmp_path: Path) -> None:
        path = script(tmp_path, f"import sys\n{leave}\n")
        with pytest.raises((SystemExit, KeyError)) as raised:
            launch.main(["--device", "cpu", path])
        if isinstance(raised.value, SystemExit):
            assert raised.value.code == 7
        else:
            assert raised.value.args == ("mine",)
            assert raised.traceback[-1].path == Path(path)

    def test_the_script_parses_the_plugins_flags(self, tmp_path: Path) -> None:
        path = script(
            tmp_path,
            "from megatron.training.arguments import parse_args\nargs = parse_args()\n"
            "assert args.distributed_backend == 'gloo' and args.muon_momentum == 0.5\n",
        )
        launch.main(
            ["--device", "cpu", path, "--use-distributed-optimizer", "--distributed-muon", "--muon-momentum", "0.5"]
        )
        assert active.active_config() == MuonConfig(momentum=0.5)

    def test_without_the_flag_nothing_is_active(self, tmp_path: Path) -> None:
        path = script(
            tmp_path, "from megatron.training.arguments import parse_args\nassert parse_args().muon_momentum == 0.9\n"
        )
        launch.main(["--device", "cpu", path, "--optimizer", "muon"])
        assert active.active_config() is None

    def test_says_on_rank_0_what_it_adds(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = script(tmp_path, "")
        launch.main(["--device", "cpu", path, "--transformer-impl", "local", "--num-workers", "3"])
        said = capsys.readouterr().out
        added = next(line for line in said.splitlines() if "adds" in line)
        assert "--distributed-backend gloo" in added
        assert "--transformer-impl" not in said and "leaves --num-workers 3 as given" in said
        monkeypatch.setenv("RANK", "1")
        launch.main(["--device", "cpu", path])
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("device", [[], ["--device", "auto"], ["--device", "cuda"]])
    def test_no_cuda(self, device: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(RuntimeError, match=r"^--device: got \w+, expected a CUDA device.*add --device cpu"):
            launch.main([*device, script(tmp_path, "raise AssertionError('ran')")])

    def test_cuda_adds_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        path = script(tmp_path, "import sys\nassert sys.argv[1:] == ['--lr', '1'], sys.argv\n")
        launch.main([path, "--lr", "1"])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "SCRIPT is missing"),
            (["--device", "cpu"], "SCRIPT is missing"),
            (["nowhere.py", "--lr", "1"], r"SCRIPT: got 'nowhere\.py', which is no file"),
            (["--device", "tpu", "x.py"], "invalid choice: 'tpu'"),
            (["--distributed-muon", "x.py"], "unrecognized arguments: --distributed-muon"),
        ],
        ids=" ".join,
    )
    def test_bad_command_line(self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            launch.main(words)
        assert left.value.code == 2
        assert re.search(message, capsys.readouterr().err)

    def test_help_shows_the_launchers_options_and_the_plugins_flags(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            launch.main(["--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0
        for flag in ("--device {auto,cuda,cpu}", "--distributed-muon", "--muon-preset", "--muon-no-nesterov"):
            assert flag in text
        for group in get_args(Group):
            assert f"\ndistributed muon: {group}:" in text
        for default in ("(default: keller, or", "(default: '', or", "(default: 100)", "(default: 0.999)"):
            assert default in " ".join(text.split())

    def test_help_shows_every_flag_that_the_readme_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        from tests.megatron.test_arguments import extended_parser

        with pytest.raises(SystemExit):
            launch.main(["--help"])
        shown = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
        known = set(extended_parser()[0]._option_string_actions)
        # Flags of Megatron's are said to be a spelling of this package's.
        aliases = {"--muon-coefficient-type", "--muon-num-ns-steps", "--help"}
        readme = (REPOSITORY / "README.md").read_text()
        assert set(re.findall(r"--[a-z][a-z0-9-]+", readme)) & known - aliases <= shown

    def test_megatrons_flags_are_as_its_parser_says(self) -> None:
        from tests.megatron.test_arguments import stock_parser

        for flag, metavar, default, _ in launch.MEGATRON_FLAGS:
            action = stock_parser()._option_string_actions[flag]
            assert (action.default, action.nargs == 0) == (default, metavar is None), flag

    def test_help_needs_no_torch(self) -> None:
        code = "import sys\nfrom megatron_muon import launch\ntry:\n    launch.main(['--help'])\nfinally:\n"
        code += "    assert not {'torch', 'megatron.core'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_as_a_command(tmp_path: Path) -> None:
    """The real thing once, in a process of its own: backend, flags, exit code."""
    path = script(
        tmp_path,
        "import sys, torch\nfrom megatron.training.arguments import parse_args\nargs = parse_args()\n"
        "print('ran', args.muon_ns_dtype, args.optimizer, torch.zeros(1, device='cuda').device)\nsys.exit(7)\n",
    )
    words = ["--use-distributed-optimizer", "--optimizer", "muon", "--distributed-muon"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_muon.launch", "--device", "cpu", path, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1"},
    )
    assert done.returncode == 7, done.stderr
    assert "ran fp32 adam cpu" in done.stdout
    assert done.stdout.count("--optimizer muon becomes adam") == 1


TRAINING = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"),
    *("--max-position-embeddings", "16", "--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "3"),
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--untie-embeddings-and-output-weights", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "64", "--lr", "0.01", "--bf16", "--use-distributed-optimizer"),
    *("--log-interval", "1", "--eval-iters", "0", "--eval-interval", "100"),
)


def _launch(rank: int, world_size: int, path: str, words: tuple[str, ...]) -> tuple[list[float], str]:
    """Launches a script on this rank; returns the losses Megatron logged, and everything printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        launch.main(["--device", "cpu", path, *words])
    text = out.getvalue()
    return [float(value) for value in re.findall(r"lm loss: (\S+)", text)], text


def test_an_unmodified_script_trains_with_muon() -> None:
    adamw = run_ranks(_launch, 2, PRETRAIN, TRAINING)
    # As a command line made for Megatron's own Muon says it.
    muon = run_ranks(_launch, 2, PRETRAIN, (*TRAINING, "--optimizer", "muon", "--distributed-muon"))
    # Megatron logs losses on the last rank; this package speaks on the first.
    losses = {name: ranks[-1][0] for name, ranks in (("adamw", adamw), ("muon", muon))}
    assert [len(values) for values in losses.values()] == [3, 3], losses
    # A loss is before its update: the first is the model's, the last tells the optimizers apart.
    assert losses["adamw"][0] == losses["muon"][0]
    assert abs(losses["adamw"][2] - losses["muon"][2]) > 1e-3
    for said in ("--optimizer muon becomes adam", "Newton-Schulz runs in fp32"):
        assert [said in text for _, text in muon] == [True, False]
        assert [said in text for _, text in adamw] == [False, False]


HYBRID = (
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec", "--distributed-muon"),
    *("--muon-exchange-dtype", "fp32", "--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-token-dispatcher-type", "alltoall", "--attention-dropout", "0", "--hidden-dropout", "0"),
)


def test_pretrain_hybrid_trains(tmp_path: Path) -> None:
    """Megatron-LM's own script for HybridModel, with attention, MLP and MoE layers."""
    files = ("pretrain_hybrid.py", "hybrid_builders.py", "model_provider.py")
    path = str(unpack(INSTALLED, tmp_path, files) / files[0])
    # HybridModel takes the number of layers from its pattern.
    words = [*TRAINING[2:], *HYBRID]
    words.remove("--bf16")

    def losses(world_size: int, *layout: str) -> list[float]:
        values: list[float] = run_ranks(_launch, world_size, path, (*words, *layout))[-1][0]
        assert len(values) == 3 and values[2] < values[0] - 0.1
        return values

    one = losses(1, "--hybrid-layer-pattern", "*-*E", "--make-vocab-size-divisible-by", "128")
    tensor_parallel = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    # The vocabulary is padded to this times the tensor-parallel size.
    two = losses(2, "--hybrid-layer-pattern", "*-*E", "--make-vocab-size-divisible-by", "64", *tensor_parallel)
    # Printed with seven digits.
    assert two == pytest.approx(one, rel=1e-6)
    # Megatron draws other initial weights on each of these stages and experts, so that losses cannot be compared.
    losses(2, "--hybrid-layer-pattern", "*-|*E", "--pipeline-model-parallel-size", "2")
    losses(2, "--hybrid-layer-pattern", "*-*E", "--expert-model-parallel-size", "2")


def test_one_rank_alone_with_distributed_muon_is_an_error() -> None:
    """Before the model is built, on both ranks."""
    with pytest.raises(RankError) as raised:
        run_ranks(_launch_one_with_muon, 2, PRETRAIN, TRAINING)
    assert sorted(raised.value.errors) == [0, 1]
    for kind, message, _ in raised.value.errors.values():
        assert kind == "RuntimeError"
        assert message.startswith(
            "the ranks have different settings: distributed_muon: on on rank 0; off on rank 1; lr: 0.01 on rank 0; "
        )


def _launch_one_with_muon(rank: int, world_size: int, path: str, words: tuple[str, ...]) -> None:
    _launch(rank, world_size, path, (*words, *(("--lr", "0.02") if rank else ("--distributed-muon",))))
