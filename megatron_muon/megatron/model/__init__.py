"""What Megatron's model says about its parameters.

In: model chunks. Out: which parameters are Muon's, their names in the whole model, their logical matrices, and which
weights are FP8.
"""
