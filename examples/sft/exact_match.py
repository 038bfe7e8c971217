"""How often an exported model gives the right answer, word for word, through Transformers' `generate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.chat_format import END, SPECIAL

_BATCH = 50


@dataclass(frozen=True)
class Outcome:
    """Of one set of chats.

    Attributes:
        chats: How many there are.
        exact: How many were answered exactly, and ended there.
        ended: How many answers ended within `max_new_tokens`.
        exact_by_kind: Kind of chat -> (exact, chats).
        examples: (question, answer, expected answer) of the first chats.
    """

    chats: int
    exact: int
    ended: int
    exact_by_kind: dict[str, tuple[int, int]]
    examples: list[tuple[str, str, str]]


def exact_match(model_directory: Path, chats: Sequence[Any], *, max_new_tokens: int = 64, shown: int = 4) -> Outcome:
    """Answers each chat's first message greedily, in fp32 on the CPU, and compares.

    Args:
        model_directory: What `megatron_muon export` wrote, with the tokenizer.
        chats: With `kind` and `messages`; the second message is the expected answer.
        max_new_tokens: Bytes of the longest answer.
        shown: How many examples to keep.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    right, total = Counter[str](), Counter[str]()
    ended = 0
    examples = []
    for at in range(0, len(chats), _BATCH):
        batch = chats[at : at + _BATCH]
        inputs = tokenizer.apply_chat_template(
            [entry["messages"][:1] for entry in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for entry, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ends = END in ids
            words = ids[: ids.index(END)] if ends else ids
            answer = bytes(token for token in words if token not in SPECIAL).decode(errors="replace")
            question, expected = (message["content"] for message in entry["messages"][:2])
            ended += ends
            total[entry["kind"]] += 1
            right[entry["kind"]] += ends and answer == expected
            if len(examples) < shown:
                examples.append((question, answer, expected))
    by_kind = {kind: (right[kind], count) for kind, count in sorted(total.items())}
    return Outcome(len(chats), sum(right.values()), ended, by_kind, examples)
