"""The page of a run, and of two side by side: numbers by hand, nothing fetched, nothing executed, and in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.cli import main
from megatron_muon.observe.metric_names import FILE_NAME
from megatron_muon.observe.timing.trace import file_name
from megatron_muon.profile import charts
from megatron_muon.profile.command import main as profile_main
from megatron_muon.profile.run_files import RunFiles, names_of, read_metrics
from megatron_muon.profile.stands_out import short_name, stands_out
from tests.profiles import FLOPS, LINK, facts, write_traces

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "decoder.layers.0.<script>document.title='owned'</script>.weight"
QKV = "self_attention.linear_qkv.weight.q"


def record(step: int, **changes: Any) -> dict[str, Any]:
    """Two layers of one kind and one of another, which is hostile."""
    matrices = {
        f"decoder.layers.{layer}.{QKV}": {"update_rms": 0.2 - layer / 100, "weight_rms": step / 1e3} for layer in (0, 1)
    }
    matrices[HOSTILE] = {"update_rms": 0.1, "orthogonality_error": 0.6, "momentum_norm": math.nan}
    run = {"ns_ms_max": 4.0, "<b>": 1.0, "max_attention_logit": 9.0, "max_attention_logit/decoder.layers.3": 8.0}
    expected = {"update_rms": 0.2, "orthogonality_error": [0.25, 0.42]}
    return {"step": step, "run": run, "matrices": matrices, "expected": expected, **changes}


def write_metrics(directory: Path, steps: range) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record(step)) for step in steps]
    # Logged twice by a resumed run, and cut off by its end.
    (directory / FILE_NAME).write_text("\n".join([*lines, lines[-1], lines[-1][:50]]), encoding="utf-8")


def write_losses(directory: Path, losses: dict[int, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for step, loss in losses.items():
            writer.add_scalar("lm loss", loss, step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with metrics and losses; the first one was profiled, on hosts with hostile names."""
    directory = tmp_path_factory.mktemp("runs <1>")
    peaks = dict(link=replace(LINK, source=HOSTILE), flops=replace(FLOPS, source=HOSTILE), device_name=HOSTILE)
    write_traces(
        directory / "a" / "muon_profile",
        {0: range(2, 5), 1: range(2, 5)},
        hosts={0: HOSTILE, 1: HOSTILE},
        run_facts=replace(facts(), **peaks),
    )
    path = directory / "a" / "muon_profile" / file_name(1)
    path.write_text(path.read_text().replace('"name":"apply"', f'"name":"{HOSTILE}"'))
    for name, last in (("a", 3.0), ("b", 2.0)):
        write_metrics(directory / name, range(10, 40, 10))
        write_losses(directory / name, {1: 6.0, 20: 4.0, 30: last})
    return directory


def specs_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    specs: list[dict[str, Any]] = json.loads(found.group(1))
    return specs


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def chart(page: str, title: str) -> dict[str, Any]:
    return next(spec for spec in specs_of(page) if spec["description"] == f"{title} by step")


def labels_of(spec: dict[str, Any]) -> list[str]:
    return [
        row["label"] for layer in spec["layer"] for row in layer.get("data", {}).get("values", []) if "label" in row
    ]


def test_page_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "a")]) == 0
    printed = capsys.readouterr().out
    assert "a: 3 logged steps, 3 profiled steps of 2 ranks, 3 points of training loss" in printed
    page = (runs / "a" / "report.html").read_text(encoding="utf-8")
    body = without_scripts(page)
    # The summary comes first, then the contents, then what they list.
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    assert headings[:5] == ["Summary", "Contents", "Loss", "Update RMS", "Orthogonality error"]
    assert headings[2:] == re.findall(r'<li><a href="#\w+">(.*?)</a>', body)
    summary = page[: page.index("Contents")]
    assert "Training loss: 6 at step 1, 3 at step 30." in summary and "Bottleneck: " in summary
    assert "Updates below 75% of an RMS of 0.2: " in summary and "error above the 0.25 to 0.42" in summary
    # Means and ends of a kind over its layers.
    rows = chart(page, "Update RMS")["data"]["values"]
    assert rows[-1] == {"step": 30, "series": "s1", "value": 0.195, "low": 0.19, "high": 0.2}
    assert labels_of(chart(page, "Update RMS"))[1] == "qkv.q"
    assert labels_of(chart(page, "logit")) == ["all", "layers.3"]
    assert f"<td>{QKV}</td><td class=n>2</td><td class=n>0.19</td><td class=n>0.195</td>" in page
    assert '<i style="background:#d8433f"></i>Newton-Schulz' in page
    timeline = next(spec for spec in specs_of(page) if "one step" in spec["description"])
    spans = [row for row in timeline["data"]["values"] if row["lane"] == "rank 0"]
    assert [(s["phase"], s["start"], s["stop"]) for s in spans[:2]] == [("momentum", 0, 1), ("newton_schulz", 1, 4)]


