"""Chats made from what every Python installation has: expressions that Python evaluates, and the standard library.

    expressions  `>>> 'stone'.upper()` is answered by `'STONE'`; one answer is right, so exact match can be measured.
    library      what a module is, what a function does, its signature, and its doctests.

Three sets of expressions: `train`; `valid`, other expressions of the same templates; and `unseen`, expressions of
templates that training never sees. No prompt is in two sets. The library's chats are split by source file.
"""

from __future__ import annotations

import ast
import doctest
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Chat = dict[str, Any]

_WORDS = "alpha beta gamma delta apple river stone cloud python muon matrix vector token model layer expert router byte"
_LONGEST = 240
"""Bytes of a library chat's question and answer, so that both fit a sequence of 256."""
_SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "ensurepip"})
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class _Values:
    """What a template is filled with."""

    word: str
    number: int
    digit: int
    other: int
    numbers: list[int]
    mixed: Any

    @classmethod
    def draw(cls, rng: random.Random) -> _Values:
        word = rng.choice(_WORDS.split())
        if rng.random() < 0.5:
            word = "".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 6)))
        numbers = [rng.randint(0, 9) for _ in range(rng.randint(2, 5))]
        mixed = rng.choice([0, 1, "", [], 7])
        return cls(word, rng.randint(0, 99), rng.randint(0, 9), rng.randint(0, 9), numbers, mixed)


TEMPLATES: dict[str, Callable[[_Values], str]] = {
    "upper": lambda v: f"{v.word!r}.upper()",
    "title": lambda v: f"{v.word!r}.title()",
    "len of a word": lambda v: f"len({v.word!r})",
    "first letter": lambda v: f"{v.word!r}[0]",
    "last letter": lambda v: f"{v.word!r}[-1]",
    "join": lambda v: f"{v.word!r} + {v.word[0]!r}",
    "max": lambda v: f"max({v.numbers})",
    "min": lambda v: f"min({v.numbers})",
    "first number": lambda v: f"{v.numbers}[0]",
    "last number": lambda v: f"{v.numbers}[-1]",
    "len of a list": lambda v: f"len({v.numbers})",
    "sum of two": lambda v: f"{v.digit} + {v.other}",
    "list": lambda v: f"list({v.word[:4]!r})",
    "even": lambda v: f"{v.number} % 2 == 0",
    "bool": lambda v: f"bool({v.mixed!r})",
    "type": lambda v: f"type({v.mixed!r}).__name__",
}
UNSEEN: dict[str, Callable[[_Values], str]] = {
    "lower": lambda v: f"{v.word.upper()!r}.lower()",
    "second letter": lambda v: f"{v.word!r}[1]",
    "odd": lambda v: f"{v.number} % 2 == 1",
}


def expressions(count: int, seed: int, templates: dict[str, Callable[[_Values], str]]) -> list[Chat]:
    """`count` chats, all with other prompts; the answer is what Python evaluates.

    Raises:
        ValueError: If the templates do not have so many different expressions.
    """
    rng, found = random.Random(seed), {}
    for _ in range(100 * count):
        kind = rng.choice(list(templates))
        expression = templates[kind](_Values.draw(rng))
        found.setdefault(expression, kind)
        if len(found) == count:
            # Made of literals above and of nothing else.
            return [chat(kind, f">>> {text}", repr(eval(text))) for text, kind in found.items()]
    raise ValueError(f"count: got {count}, expected at most about {len(found)} for these templates")


def chat(kind: str, question: str, answer: str) -> Chat:
    """A question and its answer, with the kind that results are grouped by."""
    return {"kind": kind, "messages": [_message("user", question), _message("assistant", answer)]}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def library(root: Path | None = None) -> tuple[list[Chat], list[Chat]]:
    """Chats about the standard library: (training, held out), of other files each. Prompts that repeat are left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[dict[str, Chat], dict[str, Chat]] = ({}, {})
    seen: set[str] = set()
    for number, path in enumerate(sorted(_sources(root))):
        for entry in _of_file(path, path.relative_to(root)):
            question, answer = (message["content"] for message in entry["messages"])
            if len(question.encode()) + len(answer.encode()) <= _LONGEST and question not in seen:
                seen.add(question)
                parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2][question] = entry
    train, held_out = ([*part.values()] for part in parts)
    return train, held_out


def _sources(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]) and not path.name.startswith(
            ("test_", "_sysconfigdata")
        ):
            yield path


def _of_file(path: Path, inside: Path) -> Iterator[Chat]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
    if summary := _summary(tree):
        yield chat("module", f"What is {module}?", summary)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if summary := _summary(node):
            yield chat("summary", f"What does {module}.{node.name} do?", summary)
            yield from _doctests(ast.get_docstring(node) or "")
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield chat("signature", f"Signature of {module}.{node.name}?", f"def {node.name}({ast.unparse(node.args)})")


def _summary(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def _doctests(docstring: str) -> Iterator[Chat]:
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:
        return
    for example in examples:
        if example.want.strip():
            yield chat("doctest", f">>> {example.source.strip()}", example.want.rstrip())


SETS = ("train", "valid", "unseen", "library")


def write_sets(
    directory: Path, seed: int = 0, *, train: int = 7500, of_library: int = 1000, held_out: int = 500
) -> dict[str, int]:
    """Writes `<set>.jsonl` for each of `SETS`; returns how many chats each has.

    Args:
        directory: Where to.
        seed: Of the expressions.
        train: Expressions to train on.
        of_library: Chats about the library to train on, drawn from all.
        held_out: Expressions of `valid` and of `unseen` each.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = expressions(train + held_out, seed, TEMPLATES)
    rng = random.Random(seed)
    rng.shuffle(made)
    library_train, library_held_out = library()
    sets = {
        "train": made[:train] + rng.sample(library_train, min(of_library, len(library_train))),
        "valid": made[train:],
        "unseen": expressions(held_out, seed + 1, UNSEEN),
        "library": library_held_out,
    }
    for name, chats in sets.items():
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in chats)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(chats) for name, chats in sets.items()}
