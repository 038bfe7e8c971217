"""The one place that says whether, and with which settings, Distributed Muon is active in this process."""

from __future__ import annotations

import sys

from megatron_muon.config import MuonConfig

_active: MuonConfig | None = None
# Whether command-line flags activated it, rather than `enable`.
_by_flags = False


def activate(config: MuonConfig | None) -> None:
    """Makes the installed seams use these settings from now on; None makes them pass through to Megatron."""
    global _active, _by_flags
    _active, _by_flags = config, False


def activate_by_flags(config: MuonConfig | None) -> None:
    """As `activate`, for parsed arguments: without the flag they end what earlier flags began, but not `enable`."""
    global _by_flags
    if config is not None or _by_flags:
        activate(config)
    _by_flags = config is not None


def active_config() -> MuonConfig | None:
    """The settings in use, or None if Distributed Muon is not active in this process."""
    return _active


def cpu_backend_installed() -> bool:
    """Whether this package's CPU backend serves this process."""
    # Only asked once something has imported the backend: without it the answer is known.
    backend = sys.modules.get("megatron_muon.cpu")
    return backend is not None and bool(backend.is_installed())
