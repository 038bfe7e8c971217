"""MuonConfig: every check, the presets, and that defaults live nowhere else."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import pytest

from megatron_muon.config import PRESETS, MuonConfig
from megatron_muon.megatron.entry.arguments import DEFAULT_PRESET, add_arguments, config_from_args
from megatron_muon.newton_schulz import ALIASES
from tests.distributed import run_ranks

FIELDS = {f.name: f for f in dataclasses.fields(MuonConfig)}

# Field, bad value, what the message says after "got <value>".
BAD_VALUES: list[tuple[str, Any, str]] = [
    ("momentum", -0.1, "expected in [0, 1)"),
    ("momentum", 1.0, "expected in [0, 1)"),
    ("momentum", math.nan, "expected a finite number"),
    ("momentum", "0.9", "expected a finite number"),
    ("momentum", True, "expected a finite number"),
    ("momentum", None, "expected a finite number"),
    ("nesterov", 1, "expected bool"),
    ("nesterov", None, "expected bool"),
    ("coefficients", 5, "expected str"),
    ("balance", "bytes", "expected one of 'time', 'flops'"),
    ("max_team_size", 0, "expected at least 1"),
    ("max_team_size", 2.0, "expected int"),
    ("exchange_buffer_mb", 0, "expected at least 1"),
    ("ns_steps", 0, "expected at least 1"),
    ("ns_steps", -3, "expected at least 1"),
    ("ns_steps", 5.0, "expected int"),
    ("ns_steps", True, "expected int"),
    ("ns_dtype", "fp64", "expected one of 'bf16', 'fp16', 'fp32'"),
    ("ns_dtype", "float32", "expected one of 'bf16', 'fp16', 'fp32'"),
    ("ns_backend", "cuda", "expected one of 'torch', 'emerging', 'gram-newton-schulz'"),
    ("ns_method", "syrk", "expected one of 'auto', 'standard', 'gram'"),
    ("exchange_dtype", "fp16", "expected one of 'bf16', 'fp32'"),
    ("scale_mode", "RMS", "expected one of 'rms', 'spectral', 'unit_rms_norm', 'shape_scaling'"),
    ("update_rms", 0.0, "expected positive"),
    ("update_rms", -0.2, "expected positive"),
    ("update_rms", math.inf, "expected a finite number"),
    ("extra_scale_factor", 0, "expected positive"),
    ("extra_scale_factor", math.nan, "expected a finite number"),
    ("qkv_split", "heads", "expected one of 'none', 'qkv', 'group', 'head'"),
    ("mla_split", "qkv", "expected one of 'none', 'part', 'head'"),
    ("splits", 3, "expected str"),
    ("split_gated", 0, "expected bool"),
    ("router", "sgd", "expected one of 'muon', 'adam'"),
    ("moe_fp8", "e5m2", "expected one of 'off', 'delayed', 'tensorwise', 'blockwise', 'mxfp8'"),
    ("init_from_adamw", "zero", "expected one of 'refuse', 'momentum', 'fresh'"),
    ("tp_mode", "duplicated", "expected one of 'exact', 'blockwise'"),
    ("batched", None, "expected bool"),
    ("variant", "soap", "expected one of 'muon', 'normuon', 'adamuon'"),
    ("momentum_form", "nesterov", "expected one of 'heavy_ball', 'ema'"),
    ("momentum_dtype", "fp16", "expected one of 'fp32', 'bf16'"),
    ("beta2", 1.0, "expected in [0, 1)"),
    ("second_moment_eps", 0.0, "expected positive"),
    ("cautious_weight_decay", 1, "expected bool"),
    ("log_interval", -1, "expected 0 or more"),
    ("metrics_dir", None, "expected str"),
    ("profile", -1, "expected 0 or more"),
    ("profile", True, "expected int"),
    ("profile_dir", None, "expected str"),
    ("links", 3, "expected str"),
    ("log_params", "all", "expected bool"),
    ("verify_checkpoint", 0, "expected bool"),
    ("verify_saves", 1, "expected bool"),
]


@pytest.mark.parametrize("name, value, expected", BAD_VALUES, ids=lambda v: str(v)[:20])
def test_bad_value(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        MuonConfig(**{name: value})
    assert str(error.value) == f"MuonConfig.{name}: got {value!r}, {expected}"


def test_every_field_has_a_bad_value() -> None:
    assert {name for name, _, _ in BAD_VALUES} == FIELDS.keys()


@pytest.mark.parametrize("name", ["quadratic", "", "Keller"])
def test_unknown_coefficients(name: str) -> None:
    with pytest.raises(ValueError, match=f"coefficient set: got '{name}', expected one of keller, you, polar_express"):
        MuonConfig(coefficients=name)


@pytest.mark.parametrize("steps", [5, 9, 11])
def test_steps_that_a_fixed_table_does_not_have(steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps} for coefficient set 'deepseek_v4'.*of 10; set the steps to 10"):
        MuonConfig.from_preset("deepseek-v4", ns_steps=steps)


@pytest.mark.parametrize(
    "values",
    [
        {"momentum": 0},
        {"momentum": 0.0},
        {"momentum": math.nextafter(1.0, 0.0)},
        {"ns_steps": 1},
        {"update_rms": 5e-324},
        {"extra_scale_factor": 3},
        *({"coefficients": alias, "ns_steps": 10} for alias in ALIASES),
    ],
    ids=str,
)
def test_value_at_the_edge_of_its_range(values: dict[str, Any]) -> None:
    config = MuonConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_is_frozen_keyword_only_and_a_value() -> None:
    config = MuonConfig()
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        MuonConfig(0.9)  # type: ignore[call-arg]
    assert hash(config) == hash(MuonConfig()) and config == MuonConfig() != MuonConfig(momentum=0.9)
    # A changed copy is checked as well.
    with pytest.raises(ValueError, match=r"MuonConfig\.ns_steps: got 0"):
        dataclasses.replace(config, ns_steps=0)


# Written down from the sources that `config.PRESETS` names, in full where it matters.
MOONLIGHT: dict[str, Any] = dict(
    momentum=0.95,
    nesterov=True,
    coefficients="keller",
    ns_steps=5,
    ns_dtype="bf16",
    scale_mode="rms",
    update_rms=0.2,
    extra_scale_factor=1.0,
    router="muon",
    tp_mode="exact",
)
EXPECTED_PRESETS: dict[str, dict[str, Any]] = {
    "moonlight": MOONLIGHT,
    "deepseek-v4": {**MOONLIGHT, "coefficients": "deepseek_v4", "ns_steps": 10, "update_rms": 0.18},
    "keller": {k: v for k, v in MOONLIGHT.items() if k != "update_rms"} | {"scale_mode": "shape_scaling"},
}


@pytest.mark.parametrize("preset", EXPECTED_PRESETS)
def test_preset(preset: str) -> None:
    config = MuonConfig.from_preset(preset)
    assert {name: getattr(config, name) for name in EXPECTED_PRESETS[preset]} == EXPECTED_PRESETS[preset]


def megatron_flag_defaults(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {name: parser.get_default(name) for name in vars(parser.parse_args([])) if name.startswith("muon_")}


def test_preset_megatron_is_megatrons_own_flag_defaults() -> None:
    (flags,) = run_ranks(megatron_flag_defaults, 1)
    config = MuonConfig.from_preset("megatron")
    assert config.momentum == flags["muon_momentum"]
    assert config.nesterov == flags["muon_nesterov"]
    assert config.coefficients == ALIASES[flags["muon_coefficient_type"]]
    assert config.ns_steps == flags["muon_num_ns_steps"]
    assert config.scale_mode == flags["muon_scale_mode"]
    assert config.extra_scale_factor == flags["muon_extra_scale_factor"]
    assert (config.qkv_split, flags["muon_split_qkv"]) == ("qkv", True)
    # Products in bf16.
    assert (config.ns_dtype, flags["muon_fp32_matmul_prec"]) == ("bf16", "medium")
    # It has no flag for a fused gate and up: it orthogonalizes them as one matrix.
    assert config.split_gated is False


def test_presets_are_all_tested_and_cannot_be_changed() -> None:
    assert PRESETS.keys() == {*EXPECTED_PRESETS, "megatron"}
    with pytest.raises(TypeError):
        PRESETS["moonlight"] = {}  # type: ignore[index]


def test_overrides_go_on_top_of_a_preset() -> None:
    config = MuonConfig.from_preset("megatron", nesterov=True, scale_mode="rms")
    assert config == dataclasses.replace(MuonConfig.from_preset("megatron"), nesterov=True, scale_mode="rms")
    assert config.momentum == 0.9
    assert MuonConfig.from_preset("moonlight") == MuonConfig()


def test_unknown_preset() -> None:
    with pytest.raises(ValueError) as error:
        MuonConfig.from_preset("kimi")
    assert str(error.value) == "preset: got 'kimi', expected one of moonlight, megatron, deepseek-v4, keller"


def test_unknown_override() -> None:
    with pytest.raises(ValueError) as error:
        MuonConfig.from_preset("moonlight", ns_step=5, lr=0.1, momentum=0.9)
    assert str(error.value) == f"MuonConfig has no setting lr, ns_step; it has {', '.join(sorted(FIELDS))}"


def test_bad_override() -> None:
    with pytest.raises(ValueError, match=r"MuonConfig\.momentum: got 2\.0, expected in"):
        MuonConfig.from_preset("keller", momentum=2.0)


def test_flags_have_no_defaults_of_their_own() -> None:
    """Every setting has a flag; unset it is None, and a command line without flags gives the dataclass's defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    unset = parser.parse_args([])
    for name, setting in FIELDS.items():
        assert getattr(unset, f"muon_{name}") is None
        action = next(a for a in parser._actions if a.dest == f"muon_{name}")
        default = repr(setting.default) if setting.default == "" else setting.default
        assert f"(default: {default}," in str(action.help)
    assert config_from_args(unset) == MuonConfig.from_preset(DEFAULT_PRESET) == MuonConfig()


