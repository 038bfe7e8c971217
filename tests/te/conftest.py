"""Collects these tests where Transformer Engine is installed only: the environment of `make test-te`."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("transformer_engine") is None else []
