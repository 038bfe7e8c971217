"""Names of back ends, iterations and data types, for planning and the command line: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

BackendName = Literal["torch", "emerging", "gram-newton-schulz"]
Iteration = Literal["auto", "standard", "gram"]

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8})
"""Bytes of an element, by the name of its data type."""
