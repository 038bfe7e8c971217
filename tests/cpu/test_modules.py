"""The CPU backend's core attention and norm against plain formulas, and against Megatron-Core's own where those run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.distributed import RankError, run_ranks
from tests.models import Layout

QUERIES, BATCH, HEADS = 8, 2, 4


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the largest unmasked logit per head, with a loop over heads. Shapes as for `CoreAttention`."""
    group = query.shape[2] // key.shape[2]
    outputs, largest = [], []
    for head in range(query.shape[2]):
        q, k, v = query[:, :, head], key[:, :, head // group], value[:, :, head // group]
        scores = torch.einsum("qbd,kbd->bqk", q, k) * scale
        scores = scores.masked_fill(mask.expand(scores.shape[0], 1, *mask.shape[2:])[:, 0], -torch.inf)
        outputs.append(torch.einsum("bqk,kbd->qbd", scores.softmax(-1), v))
        largest.append(scores.max())
    return torch.cat(outputs, dim=-1), torch.stack(largest)


def causal_mask(size: int) -> Tensor:
    return torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)


def random_inputs(groups: int, k_width: int, v_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(HEADS, k_width), (groups, k_width), (groups, v_width)]
    return [torch.randn(QUERIES, BATCH, *s, generator=generator, dtype=torch.float64) for s in shapes]


def make_attention(groups: int, own: bool = True, **settings: Any) -> Any:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_muon.cpu.modules import CoreAttention

    widths = {name: settings.pop(name) for name in ("k_channels", "v_channels", "softmax_scale") if name in settings}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        **settings,
    )
    return (CoreAttention if own else DotProductAttention)(config, 2, AttnMaskType.causal, "self", **widths)


# (query groups, settings, width of queries and keys, width of values, softmax scale)
CASES: dict[str, tuple[int, dict[str, Any], int, int, float]] = {
    "as configured": (4, {}, 6, 6, 6**-0.5),
    "grouped queries": (2, {}, 6, 6, 6**-0.5),
    "MLA": (4, dict(k_channels=10, v_channels=3, softmax_scale=0.2), 10, 3, 0.2),
    "MLA, default scale": (4, dict(k_channels=10, v_channels=3), 10, 3, 10**-0.5),
    "MLA and grouped queries": (2, dict(k_channels=5, v_channels=9), 5, 9, 5**-0.5),
    # Divides scores by the layer number and has the softmax multiply it back: the same values.
    "layer scaling": (4, dict(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True), 6, 6, 6**-0.5),
}


