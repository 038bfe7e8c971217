"""Who orthogonalizes what: frozen plans, how they are built and balanced, and what they cost.

In: shapes, storage ranges and settings, the same on every rank. Out: an `OwnershipPlan` that proves its own cover.
Numbers only: no torch.distributed and no tensors of a model.
"""
