"""AdamW's moments for matrices that come from Muon, which has no second moment.

`exp_avg` is Muon's mean gradient m. `exp_avg_sq` is one number per matrix, chosen so that AdamW's update, computed from
both as they are written, has the RMS that Muon's had: Muon's is scaled to 0.2, what AdamW's usually is (Moonlight,
arXiv 2502.16982, section 2.2). With bias correction at the next step t,

    rms(m / (1 - beta1^t)) / sqrt(v / (1 - beta2^t)) = 0.2
    v = mean(m^2) / 0.2^2 * (1 - beta2^t) / (1 - beta1^t)^2

Where gradients are mostly noise, mean(m^2) is (1 - momentum)/(1 + momentum) of mean(g^2): v is then 0.64 of AdamW's own
at a momentum of 0.95. Where they are steady it is 25 times as large. So updates start between 0.2 and 1.25 times the
size that AdamW's own state would give, and approach that size as beta2^k decays. With a second moment of zero they
would have no bound.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_muon.checkpoints.reader import Checkpoint
from megatron_muon.config import MuonConfig

# Numbers at a time: a float64 copy of a whole chunk would be twice its size.
_PIECE_NUMEL = 1 << 20


def square_factor(betas: tuple[float, float], step: int) -> float:
    """`exp_avg_sq` over the mean square of `exp_avg`.

    Args:
        betas: Betas of AdamW.
        step: Number of AdamW's steps, the largest over its parameters.
    """
    first, second = (1.0 - beta ** (step + 1) for beta in betas)
    return float(second / (MuonConfig.update_rms * first) ** 2)


def largest_restart_factor(beta1: float, beta2: float) -> float:
    """The largest update of an AdamW whose zero moments are not bias-corrected, for a steady gradient, over the usual.

    After k steps it is (1 - beta1^k) / sqrt(1 - beta2^k).
    """
    steps = range(1, 2 + int(5 / (1 - beta1)))
    return float(max((1 - beta1**k) / (1 - beta2**k) ** 0.5 for k in steps))


def sum_of_squares(tensor: Tensor) -> float:
    """The sum of a tensor's squares, accumulated in fp64."""
    return sum(float(piece.double().square().sum()) for piece in torch.split(tensor.reshape(-1), _PIECE_NUMEL))


def mean_squares(checkpoint: Checkpoint, key: str, stacked: int) -> Tensor:
    """The mean square of each matrix in a tensor; reads it once, one chunk at a time.

    Args:
        checkpoint: The checkpoint.
        key: Key of the tensor.
        stacked: Number of leading axes that count layers and experts.

    Returns:
        fp64, of the shape of those axes.
    """
    size = checkpoint.tensors[key].size
    sums = torch.zeros(size[:stacked], dtype=torch.float64)
    for chunk, tensor in checkpoint.chunks(key):
        lead = itertools.product(*(range(count) for count in chunk.sizes[:stacked]))
        for at in lead:
            place = tuple(offset + index for offset, index in zip(chunk.offsets, at))
            sums[place] += sum_of_squares(tensor[at])
        # Before the next one is read.
        del tensor
    return sums / size[stacked:].numel()


def spread(means: Tensor, offsets: torch.Size, sizes: torch.Size) -> Tensor:
    """A chunk in which every element of a matrix is the matrix's number of `means`; fp32."""
    stacked = means.dim()
    part = means[tuple(slice(o, o + n) for o, n in zip(offsets[:stacked], sizes[:stacked]))]
    return part.float().reshape(*part.shape, *(1 for _ in sizes[stacked:])).expand(sizes).contiguous()
