"""The iterations themselves, in plain PyTorch.

Sources: Keller Jordan's Muon post (standard iteration); Zhang, Amsel, Chen, Dao, "Gram Newton-Schulz",
https://dao-ailab.github.io/blog/2026/gram-newton-schulz/ (iterating on the Gram matrix, with restarts); Boissin
et al., "Turbo-Muon", https://hal.science/hal-05390446 (AOL scaling).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muon.newton_schulz.coefficients import AOL_SIGMA_MAX, Scaling, Schedule, check_schedule
from megatron_muon.newton_schulz.cost import (
    GRAM_DTYPES,
    block_columns,
    check_iteration,
    choose_iteration,
    restart_segments,
    symmetric_blocks,
)
from megatron_muon.newton_schulz.names import Iteration

MARGIN = 1e-7
"""Relative distance that normalized matrices keep from a norm of one, if the machine epsilon is smaller."""

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

# On a CPU, matrices from this many elements on run one after the other: one matrix's scratch stays in the cache where
# a batch's does not (13 % at 128 x 128 in float32), and a batch gives each matrix the bits it would have had alone.
_CPU_BATCH_NUMEL = 128 * 128


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the data type in which norms and scale factors of a ``dtype`` tensor are held."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def power_of_two_and_norm(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Divides each matrix by the power of two next to its largest entry, and takes the norm of the quotient.

    The division is exact unless entries are negligibly small, and no square of the quotient under- or overflows, so
    that norms do not depend on the scale of the input.

    Args:
        x: Matrices (..., M, N), floating point. Not mutated.
        out: Contiguous tensor that the quotients are written to, shape and data type of ``x``.

    Returns:
        The powers of two and the Frobenius norms of the quotients, (..., 1, 1), in `accumulation_dtype`.
    """
    dtype = accumulation_dtype(x.dtype)
    limits = torch.finfo(dtype)
    torch.abs(x, out=out)
    peak = out.amax(dim=(-2, -1), keepdim=True).to(dtype).clamp_(limits.tiny, limits.max / 2)
    power = peak / torch.frexp(peak).mantissa
    torch.div(x, power, out=out)
    # Rows first: one float32 sum over all elements loses up to 1 % of the norm at 2048 x 8192 on a CPU.
    rows = torch.linalg.vector_norm(out, dim=-1, keepdim=True, dtype=dtype)
    return power, torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def normalize(x: Tensor, *, margin: float = MARGIN, out: Tensor | None = None) -> Tensor:
    """Returns each matrix over (1 + max(margin, machine epsilon)) times its Frobenius norm; zero stays zero.

    The result does not depend on the scale of the input, bit for bit if the scales differ by a power of two. ``margin``
    is relative, so that there is no scale below which an input fades. The machine epsilon of ``x.dtype`` keeps rounding
    from lifting a singular value above one, where fast coefficient sets explode.

    Args:
        x: Matrices of shape (..., M, N), floating point. Not mutated.
        margin: Distance that is kept from a norm of one.
        out: Contiguous tensor to write to, shape and data type of ``x``.

    Returns:
        ``out``, or a new contiguous tensor of x's shape and data type.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _, norm = power_of_two_and_norm(x, out)
    norm.mul_(1.0 + max(margin, torch.finfo(x.dtype).eps)).clamp_(min=torch.finfo(norm.dtype).tiny)
    return out.div_(norm)


@dataclass
class _Workspace:
    """Buffers of one orthogonalization; ``y`` and ``spare`` are (..., m, n) with m <= n, the others (..., m, m)."""

    y: Tensor
    spare: Tensor
    gram: Tensor
    polynomial: Tensor
    blocks: list[tuple[int, int]]

    def swap(self) -> None:
        self.y, self.spare = self.spare, self.y


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    # mm and not matmul: for one matrix the same kernel, whatever its strides, in any process.
    if left.dim() == 2:
        torch.mm(left, right, out=out)
    else:
        torch.bmm(left, right, out=out)


def _multiply_add(add: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, out: Tensor) -> None:
    if left.dim() == 2:
        torch.addmm(add, left, right, beta=beta, alpha=alpha, out=out)
    else:
        torch.baddbmm(add, left, right, beta=beta, alpha=alpha, out=out)


def _mirror(out: Tensor, blocks: list[tuple[int, int]]) -> None:
    for start, stop in blocks[:-1]:
        out[..., start:stop, stop:] = out[..., stop:, start:stop].mT


def _symmetric_multiply(left: Tensor, right: Tensor, out: Tensor, blocks: list[tuple[int, int]]) -> None:
    """Writes left @ right, known to be symmetric, to out; only the blocks on and below the diagonal are multiplied."""
    if len(blocks) == 1:
        _multiply(left, right, out)
        return
    for start, stop in blocks:
        _multiply(left[..., start:, :], right[..., :, start:stop], out[..., start:, start:stop])
    _mirror(out, blocks)


def _polynomial(work: _Workspace, b: float, c: float) -> None:
    """Writes b G + c G^2 to ``work.polynomial`` for G = ``work.gram``."""
    gram, out = work.gram, work.polynomial
    if len(work.blocks) == 1:
        _multiply_add(gram, gram, gram, b, c, out)
        return
    for start, stop in work.blocks:
        below, columns = slice(start, None), slice(start, stop)
        _multiply_add(
            gram[..., below, columns], gram[..., below, :], gram[..., :, columns], b, c, out[..., below, columns]
        )
    _mirror(out, work.blocks)


def row_scales(gram: Tensor) -> Tensor:
    """Returns factors (..., M, 1) for the rows of Y that leave no singular value above `AOL_SIGMA_MAX`.

    With G = Y Y^T and s_i = 1 / sqrt(sum_j |G_ij|), the norm of diag(s) Y is at most one.

    Args:
        gram: G, (..., M, M). Not mutated.
    """
    dtype = accumulation_dtype(gram.dtype)
    sums = torch.linalg.vector_norm(gram, ord=1, dim=-1, keepdim=True, dtype=dtype)
    scale: Tensor = sums.clamp_(min=torch.finfo(dtype).tiny).rsqrt_().mul_(AOL_SIGMA_MAX)
    return scale


def _iterate_standard(work: _Workspace, schedule: Schedule, *, gram_is_ready: bool) -> None:
    """Replaces ``work.y`` by (a I + b G + c G^2) Y, G = Y Y^T, for each step in turn."""
    for a, b, c in schedule:
        if not gram_is_ready:
            _symmetric_multiply(work.y, work.y.mT, work.gram, work.blocks)
        gram_is_ready = False
        _polynomial(work, b, c)
        # a Y is added to the product and not a I to the polynomial: in bfloat16 that would round the diagonal, and
        # push singular values out of the interval on which the coefficients converge.
        _multiply_add(work.y, work.polynomial, work.y, a, 1.0, work.spare)
        work.swap()


def _iterate_gram(work: _Workspace, schedule: Schedule, *, gram_is_ready: bool) -> None:
    """Does the same on the small side: steps act on G alone, and Y is touched once per segment.

    With P = a I + b G + c G^2, a step maps Y to P Y and hence G to P G P. Both are polynomials in the same G, so they
    commute, and so does their running product Q; every product of two of them is symmetric. A segment ends with
    Y <- Q Y, and the next one forms G anew, which removes the error that G has gathered.
    """
    product, temporary = torch.empty_like(work.gram), torch.empty_like(work.gram)
    steps = iter(schedule)
    for length in restart_segments(len(schedule)):
        if not gram_is_ready:
            _symmetric_multiply(work.y, work.y.mT, work.gram, work.blocks)
        gram_is_ready = False
        for index in range(length):
            a, b, c = next(steps)
            _polynomial(work, b, c)
            work.polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
            if index + 1 < length:
                _symmetric_multiply(work.polynomial, work.gram, temporary, work.blocks)
                _symmetric_multiply(temporary, work.polynomial, work.gram, work.blocks)
            if index == 0:
                product, work.polynomial = work.polynomial, product
            else:
                _symmetric_multiply(product, work.polynomial, temporary, work.blocks)
                product, temporary = temporary, product
        _multiply(product, work.y, work.spare)
        work.swap()


def _check_input(x: Tensor, iteration: Iteration) -> None:
    if x.dim() < 2 or x.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(
            f"orthogonalize: got shape {tuple(x.shape)} in {x.dtype}, expected (..., M, N) in one of {names}"
        )
    check_iteration(iteration)
    if iteration == "gram" and _DTYPES[x.dtype] not in GRAM_DTYPES:
        raise ValueError(
            f"orthogonalize: got iteration='gram' with {x.dtype}, whose 8 bits let the Gram matrix drift (errors of "
            "10 to 50 %, and divergence); expected float16 or wider: cast the input, or set iteration='standard'"
        )


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    schedule: Schedule,
    *,
    iteration: Iteration = "auto",
    scaling: Scaling = "frobenius",
) -> Tensor:
    """Returns U p(S) V^T for each matrix x = U S V^T, p the composed polynomial of the schedule.

    S is taken after scaling: by `normalize` and, for ``scaling="aol"``, by a further diagonal factor on the shorter
    side, so that U, S and V are then those of the scaled matrix. All arithmetic is in ``x.dtype``, except that norms
    of 16-bit inputs are held in float32; what float32 products do on CUDA is up to
    ``torch.backends.cuda.matmul``. A matrix of zeros gives zeros; one with NaN or inf gives NaN and leaves the
    others of its batch alone.

    The same 2-D input gives the same bits in any process on the same kind of device. Within a batch a matrix may be
    multiplied by another kernel, which changes the last bits; on a CPU this holds for matrices below 128 x 128 only.

    Besides the result, the memory needed is one tensor like ``x`` and 2 (standard) or 4 (gram) square ones of the
    shorter side; on a CPU those of one matrix at a time.

    Args:
        x: Matrices of shape (..., M, N) in float16, bfloat16, float32 or float64; any strides. Not mutated.
        schedule: Quintics from `coefficients`.
        iteration: ``standard``, ``gram`` (see `restart_segments`; not in bfloat16), or ``auto``: the result of
            `choose_iteration`.
        scaling: ``frobenius``, or ``aol``, which the ``aol`` coefficients need (`scaling_for`).

    Returns:
        A new contiguous tensor of x's shape and data type.

    Raises:
        ValueError: If the shape, data type or an argument is not valid, the schedule does not orthogonalize under
            this scaling, or ``gram`` is asked for in bfloat16.
    """
    _check_input(x, iteration)
    check_schedule(schedule, scaling)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    *_, rows, columns = x.shape
    m, n = min(rows, columns), max(rows, columns)
    matrices = x if x.dim() == 2 else x.reshape(-1, rows, columns)
    one_by_one = x.dim() == 2 or (x.device.type == "cpu" and m * n >= _CPU_BATCH_NUMEL)
    if iteration == "auto":
        batch = 1 if one_by_one else matrices.size(0)
        iteration = choose_iteration(m, n, len(schedule), _DTYPES[x.dtype], x.device.type, batch=batch)
    blocks = block_columns(m, symmetric_blocks(m, x.device.type) if one_by_one else 1)

    shape = matrices.shape[-2:] if one_by_one else matrices.shape
    first, second = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    small = (*shape[:-2], m, m)
    gram, polynomial = (torch.empty(small, dtype=x.dtype, device=x.device) for _ in range(2))

    def run(matrix: Tensor) -> Tensor:
        normalize(matrix, out=first)
        # A tall matrix is iterated on as a view of its transpose, so that the Gram matrix is the smaller one.
        wide = (first, second) if rows <= columns else (first.mT, second.mT)
        work = _Workspace(*wide, gram, polynomial, blocks)
        if scaling == "aol":
            _symmetric_multiply(work.y, work.y.mT, work.gram, work.blocks)
            scale = row_scales(work.gram)
            work.y.mul_(scale)
            # One factor after the other: their outer product would be another (m, m) temporary.
            work.gram.mul_(scale).mul_(scale.mT)
        iterate = _iterate_gram if iteration == "gram" else _iterate_standard
        iterate(work, schedule, gram_is_ready=scaling == "aol")
        return work.y if rows <= columns else work.y.mT

    if x.dim() == 2 or not one_by_one:
        return run(matrices).view(x.shape)
    result = torch.empty(matrices.shape, dtype=x.dtype, device=x.device)
    for index, matrix in enumerate(matrices):
        # Copied, and not computed in place: a slice need not be aligned, and the kernel's bits may depend on that.
        result[index] = run(matrix)
    return result.view(x.shape)
