"""Trains the runs of a study, several side by side, and keeps their results. A second call resumes the first.

Each run is an ordinary Megatron run in a process of its own, through `megatron_muon.launch` and
`megatron.training.pretrain`. Its directory holds its log, and once it has ended `result.json`; a run without one is
started anew. A run that diverges (a loss that is not a number) has the loss infinity; a run that fails for any other
reason stops the study with the end of its log.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scaling_law import schedule
from scaling_law.flops import count
from scaling_law.ladder import Ladder, Run

EXAMPLES = Path(__file__).resolve().parents[1]
SCRIPT = EXAMPLES / "pretrain_mini_moonlight.py"
RESULT = "result.json"
_VALIDATION = re.compile(r"validation loss at iteration (\d+).*?lm loss value: (\S+)")
_TRAINING = re.compile(r"iteration\s+(\d+)/.*?elapsed time per iteration \(ms\): (\S+).*?lm loss: (\S+)")


class RunFailed(RuntimeError):
    """A training run ended with an error. The message ends with the end of its log."""


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        run: The run.
        loss: Validation loss after the last step, nats per token; infinity if training diverged.
        training: Step -> training loss.
        step_ms: Median time of a step in milliseconds.
        run_s: Wall-clock seconds of the whole run.
    """

    run: Run
    loss: float
    training: Mapping[int, float]
    step_ms: float
    run_s: float


