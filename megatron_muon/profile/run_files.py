"""What a run left in its directory: metrics, traces of a profile, and losses in TensorBoard's files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_muon.observe.metric_names import FILE_NAME

if TYPE_CHECKING:
    from megatron_muon.profile.merge import Merged

# Megatron's tags.
LOSSES: Mapping[str, str] = {"lm loss": "Training loss", "lm loss validation": "Validation loss"}


@dataclass(frozen=True)
class RunFiles:
    """One run.

    Attributes:
        name: Name in the report.
        directory: Directory of the run.
        records: Logged steps, in order.
        losses: Title -> step -> loss.
        profile: Profiled steps of all ranks; None if the run was not profiled.
        notes: What a reader should know about the files.
    """

    name: str
    directory: Path
    records: Sequence[Mapping[str, Any]] = ()
    losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    profile: Merged | None = None
    notes: Sequence[str] = ()

    @property
    def steps(self) -> list[int]:
        """All steps that something is known about."""
        found = {int(record["step"]) for record in self.records}
        found |= {step for curve in self.losses.values() for step in curve}
        return sorted(found | set(self.profile.records if self.profile else ()))


def read_run(path: Path, name: str) -> RunFiles:
    """Reads what is below a run's directory, or one file of metrics.

    Raises:
        ValueError: If there is nothing to show, or there are files of several runs.
    """
    if not path.exists():
        raise ValueError(f"RUN: got {path}, which does not exist; expected the directory of a run")
    if path.is_file():
        return RunFiles(name, path.parent, read_metrics(path))
    notes: list[str] = []
    metrics = _only(path, sorted(path.rglob(FILE_NAME)), f"files {FILE_NAME}")
    traces = _only(path, sorted({p.parent for p in path.rglob("trace.rank*.json")}), "directories of traces")
    events = sorted({p.parent for p in path.rglob("events.out.tfevents.*")})
    if metrics is not None:
        events = [directory for directory in events if directory == metrics.parent] or events
    losses = _losses(_only(path, events, "TensorBoard directories"), notes)
    profile = None
    if traces is not None:
        from megatron_muon.profile.merge import merge

        profile = merge(traces)
        notes += profile.notes
    if metrics is None and profile is None and not losses:
        raise ValueError(
            f"RUN: got {path}, which has no {FILE_NAME}, no traces and no losses; train with --muon-log-interval N or "
            "--muon-profile N, and --tensorboard-dir"
        )
    records = read_metrics(metrics) if metrics is not None else []
    return RunFiles(name, path, records, losses, profile, notes)


def _only(run: Path, found: Sequence[Path], what: str) -> Path | None:
    if len(found) > 1:
        listed = ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "")
        raise ValueError(f"RUN: got {run} with several {what}: {listed}; give one run's directory, or each run's")
    return found[0] if found else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order; of a step that a resumed run logged again, the later record.

    Raises:
        ValueError: If there is no record, or a line is damaged. A last line that was cut off is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[int(record["step"])] = {"run": {}, "matrices": {}, "expected": {}, **record}
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not a record: {line[:80]!r}; remove it") from None
    if not records:
        raise ValueError(f"{path}: got no record, expected at least one; the run has logged nothing yet")
    return [records[step] for step in sorted(records)]


def _losses(directory: Path | None, notes: list[str]) -> dict[str, dict[int, float]]:
    """Title -> step -> loss, from TensorBoard's files."""
    if directory is None:
        return {}
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            EventAccumulator,
        )
    except ModuleNotFoundError:
        notes.append("losses are left out, since they need the package tensorboard, which is not installed")
        return {}
    read = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    read.Reload()
    logged = set(read.Tags()["scalars"])
    out = {}
    for tag, title in LOSSES.items():
        if tag in logged:
            out[title] = {int(e.step): float(e.value) for e in read.Scalars(tag) if math.isfinite(e.value)}
    return {title: curve for title, curve in out.items() if curve}


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: as many of the last parts of each path as that takes."""
    resolved = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-count:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]
