"""Costs and back ends of Newton-Schulz, and agreement with other implementations."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon.newton_schulz import (
    BackendName,
    CoefficientSet,
    choose_iteration,
    coefficients,
    load_backend,
    newton_schulz_flops,
    orthogonalize,
    shapes_problem,
)
from megatron_muon.newton_schulz.backends import emerging_syrk, gram_package
from tests.svd_oracle import compose, matrix, oracle

KELLER = (3.4445, -4.7750, 2.0315)


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (256, 300), (400, 300)])
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_flops_are_those_executed(shape: tuple[int, int], iteration: Any, steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape), coefficients("keller", steps), iteration=iteration)
    assert counter.get_total_flops() == newton_schulz_flops(*shape, steps, iteration, device_type="cpu")


def test_flops_of_whole_products() -> None:
    for m, aspect in ((64, 1), (512, 4)):
        assert newton_schulz_flops(m, aspect * m, 5, "standard") == (20 * aspect + 10) * m**3
        assert newton_schulz_flops(aspect * m, m, 5, "gram") == (8 * aspect + 28) * m**3
    # A CPU multiplies only the blocks on and below the diagonal: 5/8 of four block columns.
    assert newton_schulz_flops(512, 512, 5, "standard", device_type="cpu") == (10 + 20 * 5 / 8) * 512**3
    assert newton_schulz_flops(512, 2048, 5) == newton_schulz_flops(512, 2048, 5, "gram")
    assert newton_schulz_flops(512, 2048, 5, dtype="bf16") == newton_schulz_flops(512, 2048, 5, "standard")


def test_the_cheaper_method_is_chosen() -> None:
    def chosen(m: int, n: int, dtype: str = "fp32", device: str = "cpu", batch: int = 1) -> str:
        return choose_iteration(m, n, 5, dtype, device, batch=batch)

    assert [chosen(512, n) for n in (512, 768, 1024, 4096)] == ["standard", "gram", "gram", "gram"]
    assert [chosen(4096, n, device="cuda") for n in (4096, 5120, 8192)] == ["standard", "standard", "gram"]
    assert chosen(8192, 4096, "fp16", "cuda") == "gram"
    assert chosen(8192, 4096, "bf16", "cuda") == "standard"
    # Starting more and smaller products does not pay for a small matrix, but does for many of them.
    assert chosen(32, 64) == "standard"
    assert chosen(32, 128, batch=256) == "gram"


@pytest.mark.parametrize("arguments", [(0, 5, 5), (5, 5, 0), (5, -1, 5)])
def test_sizes_below_one_have_no_cost(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        newton_schulz_flops(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        choose_iteration(*arguments, "fp32", "cpu")


# --- other implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_agrees_with_torch_optim_muon(shape: tuple[int, int]) -> None:
    """Both are bfloat16 iterations of one map: each is off by at most the bound, and so is torch's first norm."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    schedule = coefficients("keller", 5)
    x = matrix("1/i", *shape).bfloat16()
    theirs = _zeropower_via_newtonschulz(x.clone(), KELLER, 5, 1e-7).double()
    ours = orthogonalize(x, schedule).double()
    _, tolerance = oracle(x, schedule, "keller")
    # bfloat16's epsilon, by which our norm is larger, moves every singular value by as much, times the slope.
    s = torch.linalg.svdvals(x.double())
    s = s / s.norm()
    margin = float((compose(schedule, s) - compose(schedule, s / (1 + 2**-7))).norm())
    difference = float((ours - theirs).norm())
    assert difference < 2 * tolerance + margin
    assert difference < 0.05 * float(theirs.norm())


