"""torch.distributed with Gloo, for code written against NCCL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _CoalescingManager, _world

from megatron_muon.megatron.entry.patching import Patch

_Splits = Sequence[int] | torch.Tensor | None


def _as_ints(splits: _Splits) -> list[int] | None:
    if splits is None:
        return None
    if isinstance(splits, torch.Tensor):
        return [int(size) for size in splits.tolist()]
    return [int(size) for size in splits]


def _all_to_all_single(
    original: Callable[..., Any],
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: _Splits = None,
    input_split_sizes: _Splits = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Split sizes may be tensors: the MoE dispatcher turns only those on a CUDA device into NumPy arrays."""
    return original(output, input, _as_ints(output_split_sizes), _as_ints(input_split_sizes), group, async_op)


class _Works:
    """Handle of several collectives, with the part of `Work` that callers use."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait() if timeout is None else work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _all_gather(
    original: Callable[..., Any],
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Gathers tensors of unequal sizes, which NCCL does and Gloo refuses, as one broadcast from each rank."""
    # Every rank passes the same sizes, so that all of them take the same branch.
    if all(output.numel() == tensor_list[0].numel() for output in tensor_list):
        return original(tensor_list, tensor, group, async_op)
    rank = dist.get_rank(group)
    if tensor_list[rank].shape != tensor.shape:
        raise ValueError(
            f"all_gather: tensor_list[{rank}] has shape {tuple(tensor_list[rank].shape)}, "
            f"but this rank's tensor has {tuple(tensor.shape)}; give them the same shape"
        )
    tensor_list[rank].copy_(tensor)
    works = _Works(
        [
            dist.broadcast(output, group=group, group_src=source, async_op=True)
            for source, output in enumerate(tensor_list)
            if output.numel()
        ]
    )
    if async_op:
        return works
    works.wait()
    return None


@contextmanager
def _coalescing_manager(
    original: Callable[..., Any],
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    async_ops: bool = False,
) -> Iterator[_CoalescingManager]:
    """Coalesces per dtype, and forgets its operations when the block raises.

    Gloo's coalesced all-gather flattens all tensors into the first one's dtype: with FP8 weights, which Megatron-Core
    gathers together with bf16 ones, every buffer comes back corrupt without an error. torch's own manager leaves the
    operations of a failed block for the next one on the group, which then refuses to start.
    """
    if device is not None:
        raise NotImplementedError(f"coalescing on a device (got {device}) is NCCL's; Gloo has none: omit `device`")
    group = group if group is not None else dist.group.WORLD
    assert group is not None, "torch.distributed is not initialized"
    if group in _world.pg_coalesce_state:
        raise RuntimeError("a coalescing block on this group is open already; close it first")
    operations: list[Any] = []
    _world.pg_coalesce_state[group] = operations
    handle = _CoalescingManager()
    try:
        yield handle
    finally:
        # Also when the block raised: its operations were not issued, and must not be by the next block.
        del _world.pg_coalesce_state[group]
    by_kind: dict[tuple[Any, ...], list[Any]] = {}
    for operation in operations:
        by_kind.setdefault((operation.op, operation.redop, operation.tensor.dtype), []).append(operation)
    for batch in by_kind.values():
        with original(group, async_ops=async_ops) as batch_handle:
            _world.pg_coalesce_state[group].extend(batch)
        handle.works.extend(batch_handle.works)


def _batched_p2p_ops(original: Callable[..., Any], **given: Any) -> Any:
    """Refuses a batch in which one rank is both neighbours, where sends cannot be told apart.

    Sends between two ranks are matched by their order, and `send to previous` on one side is `receive from next` on
    the other: activations would be taken for gradients. Megatron's command line refuses this layout; its API does not.
    """
    with_previous = given["tensor_send_prev"] is not None or given["tensor_recv_prev"] is not None
    with_next = given["tensor_send_next"] is not None or given["tensor_recv_next"] is not None
    if with_previous and with_next and given["prev_pipeline_rank"] == given["next_pipeline_rank"]:
        raise ValueError(
            "overlap_p2p_comm: got False with a virtual pipeline over 2 stages, expected True: in one batch, both "
            "neighbours are the same rank. Set overlap_p2p_comm=True and batch_p2p_comm=False, or use more stages"
        )
    return original(**given)


PATCHES = (
    Patch(
        "torch.distributed:all_to_all_single",
        _all_to_all_single,
        "the MoE dispatcher passes split sizes as tensors",
        ("output", "input", "output_split_sizes", "input_split_sizes", "group", "async_op"),
    ),
    Patch(
        "torch.distributed:all_gather",
        _all_gather,
        "Gloo refuses unequal sizes",
        ("tensor_list", "tensor", "group", "async_op"),
    ),
    *(
        Patch(
            f"{module}:_coalescing_manager",
            _coalescing_manager,
            "a coalesced all-gather over mixed dtypes corrupts its buffers",
            ("group", "device", "async_ops"),
        )
        for module in ("torch.distributed", "megatron.core.distributed.param_and_grad_buffer")
    ),
    Patch(
        "megatron.core.pipeline_parallel.p2p_communication:_batched_p2p_ops",
        _batched_p2p_ops,
        "a virtual pipeline over 2 stages would train on mixed-up tensors",
        (
            *("tensor_send_prev", "tensor_recv_prev", "tensor_send_next", "tensor_recv_next"),
            *("group", "prev_pipeline_rank", "next_pipeline_rank"),
        ),
    ),
)
