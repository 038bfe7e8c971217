"""Models as Hugging Face Transformers stores them, from and to Megatron's checkpoints, without building a model.

In: a `torch_dist` checkpoint, or a directory with config.json and safetensors. Out: the other one.
"""
