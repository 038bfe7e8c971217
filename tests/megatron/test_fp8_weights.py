"""What is refused of FP8 primary weights, without Transformer Engine; tests/te has what works, with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_muon.megatron.entry.checks import check_arguments
from megatron_muon.megatron.model import fp8_weights as fp8

Tagged = tuple[str, nn.Parameter, bool]


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's questions for TE's classes, answered by an attribute."""
    for name, kind in (("is_float8tensor", "fp8"), ("is_nvfp4tensor", "nvfp4"), ("is_grouped_tensor", "grouped")):
        monkeypatch.setattr(fp8, name, lambda parameter, kind=kind: kind in getattr(parameter, "kind", ""))


def tagged(name: str, is_muon: bool, kind: str = "fp8", expert: bool = False) -> Tagged:
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.kind = kind  # type: ignore[attr-defined]
    parameter.allreduce = not expert  # type: ignore[attr-defined]
    return name, parameter, is_muon


@pytest.mark.parametrize(
    "parameters",
    [
        [tagged("a", True), tagged("b", False, kind="bf16"), tagged("c", True, kind="bf16")],
        # Each of the two has a buffer of its own for FP8.
        [tagged("dense", False), tagged("expert", True, expert=True)],
    ],
)
def test_one_optimizer_may_have_fp8_parameters(parameters: list[Tagged]) -> None:
    fp8.check_kinds(parameters)


@pytest.mark.parametrize("expert", [False, True])
def test_two_optimizers_may_not(expert: bool) -> None:
    with pytest.raises(NotImplementedError, match=r"^fc2: got an FP8 .* beside Muon's fc1, .* use_muon=False"):
        fp8.check_kinds([tagged("fc1", True, expert=expert), tagged("fc2", False, expert=expert)])


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("nvfp4 fp8", "omit --fp4-param-gather"), ("grouped", "omit --moe-single-grouped-weight")],
)
def test_other_quantized_parameters(kind: str, remedy: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^experts.weight: got .*{remedy}$"):
        fp8.check_kinds([tagged("experts.weight", True, kind=kind)])


def test_fp8_parameters_need_their_gather() -> None:
    parameters = [(name, parameter) for name, parameter, _ in (tagged("norm", False, kind=""), tagged("fc1", True))]
    without: Any = SimpleNamespace(fp8_param_gather=False)
    fp8.check_gather(parameters[:1], without)
    fp8.check_gather(parameters, SimpleNamespace(fp8_param_gather=True))
    message = "fp8_param_gather: got False, expected True with FP8 primary weights such as fc1, which would never be "
    with pytest.raises(ValueError, match=f"{message}updated; add --fp8-param-gather"):
        fp8.check_gather(parameters, without)


ARGUMENTS: dict[str, Any] = dict(
    optimizer="adam",
    use_distributed_optimizer=True,
    fp16=False,
    loss_scale=None,
    tensor_model_parallel_size=1,
    ckpt_format="torch_dist",
    load=None,
    expert_tensor_parallel_size=None,
    tensor_parallel_num_weight_shards=None,
    expert_tensor_parallel_num_weight_shards=None,
)


def test_mxfp8_gathers_through_the_gradients_buffer() -> None:
    asked = dict(ARGUMENTS, fp8_param_gather=True, fp8_recipe="mxfp8")
    check_arguments(SimpleNamespace(**asked, reuse_grad_buf_for_mxfp8_param_ag=True))  # type: ignore[arg-type]
    check_arguments(SimpleNamespace(**{**asked, "fp8_recipe": "blockwise"}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^--reuse-grad-buf-for-mxfp8-param-ag: got False, expected True .*; add it$"):
        check_arguments(SimpleNamespace(**asked))  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["fp4_param_gather"])
def test_flags_that_are_refused(setting: str) -> None:
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(NotImplementedError, match=f"^{flag}: got True, expected False .*omit it$"):
        check_arguments(SimpleNamespace(**ARGUMENTS, **{setting: True}))  # type: ignore[arg-type]
