"""Megatron's optimizers around `ShardedMuon`.

In: tagged parameters in DDP's buffers. Out: `MuonDistributedOptimizer`s and AdamW in one chain, with plans bound.
"""
