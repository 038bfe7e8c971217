"""Measured figures of a cluster's links, in a file that a plan is made with: `--muon-links FILE`, `plan --links FILE`.

`python -m megatron_muon.profile links --json FILE` writes such a file. It is one JSON object:

    {
      "format": "megatron_muon_links",
      "version": 1,
      "source": "8 x H100, NCCL 2.27, 2026-11-24",
      "intra_node": {"bandwidth_gb_per_s": 310.0, "latency_us": 18.0},
      "inter_node": {"bandwidth_gb_per_s": 42.0, "latency_us": 34.0},
      "launch_us": 4.0
    }

`intra_node` is about groups of ranks within one node, `inter_node` about groups that span nodes. The bandwidth is what
one rank sends to the others of an all-to-all of large buffers (GB are 1e9 bytes), the latency the time of an all-to-all
of a few bytes, and `launch_us` the time that a small kernel adds to a stream. A kind of group that was not measured is
null, and the planner's default stands in for it. `source` is free text for reports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LINKS_FORMAT = "megatron_muon_links"
LINKS_VERSION = 1
_KEYS = ("format", "version", "source", "intra_node", "inter_node", "launch_us")
_LINK_KEYS = ("bandwidth_gb_per_s", "latency_us")


@dataclass(frozen=True)
class LinkFigures:
    """What an all-to-all reaches in one kind of group.

    Attributes:
        bandwidth_gb_per_s: What one rank sends, in 1e9 bytes per second; positive.
        latency_us: Time of an all-to-all of a few bytes, in microseconds; 0 or more.
    """

    bandwidth_gb_per_s: float
    latency_us: float


@dataclass(frozen=True)
class MeasuredLinks:
    """The content of a links file.

    Attributes:
        source: What was measured, and where.
        intra_node: Groups within a node; None if they were not measured.
        inter_node: Groups over several nodes; None if they were not measured.
        launch_us: What a small kernel adds to a stream, in microseconds; None if it was not measured.
    """

    source: str
    intra_node: LinkFigures | None
    inter_node: LinkFigures | None
    launch_us: float | None

    def to_json(self) -> dict[str, Any]:
        """The object that `load_links` reads."""
        return {"format": LINKS_FORMAT, "version": LINKS_VERSION, **asdict(self)}


def load_links(path: str | Path, flag: str = "--muon-links") -> MeasuredLinks:
    """Reads a links file.

    Args:
        path: The file.
        flag: The command-line flag that named it, for messages.

    Raises:
        ValueError: If the file cannot be read, is not such a file, or holds an invalid figure. The message names the
            file and the key.
    """
    where = f"{flag} {path}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}: got a file that cannot be read, expected JSON of measured links: {error}"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: got a file that is not valid JSON, expected measured links: {error}") from error
    if not isinstance(content, dict) or content.get("format") != LINKS_FORMAT:
        raise ValueError(
            f'{where}: got a file without "format": "{LINKS_FORMAT}", expected one that '
            "`python -m megatron_muon.profile links --json FILE` wrote"
        )
    if content.get("version") != LINKS_VERSION:
        raise ValueError(
            f"{where}: version: got {content.get('version')!r}, expected {LINKS_VERSION}; measure the links again"
        )
    _check_keys(where, content, _KEYS)
    source = content["source"]
    if not isinstance(source, str):
        raise ValueError(f"{where}: source: got {source!r}, expected text")
    return MeasuredLinks(
        source,
        _figures(f"{where}: intra_node", content["intra_node"]),
        _figures(f"{where}: inter_node", content["inter_node"]),
        None if content["launch_us"] is None else _number(where, content, "launch_us"),
    )


def _figures(where: str, content: Any) -> LinkFigures | None:
    if content is None:
        return None
    _check_keys(where, content, _LINK_KEYS)
    bandwidth = _number(where, content, "bandwidth_gb_per_s")
    if bandwidth == 0:
        raise ValueError(f"{where}: bandwidth_gb_per_s: got 0, expected a positive number")
    return LinkFigures(bandwidth, _number(where, content, "latency_us"))


def _check_keys(where: str, content: Any, known: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {content!r}, expected an object with {', '.join(known)}, or null")
    for problem, keys in (("unknown", set(content) - set(known)), ("no", set(known) - set(content))):
        if keys:
            raise ValueError(f"{where}: got {problem} {', '.join(sorted(keys))}, expected {', '.join(known)}")


def _number(where: str, content: Mapping[str, Any], key: str) -> float:
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: {key}: got {value!r}, expected a number that is not negative")
    return float(value)
