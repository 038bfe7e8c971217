"""Chrome's trace event format, as far as traces here use it, as a JSON schema.

Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: JSON
array format, complete events (X), nestable asynchronous events (b, e) and metadata (M).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "name": {"type": "string", "minLength": 1},
    "pid": {"type": "integer", "minimum": 0},
    "tid": {"type": "integer", "minimum": 0},
    "args": {"type": "object"},
}
_TIME = {"type": "number", "minimum": 0}


def _event(ph: str, required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {
        "if": {"properties": {"ph": {"const": ph}}},
        "then": {
            "required": ["ph", "name", "pid", "tid", *required],
            "properties": {"ph": {"const": ph}, **_COMMON, **properties},
            "additionalProperties": False,
        },
    }


SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["ph"],
        "properties": {"ph": {"enum": ["X", "b", "e", "M"]}},
        "allOf": [
            _event("X", ("cat", "ts", "dur"), cat={"type": "string"}, ts=_TIME, dur=_TIME),
            _event("b", ("cat", "id", "ts"), cat={"type": "string"}, id={"type": "string"}, ts=_TIME),
            _event("e", ("cat", "id", "ts"), cat={"type": "string"}, id={"type": "string"}, ts=_TIME),
            _event("M", ("args",)),
        ],
    },
}


def load_events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, as a viewer reads it: the array's closing bracket may be missing."""
    content: list[dict[str, Any]] = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    return content
