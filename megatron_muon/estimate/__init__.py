"""What a step of Muon costs under a parallel layout, told from shapes alone: `python -m megatron_muon plan`.

`estimate_model` makes the estimates, `plan_table` compares layouts of many sizes. The matrices, their slices and the
ownership plan are those of the plugin; buffers are laid out by Megatron-Core's own functions.
"""
