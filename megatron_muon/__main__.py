"""Runs `megatron_muon.cli`."""

from megatron_muon.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
