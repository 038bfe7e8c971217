"""Bandwidth profiling: what the exchange costs, and whether the links deliver it. `python -m megatron_muon.profile`."""
