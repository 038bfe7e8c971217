"""Runs `megatron_muon.profile.command`."""

from megatron_muon.profile.command import main

if __name__ == "__main__":
    raise SystemExit(main())
