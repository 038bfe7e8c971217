"""Distributed Muon inside Megatron-Core: the only room that imports Megatron when it is imported.

In: Megatron's arguments, model chunks and process groups. Out: a chained optimizer that Megatron drives as its own.
`entry` takes flags and installs seams, `model` reads the model, `optimizer` builds, `checkpoint` saves, `log` writes.
"""