def job(ladder: Ladder, run: Run, corpus: Path) -> dict[str, Any]:
    """What a result depends on; the result of another job is not taken."""
    return {
        "run": asdict(run),
        "flags": ladder.megatron_flags(run),
        "corpus": json.loads((corpus / "corpus.json").read_text(encoding="utf-8")),
        "versions": {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")},
    }


def load(ladder: Ladder, run: Run, directory: Path, corpus: Path) -> Result | None:
    """The result of a run that has ended; None if there is none of this job."""
    path = directory / run.key / RESULT
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["job"] != json.loads(json.dumps(job(ladder, run, corpus))):
        return None
    return result_from(saved["result"])


def result_from(saved: Mapping[str, Any]) -> Result:
    """A result as `result.json` and a study's raw results hold it."""
    loss = math.inf if saved["loss"] is None else float(saved["loss"])
    training = {int(step): float(value) for step, value in saved["training"].items()}
    return Result(Run(**saved["run"]), loss, training, saved["step_ms"], saved["run_s"])


def saved_form(result: Result) -> dict[str, Any]:
    """A result for JSON, which has no infinity."""
    return asdict(result) | {"loss": result.loss if math.isfinite(result.loss) else None}


def parse_log(text: str, steps: int) -> tuple[float, dict[int, float], float] | None:
    """The validation loss at the end, training losses by step and the median time of a step, from Megatron's log.

    Returns:
        None if the log has no validation loss of the last step.
    """
    validation = {int(step): float(value) for step, value in _VALIDATION.findall(text)}
    found = [(int(step), float(ms), float(loss)) for step, ms, loss in _TRAINING.findall(text)]
    if steps not in validation:
        return None
    times = [ms for _, ms, _ in found[1:]] or [ms for _, ms, _ in found] or [math.nan]
    return validation[steps], {step: loss for step, _, loss in found}, statistics.median(times)


def words(ladder: Ladder, run: Run, corpus: Path) -> list[str]:
    """The training script of a run and its flags."""
    data = {
        "--train-data-path": corpus / "train",
        "--valid-data-path": corpus / "valid",
        "--data-cache-path": corpus / "cache",
    }
    return [str(SCRIPT), *ladder.megatron_flags(run), *(str(word) for pair in data.items() for word in pair)]


def _train(script: list[str], log: str) -> None:
    """A run on this machine's CPU as one rank with one thread, in a process forked with Megatron imported."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    own = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(own, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    from megatron_muon import launch

    launch.main(["--device", "cpu", *script])


class _Forked:
    """A run on a CPU."""

    def __init__(self, script: list[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["scaling_law.preload"])
        self._process = context.Process(target=_train, args=(script, str(log)))
        self._process.start()

    def exit_code(self) -> int | None:
        return self._process.exitcode

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


class _Command:
    """A run that the ladder's own command starts."""

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def exit_code(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


@dataclass
class _Process:
    run: Run
    process: _Forked | _Command
    directory: Path
    started: float

    def finish(self, ladder: Ladder, corpus: Path) -> Result:
        """Reads the log of the ended run and writes its result.

        Raises:
            RunFailed: If the run ended with an error that is not a divergence.
        """
        text = (self.directory / "log.txt").read_text(encoding="utf-8", errors="replace")
        run_s = time.monotonic() - self.started
        parsed = parse_log(text, ladder.steps(self.run)) if self.process.exit_code() == 0 else None
        if parsed is not None:
            loss, training, step_ms = parsed
        elif re.search(r"(?i)\b(nan|inf)\b[^\n]*(loss|grad)|(loss|grad)[^\n]*\b(nan|inf)\b", text):
            loss, training, step_ms = math.inf, {}, math.nan
        else:
            tail = "\n".join(text.splitlines()[-30:])
            raise RunFailed(
                f"run {self.run.key} ended with exit code {self.process.exit_code()}; its log ends:\n{tail}"
            )
        result = Result(self.run, loss if math.isfinite(loss) else math.inf, training, step_ms, run_s)
        content = {"job": job(ladder, self.run, corpus), "result": saved_form(result)}
        partial = self.directory / "result.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.directory / RESULT)
        return result


def _start(ladder: Ladder, run: Run, directory: Path, corpus: Path) -> _Process:
    own = directory / run.key
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    script, log = words(ladder, run, corpus), own / "log.txt"
    process = _Command([*ladder.process, *script], log) if ladder.process else _Forked(script, log)
    return _Process(run, process, own, time.monotonic())


def run_study(ladder: Ladder, directory: Path, corpus: Path, console: Console, side_by_side: int = 2) -> list[Result]:
    """Trains until the study needs no further run.

    Args:
        ladder: The study.
        directory: Where each run has its directory.
        corpus: Where `train` and `valid` lie.
        console: Where progress is shown.
        side_by_side: Runs at a time.

    Returns:
        All results that the study uses.

    Raises:
        RunFailed: If a run ends with an error; the others that are under way are ended and can be resumed.
    """
    results: dict[Run, Result] = {}
    fresh: list[Result] = []
    running: list[_Process] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=None)
        try:
            while True:
                losses = {run: result.loss for run, result in results.items()}
                wanted = schedule.needed(ladder, losses)
                known = [(run, load(ladder, run, directory, corpus)) for run in wanted]
                found = {run: result for run, result in known if result is not None}
                if found:
                    results |= found
                    continue
                waiting = [run for run in wanted if run not in {process.run for process in running}]
                if not waiting and not running:
                    return list(results.values())
                while waiting and len(running) < side_by_side:
                    running.append(_start(ladder, waiting.pop(0), directory, corpus))
                left = time_left(ladder, [*waiting, *(p.run for p in running)], fresh, side_by_side)
                progress.update(
                    task, completed=len(results), total=len(results) + len(wanted), description=f"runs, {left}"
                )
                time.sleep(0.2)
                for process in [p for p in running if p.process.exit_code() is not None]:
                    running.remove(process)
                    result = process.finish(ladder, corpus)
                    results[process.run] = result
                    fresh.append(result)
                    minutes = (time.monotonic() - started) / 60
                    console.print(
                        f"{process.run.key}: loss {result.loss:.4f} in {result.run_s:.0f} s; {minutes:.1f} min so far",
                        highlight=False,
                        soft_wrap=True,
                    )
        finally:
            for process in running:
                process.process.end()


def time_left(ladder: Ladder, runs: list[Run], fresh: list[Result], side_by_side: int) -> str:
    """How long the runs that are known to be needed take, from the rates of those that have ended in this call."""
    if not fresh:
        return f"{len(runs)} known to be needed"
    rate = sum(count(ladder, r.run).total for r in fresh) / sum(r.run_s for r in fresh)
    minutes = sum(count(ladder, run).total for run in runs) / rate / side_by_side / 60
    return f"about {minutes:.0f} min left for those known to be needed"
