"""One rank of a short training run of Transformer Engine's modules with Muon, on CUDA; prints its losses as JSON.

torchrun --nproc-per-node N -m tests.gpu.te_training RECIPE   (bf16, delayed, tensorwise, blockwise or mxfp8)
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

STEPS, SEQUENCE_LENGTH, BATCH = 20, 128, 4
# Whole blocks of 128 x 128, which the kernels' matrix products want of every recipe's operands.
SIZES: dict[str, Any] = dict(
    hidden_size=256,
    ffn_hidden_size=256,
    kv_channels=64,
    moe_ffn_hidden_size=256,
    moe_shared_expert_intermediate_size=256,
    use_cpu_initialization=False,
    moe_router_padding_for_quantization=True,
)


def losses(recipe: str) -> list[float]:
    """Trains on two batches in turn; returns the mean loss over the ranks before each update."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_muon.config import MuonConfig
    from tests.models import VOCABULARY, Layout
    from tests.te.fp8_runs import Recipe, build_fp8

    world_size = dist.get_world_size()
    layout = Layout(world_size, ep=min(2, world_size), config=SIZES)
    run = build_fp8(layout, None if recipe == "bf16" else cast(Recipe, recipe), muon=MuonConfig(), clip_grad=1.0)
    (chunk,) = run.chunks
    chunk.config.finalize_model_grads_func = finalize_model_grads
    group = ps.get_data_parallel_group()
    out = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1000 + step % 2)
        tokens = torch.randint(0, VOCABULARY, (BATCH, 1, SEQUENCE_LENGTH + 1), generator=generator).cuda()
        mine = tokens[dist.get_rank(group) :: dist.get_world_size(group)]
        chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(mine),
            model=chunk,
            num_microbatches=len(mine),
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=1,
            decoder_seq_length=SEQUENCE_LENGTH,
        )
        successful, _, _ = run.optimizer.step()
        assert successful
        mean = torch.stack([entry["loss"] for entry in reported]).mean()
        dist.all_reduce(mean, op=dist.ReduceOp.AVG, group=group)
        out.append(mean.item())
    return out


def _forward(batches: Any, chunk: Any) -> tuple[Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE_LENGTH, device=tokens.device)[None]
    output = chunk(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())

    def loss(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = values.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    found = losses(sys.argv[1])
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
