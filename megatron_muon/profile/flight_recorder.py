"""torch's Flight Recorder: writes a rank's dump, reads dumps of all ranks, and says who is behind and who disagrees.

The recorder keeps the last collectives that a rank issued, on NCCL and on Gloo. Dumps come as JSON or as pickles. A
pickle may run code when it is loaded; those read here are of plain values, and anything else in them is refused.

Source: torch/csrc/distributed/c10d/FlightRecorder.hpp; the Flight Recorder tutorial for the fields.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

BUFFER_VARIABLE = "TORCH_FR_BUFFER_SIZE"
BUFFER_ENTRIES = 10_000
_ELEMENT_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Float8_e4m3fn", "Float8_e5m2"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
}
# Their ranks may pass different sizes.
_UNEVEN = ("all_to_all", "alltoall", "gather", "scatter", "send", "recv", "coalesced")


@dataclass(frozen=True)
class Entry:
    """A collective or point-to-point call as one rank recorded it.

    Attributes:
        record_id: Running number on the rank.
        group: Name of the process group; the same on its ranks.
        description: What the group is for, where the one who made it said so.
        seq_id: Number of the collective within the group, or of the point-to-point call.
        is_p2p: A point-to-point call.
        name: Such as `nccl:all_reduce`.
        input_bytes: Of this rank; None if a data type is unknown.
        sizes: Of the inputs.
        is_done: The rank has seen it complete.
        duration_ms: Where the recorder measured it: NCCL with TORCH_NCCL_ENABLE_TIMING=1.
    """

    record_id: int
    group: str
    description: str
    seq_id: int
    is_p2p: bool
    name: str
    input_bytes: int | None
    sizes: tuple[tuple[int, ...], ...]
    is_done: bool
    duration_ms: float | None


@dataclass(frozen=True)
class Dump:
    """One rank's dump.

    Attributes:
        rank: Global rank, from the file's name.
        version: Of the format.
        entries: Oldest first.
        completed: Group -> number of the last call that completed; of groups that an entry is about.
        enqueued: Group -> number of the last one issued.
    """

    rank: int
    version: str
    entries: tuple[Entry, ...]
    completed: Mapping[str, int]
    enqueued: Mapping[str, int]


def switch_on() -> None:
    """Lets the recorder keep entries, unless the environment says how many. Before the first process group is made."""
    os.environ.setdefault(BUFFER_VARIABLE, str(BUFFER_ENTRIES))


def write_dump(directory: Path, rank: int) -> str:
    """Writes this process's dump, as JSON without stack traces, to `flight_recorder_rank<rank>.json`.

    Args:
        directory: Exists.
        rank: Global rank.

    Returns:
        "", or why there is nothing to write.

    Raises:
        OSError: If it cannot be written.
    """
    from torch._C import _distributed_c10d as c10d

    # NCCL's recorder is another object than that of the other backends.
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(c10d, name, None)
        content = bytes(dump()) if dump is not None else b"{}"
        if json.loads(content).get("entries"):
            (directory / f"flight_recorder_rank{rank}.json").write_bytes(content)
            return ""
    return f"rank {rank}: the Flight Recorder has no entry; set {BUFFER_VARIABLE}={BUFFER_ENTRIES} for the whole job"


class _PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers; refuses whatever would import or call something."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, expected plain values only")


def load_dump(path: Path) -> Dump:
    """Reads a dump, JSON or pickle.

    Args:
        path: Ends in the rank, as torch names its dumps, or in the rank and a suffix.

    Raises:
        ValueError: If it cannot be read, or is none.
    """
    content = path.read_bytes()
    try:
        raw = json.loads(content) if content[:1] == b"{" else _PlainUnpickler(BytesIO(content)).load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: is no Flight Recorder dump: {error}") from error
    found = re.search(r"(\d+)$", path.stem)
    if found is None:
        raise ValueError(f"{path}: got a name without a rank, expected one that ends in it, such as nccl_trace_rank_0")
    try:
        # The status is by a number of the rank's own, which ranks do not share; entries say which group it is.
        names = {str(entry["pg_id"]): str(entry["process_group"][0]) for entry in raw.get("entries", [])}
        status = {names[str(i)]: s for i, s in raw.get("pg_status", {}).items() if str(i) in names}
        return Dump(
            rank=int(found.group(1)),
            version=str(raw["version"]),
            entries=tuple(_entry(entry) for entry in raw.get("entries", [])),
            completed={group: int(s["last_completed_collective"]) for group, s in status.items()},
            enqueued={group: int(s["last_enqueued_collective"]) for group, s in status.items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: is no Flight Recorder dump: {type(error).__name__} {error}") from error


def _entry(raw: Mapping[str, Any]) -> Entry:
    group, description = raw["process_group"]
    is_p2p = bool(raw["is_p2p"])
    sizes = tuple(tuple(int(n) for n in size) for size in raw["input_sizes"])
    item_bytes = [_ELEMENT_BYTES.get(dtype) for dtype in raw["input_dtypes"]]
    input_bytes = None
    if None not in item_bytes and len(item_bytes) == len(sizes):
        input_bytes = sum(prod(size) * each for size, each in zip(sizes, item_bytes) if each is not None)
    duration = raw.get("duration_ms")
    return Entry(
        record_id=int(raw["record_id"]),
        group=str(group),
        description=str(description),
        seq_id=int(raw["p2p_seq_id" if is_p2p else "collective_seq_id"]),
        is_p2p=is_p2p,
        name=str(raw["profiling_name"]),
        input_bytes=input_bytes,
        sizes=sizes,
        # Gloo leaves the state at `scheduled` and only retires the entry.
        is_done=raw["state"] == "completed" or bool(raw["retired"]),
        duration_ms=None if duration is None else float(duration),
    )


@dataclass(frozen=True)
class Calls:
    """Calls of one kind over one group.

    Attributes:
        name: Of the collective.
        group: Of the process group.
        ranks: Whose dumps have it.
        count: On the rank that issued most.
        bytes: Of inputs, on the rank with most; None if unknown.
        duration_ms: Median, where it was measured.
    """

    name: str
    group: str
    ranks: tuple[int, ...]
    count: int
    bytes: int | None
    duration_ms: float | None


def calls(dumps: Sequence[Dump]) -> list[Calls]:
    """What was called, by group and name."""
    found: dict[tuple[str, str], dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for dump in dumps:
        for entry in dump.entries:
            found[entry.group, entry.name][dump.rank].append(entry)
    out = []
    for (group, name), by_rank in sorted(found.items()):
        durations = [e.duration_ms for entries in by_rank.values() for e in entries if e.duration_ms is not None]
        sums = [_sum(e.input_bytes for e in entries) for entries in by_rank.values()]
        out.append(
            Calls(
                name=name,
                group=group,
                ranks=tuple(sorted(by_rank)),
                count=max(map(len, by_rank.values())),
                bytes=None if None in sums else max(s for s in sums if s is not None),
                duration_ms=median(durations) if durations else None,
            )
        )
    return out


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def findings(dumps: Sequence[Dump]) -> list[str]:
    """What is wrong: ranks that are behind, calls that hang, and ranks that issued different things."""
    return [*_behind(dumps), *_unfinished(dumps), *_disagreements(dumps), *_lost(dumps)]


def _behind(dumps: Sequence[Dump]) -> list[str]:
    out = []
    for title, numbers in (("issued", "enqueued"), ("completed", "completed")):
        for group in sorted({g for dump in dumps for g in getattr(dump, numbers)}):
            last = {d.rank: getattr(d, numbers)[group] for d in dumps if group in getattr(d, numbers)}
            behind = {rank: number for rank, number in last.items() if number < max(last.values())}
            if behind:
                words = ", ".join(f"rank {rank} {number}" for rank, number in sorted(behind.items()))
                out.append(f"group {group}: others {title} call {max(last.values())}, but {words}")
    return out


def _unfinished(dumps: Sequence[Dump]) -> list[str]:
    """The first call of each rank that has not completed, in a group where nothing later has: those end in order."""
    out = []
    for dump in dumps:
        last_done: dict[tuple[str, bool], int] = {}
        for entry in dump.entries:
            if entry.is_done:
                last_done[entry.group, entry.is_p2p] = entry.record_id
        waiting = next(
            (e for e in dump.entries if not e.is_done and e.record_id > last_done.get((e.group, e.is_p2p), -1)), None
        )
        if waiting is not None:
            kind = "point-to-point call" if waiting.is_p2p else "collective"
            out.append(f"rank {dump.rank} waits in {waiting.name}, {kind} {waiting.seq_id} of group {waiting.group}")
    return out


def _disagreements(dumps: Sequence[Dump]) -> list[str]:
    """The first collective of each group that ranks do not agree on."""
    at: dict[tuple[str, int], dict[int, Entry]] = defaultdict(dict)
    for dump in dumps:
        for entry in dump.entries:
            if not entry.is_p2p:
                at[entry.group, entry.seq_id][dump.rank] = entry
    out: dict[str, str] = {}
    for (group, seq_id), by_rank in sorted(at.items(), key=lambda item: item[0]):
        uneven = any(word in entry.name for entry in by_rank.values() for word in _UNEVEN)
        kinds = defaultdict(list)
        for rank, entry in sorted(by_rank.items()):
            kinds[entry.name if uneven else f"{entry.name} {[list(s) for s in entry.sizes]}"].append(rank)
        if len(kinds) > 1 and group not in out:
            words = "; ".join(f"ranks {ranks}: {kind}" for kind, ranks in kinds.items())
            out[group] = f"group {group}, collective {seq_id}: {words}"
    return list(out.values())


def _lost(dumps: Sequence[Dump]) -> list[str]:
    lost = {d.rank: d.entries[0].record_id for d in dumps if d.entries and d.entries[0].record_id > 0}
    if not lost:
        return []
    return [f"the buffer was too small: {max(lost.values())} older entries are gone; raise {BUFFER_VARIABLE}"]
