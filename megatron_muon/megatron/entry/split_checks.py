"""Whether the registry's rows fit a model, asked on every rank before anything is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.model.identity import NamedParameter
from megatron_muon.megatron.model.registry import is_matrix, registry
from megatron_muon.megatron.model.routing import matrix_spec, uses_muon

_ERRORS: tuple[type[Exception], ...] = (ValueError, NotImplementedError)
_MOST_SHOWN = 3


def check_splits(entries: Sequence[NamedParameter], muon: MuonConfig, tp_size_of: Callable[[bool], int]) -> None:
    """Raises on every rank if on any of them a row does not fit a parameter, or a user's row matches none anywhere.

    Collective over the world.

    Args:
        entries: This rank's parameters.
        muon: The settings.
        tp_size_of: Size of the tensor-parallel group of dense (False) and of expert (True) parameters.

    Raises:
        ValueError: If rows of the same priority match a parameter, a split does not divide one, a row gives Muon what
            is no matrix, or matches nothing.
        NotImplementedError: If tensor-parallel pieces are not to be joined and a split makes them differ.
        RuntimeError: If ranks have read different rows.
    """
    rows = registry(muon.splits)
    problems = []
    for entry in entries:
        problem = _problem(entry, muon, tp_size_of(not getattr(entry.parameter, "allreduce", True)))
        if problem is not None:
            problems.append(problem)
    used = {row.name for row in rows.user_rows for entry in entries if rows.by_name(row.name).matches(entry)}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (repr(rows.user_rows), problems[:_MOST_SHOWN], used))
    different = [rank for rank, (content, _, _) in enumerate(gathered) if content != gathered[0][0]]
    if different:
        raise RuntimeError(
            f"--muon-splits {muon.splits}: global rank {different[0]} has read other rows than rank 0; give all ranks "
            "the same file"
        )
    found = list(dict.fromkeys(problem for _, own, _ in gathered for problem in own))
    if found:
        shown = "; ".join(text for _, text in found[:_MOST_SHOWN])
        raise _ERRORS[found[0][0]](shown + ("; and more" if len(found) > _MOST_SHOWN else ""))
    everywhere = {name for _, _, names in gathered for name in names}
    for row in rows.user_rows:
        if row.name not in everywhere:
            raise ValueError(
                f"--muon-splits {muon.splits}: {row.name}: match: got {row.match!r}, which matches no parameter of the "
                "model on any rank; correct or remove the row (--muon-log-params lists the names)"
            )


def _problem(entry: NamedParameter, muon: MuonConfig, tp_size: int) -> tuple[int, str] | None:
    """(index of the error's class, message) if no single row fits a parameter."""
    matching = registry(muon.splits).matching(entry)
    if len(matching) > 1:
        names = ", ".join(row.name for row in matching)
        return 0, (
            f"{entry.whole_name}: matched by {len(matching)} rows of priority {matching[0].priority}, {names}, "
            "expected one; narrow a match or give a row a higher priority"
        )
    (row,) = matching
    if not uses_muon(entry, muon):
        return None
    if not is_matrix(entry):
        return 0, (
            f"{entry.whole_name}: {row.name} gives it to Muon, but it has shape {tuple(entry.parameter.shape)}; Muon "
            "needs a matrix: narrow the row's match"
        )
    try:
        matrix_spec(entry, muon, tp_size)
    except _ERRORS as error:
        kind = next(index for index, of in enumerate(_ERRORS) if isinstance(error, of))
        where = "" if entry.name == entry.whole_name else f"{entry.whole_name}: "
        return kind, f"row {row.name}: {where}{error}"
    return None
