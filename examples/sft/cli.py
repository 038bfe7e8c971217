"""Instruction tuning of the mini-Moonlight, and a chat with it.

python examples/sft chat                  # `make chat`: pretrain, fine-tune, export, serve, and ask
python examples/sft data runs/chat/data   # the chats alone, as JSON lines
python examples/sft evaluate runs/chat/model --data runs/chat/data
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import demo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sft import runs, samples
from sft.exact_match import Outcome, exact_match
from sft.packing import read_chats

QUESTIONS = (
    ">>> 'river'.upper()",
    ">>> max([3, 9, 4])",
    ">>> 7 + 8",
    ">>> list('muon')",
    ">>> 'STONE'.lower()",
    "What is json.decoder?",
    "What does textwrap.dedent do?",
)


def chat(out: Path, pretrained: Path | None, steps: int, tuning: runs.Tuning, limit: int, console: Console) -> None:
    """Pretrains if there is no checkpoint, fine-tunes, exports, measures exact match, serves and asks.

    Raises:
        demo.RunFailed: If one of the parts ends with an error.
    """
    started = time.monotonic()

    def done(what: str) -> None:
        console.print(f"[{time.monotonic() - started:5.0f} s] {escape(what)}", highlight=False, soft_wrap=True)

    checkpoint = pretrained or out / "pretrained" / "checkpoint"
    if not (checkpoint / "latest_checkpointed_iteration.txt").exists():
        if pretrained is not None:
            raise demo.RunFailed(f"--pretrained: got {pretrained}, expected a run's checkpoint directory")
        log = runs.pretrain("muon", out / "pretrained", steps)
        done(f"pretrained: validation loss {log.validation_loss[max(log.validation_loss)]:.3f} nats per byte")
    counts = samples.write_sets(out / "data")
    done("chats: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    flags = runs.tuning_flags(tuning, load=checkpoint, data=out / "data", out=out / "tuned")
    log = runs.run_training("fine-tuning", runs.SCRIPT, flags, out / "tuned")
    losses = sorted(log.validation_loss.items())
    (first, before), (last, after) = losses[0], losses[-1]
    done(f"fine-tuned: loss of answers {before:.3f} after {first} steps, {after:.3f} after {last}")
    model = out / "model"
    runs.export(out / "tuned" / "checkpoint", model)
    done(f"exported: {model}")
    evaluate(model, out / "data", limit, console)
    with runs.served(model) as address:
        done(f"served by transformers at {address}")
        for question in QUESTIONS:
            console.print(f"  you    {escape(question)}", highlight=False)
            console.print(f"  model  {escape(runs.ask(address, model, question))}", highlight=False)
        while sys.stdin.isatty() and (question := console.input("  you    ").strip()):
            console.print(f"  model  {escape(runs.ask(address, model, question))}", highlight=False)


def evaluate(model: Path, data: Path, limit: int, console: Console) -> dict[str, Outcome]:
    """Exact match on the held-out sets, as a table."""
    table = Table("set", "chats", "exact", "ended", box=None)
    outcomes = {}
    for name in samples.SETS[1:]:
        outcomes[name] = outcome = exact_match(model, read_chats([data / f"{name}.jsonl"])[:limit])
        table.add_row(name, str(outcome.chats), str(outcome.exact), str(outcome.ended))
    console.print(table)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    talk = commands.add_parser("chat", help="pretrain, fine-tune, export, serve and ask")
    talk.add_argument("--out", type=Path, default=Path("runs/chat"), help="where to write (default: %(default)s)")
    talk.add_argument("--pretrained", type=Path, help="a checkpoint to start from, such as runs/demo/checkpoint")
    talk.add_argument("--pretraining-steps", type=int, default=demo.STEPS, help="default: %(default)s")
    talk.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="default: %(default)s")
    talk.add_argument("--lr", type=float, default=runs.LEARNING_RATE, help="of fine-tuning (default: %(default)s)")
    talk.add_argument("--steps", type=int, default=runs.STEPS, help="of fine-tuning (default: %(default)s)")
    talk.add_argument("--limit", type=int, default=200, help="chats of each set to evaluate (default: %(default)s)")
    make = commands.add_parser("data", help="write the chats")
    make.add_argument("directory", type=Path)
    measure = commands.add_parser("evaluate", help="exact match of an exported model")
    measure.add_argument("model", type=Path)
    measure.add_argument("--data", type=Path, required=True, help="what the command data wrote")
    measure.add_argument("--limit", type=int, default=500, help="chats of each set (default: %(default)s)")
    args = parser.parse_args(argv)
    console = Console()
    try:
        if args.command == "data":
            console.print(samples.write_sets(args.directory))
        elif args.command == "evaluate":
            evaluate(args.model, args.data, args.limit, console)
        else:
            tuning = runs.Tuning(args.optimizer, args.lr, args.steps)
            chat(args.out, args.pretrained, args.pretraining_steps, tuning, args.limit, console)
    except ValueError as error:
        parser.error(str(error))
    except demo.RunFailed as error:
        console.print(f"[bold red]failed[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    return 0
