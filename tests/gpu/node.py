"""One rank of Distributed Muon without Megatron on every GPU of a node; rank 0 prints what differs from the reference.

torchrun --nproc-per-node N -m tests.gpu.node     (over NCCL; it ends with an error if the difference is too large)
"""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist

from tests.optimizer.test_sharded_muon import CONFIGS, Case, reference, train

# Of weights of about 1. On a GPU products add in another order, and Newton-Schulz multiplies their roundings, 6e-8
# each, by up to 1e3 where singular values are small. An update is about 0.01; one that is lost differs by as much.
TOLERANCE = 1e-4


def cases_of(world_size: int) -> list[Case]:
    """In fp32 and with bf16 messages, in one round and in three; with stacked matrices; and with teams."""
    cases = [Case(world_size, i, config, rounds) for i, config in enumerate(CONFIGS[:2]) for rounds in (1, 3)]
    cases.append(dataclasses.replace(cases[0], config=dataclasses.replace(CONFIGS[0], batched=True)))
    if world_size > 1:
        cases += [dataclasses.replace(case, teams=True) for case in cases[:2]]
    return cases


def worst_difference(rank: int, world_size: int, device: str) -> float:
    """Of any weight after three steps, over ranks and `cases_of`."""
    cases = cases_of(world_size)
    worst = torch.zeros((), device=device)
    for case, result in zip(cases, train(rank, world_size, cases, torch.device(device)), strict=True):
        oracle = reference(case)
        for name, (low, high) in case.held(rank).items():
            expected = oracle.parameters[name].flatten()[low:high].to(device)
            worst = torch.maximum(worst, (result["weights"][name] - expected).abs().max())
    if world_size > 1:
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    worst = worst_difference(dist.get_rank(), dist.get_world_size(), f"cuda:{torch.cuda.current_device()}")
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print(f"largest difference from the reference: {worst:.2e}", flush=True)
    if worst > TOLERANCE:
        raise SystemExit(f"got a difference of {worst:.2e} from the reference, expected at most {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
