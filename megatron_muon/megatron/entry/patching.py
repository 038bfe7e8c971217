"""Replaces functions of torch and Megatron: a table is checked as a whole, then applied as a whole, and can be undone.

The seams and the CPU backend are such tables. A target that is missing or has changed is an error that names it with
the versions: a replacement that no longer fits must not be left out silently.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One attribute of torch or Megatron that is replaced.

    Attributes:
        target: `module:attribute` or `module:Class.attribute`. The module is imported.
        replacement: A function that is called with the original and then with the original's arguments; or, where
            `is_value`, what the attribute becomes.
        why: What goes wrong without it, or what it is for, in one sentence.
        parameters: The names of the original's first parameters, on which the replacement relies. Empty: not checked.
        exact: Whether these are all its parameters.
        is_value: Whether `replacement` takes the place of the original as it is.
        by_name: Whether modules that have imported the original by name get the replacement as well.
    """

    target: str
    replacement: Any
    why: str
    parameters: tuple[str, ...] = ()
    exact: bool = False
    is_value: bool = False
    by_name: bool = False


@dataclass(frozen=True)
class Applied:
    """An attribute that has been replaced: `owner.name` was `before` (`_INHERITED`: not its own) and is `after`."""

    owner: Any
    name: str
    before: Any
    after: Any


_INHERITED = object()


class _MismatchError(Exception):
    """A target is missing or has changed."""


def apply_patches(patches: Iterable[Patch], what: str, remedy: str) -> list[Applied]:
    """Checks every target, then replaces all of them; after a failed check nothing is replaced.

    Args:
        patches: The table.
        what: The name of the whole, for the error.
        remedy: What a user can do if it does not fit, for the error.

    Returns:
        The replaced attributes, for `undo`.

    Raises:
        RuntimeError: If targets are missing or have changed. Names each of them, and the versions.
    """
    found: list[tuple[Patch, Any, str, Any]] = []
    mismatches: list[str] = []
    for patch in patches:
        try:
            found.append((patch, *_resolve(patch)))
        except _MismatchError as mismatch:
            mismatches.append(str(mismatch))
    if mismatches:
        raise mismatch_error(what, "; ".join(mismatches), remedy)
    applied: list[Applied] = []
    by_name: dict[int, tuple[Any, Any]] = {}
    for patch, owner, name, original in found:
        applied.append(_replace(owner, name, _around(patch, original, inspect.getattr_static(owner, name, None))))
        if patch.by_name:
            by_name[id(original)] = (original, getattr(owner, name))
    return applied + _replace_by_name(by_name)


def undo(applied: Sequence[Applied]) -> None:
    """Gives attributes back what they were, where they still are what `apply_patches` made them."""
    for entry in reversed(applied):
        if vars(entry.owner).get(entry.name) is not entry.after:
            continue
        if entry.before is _INHERITED:
            delattr(entry.owner, entry.name)
        else:
            setattr(entry.owner, entry.name, entry.before)


def mismatch_error(what: str, problem: str, remedy: str) -> RuntimeError:
    """The error for libraries that the tables do not fit."""
    import torch

    try:
        from megatron.core.package_info import __version__ as megatron
    except ImportError:
        megatron = "(not installed)"
    return RuntimeError(
        f"{what} does not fit megatron-core {megatron} with torch {torch.__version__}: {problem}; {remedy}"
    )


def _resolve(patch: Patch) -> tuple[Any, str, Any]:
    """(owner, attribute, original) of a target."""
    module_name, _, path = patch.target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A dependency that the module itself fails to import is another problem, with its own message.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise _MismatchError(f"{patch.target}: there is no module {error.name}") from error
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, _INHERITED)
    # A missing class is an object too, and has what every object has.
    original: Any = _INHERITED if owner is _INHERITED else getattr(owner, name, _INHERITED)
    if original is _INHERITED:
        raise _MismatchError(f"{patch.target}: there is no {path} in {module_name}")
    if patch.parameters:
        got = tuple(inspect.signature(original).parameters)
        if (got if patch.exact else got[: len(patch.parameters)]) != patch.parameters:
            expected = "expected" if patch.exact else "expected to begin with"
            raise _MismatchError(
                f"{patch.target}: got parameters ({', '.join(got)}), {expected} ({', '.join(patch.parameters)})"
            )
    return owner, name, original


def _around(patch: Patch, original: Any, static: Any) -> Any:
    """What takes the place of the original; a static or class method if it is one."""
    if patch.is_value:
        return patch.replacement
    kind = type(static) if isinstance(static, staticmethod | classmethod) else None
    function: Callable[..., Any] = patch.replacement
    if kind is classmethod:
        original = original.__func__

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return replacement if kind is None else kind(replacement)


def _replace(owner: Any, name: str, after: Any) -> Applied:
    before = vars(owner).get(name, _INHERITED)
    setattr(owner, name, after)
    return Applied(owner, name, before, after)


def _replace_by_name(by_name: dict[int, tuple[Any, Any]]) -> list[Applied]:
    """Replaces originals, given by `id`, wherever a module but this package's own holds them under any name."""
    applied = []
    for module in list(sys.modules.values()) if by_name else ():
        # This package's own modules import originals to call them.
        if not inspect.ismodule(module) or module.__name__.startswith("megatron_muon"):
            continue
        for name, value in list(vars(module).items()):
            original, replacement = by_name.get(id(value), (_INHERITED, None))
            if value is original:
                applied.append(_replace(module, name, replacement))
    return applied
