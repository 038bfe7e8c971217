"""What a Megatron run writes about its Muon steps.

In: observers and watches of the optimizers. Out: log lines, TensorBoard, W&B, files of metrics and traces.
"""
