"""Fine-tunes a GPT on chats with `megatron.training.pretrain`: packed, with the loss on answers alone.

    torchrun --nproc-per-node 4 -m megatron_muon.launch --device cpu examples/sft/finetune_mini_moonlight.py \
        $(grep -v '^#' examples/mini_moonlight.flags) --load RUN --finetune --distributed-muon \
        --train-data-path train.jsonl --valid-data-path valid.jsonl ...

Like `pretrain_mini_moonlight.py` it knows neither Muon nor the CPU backend. Its data paths are JSON lines of chats.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from megatron.core.datasets.utils import Split
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tensorboard_writer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from pretrain_mini_moonlight import Repeated, loss_func

from sft.packing import Batch, PackedChats, read_chats


def datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
    """Builds the packed training and validation sets, on every rank; see `pretrain_mini_moonlight`."""
    args = get_args()
    period = args.eval_iters * args.eval_global_batch_size
    train = PackedChats(read_chats(args.train_data_path), args.seq_length, num_samples[0], args.seed, Split.train)
    valid = PackedChats(read_chats(args.valid_data_path), args.seq_length, period, args.seed, Split.valid)
    return train, Repeated(valid, period, num_samples[1]), None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron then calls it on every rank


def forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Runs the model on one micro-batch; returns its token losses and the function that sums them."""
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


def main() -> None:
    """Fine-tunes."""
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
