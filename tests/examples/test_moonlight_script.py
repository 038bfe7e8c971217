"""`examples/moonlight_16b_fp8.sh` gives Megatron arguments that it and our checks accept, for Moonlight's model.

Nothing is trained: torchrun is stood in for by a program that writes down its arguments, Transformer Engine by its
version, and the GPUs by their compute capability.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.megatron.entry import arguments
from megatron_muon.megatron.entry.fp8_checks import RECIPES
from megatron_muon.megatron.entry.fp8_checks import Fp8Machine as Machine
from tests.megatron.test_arguments import extended_parser
from tests.paths import EXAMPLES
from tests.seams import seams_removed_afterwards

SCRIPT = EXAMPLES / "moonlight_16b_fp8.sh"
HOPPER, BLACKWELL = Machine("2.20.2", (9, 0)), Machine("2.20.2", (10, 0))


@pytest.fixture(autouse=True)
def machine_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's own questions about Transformer Engine and the device, answered for a Hopper machine."""
    import megatron.core.utils
    from megatron.core.transformer.moe import moe_utils
    from packaging.version import Version

    monkeypatch.setattr(megatron.core.utils, "_te_version", Version("2.20.2"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    # What --moe-permute-fusion needs of Transformer Engine; Megatron asks whether it is there.
    for kernel in (
        "permute",
        "permute_with_probs",
        "unpermute",
        "sort_chunks_by_index",
        "sort_chunks_by_index_with_probs",
    ):
        monkeypatch.setattr(moe_utils, f"fused_{kernel}", object())
    with seams_removed_afterwards():
        yield


def words(directory: Path, *further: str, **environment: str) -> list[str]:
    """The words that the script gives torchrun."""
    torchrun = directory / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n', encoding="utf-8")
    torchrun.chmod(0o755)
    settings = {"MEGATRON_LM": "mlm", "DATA": "corpus", "TOKENIZER": "tokenizer", **environment}
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT), *further], env={"PATH": path, **settings}, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def parsed(given: list[str], machine: Machine, world_size: int) -> argparse.Namespace:
    """The script's arguments, once our checks have passed them and completed them."""
    given = given[given.index("mlm/pretrain_gpt.py") + 1 :]
    parser, changes = extended_parser()
    args = parser.parse_args(given)
    assert arguments.apply(args, changes, machine=machine) is not None
    # parse_args sets these.
    args.rank, args.world_size = 0, world_size
    return args


@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize("fp8_weights", ["0", "1"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_makes_moonlight_of_it(recipe: str, fp8_weights: str, nodes: int, tmp_path: Path) -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.arguments import core_transformer_config_from_args, validate_args

    given = words(tmp_path, RECIPE=recipe, FP8_WEIGHTS=fp8_weights, NODES=str(nodes))
    assert given[:6] == ["--nnodes", str(nodes), "--node-rank", "0", "--nproc-per-node", "8"]
    assert given[given.index("-m") + 1] == "megatron_muon.launch"
    args = parsed(given, BLACKWELL if recipe == "mxfp8" else HOPPER, 8 * nodes)
    validate_args(args)
    config = core_transformer_config_from_args(args, MLATransformerConfig)
    assert (config.fp8_recipe, config.fp8_param) == (recipe, fp8_weights == "1")
    assert config.moe_grouped_gemm and config.moe_router_padding_for_quantization and config.quant_recipe is not None
    assert args.data_parallel_size == 8 * nodes and config.expert_model_parallel_size == 8
    assert args.use_distributed_optimizer and args.optimizer == "adam"
    assert (args.recompute_modules is None) == (recipe == "delayed")
    expected: dict[str, Any] = dict(
        num_layers=27,
        hidden_size=2048,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        ffn_hidden_size=11264,
        moe_ffn_hidden_size=1408,
        moe_shared_expert_intermediate_size=2816,
        num_moe_experts=64,
        moe_router_topk=6,
        moe_router_topk_scaling_factor=2.446,
        moe_layer_freq=[0] + [1] * 26,
        add_bias_linear=False,
        gated_linear_unit=True,
    )
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_recipe_that_the_machine_has_not_is_refused(tmp_path: Path) -> None:
    given = words(tmp_path, RECIPE="mxfp8")
    with pytest.raises(RuntimeError, match=r"--muon-moe-fp8 mxfp8: got compute capability 9\.0, expected 10\.0"):
        parsed(given, HOPPER, 8)
    with pytest.raises(RuntimeError, match="--muon-moe-fp8 mxfp8: got Transformer Engine none"):
        parsed(given, Machine(None, (10, 0)), 8)


def test_further_arguments_win(tmp_path: Path) -> None:
    assert parsed(words(tmp_path, "--train-iters", "7"), HOPPER, 8).train_iters == 7


def test_every_flag_is_explained() -> None:
    flags = re.findall(r"^  (--[\w-]+)(.*)$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(flags) > 60
    assert [flag for flag, rest in flags if " # " not in rest and not flag.startswith("--master")] == []