OTHER_VALUES: dict[str, Any] = dict(
    momentum=0.5,
    nesterov=False,
    coefficients="you",
    ns_steps=6,
    ns_dtype="fp32",
    ns_backend="emerging",
    ns_method="standard",
    exchange_dtype="fp32",
    scale_mode="spectral",
    update_rms=0.1,
    extra_scale_factor=2.0,
    qkv_split="head",
    mla_split="part",
    splits="splits.yaml",
    split_gated=False,
    router="adam",
    tp_mode="blockwise",
    batched=False,
    max_team_size=1,
    balance="flops",
    exchange_buffer_mb=64,
    variant="normuon",
    momentum_form="ema",
    momentum_dtype="bf16",
    beta2=0.9,
    second_moment_eps=1e-6,
    cautious_weight_decay=True,
    log_interval=10,
    metrics_dir="metrics",
    profile=10,
    profile_dir="profile",
    links="measured.json",
    log_params=True,
    init_from_adamw="fresh",
    verify_checkpoint=False,
    verify_saves=True,
    moe_fp8="blockwise",
)


@pytest.mark.parametrize("name", FIELDS)
def test_flag_sets_its_field_and_no_other(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    value = OTHER_VALUES[name]
    assert value != FIELDS[name].default
    flag = name.replace("_", "-")
    words = [f"--muon-{flag}", str(value)]
    if isinstance(value, bool):
        words = [f"--muon-{flag}" if value else f"--muon-no-{flag}"]
    needed = {"max_team_size": 1} if name == "ns_backend" else {}
    words += [word for n, v in needed.items() for word in (f"--muon-{n.replace('_', '-')}", str(v))]
    assert config_from_args(parser.parse_args(words)) == MuonConfig(**{name: value, **needed})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ns_method="gram"), "ns_method: got 'gram', expected auto or standard with ns_dtype bf16"),
        (dict(ns_backend="emerging"), "max_team_size: got 64, expected 1: teams multiply with torch"),
        (dict(ns_backend="emerging", ns_dtype="fp32", max_team_size=1), "ns_dtype: got 'fp32', expected one that back"),
        (dict(ns_backend="emerging", ns_method="gram", max_team_size=1), "ns_method: got 'gram', expected auto or"),
        (
            dict(ns_backend="gram-newton-schulz", coefficients="aol", ns_steps=4, max_team_size=1),
            "coefficients: got 'aol', expected another set with back end",
        ),
    ],
)
def test_back_ends_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MuonConfig.{message}"):
        MuonConfig(**settings)
