"""Runs `scaling_law.cli`, also as `python examples/scaling_law`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaling_law.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
