"""Takes the seams of `megatron_muon.megatron.entry.seams` out of a test process again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_muon.megatron.entry import messages
from megatron_muon.megatron.entry import seams as compat


@contextmanager
def seams_removed_afterwards() -> Iterator[None]:
    """A context after which Megatron is stock again, as far as this process has imported it."""
    try:
        yield
    finally:
        compat.activate(None)
        messages.say.cache_clear()
        for module in list(sys.modules.values()):
            if inspect.ismodule(module):
                owners = [module, *(v for v in vars(module).values() if inspect.isclass(v))]
                for owner in owners if module.__name__.startswith("megatron.") else [module]:
                    for name, value in list(vars(owner).items()):
                        function = value.__func__ if isinstance(value, staticmethod) else value
                        if inspect.isfunction(function) and compat.SEAM_MARK in vars(function):
                            stock = inspect.unwrap(function)
                            setattr(owner, name, stock if function is value else staticmethod(stock))
