"""`ShardedMuon`, a torch optimizer on flat slices, and the step that it takes.

In: a plan, a process group and this rank's slices with their gradients. Out: updated slices and state.
The step reads as its phases: momentum, gather, Newton-Schulz, scatter, apply.
"""
