"""What a redirect is, and how a table of them is checked and applied as one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

VERIFIED_MEGATRON_CORE = "0.19.2"


@dataclass(frozen=True)
class Redirect:
    """One attribute of torch or Megatron-Core that the CPU backend replaces.

    Attributes:
        target: `module:attribute` or `module:Class.attribute`.
        make: Takes the original, returns its replacement.
        why: One sentence: what fails on a CPU without it.
        parameters: Names of the original's leading parameters, for replacements that rely on them. Empty: unchecked.
    """

    target: str
    make: Callable[[Any], Any]
    why: str
    parameters: tuple[str, ...] = ()


_MISSING = object()


class _Mismatch(Exception):
    """A target is missing or has changed."""


@dataclass(frozen=True)
class _Resolved:
    owner: Any
    name: str
    original: Any
    redirect: Redirect


def megatron_core_version() -> str:
    """Version of the Megatron-Core that is imported, else of the one installed, else `not installed`."""
    imported = getattr(sys.modules.get("megatron.core"), "__version__", None)
    if imported is not None:
        return str(imported)
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def mismatch_error(problem: str) -> RuntimeError:
    """The error for a Megatron-Core that the CPU backend does not fit."""
    return RuntimeError(
        f"the CPU backend does not fit megatron-core {megatron_core_version()} with torch {torch.__version__}: "
        f"{problem}. It is verified with megatron-core {VERIFIED_MEGATRON_CORE}; "
        f"install that version (pip install megatron-core=={VERIFIED_MEGATRON_CORE}), or update megatron_muon."
    )


def _resolve(redirect: Redirect) -> _Resolved:
    module_name, _, path = redirect.target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A dependency that the module itself fails to import is another problem, with its own message.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise _Mismatch(f"{redirect.target}: there is no module {error.name}") from error
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    original: Any = getattr(owner, name, _MISSING)
    if original is _MISSING:
        raise _Mismatch(f"{redirect.target}: there is no {path} in {module_name}")
    if redirect.parameters:
        found = tuple(inspect.signature(original).parameters)
        if found[: len(redirect.parameters)] != redirect.parameters:
            raise _Mismatch(
                f"{redirect.target}: its parameters are ({', '.join(found)}), "
                f"expected to begin with ({', '.join(redirect.parameters)})"
            )
    return _Resolved(owner, name, original, redirect)


def apply_redirects(redirects: Iterable[Redirect]) -> None:
    """Checks every target, then replaces all of them; on a failed check nothing is replaced.

    Args:
        redirects: The table. The modules named in it are imported.

    Raises:
        RuntimeError: If targets are missing or have changed. Names each of them and the Megatron-Core version.
    """
    resolved: list[_Resolved] = []
    mismatches: list[str] = []
    for redirect in redirects:
        try:
            resolved.append(_resolve(redirect))
        except _Mismatch as mismatch:
            mismatches.append(str(mismatch))
    if mismatches:
        raise mismatch_error("; ".join(mismatches))
    for item in resolved:
        replacement = item.redirect.make(item.original)
        if inspect.isfunction(replacement) and replacement is not item.original:
            functools.update_wrapper(replacement, item.original)
            # A static method reads as its function; set on the class, it must be static again.
            if isinstance(inspect.getattr_static(item.owner, item.name, None), staticmethod):
                replacement = staticmethod(replacement)
        setattr(item.owner, item.name, replacement)
