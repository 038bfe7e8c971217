"""The choices of back end and iteration by name, for the command line: without torch."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["torch", "emerging", "gram-newton-schulz"]
Iteration = Literal["auto", "standard", "gram"]
