"""Which tests need processes of their own, and in which order workers take them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import pytest

from tests import distributed

# Files of long tests, longest first: no worker starts one of them when the other has nothing left to do.
LONG = [
    *("megatron/test_faults", "checkpoints/test_conversion_runs", "megatron/test_sharded_states"),
    *("megatron/test_training_checkpoints", "checkpoints/test_convert", "cpu/test_training", "test_launch"),
    *("cpu/test_pretrain", "cpu/test_fp8", "megatron/test_attention_clip", "profile/test_profiling"),
    *("profile/test_links", "checkpoints/test_manifest", "optimizer/test_exactness"),
]
PROCESSES = ("run_ranks", "subprocess", "Popen", "fork")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _starts_processes(item):
            item.add_marker(pytest.mark.fast)
    items.sort(key=lambda item: _place(item.nodeid))


def pytest_collection_finish(session: pytest.Session) -> None:
    modules = {item.module.__name__ for item in session.items if isinstance(item, pytest.Function)}
    distributed.preload(sorted(name for name in modules if name.startswith("tests.")))


def _place(nodeid: str) -> int:
    name = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    return LONG.index(name) if name in LONG else len(LONG)


def _starts_processes(item: pytest.Item) -> bool:
    """Whether a test, its fixtures, or a function of the tests that they name, names what starts processes."""
    if not isinstance(item, pytest.Function):
        return True
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    todo: list[Any] = [item.function, *fixtures]
    seen: set[Any] = set()
    while todo:
        function = inspect.unwrap(todo.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen or not function.__module__.startswith("tests"):
            continue
        seen.add(code)
        names = set(_names(code))
        if names & set(PROCESSES):
            return True
        todo += [function.__globals__[name] for name in names if name in function.__globals__]
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function uses, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
