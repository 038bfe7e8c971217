"""How a Megatron script becomes one with Distributed Muon.

In: the command line and the installed Megatron. Out: settings, checks before the first collective, and the seams.
"""
