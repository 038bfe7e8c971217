"""bf16 matrix products in fp32, rounded once: for processors that have no bf16 arithmetic.

There torch falls back on a loop that is 3 to 60 times slower than converting, multiplying in fp32 and rounding
(2048 x 512 x 128 on an AVX2 processor: 191 ms against 3). Sums are in fp32 either way. What a processor with bf16
arithmetic gives differs by the order of its sums alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

_library: Any = None  # torch drops the kernels with it


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices itself (AVX-512 BF16; AMX processors have it too)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def install_fp32_products() -> None:
    """Makes `mm`, `bmm`, `addmm` and `baddbmm` of bf16 tensors on the CPU compute in fp32. A second call does nothing.

    Below autograd, so that backward passes take the same way. Other data types keep torch's own kernels, which are
    reached through the variants with `out`.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, kernel in (("mm", _mm), ("bmm", _bmm), ("addmm", _addmm), ("baddbmm", _baddbmm)):
            _library.impl(name, kernel, "CPU")


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16:
        return _mm(a.float(), b.float()).bfloat16()
    out: Tensor = _aten.mm.out(a, b, out=a.new_empty(0))
    return out


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16:
        return _bmm(a.float(), b.float()).bfloat16()
    out: Tensor = _aten.bmm.out(a, b, out=a.new_empty(0))
    return out


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16 and c.dtype is torch.bfloat16:
        return _addmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha).bfloat16()
    out: Tensor = _aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))
    return out


def _baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16 and c.dtype is torch.bfloat16:
        return _baddbmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha).bfloat16()
    out: Tensor = _aten.baddbmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))
    return out
