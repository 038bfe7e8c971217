"""Makes docs/screens.md and the pictures of a report: runs every tool and keeps what it prints.

    python docs/make_screens.py [--run DIR]

Trains the demo's model for 40 steps on this machine's CPU first, unless DIR has that run already. Pictures are made if
chromium is on PATH and Pillow is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "examples"))
COLUMNS, STEPS = 100, 40
PYTHON = "python"

# Name -> (heading, what to know, command). RUN stands for the run's directory.
SCREENS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "plan": (
        "Plan of a layout",
        "See [Planning a layout](planning.md).",
        (PYTHON, "-m", "megatron_muon", "plan", "moonlight-16b", "--dp", "16", "--tp", "2", "--pp", "4", "--ep", "8"),
    ),
    "inspect": (
        "Contents of a checkpoint",
        "See [Checkpoints](checkpoints.md). Lines in the middle are left out here.",
        (PYTHON, "-m", "megatron_muon", "inspect", "RUN/checkpoint"),
    ),
    "report": (
        "Page of a run",
        "See [Profiling a run](profiling_training.md) for the page itself.",
        (PYTHON, "-m", "megatron_muon", "report", "RUN"),
    ),
    "links": (
        "Links between ranks",
        "See [Measuring links](profiling.md). Two Gloo ranks on one host, not what a cluster reaches.",
        ("torchrun", "--nproc-per-node", "2", "-m", "megatron_muon.profile", "links", "--model",
         "examples/mini_moonlight.json", "-b", "64K", "-e", "4M", "-n", "10"),
    ),
    "inspector": (
        "NCCL Inspector's files",
        "From the sample in `tests/samples/inspector`, which was written after NCCL's documentation and not recorded.",
        (PYTHON, "-m", "megatron_muon.profile", "inspector", "tests/samples/inspector"),
    ),
}  # fmt: skip
_MOST_LINES = 40


def train(run: Path) -> None:
    """A short run of the demo's model with metrics, a profile and a checkpoint."""
    import demo

    corpus = run / "corpus"
    demo.prepare_corpus(corpus)
    flags = demo.training_flags("muon", steps=STEPS, lr=demo.LEARNING_RATE, corpus=corpus, tensorboard=run)
    flags += demo.saving_flags(STEPS, run / "checkpoint")
    flags += ["--muon-log-interval", "2", "--muon-profile", "9"]
    done = subprocess.run(
        demo.command(flags, run / "logs"), env=demo.rank_environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"make_screens: the training run failed:\n{done.stderr[-2000:]}")


def screen(command: tuple[str, ...], run: Path) -> str:
    """What a command prints, `COLUMNS` wide, with the run's directory called `RUN`."""
    words = [word.replace("RUN", str(run)) for word in command]
    words[0] = sys.executable if words[0] == PYTHON else str(Path(sys.executable).with_name(words[0]))
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"make_screens: {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    lines = [line.rstrip() for line in done.stdout.replace(str(run), "RUN").splitlines()]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES // 2], "...", *lines[-_MOST_LINES // 2 :]]
    return "\n".join(lines)


def log_screen(run: Path) -> str:
    """What rank 0 prints of the last logged and profiled steps."""
    logs = [p.read_text(encoding="utf-8", errors="replace") for p in sorted(run.glob("logs/**/stdout.log"))]
    metrics = [line for log in logs for line in log.splitlines() if line.startswith("megatron_muon: step")]
    # The table of medians, to the last line of the list below it.
    summary = next(m.group(0) for log in logs if (m := re.search(r"Optimizer step, median.*", log, re.DOTALL)))
    kept = []
    for line in summary.splitlines():
        if kept and not line.startswith((" ", "-")) and line:
            break
        kept.append(line.rstrip())
    return "\n".join([*metrics[-2:], "", *kept]).rstrip()


def pictures(run: Path) -> None:
    """Pictures of the page, wide and 390 px narrow in dark mode, in few colors so that they stay small."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("make_screens: no chromium on PATH; the pictures stay as they are")
        return
    from PIL import Image

    page, narrow = run / "report.html", run / "narrow.html"
    # A window has a least width; a frame has not.
    narrow.write_text(f'<body style="margin:0"><iframe src="{page.name}" width=390 height=2900 style="border:0">')
    for name, source, size, mode in (
        ("report_wide", page, (1100, 1750), "light"),
        ("report_narrow", narrow, (500, 2900), "dark"),
    ):
        target = DOCS / f"{name}.png"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        arguments += [f"--user-data-dir={run / 'browser'}", f"--window-size={size[0]},{size[1]}"]
        arguments += ["--blink-settings=preferredColorScheme=0"] if mode == "dark" else []
        subprocess.run(
            [browser, *arguments, f"--screenshot={target}", source.as_uri()],
            check=True,
            capture_output=True,
            timeout=120,
        )
        image = Image.open(target).convert("RGB").crop((0, 1550, 390, 2850) if source == narrow else (0, 0, *size))
        image.quantize(128).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "screens", metavar="DIR", help="the demo's run")
    args = parser.parse_args()
    run = args.run.resolve()
    if not (run / "checkpoint").is_dir():
        run.mkdir(parents=True, exist_ok=True)
        train(run)
    parts = [
        "# Screens of the tools",
        "",
        f"Made by `python docs/make_screens.py`, {COLUMNS} columns wide. RUN is {STEPS} steps of the demo's "
        "model on four CPU ranks.",
    ]
    for heading, text, command in SCREENS.values():
        shown = " ".join(command)
        parts += ["", f"## {heading}", "", text, "", "```text", f"$ {shown}", screen(command, run), "```"]
    text = "Two lines of metrics, and what rank 0 prints of the profile at the end. See [Metrics](metrics.md)."
    parts += ["", "## Log of a run", "", text, "", "```text", log_screen(run), "```", ""]
    (DOCS / "screens.md").write_text("\n".join(parts), encoding="utf-8")
    pictures(run)
    print(f"wrote {DOCS / 'screens.md'}")


if __name__ == "__main__":
    main()
