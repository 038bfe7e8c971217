"""What an orthogonalization costs, and which iteration is the cheaper one."""

from __future__ import annotations

from typing import Literal, get_args

from megatron_muon.newton_schulz.names import Iteration

GRAM_DTYPES = ("fp16", "fp32", "fp64")
"""Names of the data types in which the Gram iteration is accurate enough."""

# Below 128 columns a block's product no longer runs at the speed of the whole; beyond 8 blocks little is left to gain.
_BLOCK_COLUMNS = 128
_MAX_BLOCKS = 8

# What starting one matrix product costs, in the FLOPs that could have been done meanwhile. For "cpu" measured on one
# core (about 4 us at 100 GFLOP/s); for others an estimate (a 4 us launch at 100 TFLOP/s).
_LAUNCH_FLOPS = {"cpu": 400_000}
_LAUNCH_FLOPS_ACCELERATOR = 400_000_000


def symmetric_blocks(m: int, device_type: str) -> int:
    """Returns into how many block columns the torch back end cuts a symmetric (m, m) product.

    Only the blocks on and below the diagonal are computed and then mirrored: a fraction (k + 1) / (2 k) of the
    FLOPs for k blocks. One means the whole product. Accelerators get whole products: splitting them into launches
    has not been measured there, and the ``emerging`` and ``gram-newton-schulz`` back ends bring kernels for it.

    Args:
        m: Order of the symmetric matrix.
        device_type: ``torch.device.type``.
    """
    if device_type != "cpu" or m < 2 * _BLOCK_COLUMNS:
        return 1
    return min(m // _BLOCK_COLUMNS, _MAX_BLOCKS)


def block_columns(m: int, blocks: int) -> list[tuple[int, int]]:
    """Returns the half-open column ranges of ``blocks`` nearly equal block columns of an (m, m) matrix."""
    width = -(-m // blocks)
    return [(start, min(start + width, m)) for start in range(0, m, width)]


def restart_segments(steps: int) -> tuple[int, ...]:
    """Returns the lengths of the Gram iteration's segments; the Gram matrix is formed anew before each.

    Within a segment the error of the Gram matrix grows by the square of the slope at zero with every step, so the
    first segment, where singular values are smallest and slopes largest, has two steps and no other more than three.
    Measured in float32 over the coefficient sets here and spectra from flat to rank one, this keeps the distance to
    the exact result within 5 times that of the standard iteration (6.3 at eight steps); (3, 2) in place of (2, 3)
    reaches 15 times, no restart 200 times.

    Args:
        steps: Number of iterations, at least one.
    """
    if steps <= 2:
        return (steps,)
    rest = steps - 2
    count = -(-rest // 3)
    short, longer = divmod(rest, count)
    return tuple(sorted((2, *(short + (index < longer) for index in range(count)))))


def _symmetric_product_flops(m: int, inner: int, blocks: int) -> int:
    return sum(2 * (m - start) * (stop - start) * inner for start, stop in block_columns(m, blocks))


def _products(m: int, n: int, steps: int, iteration: Iteration, blocks: int) -> tuple[int, int]:
    """Returns (FLOPs, number of matrix products) of one matrix with m <= n."""
    gram = _symmetric_product_flops(m, n, blocks)
    square = _symmetric_product_flops(m, m, blocks)
    apply = 2 * m * m * n
    if iteration == "standard":
        return steps * (gram + square + apply), 3 * steps
    segments = restart_segments(steps)
    # A segment of L steps: L polynomials, and L - 1 times one product for Q and two for the Gram matrix.
    squares = sum(length + 3 * (length - 1) for length in segments)
    return len(segments) * (gram + apply) + squares * square, 2 * len(segments) + squares


def check_iteration(iteration: str) -> None:
    """Raises ValueError unless ``iteration`` is an `Iteration`."""
    if iteration not in get_args(Iteration):
        raise ValueError(f"iteration: got {iteration!r}, expected one of {', '.join(get_args(Iteration))}")


def _check(m: int, n: int, steps: int) -> tuple[int, int]:
    if min(m, n, steps) < 1:
        raise ValueError(f"Newton-Schulz cost: got m={m}, n={n}, steps={steps}, expected each to be at least 1")
    return min(m, n), max(m, n)


def choose_iteration(
    m: int, n: int, steps: int, dtype: str, device_type: str, *, batch: int = 1
) -> Literal["standard", "gram"]:
    """Returns the iteration that costs less for matrices of shape (m, n).

    Below float16's precision it is always the standard one: in bfloat16 the Gram iteration is off by 10 to 50 % on
    decaying spectra, and diverges for some coefficient sets. Otherwise the cost of each is its FLOPs plus a fixed
    price for every product started.

    Args:
        m: Rows.
        n: Columns; the order of the two does not matter.
        steps: Number of iterations, at least one.
        dtype: Data type of the iteration, a key of `DTYPE_BYTES`.
        device_type: ``torch.device.type``.
        batch: Matrices that share each product.

    Raises:
        ValueError: If a size, ``steps`` or ``batch`` is below one.
    """
    m, n = _check(m, n, steps)
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    if dtype not in GRAM_DTYPES:
        return "standard"
    blocks = symmetric_blocks(m, device_type)
    launch = _LAUNCH_FLOPS.get(device_type, _LAUNCH_FLOPS_ACCELERATOR)
    cost = {}
    for iteration in ("standard", "gram"):
        flops, products = _products(m, n, steps, iteration, blocks)
        cost[iteration] = batch * flops + launch * products
    return "gram" if cost["gram"] < cost["standard"] else "standard"


def newton_schulz_flops(
    m: int,
    n: int,
    steps: int,
    iteration: Iteration = "auto",
    *,
    dtype: str = "fp32",
    device_type: str = "cuda",
) -> int:
    """Returns the floating-point operations of all matrix products for one (m, n) matrix, two per multiply-add.

    With m <= n, a = n / m and whole products, in units of m^3, five steps: standard 20 a + 10, gram 8 a + 28.
    On ``device_type="cpu"`` the products that `symmetric_blocks` leaves out are not counted. Element-wise work and
    the back ends of other packages are not counted either.

    Args:
        m: Rows.
        n: Columns; the order of the two does not matter.
        steps: Number of iterations, at least one.
        iteration: The iteration; ``auto`` is the one of `choose_iteration`.
        dtype: Data type of the iteration, a key of `DTYPE_BYTES`; matters for ``auto`` only.
        device_type: ``torch.device.type``.

    Raises:
        ValueError: If a size or ``steps`` is below one, or the iteration is not known.
    """
    m, n = _check(m, n, steps)
    check_iteration(iteration)
    if iteration == "auto":
        iteration = choose_iteration(m, n, steps, dtype, device_type)
    return _products(m, n, steps, iteration, symmetric_blocks(m, device_type))[0]
