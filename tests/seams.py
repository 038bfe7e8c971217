"""Takes the seams of `megatron_muon.megatron.entry.seams` out of a test process again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_muon.megatron.entry import active, messages, seams


@contextmanager
def seams_removed_afterwards() -> Iterator[None]:
    """A context after which Megatron is stock again, and Distributed Muon not active."""
    try:
        yield
    finally:
        active.activate(None)
        messages.say.cache_clear()
        seams.remove_seams()
