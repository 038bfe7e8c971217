"""What a step of Muon costs under a parallel layout, from shapes alone: `python -m megatron_muon plan`.

In: a model's shapes, a layout and settings. Out: for each pipeline stage, what three schemes ask of a rank. Matrices,
slices and plans are the plugin's own; buffers follow Megatron-Core's rules. Imports neither torch nor Megatron.
"""
