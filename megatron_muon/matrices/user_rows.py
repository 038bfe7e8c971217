"""Reads a user's own rows of the registry of splits from YAML (docs/matrices.md has the format)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml  # type: ignore[import-untyped]

from megatron_muon.matrices.fused import WHOLE, Cut, Section, Split

FLAG = "--muon-splits"
_ROW_KEYS = ("match", "name", "optimizer", "priority", "parts", "on_each_rank", "along", "block", "heads")
_PART_KEYS = ("rows", "along", "block", "heads")
_DIMS: Mapping[str, int] = {"rows": 0, "columns": 1}


@dataclass(frozen=True)
class SplitRow:
    """A row of the user's.

    Attributes:
        name: For tables and messages.
        match: Glob on the parameter's name in the whole model.
        optimizer: Whose the parameters are.
        priority: 1 or more; a built-in row has less.
        split: How they are made of logical matrices, if they are Muon's.
    """

    name: str
    match: str
    optimizer: Literal["muon", "adam"]
    priority: int
    split: Split


def load_split_rows(path: str) -> tuple[SplitRow, ...]:
    """The rows of a file.

    Raises:
        ValueError: If the file cannot be read, or a row is bad; the message names the file and the row.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{FLAG} {path}: got what cannot be read, expected a YAML file of rows: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{FLAG} {path}: got {type(content).__name__} at the top, expected a list of rows")
    rows = tuple(_row(f"{FLAG} {path}: row {number}", number, row) for number, row in enumerate(content, start=1))
    names = [row.name for row in rows]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{FLAG} {path}: got several rows of the name {', '.join(repeated)}, expected each once")
    return rows


def _row(where: str, number: int, content: Any) -> SplitRow:
    _check_keys(where, content, _ROW_KEYS)
    match = content.get("match")
    if not isinstance(match, str) or not match:
        raise ValueError(f"{where}: match: got {match!r}, expected a glob on parameter names")
    where = f"{where} ({match})"
    name = content.get("name", f"row {number} ({match})")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: name: got {name!r}, expected a name")
    optimizer = content.get("optimizer", "muon")
    if optimizer not in ("muon", "adam"):
        raise ValueError(f"{where}: optimizer: got {optimizer!r}, expected muon or adam")
    split = _split(where, content)
    if optimizer == "adam" and split != WHOLE:
        raise ValueError(f"{where}: got optimizer adam and a split, expected one or the other: AdamW knows no matrices")
    priority = _positive(where, content, "priority") or 1
    return SplitRow(name, match, cast(Literal["muon", "adam"], optimizer), priority, split)


def _split(where: str, content: Mapping[str, Any]) -> Split:
    cut, parts = _cut(where, content), content.get("parts")
    on_each_rank = content.get("on_each_rank", False)
    if not isinstance(on_each_rank, bool):
        raise ValueError(f"{where}: on_each_rank: got {on_each_rank!r}, expected true or false")
    if parts is None:
        if on_each_rank:
            raise ValueError(f"{where}: on_each_rank: got true, expected it only with parts")
        return Split(((Section("", cut=cut),),))
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{where}: parts: got {parts!r}, expected label: rows")
    if cut is not None:
        raise ValueError(f"{where}: got block or heads beside parts, expected them in each part that is cut")
    sections = tuple(_section(where, str(label), part) for label, part in parts.items())
    return Split(tuple((section,) for section in sections) if on_each_rank else (sections,))


def _section(where: str, label: str, content: Any) -> Section:
    if not isinstance(content, dict):
        content = {"rows": content}
    where = f"{where}: parts: {label}"
    _check_keys(where, content, _PART_KEYS)
    rows = _positive(where, content, "rows")
    if rows is None:
        raise ValueError(f"{where}: rows: got none, expected how many rows the part has in the whole parameter")
    return Section(label, rows, _cut(where, content))


def _cut(where: str, content: Mapping[str, Any]) -> Cut | None:
    size, count = _positive(where, content, "block"), _positive(where, content, "heads")
    along = content.get("along", "rows")
    if along not in _DIMS:
        raise ValueError(f"{where}: along: got {along!r}, expected rows or columns")
    if size is not None and count is not None:
        raise ValueError(f"{where}: got block and heads, expected one or the other")
    if size is None and count is None:
        if "along" in content:
            raise ValueError(f"{where}: along: got {along!r}, expected it only with block or heads")
        return None
    return Cut(_DIMS[along], size, count)


def _check_keys(where: str, content: Any, known: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {content!r}, expected a mapping with {', '.join(known)}")
    unknown = sorted(str(key) for key in set(content) - set(known))
    if unknown:
        raise ValueError(f"{where}: got unknown {', '.join(unknown)}, expected {', '.join(known)}")


def _positive(where: str, content: Mapping[str, Any], key: str) -> int | None:
    value = content.get(key)
    if key in content and (type(value) is not int or value < 1):
        raise ValueError(f"{where}: {key}: got {value!r}, expected a positive integer")
    return cast(int | None, value)
