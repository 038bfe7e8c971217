"""What --muon-profile costs: the demo's model on the demo's ranks, profiled and unprofiled steps in pairs.

    python benchmarks/profile_overhead.py [--pairs 40] [--profile-dir DIR] [--output DIR]

Trains the demo's mini-Moonlight (4 CPU ranks, TP2 x EP2 x DP2, as `make demo` does) twice. With `--muon-profile 2`
every second step is profiled: it and the step before it are a pair, and what else the machine does falls on both. The
control is the same run without the flag, with the same steps paired: what its ratio differs from 1 by is noise, or
parity. Times are Megatron's iteration times, so that they have the whole step in them: forward, backward, optimizer,
collecting and writing. A run with `--muon-profile N` pays the difference once in N steps.

Writes profile_overhead.{md,json}; with --profile-dir, the traces stay there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402
import demo_report  # noqa: E402

# Steps before the first pair: buffers are made, and TensorBoard's and the corpus's files opened.
WARMUP = 4
RUNS: Mapping[str, Sequence[str]] = {"profiled": ("--muon-profile", "2"), "control": ()}


def train(name: str, corpus: Path, directory: Path, pairs: int, profile_dir: Path) -> tuple[list[float], str]:
    """Seconds of each step of a run, from the first pair on, and the profile's summary that rank 0 printed."""
    tensorboard, logs = directory / name / "tensorboard", directory / name / "logs"
    logs.mkdir(parents=True)
    steps = WARMUP + 2 * pairs
    flags = demo.training_flags("muon", steps=steps, lr=demo.LEARNING_RATE, corpus=corpus, tensorboard=tensorboard)
    # Evaluations would fall on some steps only.
    flags[flags.index("--eval-interval") + 1] = str(10 * steps)
    extra = [*RUNS[name], *(["--muon-profile-dir", str(profile_dir)] if RUNS[name] else [])]
    with (logs / "torchrun.log").open("wb") as output:
        done = subprocess.run(
            demo.command([*flags, *extra], logs), stdout=output, stderr=subprocess.STDOUT, env=demo.rank_environment()
        )
    if done.returncode != 0:
        raise SystemExit(demo.failure_message(name, done.returncode, logs))
    log = demo_report.RunReader(tensorboard).read()
    (said,) = logs.glob("*/attempt_0/0/stdout.log")
    _, marker, summary = said.read_text(encoding="utf-8").partition("Optimizer step, median")
    return [log.step_s[step] for step in range(WARMUP + 1, steps + 1)], marker + summary


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    """Medians of first and second steps of pairs, and of their ratios, with a 95 % interval by bootstrap."""
    pairs = list(zip(seconds[::2], seconds[1::2], strict=True))
    ratios = [second / first for first, second in pairs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "first_ms": 1e3 * statistics.median(first for first, _ in pairs),
        "second_ms": 1e3 * statistics.median(second for _, second in pairs),
        "ratio": statistics.median(ratios),
        "interval": [medians[49], medians[1949]],
        "ratios": ratios,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """One line per run."""
    lines = [
        "# Overhead of --muon-profile",
        "",
        f"The demo's model on {demo.RANKS} Gloo ranks, {report['pairs']} pairs of neighbouring steps; medians. "
        f"Profiled: the second step of each pair is (`--muon-profile 2`); control: none is. {report['machine']}, "
        f"torch {report['torch']}.",
        "",
        "| run | first step of a pair, ms | second, ms | second / first | 95 % interval |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in RUNS:
        row = report[name]
        low, high = row["interval"]
        cells = (f"{row['first_ms']:.1f}", f"{row['second_ms']:.1f}", f"{row['ratio']:.4f}", f"{low:.4f} to {high:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "What the profiled run said at its end:", "", "```", report["summary"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--profile-dir", type=Path, help="where traces stay (default: nowhere)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs: got {args.pairs}, expected at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        demo.prepare_corpus(directory / "corpus")
        profile_dir = args.profile_dir or directory / "profile"
        runs = {name: train(name, directory / "corpus", directory, args.pairs, profile_dir.resolve()) for name in RUNS}
    report = {
        "pairs": args.pairs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **{name: summarize(seconds) for name, (seconds, _) in runs.items()},
        "summary": runs["profiled"][1],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "profile_overhead.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "profile_overhead.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