def test_nothing_is_fetched_and_nothing_of_a_file_is_executed(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs / "a"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    body = without_scripts(page)
    assert "default-src 'none'" in body and " src=" not in body and "http" not in body.replace("http-equiv", "")
    # Three scripts are ours: the library, the charts' data, in which no tag can begin, and what draws them.
    assert page.count("<script") == 3 and "<script" not in body and "&lt;script&gt;document" in body


def test_two_runs_are_compared(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert profile_main(["report", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "<title>a and b</title>" in page and "<h3>a</h3>" in page and "<h3>b</h3>" in page
    assert labels_of(chart(page, "Training loss")) == ["a", "b"]
    mean = chart(page, "Update RMS, mean")
    assert labels_of(mean) == ["a", "b"] and mean["data"]["values"][0]["value"] == pytest.approx((0.195 + 0.1) / 2)
    assert labels_of(chart(page, "qkv.q")) == ["a", "b"]
    # Only the first one was profiled.
    assert page.count("Where the time of a step goes: a</h2>") == 1 and "goes: b</h2>" not in page


def test_a_run_of_which_only_losses_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_losses(tmp_path / "adamw", {1: 6.0, 2: 5.0})
    assert main(["report", str(tmp_path / "adamw")]) == 0
    page = (tmp_path / "adamw" / "report.html").read_text(encoding="utf-8")
    assert labels_of(chart(page, "loss")) == ["training"] and "Nothing: all values are where" in page


def test_step_and_trace(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", str(runs / "a"), "--out", str(tmp_path / "page.html")]
    assert main([*arguments, "--step", "4", "--trace", str(tmp_path / "trace.json")]) == 0
    assert {event["pid"] for event in json.loads((tmp_path / "trace.json").read_text())} == {0, 1}
    assert main([*arguments, "--step", "5"]) == 2
    assert "--step: got 5, expected a profiled step: 2, 3, 4" in capsys.readouterr().err
    for more, message in (
        (["--step", "5"], "--step: got 5, expected a run that was trained with --muon-profile"),
        (["--trace", "x.json"], "--trace: got x.json, expected exactly one run, with traces"),
    ):
        assert main(["report", str(runs / "b"), "--out", str(tmp_path / "page.html"), *more]) == 2
        assert message in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, content, message in (
        ("bad", "nonsense\n{}\n", "line 1 is not a record"),
        ("none", "", "got no record, expected at least one"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE_NAME).write_text(content)
        assert main(["report", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    for path, message in (
        (tmp_path / "nowhere", "which does not exist; expected the directory of a run"),
        (tmp_path / "empty", f"which has no {FILE_NAME}, no traces and no losses"),
        (runs, f"with several files {FILE_NAME}: "),
    ):
        assert main(["report", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_records_of_a_resumed_run(tmp_path: Path) -> None:
    write_metrics(tmp_path, range(10, 40, 10))
    assert [r["step"] for r in read_metrics(tmp_path / FILE_NAME)] == [10, 20, 30]


def test_names_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "tensorboard", tmp_path / "b" / "tensorboard"]
    assert names_of(paths) == ["a/tensorboard", "b/tensorboard"] and names_of(paths[:1]) == ["tensorboard"]
    assert len(set(names_of([tmp_path, tmp_path]))) == 2


def test_what_stands_out_by_hand() -> None:
    def run(**changes: Any) -> list[str]:
        return stands_out(RunFiles("a", Path(), [record(10, **changes)]))

    quiet = {f"decoder.layers.{i}.k{i}.weight": {"update_rms": 0.19, "update_to_weight": 1e-3} for i in range(4)}
    level = {"ns_ms_imbalance": 1.0, "ns_flops_imbalance": 1.0}
    assert run(matrices=quiet, run=level) == []
    fast = {**quiet, "decoder.layers.9.fast.weight": {"update_to_weight": 5e-3}}
    assert run(matrices=fast, run=level) == [
        "Weights replaced more than 4 times as fast as the median kind's (0.001): fast (0.005)."
    ]
    (slow,) = run(matrices=quiet, run={**level, "ns_ms_imbalance": 1.5})
    assert slow.startswith("Newton-Schulz took 1.50 of the ranks' mean on the slowest rank although the plan is level")
    logits = run(matrices=quiet, run={**level, "qk_nonfinite_heads": 2.0, "qk_clipped_heads": 3.0})
    assert (
        logits[0] == "2 attention heads had NaN or infinite logits before step 10." and "acted on 3 heads" in logits[1]
    )
    curve = {step: 3.0 - step / 100 for step in range(10)} | {10: 3.3}
    (risen,) = stands_out(RunFiles("a", Path(), losses={"Validation loss": curve}))
    assert risen == "Validation loss has risen from 2.91 at step 9 to 3.3."


def test_labels() -> None:
    assert short_name("self_attention.linear_qkv.weight.q") == "qkv.q"
    assert short_name("mlp.experts.local_experts.linear_fc1.weight.gate") == "experts.fc1.gate"
    assert short_name("weight") == "weight"


@pytest.mark.parametrize("values", [[0.1] * 9, [0.0, *[0.3] * 9], [0.3, 0.1, 0.2], [1e-4, 1.0, 1e-4, 0.5]])
def test_labels_do_not_overlap(values: list[float]) -> None:
    scale = charts._Scale.over(values, 220)
    places = [scale._forward(value) for value in scale.spread(values)]
    gaps = [b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)]
    assert min(gaps) >= charts._LABEL_PX - 1e-6 and max(places) <= 220
    # Their order is that of the values.
    assert sorted(range(len(values)), key=values.__getitem__) == sorted(range(len(values)), key=places.__getitem__)


def test_long_runs_are_thinned() -> None:
    points = dict.fromkeys(range(1, 10001), (1.0, 1.0, 1.0))
    rows = charts.lines("x", [("a", points)])["data"]["values"]
    assert len(rows) <= 401 and (rows[0]["step"], rows[-1]["step"]) == (1, 10_000)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on PATH (Debian: apt install chromium)")
def test_page_in_a_browser(runs: Path, tmp_path: Path) -> None:
    """Every chart outside of what is folded away is drawn, at two widths, and hostile names stay text."""
    out = tmp_path / "page.html"
    assert main(["report", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    drawn = len(re.findall('class="chart"', re.sub(r"<details>.*?</details>", "", out.read_text(), flags=re.DOTALL)))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    for width in (500, 1200):
        done = subprocess.run(
            [
                *(str(CHROMIUM), *arguments, "--virtual-time-budget=8000", f"--window-size={width},2000", "--dump-dom"),
                out.as_uri(),
            ],
            check=True, capture_output=True, timeout=120, text=True,
        )  # fmt: skip
        body = without_scripts(done.stdout)
        assert body.count("<svg") == drawn > 8
        assert "<title>a and b</title>" in body and "Newton-Schulz" in body
        assert max(int(float(w)) for w in re.findall(r'<svg[^>]* width="([\d.]+)"', body)) <= width


def test_help_is_quick() -> None:
    """Neither torch nor numpy is imported for it, which would take seconds."""
    code = (
        "import sys\nfrom megatron_muon.profile.command import main\n"
        "for words in (['--help'], ['links', '--help'], ['report', '--help'], ['inspector', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as done:\n        assert done.code == 0\n"
        "print([m for m in ('torch', 'numpy', 'megatron', 'rich', 'vl_convert') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("width", ["80", "100", "160"])
def test_what_is_printed_fits(
    runs: Path, width: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(["report", str(runs / "a"), "--out", str(tmp_path / "page.html")]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert len(first) <= 80 and last.startswith(f"wrote {tmp_path / 'page.html'} (")


def test_every_chart_compiles_and_shows_values(runs: Path, tmp_path: Path) -> None:
    """Vega-Lite accepts the specifications, and each has a tooltip."""
    import vl_convert

    assert main(["report", str(runs / "a"), "--out", str(tmp_path / "page.html")]) == 0
    specs = specs_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    for spec in specs:
        compiled = json.dumps(vl_convert.vegalite_to_vega(spec))
        assert '"tooltip"' in compiled, spec["description"]
    # Hovering a line chart shows the values of all lines at the nearest step.
    tooltip = chart((tmp_path / "page.html").read_text(encoding="utf-8"), "Update RMS")["layer"][-1]["encoding"][
        "tooltip"
    ]
    assert [entry["title"] for entry in tooltip] == ["step", *labels_of(specs[1])]
