"""Checkpoints as files: what is in them, another optimizer's state made of them, and whether they are whole.

Nothing here needs a process group or a GPU. Checkpoints are not trusted: what is unpickled comes from a closed list.
"""
