"""bf16 matrix products in fp32: the values, the gradients, and that other data types keep torch's own kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks


def products(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """mm, bmm, addmm and baddbmm, on views as the backward passes have them."""
    stacked = [t.expand(2, -1, -1) for t in (c, a, b)]
    return [
        a @ b,
        torch.bmm(*stacked[1:]),
        torch.addmm(c, a, b, beta=0.5, alpha=2.0),
        torch.baddbmm(*stacked, beta=0.5, alpha=2.0),
        torch.addmm(c[0], a, b),
        (b.mT @ a.mT).mT,
    ]


def _compare(rank: int, world_size: int) -> list[list[Any]]:
    from megatron_muon.cpu.products import install_fp32_products

    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((37, 129), (129, 22), (37, 22)))
    half = [t.bfloat16() for t in (a, b, c)]
    fp32, rounded = products(a, b, c), [p.bfloat16() for p in products(*(t.float() for t in half))]
    integers = torch.arange(6).view(2, 3)
    integer_product = integers @ integers.T

    install_fp32_products()
    install_fp32_products()

    now, then = products(a, b, c), products(*half)
    x, w = half[0].clone().requires_grad_(), half[1].mT.clone().requires_grad_()
    torch.nn.functional.linear(x.view(1, 37, 129), w).backward(half[2][None])
    assert x.grad is not None and w.grad is not None
    gradients = [x.grad, w.grad]
    wanted = [(half[2].float() @ half[1].float().mT).bfloat16(), (half[2].float().mT @ half[0].float()).bfloat16()]
    with pytest.raises(RuntimeError, match="same dtype"):
        a @ half[1]
    return [
        [torch.equal(p, q) for p, q in zip(fp32, now, strict=True)],
        [p.dtype is torch.bfloat16 and torch.equal(p, q) for p, q in zip(then, rounded, strict=True)],
        [torch.equal(p, q) for p, q in zip(gradients, wanted, strict=True)],
        [torch.equal(integers @ integers.T, integer_product)],
    ]


def test_products_of_bf16_are_those_of_fp32_rounded_once() -> None:
    """In a process of its own: kernels that are replaced stay so."""
    fp32, bf16, gradients, integers = run_ranks(_compare, 1)[0]
    assert all(fp32) and all(bf16) and all(gradients) and all(integers)
