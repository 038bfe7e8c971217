"""Which parameters are Muon's, how fused weights split, and what the builder refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_muon.config import MuonConfig
from tests.distributed import RankError, run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, wrap

MUON = MuonConfig(exchange_dtype="fp32", ns_dtype="fp32")


def routed(rank: int, world_size: int, model: str, muon: MuonConfig) -> dict[str, tuple[bool, list[Any]]]:
    """For each parameter of a two-layer model: is it Muon's, and the (label, count, rows, cols) of its parts."""
    from megatron_muon.megatron.model.routing import matrix_spec, named_parameters, uses_muon

    layout = Layout(1)
    initialize(layout)
    out: dict[str, tuple[bool, list[Any]]] = {}
    for entry in named_parameters(make_chunks(model, layout, torch.float32)):
        parts: list[Any] = []
        is_muons = uses_muon(entry, muon)
        if is_muons:
            spec = matrix_spec(entry, muon, 1)
            parts = [(part.label, *spec.logical_shape(index)) for index, part in enumerate(spec.parts)]
        out[entry.name] = (is_muons, parts)
    return out


def test_every_parameter_of_a_moe_model() -> None:
    found = run_ranks(routed, 1, "moe", MUON)[0]
    muons = {name: parts for name, (is_muons, parts) in found.items() if is_muons}
    layer = "decoder.layers.1"
    # hidden 32, 4 heads of 8 in 2 query groups, dense FFN 48, experts and shared expert 32.
    assert muons["decoder.layers.0.self_attention.linear_qkv.weight"] == [
        ("q", 1, 32, 32),
        ("k", 1, 16, 32),
        ("v", 1, 16, 32),
    ]
    assert muons["decoder.layers.0.self_attention.linear_proj.weight"] == [("", 1, 32, 32)]
    assert muons["decoder.layers.0.mlp.linear_fc1.weight"] == [("gate", 1, 48, 32), ("up", 1, 48, 32)]
    assert muons["decoder.layers.0.mlp.linear_fc2.weight"] == [("", 1, 32, 48)]
    assert muons[f"{layer}.mlp.router.weight"] == [("", 1, 4, 32)]
    assert muons[f"{layer}.mlp.shared_experts.linear_fc1.weight"] == [("gate", 1, 32, 32), ("up", 1, 32, 32)]
    for expert in range(4):
        name = f"{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"
        assert muons[name] == [("gate", 1, 32, 32), ("up", 1, 32, 32)]
    others = {name for name, (is_muons, _) in found.items() if not is_muons}
    assert {"embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"} <= others
    assert all(found[name][0] == (name in muons) for name in found)
    assert len(muons) == 4 + 2 + 1 + 2 + 4 * 2  # layer 0; layer 1's attention, router, shared expert, experts


def test_learned_positions_are_adams() -> None:
    found = run_ranks(routed, 1, "learned", MUON)[0]
    assert not found["embedding.position_embeddings.weight"][0]


def test_router_can_opt_out() -> None:
    found = run_ranks(routed, 1, "moe", replace(MUON, router="adam"))[0]
    assert not found["decoder.layers.1.mlp.router.weight"][0]
    assert found["decoder.layers.0.mlp.linear_fc1.weight"][0]


def test_splits_can_be_switched_off() -> None:
    found = run_ranks(routed, 1, "moe", replace(MUON, qkv_split="none", split_gated=False))[0]
    assert found["decoder.layers.0.self_attention.linear_qkv.weight"][1] == [("", 1, 64, 32)]
    assert found["decoder.layers.0.mlp.linear_fc1.weight"][1] == [("", 1, 96, 32)]


class _Mini(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4, bias=False)


def test_use_muon_attribute_decides() -> None:
    from megatron_muon.megatron.model.routing import TAG, tag_parameters

    model = _Mini()
    model.a.weight.use_muon = False
    tag_parameters([model], MUON)
    assert not getattr(model.a.weight, TAG)
    assert getattr(model.b.weight, TAG)
    assert not getattr(model.a.bias, TAG)


def test_use_muon_on_a_vector_is_an_error() -> None:
    from megatron_muon.megatron.model.routing import tag_parameters

    model = _Mini()
    model.a.bias.use_muon = True
    with pytest.raises(ValueError, match=r"a\.bias: use_muon is True, but it has shape \(4,\)"):
        tag_parameters([model], MUON)


def test_complex_parameter_is_an_error() -> None:
    from megatron_muon.megatron.model.routing import tag_parameters

    model = _Mini()
    model.b.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"b\.weight: got torch.complex64"):
        tag_parameters([model], MUON)


def refuse(rank: int, world_size: int, case: str) -> None:
    """Builds an optimizer in a way that must be refused."""
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    layout = Layout(world_size, tp=2 if case == "qkv" else 1)
    initialize(layout)
    chunks = make_chunks("odd", layout, torch.float32)
    muon = MUON
    if case == "plans differ" and rank == 1:
        # As if this rank had another model.
        next(chunks[0].decoder.layers[0].self_attention.linear_proj.parameters()).use_muon = False  # type: ignore
    if case != "untagged":
        tag_parameters(chunks, muon)
    if case == "qkv":
        attention: Any = chunks[0].decoder.layers[0].self_attention  # type: ignore[union-attr]
        attention.config.kv_channels = 5
    config = optimizer_config(layout, torch.float32, lr=-1.0 if case == "negative lr" else 1e-3)
    get_megatron_optimizer(config, wrap(chunks, layout), muon=muon)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("untagged", "RuntimeError", ["before Muon's parameters were tagged", "megatron_muon.enable"]),
        ("plans differ", "RuntimeError", ["different ownership plans", "rank 0", "rank 1"]),
        ("qkv", "ValueError", ["linear_qkv.weight", "do not divide", "switch the split off"]),
        ("negative lr", "ValueError", ["lr", "-1.0"]),
    ],
)
def test_refused_on_every_rank(case: str, error: str, words: list[str]) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(refuse, 2, case)
    # Every rank says so itself: none waits for the others or dies of their leaving.
    assert sorted(caught.value.errors) == [0, 1]
    for kind, message, _ in caught.value.errors.values():
        assert kind == error
        for word in words:
            assert word in message
