"""Runs `sft.cli`, also as `python examples/sft`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
