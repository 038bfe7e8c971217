"""Packs chats into sequences. Each attends to itself alone, and the loss counts the assistant's words.

A pack's mask is block-diagonal and causal. Rotary positions are relative, so that a chat's place in the pack does not
matter: packing is exact. Megatron's own packed sequences need Transformer Engine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sft.chat_format import PAD, encode

Batch = dict[str, torch.Tensor]
Encoded = tuple[list[int], list[int]]


def read_chats(paths: Sequence[str | Path]) -> list[Any]:
    """The lines of JSON files, each a chat with `messages`.

    Raises:
        ValueError: If a line is no such chat; the message names the file and the line.
    """
    out = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            entry = json.loads(line)
            if not isinstance(entry, dict) or not entry.get("messages"):
                raise ValueError(f"{path}:{number}: got {line[:60]!r}, expected a JSON object with messages")
            out.append(entry)
    return out


class PackedChats(torch.utils.data.Dataset[Batch]):
    """Packs of chats in an order that depends on the seed alone; every epoch packs anew.

    Args:
        chats: With `messages`; those that are longer than a sequence are left out.
        length: Tokens of a sequence.
        count: Number of packs.
        seed: Of the order.
        split: What Megatron calls the dataset's part, by which it chooses batch sizes.

    Raises:
        ValueError: If no chat fits a sequence.
    """

    def __init__(self, chats: Sequence[Any], length: int, count: int, seed: int, split: Any) -> None:
        self.split = self.index_split = split
        self._length = length
        fitting = [chat for chat in (encode(entry["messages"]) for entry in chats) if len(chat[0]) <= length + 1]
        if not fitting:
            raise ValueError(f"--seq-length: got {length}, expected room for any of the {len(chats)} chats; none fits")
        rng = random.Random(seed)
        self._packs: list[list[Encoded]] = []
        while len(self._packs) < count:
            rng.shuffle(fitting)
            self._packs += _packs(fitting, length + 1)
        del self._packs[count:]

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> Batch:
        pack = self._packs[index]
        ids = [token for chat, _ in pack for token in chat]
        learned = [flag for _, flags in pack for flag in flags]
        owner = [number for number, (chat, _) in enumerate(pack) for _ in chat]
        spare = self._length + 1 - len(ids)
        tokens = torch.tensor(ids + [PAD] * spare)
        document = torch.tensor(owner + [-1] * spare)[:-1]
        allowed = (document[:, None] == document[None, :]).tril()
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.tensor(learned + [0] * spare)[1:].float(),
            "position_ids": torch.arange(self._length),
            # Megatron's masks are true where attention is not allowed.
            "attention_mask": ~allowed[None],
        }


def _packs(chats: Sequence[Encoded], room: int) -> list[list[Encoded]]:
    """Fills one sequence after the other, in order."""
    out: list[list[Encoded]] = [[]]
    used = 0
    for chat in chats:
        if used + len(chat[0]) > room:
            out.append([])
            used = 0
        out[-1].append(chat)
        used += len(chat[0])
    return out
