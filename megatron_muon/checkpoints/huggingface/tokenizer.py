"""The tokenizer's files in a Hugging Face directory: how many tokens they have, and which ones end a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIG = "tokenizer_config.json"
_TIKTOKEN = ("tiktoken.model", "*.tiktoken")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", *_TIKTOKEN)
# A tokenizer's own files; whatever else is in the directory belongs to a model.
_FILES = (
    *("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "tokenization_*.py", "chat_template.jinja", *_TIKTOKEN),
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's files.

    Attributes:
        directory: Where they lie.
        size: Number of tokens, up to the largest id; None where no file lists them.
        bos: Id of the token that begins a text, if there is one.
        eos: Id of the token that ends a text, if there is one.
    """

    directory: Path
    size: int | None
    bos: int | None
    eos: int | None

    @classmethod
    def read(cls, directory: Path, rows: int) -> Tokenizer:
        """Looks at a directory.

        Args:
            directory: The tokenizer's.
            rows: Rows of the model's vocabulary.

        Raises:
            ValueError: If there is no tokenizer, its files are damaged, or it has more tokens than the vocabulary.
        """
        if not any(path for name in _VOCABULARIES for path in directory.glob(name)):
            raise ValueError(
                f"--tokenizer: got {directory}, expected a tokenizer.json, tokenizer.model or tiktoken file"
            )
        ids = _ids(directory)
        size = max(ids.values()) + 1 if ids else None
        if size is not None and size > rows:
            raise ValueError(
                f"--tokenizer: {directory} has {size} tokens, expected at most {rows}, the rows of the model's "
                "vocabulary; give the tokenizer that the run was trained with"
            )
        config = read_json(directory / _CONFIG)
        bos, eos = (ids.get(_content(config.get(name))) for name in ("bos_token", "eos_token"))
        return cls(directory, size, bos, eos)

    def copy(self, target: Path, chat_template: Path | None) -> None:
        """Copies the files into `target`, with the chat template in the tokenizer's configuration."""
        for name in _FILES:
            for path in self.directory.glob(name):
                shutil.copyfile(path, target / path.name)
        if chat_template is not None:
            config = read_json(self.directory / _CONFIG)
            config["chat_template"] = chat_template.read_text(encoding="utf-8")
            (target / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            # It would win over the configuration.
            (target / "chat_template.jinja").unlink(missing_ok=True)


def _ids(directory: Path) -> dict[str, int]:
    """Token -> id, as far as the files list them; of a tiktoken file only the ids are used."""
    out: dict[str, int] = {}
    for path in (path for name in _TIKTOKEN for path in directory.glob(name)):
        out |= {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines() if line.strip()}
    content = read_json(directory / "tokenizer.json")
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, Mapping):
        out |= vocabulary
    else:
        out |= {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    decoder = read_json(directory / _CONFIG).get("added_tokens_decoder", {})
    return out | added | {entry["content"]: int(number) for number, entry in decoder.items()}


def _content(token: Any) -> str:
    return str(token.get("content") if isinstance(token, Mapping) else token)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none. Raises ValueError if it is damaged."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}), expected JSON; use another copy") from error
