"""The command-line flags that Megatron's scripts need on a CPU."""

from __future__ import annotations

# Flags without which megatron.training needs CUDA, fused kernels or Transformer Engine. None: a flag without a value.
REQUIRED_FLAGS: tuple[tuple[str, str | None], ...] = (
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),
    ("--attention-backend", "unfused"),
    ("--use-cpu-initialization", None),
    ("--no-persist-layer-norm", None),
    ("--no-gradient-accumulation-fusion", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-bias-swiglu-fusion", None),
    ("--no-bias-gelu-fusion", None),
    ("--no-bias-dropout-fusion", None),
    ("--no-rope-fusion", None),
    # On a CPU, worker processes compete with the ranks for the same cores.
    ("--num-workers", "0"),
)


def cpu_arguments() -> list[str]:
    """`REQUIRED_FLAGS` as command-line words, to be appended to a script's own: argparse lets the last one win."""
    return [word for flag, value in REQUIRED_FLAGS for word in ((flag,) if value is None else (flag, value))]
