"""What stands in for Transformer Engine's kernels is those kernels, as far as public data and formulas say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.models import Layout
from tests.paths import TESTS
from tests.te import cuda_stand_ins
from tests.te.fp8_runs import adam_parameters

cuda_stand_ins.install()

# Made by the reference quantizers of TE's own test suite.
GOLDEN = np.load(TESTS / "golden" / "fp8_te_2.20.2.npz")
CASES = sorted({name.partition("/")[0] for name in GOLDEN.files})


def golden(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"{case}/{name}"])


def test_cases() -> None:
    assert CASES == ["huge", "one_block", "ragged", "rows", "tiny", "zero_block"]


def quantizers() -> dict[str, Any]:
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor import Float8BlockQuantizer, Float8CurrentScalingQuantizer

    e4m3 = DType.kFloat8E4M3
    return {
        "blockwise128": Float8BlockQuantizer(e4m3, rowwise=True, columnwise=False),
        "tensorwise": Float8CurrentScalingQuantizer(e4m3, torch.device("cpu"), columnwise=False),
    }


@pytest.mark.parametrize("case", CASES)
def test_real_quantizers_give_the_golden_bytes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (10, 0))
    source = golden(case, "input_bf16_as_int16").view(torch.bfloat16)
    blockwise, tensorwise = (quantizer(source) for quantizer in quantizers().values())
    scales = golden(case, "blockwise128_scale_inv")
    rows, cols = scales.shape
    unlike = [
        int((blockwise._rowwise_data != golden(case, "blockwise128_e4m3_bytes")).sum()),
        int((blockwise._rowwise_scale_inv[:rows, :cols] != scales).sum()),
        int((tensorwise._data != golden(case, "tensorwise_e4m3_bytes")).sum()),
        int((tensorwise._scale_inv != golden(case, "tensorwise_scale_inv")).sum()),
    ]
    print(case, tuple(source.shape), unlike)
    assert unlike == [0, 0, 0, 0]


def test_mxfp8_exponents_round_up() -> None:
    """Worked by hand: 448 fits with 2^0, the next bf16 number above needs 2^1; 2^-127 is the smallest."""
    amax = torch.tensor([448.0, 450.0, 447.0, 224.0, 3.5, 1e-45, 0.0])
    exponents = cuda_stand_ins.e8m0_from_amax(amax, 448.0)
    assert exponents.tolist() == [127, 128, 127, 126, 120, 0, 0]
    assert cuda_stand_ins.e8m0_value(exponents[:5]).tolist() == [1.0, 2.0, 1.0, 0.5, 2.0**-7]


def test_mxfp8_blocks_are_scaled_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no golden bytes of MXFP8: no block saturates, and none would with half of its power of two."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor import MXFP8Quantizer

    source = golden("rows", "input_bf16_as_int16").view(torch.bfloat16)
    quantized = MXFP8Quantizer(DType.kFloat8E4M3)(source)
    for shape, exponent in (
        ((1, 32), quantized._rowwise_scale_inv[:256, :12]),
        ((32, 1), quantized._columnwise_scale_inv[:8, :384]),
    ):
        scale = cuda_stand_ins.e8m0_value(exponent)
        largest = cuda_stand_ins.blocks_of(source, *shape) / scale
        assert bool((largest <= 448).all()) and bool((largest > 224).all()), shape
    # Half a step of e4m3 (three bits of mantissa): 2^-4 of the number.
    normal = source.float().abs() >= 2.0**-6 * cuda_stand_ins.spread(
        cuda_stand_ins.e8m0_value(quantized._rowwise_scale_inv[:256, :12]), 1, 32, (256, 384)
    )
    # TE's own asks for a device first.
    dequantized = cuda_stand_ins.dequantize(quantized, DType.kFloat32)
    error = (dequantized - source.float()).abs() / source.float().abs()
    assert float(error[normal].max()) <= 2.0**-4


def test_every_stand_in_has_the_kernels_name() -> None:
    import transformer_engine_torch as tex

    assert all(getattr(tex, name) is function for name, function in cuda_stand_ins.KERNELS.items())
    from transformer_engine.pytorch.optimizers import multi_tensor_scale

    assert multi_tensor_scale is cuda_stand_ins.multi_tensor_scale


def test_a_mark_of_overflow_is_set_and_obeyed() -> None:
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2)
    cuda_stand_ins.multi_tensor_scale(0, flag, [[torch.tensor([1.0, torch.inf])], [out]], 2.0)
    assert flag.item() == 1 and out.tolist() == [2.0, torch.inf]
    parameter = torch.ones(1)
    lists = [[torch.ones(1)], [parameter], [torch.zeros(1)], [torch.zeros(1)]]
    cuda_stand_ins.multi_tensor_adam(0, flag, lists, 1.0, 0.9, 0.95, 1e-8, 1, 1, 1, 0.0)
    assert parameter.item() == 1.0


def test_adamws_parameters_get_te_fused_adam() -> None:
    """Norms, embeddings and the output layer: TE's FusedAdam in Megatron's optimizer, against torch's AdamW."""
    results = run_ranks(adam_parameters, 2, Layout(2))
    assert {kind for kind, _, _ in results} == {"transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"}
    for rank, (_, compared, worst) in enumerate(results):
        print(f"rank {rank}: {compared} slices, largest difference {worst:.1e} of the largest weight")
        # The same operations, in other places of fused expressions: some roundings of an update of 1e-2 of a weight.
        assert worst <= 1e-6
    assert sum(compared for _, compared, _ in results) >= 8