@pytest.mark.parametrize("shape", [(32, 96), (300, 256), (4, 20, 24)])
@pytest.mark.parametrize(("name", "upstream"), [("keller", "simple"), ("you", "quintic"), ("cans", "cans")])
def test_agrees_with_emerging_optimizers_in_float32(
    shape: tuple[int, ...], name: CoefficientSet, upstream: Any
) -> None:
    utils = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    schedule = coefficients(name, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs = utils.newton_schulz(x, 5, upstream)
    for iteration in ("standard", "gram"):
        ours = orthogonalize(x, schedule, iteration=iteration)
        for one, other, source in zip(
            ours.view(-1, *shape[-2:]), theirs.reshape(-1, *shape[-2:]), x.view(-1, *shape[-2:])
        ):
            _, tolerance = oracle(source, schedule, name)
            assert float((one - other).norm()) < 2 * tolerance


# --- back ends --------------------------------------------------------------------------------------------------------


def test_torch_is_always_there_and_others_are_refused_without_cuda() -> None:
    assert load_backend("torch", "cpu") is orthogonalize
    with pytest.raises(ValueError, match="expected one of torch, emerging, gram-newton-schulz"):
        load_backend("cuda", "cuda")
    for name in set(get_args(BackendName)) - {"torch"}:
        with pytest.raises(RuntimeError, match=f"'{name}'.*device type 'cpu'.*take the back end 'torch'"):
            load_backend(name, "cpu")


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `load_backend` get past the look at the device; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_packages_that_are_missing_are_named(pretend_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gram_newton_schulz", None)  # as if not installed
    with pytest.raises(RuntimeError, match="'gram_newton_schulz' is not installed; `pip install 'gram-newton-schulz"):
        load_backend("gram-newton-schulz", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(RuntimeError, match=r"capability 8\.0, expected 9\.0"):
        load_backend("gram-newton-schulz", "cuda")


def test_the_syrk_step_of_emerging_optimizers_is_found(pretend_cuda: None) -> None:
    utils = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    assert callable(load_backend("emerging", "cuda"))
    parameters = list(inspect.signature(utils.newton_schulz_step_tsyrk).parameters)
    assert parameters[:4] == ["X", "a", "b", "c"]


def stand_in_syrk_step(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """In place of the kernel: the same step by torch.addmm, under the kernel's own conditions on its input."""
    assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.size(0) <= x.size(1)
    assert x.is_contiguous() or x.mT.is_contiguous()
    gram = x @ x.mT
    return torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (2, 3, 8, 8)])
def test_emerging_with_a_stand_in_for_its_kernel(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = x.clone()
    schedule = coefficients("keller", 5)
    backend = emerging_syrk(stand_in_syrk_step)
    ours = torch.stack([orthogonalize(one, schedule) for one in x.view(-1, *shape[-2:])]).view(shape)
    assert torch.equal(backend(x, schedule), ours)
    assert torch.equal(x, before)


class StandInGramPackage:
    """In place of gram_newton_schulz.GramNewtonSchulz: its constructor, and its contract on 3-D input."""

    made = 0

    def __init__(
        self,
        ns_epsilon: float = 1e-7,
        ns_use_kernels: bool = True,
        ns_coefficients: list[list[float]] | None = None,
        use_gram_newton_schulz: bool = True,
        gram_newton_schulz_reset_iterations: list[int] | None = None,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        assert ns_coefficients is not None and ns_use_kernels and compile_kwargs is None
        assert gram_newton_schulz_reset_iterations == [2]
        self.schedule = tuple((a, b, c) for a, b, c in ns_coefficients)
        self.iteration: Any = "gram" if use_gram_newton_schulz else "standard"
        self.epsilon = ns_epsilon
        type(self).made += 1

    def __call__(self, x: Tensor) -> Tensor:
        scaled = x.float() / (x.float().norm(dim=(-2, -1), keepdim=True) + self.epsilon)
        return orthogonalize(scaled.half(), self.schedule, iteration=self.iteration).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_package_with_a_stand_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInGramPackage, "made", 0)
    backend = gram_package(StandInGramPackage)
    schedule = coefficients("you", 5)
    # Where the data type reaches so far, a scale that the package's absolute epsilon would swallow.
    scale = 2.0**-60 if dtype == torch.bfloat16 else 2.0**-8
    x = (torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    for iteration in ("auto", "gram", "standard", "gram"):
        y = backend(x, schedule, iteration=iteration)
        assert y.shape == x.shape and y.dtype == dtype
        for one, result in zip(x, y):
            expected, tolerance = oracle(one, schedule, "you")
            assert float((result.double() - expected).norm()) < tolerance
    assert StandInGramPackage.made == 2  # one for each of the iterations, not for each call


@pytest.mark.parametrize(
    ("backend", "dtype", "arguments", "message"),
    [
        (emerging_syrk(stand_in_syrk_step), torch.float32, {}, "expected .* in bfloat16"),
        (emerging_syrk(stand_in_syrk_step), torch.bfloat16, {"iteration": "gram"}, "got iteration 'gram'"),
        (emerging_syrk(stand_in_syrk_step), torch.bfloat16, {"scaling": "aol"}, "got scaling 'aol'"),
        (gram_package(StandInGramPackage), torch.float32, {}, "expected .* in float16 or bfloat16"),
        (gram_package(StandInGramPackage), torch.float16, {"scaling": "aol"}, "got scaling 'aol'"),
        (gram_package(StandInGramPackage), torch.float16, {"iteration": "x"}, "expected one of auto"),
    ],
)
def test_back_ends_refuse_what_they_would_have_to_downgrade(
    backend: Any, dtype: torch.dtype, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        backend(torch.ones(4, 8, dtype=dtype), coefficients("keller", 5), **arguments)


def test_shapes_that_kernels_cannot_load_are_named() -> None:
    """Rows of 16 bytes are 8 elements; the Gram package leaves short sides up to 256 to torch."""
    fit, odd, small = (512, 2048), (2048, 1028), (64, 100)
    for name in get_args(BackendName):
        assert shapes_problem(name, [fit]) is None
    assert shapes_problem("torch", [odd, small]) is None
    assert shapes_problem("gram-newton-schulz", [fit, small]) is None
    problem = shapes_problem("gram-newton-schulz", [fit, odd, small])
    assert problem and "'gram-newton-schulz'" in problem and "1 shapes" in problem and "(2048 x 1028)" in problem
    problem = shapes_problem("emerging", [fit, odd, small, odd, (3, 8), (5, 8)])
    assert problem and "4 shapes" in problem and "(2048 x 1028, 64 x 100, 5 x 8, ...)" in problem
    assert "multiples of 8 elements" in problem and "take the back end 'torch'" in problem
