"""Distributed Muon's state in Megatron's checkpoints.

In: optimizers and what Megatron's save and load hand over. Out: sharded state, manifests, and state adopted from
AdamW's checkpoints.
"""
