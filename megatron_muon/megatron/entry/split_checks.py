"""Whether the registry's rows fit a model, found on each rank before anything is exchanged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.model.identity import NamedParameter
from megatron_muon.megatron.model.registry import is_matrix, registry
from megatron_muon.megatron.model.routing import matrix_spec, uses_muon

_MOST_SHOWN = 3
_Problem = ValueError | NotImplementedError


def check_splits(entries: Sequence[NamedParameter], muon: MuonConfig, tp_size_of: Callable[[bool], int]) -> set[str]:
    """Checks this rank's parameters. Issues no collective.

    Args:
        entries: This rank's parameters.
        muon: The settings.
        tp_size_of: Size of the tensor-parallel group of dense (False) and of expert (True) parameters.

    Returns:
        The user's rows that match a parameter of this rank, by name.

    Raises:
        ValueError: If rows of the same priority match a parameter, a split does not divide one, or a row gives Muon
            what is no matrix.
        NotImplementedError: If tensor-parallel pieces are not to be joined and a split makes them differ.
    """
    rows = registry(muon.splits)
    found: dict[str, tuple[_Problem, int]] = {}
    for entry in entries:
        problem = _problem(entry, muon, tp_size_of(not getattr(entry.parameter, "allreduce", True)))
        if problem is not None:
            # Layers and experts differ in their numbers alone.
            alike = re.sub(r"\d+", "*", str(problem))
            first, count = found.get(alike, (problem, 0))
            found[alike] = first, count + 1
    if found:
        shown = [
            f"{problem}{f' (and {count - 1} parameters alike)' if count > 1 else ''}"
            for problem, count in list(found.values())[:_MOST_SHOWN]
        ]
        more = f"; and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
        raise type(next(iter(found.values()))[0])("; ".join(shown) + more)
    return {row.name for row in rows.user_rows for entry in entries if rows.by_name(row.name).matches(entry)}


def check_rows_match(muon: MuonConfig, used: Iterable[str]) -> None:
    """Raises ValueError if a user's row is not among the `used` ones of all ranks."""
    everywhere = set(used)
    for row in registry(muon.splits).user_rows:
        if row.name not in everywhere:
            raise ValueError(
                f"--muon-splits {muon.splits}: {row.name}: match: got {row.match!r}, which matches no parameter of the "
                "model on any rank; correct or remove the row (--muon-log-params lists the names)"
            )


def _problem(entry: NamedParameter, muon: MuonConfig, tp_size: int) -> _Problem | None:
    """The error if no single row fits a parameter."""
    matching = registry(muon.splits).matching(entry)
    if len(matching) > 1:
        names = ", ".join(row.name for row in matching)
        return ValueError(
            f"{entry.whole_name}: matched by {len(matching)} rows of priority {matching[0].priority}, {names}, "
            "expected one; narrow a match or give a row a higher priority"
        )
    (row,) = matching
    if not uses_muon(entry, muon):
        return None
    if not is_matrix(entry):
        return ValueError(
            f"{entry.whole_name}: {row.name} gives it to Muon, but it has shape {tuple(entry.parameter.shape)}; Muon "
            "needs a matrix: narrow the row's match"
        )
    try:
        matrix_spec(entry, muon, tp_size)
    except (ValueError, NotImplementedError) as error:
        where = "" if entry.name == entry.whole_name else f"{entry.whole_name}: "
        kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
        return kind(f"row {row.name}: {where}{error}")
    return None
