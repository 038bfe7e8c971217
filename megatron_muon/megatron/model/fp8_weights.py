"""FP8 primary weights (`--fp8-param-gather`): what of Megatron's path Distributed Muon relies on, and what it refuses.

The path is Megatron's own, which MuonDistributedOptimizer inherits; Muon updates the fp32 main slices and touches no
FP8 tensor:

1. Transformer Engine makes the parameters (`QuantizedTensor`); DDP puts their bytes into a uint8 buffer, and the tag
   puts those of Muon into one of their own. Main slices start from the bf16 values that TE keeps beside.
2. After the update, `_copy_main_params_to_model_params` quantizes each rank's slices by scales of the whole matrix: it
   all-reduces maxima over the (expert-)data-parallel group, so every rank of it must come here, also one that stores
   nothing. ShardedMuon is made on all of them, hence no rank is left out.
3. The chain gathers the bytes once all its optimizers have stepped.

mxfp8 has scales in two directions and gathers bf16 in the place of the gradients instead
(`--reuse-grad-buf-for-mxfp8-param-ag`); no gradient is read after the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron.core import fp8_utils
from megatron.core.fp4_utils import is_nvfp4tensor
from megatron.core.fp8_utils import is_float8tensor
from torch import nn

# megatron-core 0.18 knows no parameter that holds the matrices of all experts.
is_grouped_tensor: Callable[[nn.Parameter], bool] = getattr(fp8_utils, "is_grouped_tensor", lambda parameter: False)


def check_kinds(tagged: Iterable[tuple[str, nn.Parameter, bool]]) -> None:
    """Checks quantized parameters before DDP makes its buffers. Issues no collective.

    Args:
        tagged: Name, parameter, and whether it is Muon's, of all trainable parameters of a model chunk.

    Raises:
        NotImplementedError: If parameters are of a kind that Distributed Muon cannot update, or some are Muon's and
            some AdamW's: Megatron has one buffer for FP8 in each of the dense and the expert parameters.
    """
    first: dict[tuple[bool, bool], str] = {}
    for name, parameter, is_muon in tagged:
        if is_grouped_tensor(parameter):
            raise NotImplementedError(
                f"{name}: got all experts' matrices in one parameter, expected one parameter each with Distributed "
                "Muon, which takes matrices; omit --moe-single-grouped-weight"
            )
        if is_nvfp4tensor(parameter):
            raise NotImplementedError(
                f"{name}: got an NVFP4 primary weight, expected FP8 or bf16 with Distributed Muon; omit "
                "--fp4-param-gather"
            )
        if is_float8tensor(parameter):
            first.setdefault((not getattr(parameter, "allreduce", True), is_muon), name)
    for expert in (False, True):
        if (expert, False) in first and (expert, True) in first:
            raise NotImplementedError(
                f"{first[expert, False]}: got an FP8 primary weight for AdamW beside Muon's {first[expert, True]}, "
                "expected all of Muon: Megatron has one FP8 buffer for both; omit use_muon=False on it, keep its "
                "module in bf16, or omit --fp8-param-gather"
            )


def check_gather(parameters: Iterable[tuple[str, nn.Parameter]], ddp_config: Any) -> None:
    """Checks that FP8 parameters follow their main parameters. Issues no collective.

    Without `fp8_param_gather` Megatron's optimizer skips them silently.

    Raises:
        ValueError: If they would not.
    """
    if ddp_config.fp8_param_gather:
        return
    name = next((name for name, parameter in parameters if is_float8tensor(parameter)), None)
    if name is not None:
        raise ValueError(
            "DistributedDataParallelConfig.fp8_param_gather: got False, expected True with FP8 primary weights such as "
            f"{name}, which would never be updated; add --fp8-param-gather, or build the model without fp8_param"
        )
