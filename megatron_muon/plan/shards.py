"""Which data-parallel ranks store which range of a parameter, in a bucket that is cut into equal shards."""

from __future__ import annotations


def shard_ranges(begin: int, end: int, shard_numel: int) -> list[tuple[int, int, int]]:
    """The flat ranges of a parameter that data-parallel ranks store.

    Megatron's DistributedOptimizer cuts a bucket into equal shards, one for each data-parallel rank, without regard to
    parameters. The ranks that store a part of a parameter therefore follow each other, and both ends of their range
    are known from two divisions, whatever the number of ranks.

    Args:
        begin: First element of the parameter, counted from the beginning of its bucket.
        end: One past its last element.
        shard_numel: Elements of a shard.

    Returns:
        (rank, start, stop) in ascending order; `start` and `stop` count from the parameter's first element.
    """
    if begin >= end:
        return []
    return [
        (rank, max(rank * shard_numel - begin, 0), min((rank + 1) * shard_numel, end) - begin)
        for rank in range(begin // shard_numel, (end - 1) // shard_numel + 1)
    ]
