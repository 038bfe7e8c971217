"""Pretrains a GPT on bytes with `megatron.training.pretrain`; the model is what the flags say.

An ordinary Megatron-Core pretraining script: it knows neither Muon nor the CPU backend. `examples/demo.py` gives it
the flags of a mini-Moonlight; with `--tensorboard-dir` it also leaves, beside the TensorBoard files, one
`optimizer.rank<N>.json` per rank that tells what the optimizers of the rank keep.

    torchrun --nproc-per-node 4 examples/pretrain_mini_moonlight.py <megatron flags>
    torchrun --nproc-per-node 4 -m megatron_muon.launch --device cpu \
        examples/pretrain_mini_moonlight.py <megatron flags> --distributed-muon
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tensorboard_writer, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch.optim.optimizer import register_optimizer_step_post_hook

Batch = dict[str, torch.Tensor]


class Repeated(torch.utils.data.Dataset[Batch]):
    """The first samples of a dataset, over and over, so that every evaluation sees the same ones.

    Args:
        dataset: The dataset, shuffled once.
        period: How many of its samples to repeat.
        num_samples: Length to pretend.

    Raises:
        ValueError: If the dataset has fewer samples than `period`.
    """

    def __init__(self, dataset: GPTDataset, period: int, num_samples: int) -> None:
        if len(dataset) < period:
            raise ValueError(
                f"--eval-iters x --eval-global-batch-size: got {period} samples, expected at most {len(dataset)}, "
                "the validation set's"
            )
        self.split = dataset.index_split  # by which Megatron chooses the evaluation's batch size
        self._dataset = dataset
        self._period = period
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Batch:
        sample: Batch = self._dataset[index % self._period]
        return sample


def datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
    """Builds the training and validation datasets, on every rank.

    Args:
        num_samples: How many samples training and validation will read; a third number is unused: no test set.
        vp_stage: Unused: each virtual stage reads the same samples.

    Returns:
        The two datasets, and None for the test set.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    # The files are mapped into memory and a sample depends on the data-parallel rank only, so every rank reads for
    # itself and nothing has to be broadcast over the tensor-parallel group.
    sizes = [num_samples[0], None, None]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    valid = Repeated(valid, args.eval_iters * args.eval_global_batch_size, num_samples[1])
    return train, valid, None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron then calls it on every rank


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Sums a micro-batch's token losses.

    Args:
        loss_mask: 1 where a token counts; `[batch, sequence]`.
        losses: Cross entropy in nats per token; `[batch, sequence]`.

    Returns:
        The summed loss, the number of tokens, and the pair of both that Megatron averages over data-parallel ranks.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Runs the model on one micro-batch; returns its token losses and the function that sums them."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()  # whoever follows the event file sees an iteration once the next one starts
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


class OptimizerWatch:
    """Knows the `torch.optim` optimizers that step on this rank, whatever Megatron wraps around them."""

    def __init__(self) -> None:
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._optimizers[id(optimizer)] = optimizer

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that optimizers keep from step to step, by the optimizers' class names."""
        found: dict[str, int] = {}
        for optimizer in self._optimizers.values():
            tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            name = type(optimizer).__name__
            found[name] = found.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
        return found


def main() -> None:
    """Trains, then writes how much state this rank's optimizers keep."""
    args = parse_and_validate_args()
    watch = OptimizerWatch()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()
    if args.tensorboard_dir:
        path = Path(args.tensorboard_dir) / f"optimizer.rank{args.rank}.json"
        path.write_text(json.dumps(watch.state_bytes()) + "\n", encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
