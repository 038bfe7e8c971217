"""Chats as bytes. A token is a byte; bytes that UTF-8 never has are the special tokens, so that 256 ids suffice.

The format is ChatML. `encode` says it for training, and `TEMPLATE` for `apply_chat_template` of Transformers and vLLM;
a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

END_OF_TEXT, START, END, PAD = 0x00, 0xF8, 0xF9, 0xFA
SPECIAL = {END_OF_TEXT: "<|endoftext|>", START: "<|im_start|>", END: "<|im_end|>", PAD: "<|pad|>"}

# What lies between the generation tags is what training learns, and `assistant_masks` of Transformers marks.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{{- '\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

Message = Mapping[str, str]
"""`role` and `content`."""


def encode(messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and for each 1 if it is to be learned: an assistant's words and their end."""
    ids: list[int] = []
    learned: list[int] = []
    for message in messages:
        head = [START, *message["role"].encode(), *b"\n"]
        body = [*message["content"].encode(), END]
        ids += [*head, *body, *b"\n"]
        learned += [0] * len(head) + [int(message["role"] == "assistant")] * len(body) + [0]
    return ids, learned


def write_tokenizer(directory: Path, model_max_length: int) -> None:
    """Writes a byte tokenizer with the chat template, as Transformers, vLLM and SGLang load it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = _byte_characters()
    vocabulary = {SPECIAL.get(byte, characters[byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=list(SPECIAL.values()),
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        padding_side="left",
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def _byte_characters() -> dict[int, str]:
    """For each byte the printable character that GPT-2's byte-level tokenizers have in its place."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}