def attend(rank: int, world_size: int, name: str) -> None:
    groups, settings, k_width, v_width, scale = CASES[name]
    models.initialize(Layout(1))
    attention = make_attention(groups, **settings)
    exact = [t.requires_grad_() for t in random_inputs(groups, k_width, v_width)]
    inputs = [t.detach().float().requires_grad_() for t in exact]
    weights = torch.randn(QUERIES, BATCH, HEADS * v_width, generator=torch.Generator().manual_seed(1))
    expected, _ = formula(*exact, causal_mask(QUERIES), scale)
    (expected * weights.double()).sum().backward()
    for mask in (None, causal_mask(QUERIES)):
        for tensor in inputs:
            tensor.grad = None
        output = attention(*inputs, mask)
        assert output.shape == (QUERIES, BATCH, HEADS * v_width)
        (output * weights).sum().backward()
        # Dot products of up to 10 terms of order 1 in fp32 (spacing 1.2e-7), then a softmax: errors of about 1e-6.
        # Masked scores are -10000, whose weight of e^-10000 is 0 in both.
        assert torch.allclose(output.double(), expected, rtol=0, atol=3e-6)
        for tensor, reference in zip(inputs, exact):
            assert tensor.grad is not None and reference.grad is not None
            assert torch.allclose(tensor.grad.double(), reference.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_formula(name: str) -> None:
    run_ranks(attend, 1, name)


def drop_in(rank: int, world_size: int) -> None:
    models.initialize(Layout(1))
    for groups, settings in ((4, {}), (2, {}), (4, dict(window_size=(3, 0))), (4, dict(softmax_type="off-by-one"))):
        inputs = [t.float() for t in random_inputs(groups, 6, 6)]
        own = make_attention(groups, **settings)(*inputs, None)
        stock = make_attention(groups, own=False, **settings)(*inputs, None)
        assert torch.equal(own, stock), settings


def test_attention_equals_the_stock_one_bitwise_where_that_can_run() -> None:
    run_ranks(drop_in, 1)


def max_logits(rank: int, world_size: int) -> None:
    models.initialize(Layout(1))
    for name in ("grouped queries", "MLA", "layer scaling"):
        groups, settings, k_width, v_width, scale = CASES[name]
        assert make_attention(groups, **settings).current_max_attn_logits is None
        attention = make_attention(groups, **settings, log_max_attention_logit=True)
        exact = random_inputs(groups, k_width, v_width)
        # The last key has the largest logits, with queries that may not see it.
        exact[1][-1] *= 10
        exact[0][-1] = 0
        _, expected = formula(*exact, causal_mask(QUERIES), scale)
        unmasked = formula(*exact, torch.zeros_like(causal_mask(QUERIES)), scale)[1]
        assert (expected < unmasked).all()
        for mask in (None, causal_mask(QUERIES)):
            attention.current_max_attn_logits = None
            query, key, value = (t.float().requires_grad_() for t in exact)
            attention(0.5 * query, key, value, mask)
            half = attention.current_max_attn_logits
            assert torch.allclose(half.double(), 0.5 * expected, atol=1e-5)
            attention(query, key, value, mask)
            whole = attention.current_max_attn_logits
            assert not whole.requires_grad
            assert torch.allclose(whole.double(), torch.maximum(expected, 0.5 * expected), atol=1e-5)
            attention(0 * query, key, value, mask)
            assert torch.equal(attention.current_max_attn_logits, whole.clamp(min=0))  # the largest since the reset


def test_attention_records_the_largest_logit_of_each_head() -> None:
    run_ranks(max_logits, 1)


def refuse(rank: int, world_size: int, what: str) -> None:
    models.initialize(Layout(1))
    inputs = [t.float() for t in random_inputs(4, 6, 6)]
    if what == "packed":
        make_attention(4)(*inputs, None, packed_seq_params=object())
    elif what == "bias":
        make_attention(4)(*inputs, None, attention_bias=torch.zeros(1))
    else:
        config = models.make_config("dense", Layout(1, config=dict(layernorm_zero_centered_gamma=True)), torch.float32)
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        WrappedTorchNorm(config, 8)


@pytest.mark.parametrize(
    ("what", "message"),
    [("packed", "Packed sequence is not supported"), ("bias", "bias is not supported"), ("gamma", "zero_centered")],
)
def test_what_the_modules_cannot_do_is_refused(what: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(refuse, 1, what)


def norms(rank: int, world_size: int, name: str) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for sequence_parallel in (False, True):
        layout = Layout(2, tp=2, sequence_parallel=sequence_parallel, config=dict(normalization=name))
        config = models.make_config("dense", layout, torch.float32)
        norm = WrappedTorchNorm(config, 12, eps=1e-4)
        assert config.sequence_parallel is sequence_parallel
        assert all(p.sequence_parallel is sequence_parallel for p in norm.parameters())
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(5, 12, generator=generator) + 0.5
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(12, generator=generator))
        exact = x.double()
        if name == "LayerNorm":
            exact = exact - exact.mean(-1, keepdim=True)
        exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight.double()
        if name == "LayerNorm":
            exact = exact + norm.bias.double()
        # Elements of order 1 to 5; a handful of fp32 roundings of 6e-8 relative each.
        assert torch.allclose(norm(x).double(), exact, rtol=1e-6, atol=1e-6)
        # A token's result does not depend on its neighbours: shards of the sequence give the same bits.
        assert torch.equal(torch.cat([norm(x[:2]), norm(x[2:])]), norm(x))
        # With bf16 inputs and weights, the norm is computed in fp32 and rounded once: half a spacing of 2^-7 relative.
        low = norm.bfloat16()(x.bfloat16())
        again = norm.float()(x.bfloat16().float())
        assert torch.allclose(low.float(), again, rtol=2**-8 * 1.01, atol=1e-6)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norm_equals_the_formula_with_and_without_sequence_parallelism(name: str) -> None:
    run_ranks(norms, 1, name)


def hybrid_checkpoint_keys(rank: int, world_size: int) -> set[str]:
    from tests import models

    layout = models.Layout(1)
    models.initialize(layout)
    (chunk,) = models.make_chunks("hybrid moe", layout, torch.float32)
    return {entry.key for entry in chunk.sharded_state_dict().values() if hasattr(entry, "key")}


def test_local_hybrid_layers_have_the_checkpoint_keys_of_transformer_engines() -> None:
    """There, a norm is a part of the projection after it, but before the router."""
    keys = run_ranks(hybrid_checkpoint_keys, 1)[0]
    for norm in (
        *("0.self_attention.linear_qkv.layer_norm_weight", "1.mlp.linear_fc1.layer_norm_weight"),
        *("2.self_attention.linear_qkv.layer_norm_weight", "3.pre_mlp_layernorm.weight"),
    ):
        assert f"decoder.layers.{norm}" in keys
    assert "decoder.final_norm.weight" in keys
    assert not any("input_layernorm" in key for key in keys)
