"""`cpu_pretrain_gpt.py` for megatron-core 0.18, whose training loop takes a function that makes the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

from tests.scripts.cpu_pretrain_gpt import datasets_provider, forward_step


def model_provider(pre_process: bool = True, post_process: bool = True, **rest: Any) -> Any:
    """One stage of the model."""
    args, stage = get_args(), rest.get("vp_stage")
    config = rest.get("config") or core_transformer_config_from_args(args)
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, False, args.normalization, vp_stage=stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        pg_collection=rest.get("pg_collection"),
        vp_stage=stage,
    )


if __name__ == "__main__":
    container = pretrain_cfg_container_from_args(parse_and_validate_args())
    pretrain(container, datasets_provider, model_provider, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()
