"""`python -m megatron_muon plan`: its output, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.cli import main
from megatron_muon.estimate.estimates import SCHEMES, estimate_model
from megatron_muon.estimate.report import estimate_to_json
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks
from megatron_muon.plan.machines import GPU_MODELS


def shape_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape_of(v) for key, v in value.items()}
    return type(value).__name__


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    arguments = ["plan", "moonlight-16b", "--dp", "16", "--pp", "4", "--ep", "8", "--json", "--plot", str(picture)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(arguments[:-2]) == 0
    assert capsys.readouterr().out == first

    content = json.loads(first)
    plan = estimate_model(load_model("moonlight-16b"), Layout(dp=16, pp=4, ep=8))
    assert content == json.loads(json.dumps(estimate_to_json(plan), allow_nan=False))
    assert set(content) == {"version", "model", "layout", "settings", "prediction", "notes", "stages"}
    assert content["layout"]["ranks"] == 64 and content["layout"]["expert_dp"] == 2
    assert [stage["stages"] for stage in content["stages"]] == [[0], [1, 2], [3]]
    milliseconds = {m.name: dict.fromkeys(("exchange", "newton_schulz", "memory"), "float") for m in GPU_MODELS}
    range_of = {"mean": "float", "max": "float"}
    scheme = {
        "flops": {"max": "float", "mean": "float", "max_over_ideal": "float", "busiest_over_ideal": "float"},
        "sent_bytes": range_of,
        "team_bytes": range_of,
        "momentum_bytes": range_of,
        "exchange_buffer_bytes": range_of,
        "memory_traffic_bytes": range_of,
        "buffer_bytes": "int",
        "collectives": "int",
        "padding": {"dense": "float", "expert": "float"},
        "predicted_ms": milliseconds,
    }
    # The second stage: the first has no MoE layer alone, the last is like it.
    assert shape_of(content["stages"][1]) == {
        "stages": "list",
        "num_layers": "int",
        "ranks": "int",
        "logical_matrices": "int",
        "muon_numel_per_rank": {"dense": "int", "expert": "int"},
        "ideal_flops": "float",
        "adamw": {"sent_bytes": "float", "predicted_ms": {m.name: "float" for m in GPU_MODELS}},
        "schemes": dict.fromkeys(SCHEMES, scheme),
    }


@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut at any width: no line is longer, no ellipsis, and each cell and note is there as a whole."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", "llama3-70b", "--dp", "64", "--tp", "8", "--pp", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line or "..." in line for line in lines)
    words = " ".join(" ".join(lines).split())
    for text in ("Stages 1-15, each: 5 layers, 35 logical matrices", "603", "Notes - Newton-Schulz: 5 steps."):
        assert text in words, text
    for text in ("all-gather", "Newton-Schulz", "conservative defaults, not measured: 300 GB/s", "--links FILE."):
        assert text in words, text
    # Each GPU's memory has another bandwidth.
    memory = {line.split()[1] for line in lines if line.split()[:1] == ["memory"]}
    assert len(memory) >= 3 and sum(line.startswith("- ") for line in lines) >= 9


def test_measured_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    links = MeasuredLinks("a test", LinkFigures(1.0, 5.0), LinkFigures(1.0, 5.0), 1.0)
    path = tmp_path / "links.json"
    path.write_text(json.dumps(links.to_json()))
    arguments = ["plan", "llama3-8b", "--dp", "16", "--pp", "4"]
    assert main([*arguments, "--links", str(path)]) == 0
    assert "as measured (a test)" in capsys.readouterr().out
    assert main([*arguments, "--links", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["prediction"]["links"] == links.to_json()
    assert content["prediction"]["planner"]["bytes_per_s"] == 1e9
    # On such links no team pays.
    assert content["stages"][0]["schemes"]["megatron_muon"]["team_bytes"]["max"] == 0


def test_planning_imports_no_torch_and_messages_no_numpy() -> None:
    """torch takes seconds to import: neither help, nor an error, nor a plan with its tables waits for it."""
    script = (
        "import sys; from megatron_muon.cli import main\n"
        "try: print(main({}))\nexcept SystemExit as done: print(done.code)\n"
        "print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
    )
    for arguments, code, imported in (
        (["plan", "--help"], "0", "[]"),
        (["bogus"], "2", "[]"),
        (["plan", "gpt-5"], "2", "[]"),
        (["plan", "llama3-8b", "--dp", "0"], "2", "[]"),
        (["plan", "moonlight-16b", "--dp", "8", "--tp", "2", "--ep", "8"], "0", "['numpy']"),
    ):
        done = subprocess.run([sys.executable, "-c", script.format(arguments)], capture_output=True, text=True)
        assert done.stdout.splitlines()[-2:] == [code, imported], (arguments, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-5"], "no built-in model; expected one of moonlight-16b"),
        (["llama3-8b", "--dp", "0"], "dp: got 0, expected a positive integer"),
        (["llama3-8b", "--qkv-split", "heads"], "qkv_split: got 'heads'"),
        (["moonlight-16b", "--tp", "3"], "16 attention heads do not divide over tensor-parallel size 3"),
        (["moonlight-16b", "--dp", "48", "--ep", "48"], "a divisor of moonlight-16b's 64 experts"),
        (["moonlight-16b", "--dp", "4", "--ep", "8"], "ep x etp: got 8 x 1, expected a divisor of dp x tp = 4 x 1"),
        (["llama3-8b", "--dp", "8", "--ep", "8"], "llama3-8b has no routed experts"),
        (["llama3-8b", "--pp", "33"], "33 stages for 32 layers"),
        (["llama3-8b", "--pp", "2", "--layers-per-stage", "16,17"], "2 positive numbers that add up to 32"),
        (["llama3-8b", "--pp", "2", "--layers-per-stage", "a,b"], "numbers separated by commas"),
        (["llama3-8b", "--dp", "6", "--instances", "4"], "instances: got 4, expected a divisor of dp = 6"),
        (["moonlight-16b", "--dp", "8", "--ep", "8", "--instances", "2"], "expert data-parallel size"),
        (["llama3-8b", "--exchange-dtype", "fp8"], "exchange_dtype: got 'fp8'"),
        (["llama3-8b", "--transformer-impl", "apex"], "transformer impl: got 'apex'"),
        (["llama3-8b", "--ddp-bucket-size", "-1"], "bucket size: got -1"),
        (
            ["llama3-8b", "--links", "/nowhere/links.json"],
            "links.json: got a file that cannot be read",
        ),
        (["llama3-8b", "--plot", "/nowhere/plan.png"], "cannot write /nowhere/plan.png"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "{", "no valid JSON"),
        ("m.json", "[]", "expected a mapping"),
        ("m.json", '{"model_type": "mamba2"}', "got model_type 'mamba2' (architectures None), expected one of llama"),
        ("m.json", '{"model_type": "llama"}', "has no 'hidden_size'"),
        ("m.json", '{"model_type": "llama", "hidden_size": -1}', "hidden_size: got -1"),
        ("m.yaml", "layers: [", "no valid YAML"),
        ("m.yaml", "layers: []", "expected a list of layers"),
        ("m.yaml", "layers: [{matrices: [{name: a, shape: [4]}]}]", "expected [rows, columns]"),
        ("m.yaml", "layers: [{matrices: [{name: a, shape: [4, 4], splt: rows}]}]", "unknown splt"),
        ("m.yaml", "layers: [{matrices: [{name: a, shape: [4, 4], split: heads}]}]", "split: got 'heads'"),
        ("m.yaml", "layers: [{matrices: [{name: a, shape: [6, 4], parts: {q: 4}}]}]", "do not divide into repetitions"),
        ("m.yaml", "layers: [{matrices: [{name: a, shape: [4, 4], parts: {q: 4}, gated: true}]}]", "one or the other"),
        ("m.yaml", "layers: [{repeat: 0, matrices: [{name: a, shape: [4, 4]}]}]", "repeat: got 0"),
        ("m.yaml", "{layers: [{matrices: [{name: a, shape: [4, 4]}]}], other_parameters: -1}", "expected a count"),
    ],
)
def test_bad_files(name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main(["plan", str(path)]) == 2
    assert message in capsys.readouterr().err
