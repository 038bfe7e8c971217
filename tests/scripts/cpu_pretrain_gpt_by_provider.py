"""`cpu_pretrain_gpt.py` with a function that makes the model, which is how scripts before Megatron-Core 0.19 say it.

Megatron then wraps the model by other code, which gives its layer-wise Muon the buffers it is made for.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelBuilder

from tests.scripts.cpu_pretrain_gpt import datasets_provider, forward_step


def model_provider(pre_process: bool, post_process: bool, pg_collection: Any = None, **rest: Any) -> Any:
    """One stage of the model."""
    builder = GPTModelBuilder(gpt_config_from_args(get_args()))
    return builder.build_model(pg_collection, pre_process, post_process, rest.get("vp_stage"))


if __name__ == "__main__":
    config = pretrain_cfg_container_from_args(parse_and_validate_args(), None)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step, model_provider)
    torch.distributed.destroy_process_group()
