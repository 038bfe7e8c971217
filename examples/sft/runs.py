"""Pretraining, fine-tuning and export of the mini-Moonlight as processes of their own, and a server for the result."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import demo
import demo_report

from sft.chat_format import write_tokenizer

Optimizer = Literal["adamw", "muon"]
SCRIPT = Path(__file__).resolve().parent / "finetune_mini_moonlight.py"
STEPS = 300
LEARNING_RATE = 5e-3
"""Of fine-tuning with Muon. At 2e-3, 148 of 200 held-out expressions are answered exactly, at 5e-3 187."""
STEPS_PER_EVALUATION = 25
_STARTS_WITHIN_S = 120.0


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning run.

    Attributes:
        optimizer: What trains the matrices.
        learning_rate: The peak: warmed up over the first twentieth of the steps, then a cosine down to a tenth of it.
        steps: Steps of 16 packs of 256 tokens.
        seed: Of the order of chats.
    """

    optimizer: Optimizer = "muon"
    learning_rate: float = LEARNING_RATE
    steps: int = STEPS
    seed: int = 1234


def checkpoint_flags(directory: Path, steps: int) -> list[str]:
    """What saves a run's end in a form that any layout loads and `export` reads."""
    layout = ["--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable"]
    return ["--save", str(directory), "--save-interval", str(steps), *layout]


def tuning_flags(tuning: Tuning, *, load: Path, data: Path, out: Path) -> list[str]:
    """Megatron's flags of a fine-tuning run.

    Args:
        tuning: The run.
        load: The pretrained run's checkpoint directory.
        data: Where `samples.write_sets` wrote.
        out: The run's directory, which gets `checkpoint` and `tensorboard`.
    """
    flags = demo.training_flags(
        tuning.optimizer, steps=tuning.steps, lr=tuning.learning_rate, corpus=data, tensorboard=out / "tensorboard"
    )
    # Of flags that repeat, the last one counts.
    changed = {
        "--train-data-path": data / "train.jsonl",
        "--valid-data-path": data / "valid.jsonl",
        "--lr-warmup-iters": max(1, tuning.steps // 20),
        "--eval-interval": min(STEPS_PER_EVALUATION, tuning.steps),
        "--seed": tuning.seed,
        "--load": load,
    }
    words = [str(word) for flag in changed.items() for word in flag]
    return [*flags, *words, "--finetune", *checkpoint_flags(out / "checkpoint", tuning.steps)]


def run_training(name: str, script: Path, flags: Sequence[str], out: Path) -> demo_report.RunLog:
    """Trains on this machine's CPU, four ranks; an earlier run's files in `out` are replaced.

    Raises:
        demo.RunFailed: If it exits with an error.
    """
    for part in ("logs", "tensorboard", "checkpoint"):
        shutil.rmtree(out / part, ignore_errors=True)
    logs = out / "logs"
    logs.mkdir(parents=True)
    process = demo.start(flags, logs, script)
    try:
        code = process.wait()
    finally:
        demo.stop(process)
    if code != 0:
        raise demo.RunFailed(demo.failure_message(name, code, logs))
    return demo_report.RunReader(out / "tensorboard").read()


def pretrain(optimizer: Optimizer, out: Path, steps: int = demo.STEPS) -> demo_report.RunLog:
    """Pretrains on the standard library as `make demo` does, and saves the end.

    Raises:
        demo.RunFailed: If it exits with an error.
    """
    corpus = out / "corpus"
    demo.prepare_corpus(corpus)
    flags = demo.training_flags(
        optimizer, steps=steps, lr=demo.LEARNING_RATE, corpus=corpus, tensorboard=out / "tensorboard"
    )
    return run_training(
        f"pretraining with {optimizer}", demo.PRETRAIN, [*flags, *checkpoint_flags(out / "checkpoint", steps)], out
    )


def export(checkpoint: Path, to: Path) -> None:
    """Writes a Hugging Face directory with the byte tokenizer and the chat template; an earlier one is replaced.

    Raises:
        demo.RunFailed: If the export ends with an error.
    """
    shutil.rmtree(to, ignore_errors=True)
    tokenizer = to.with_name(f"{to.name}-tokenizer")
    tokenizer.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, demo.SEQUENCE_LENGTH)
    command = [sys.executable, "-m", "megatron_muon", "export", str(checkpoint), "--to", "huggingface", str(to)]
    done = subprocess.run([*command, "--tokenizer", str(tokenizer)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise demo.RunFailed(f"the export of {checkpoint} ended with {done.returncode}: {done.stderr.strip()}")


@contextmanager
def served(model: Path) -> Iterator[str]:
    """Serves a model with `transformers serve` on this machine, and yields the address; stops it at the end.

    Raises:
        demo.RunFailed: If the server does not answer in time; the message has the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", model.with_name("serve.log")
    binary = Path(sys.executable).with_name("transformers")
    command = [str(binary), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for(address, process, log)
        yield address
    finally:
        demo.stop(process)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < _STARTS_WITHIN_S and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise demo.RunFailed(f"transformers serve does not answer; the end of {log}:\n{log.read_text()[-2000:]}")


def ask(address: str, model: Path, question: str, max_tokens: int = 96) -> str:
    """The served model's greedy answer, by the API that OpenAI's clients use."""
    body: dict[str, Any] = {
        "model": str(model),
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer
