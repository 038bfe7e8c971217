"""The flags give the settings they say, leave stock Megatron as it was, and refuse what cannot be honoured."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megatron_muon.config import PRESETS, MuonConfig
from megatron_muon.megatron.entry import arguments, messages
from megatron_muon.megatron.entry.checks import check_arguments, check_optimizer_config
from megatron_muon.newton_schulz import ALIASES
from tests.paths import EXAMPLES

ON = ("--distributed-muon", "--use-distributed-optimizer")
MODEL = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--max-position-embeddings", "32", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3"),
)
# A value other than the default's, by field, where it cannot be made from the type.
OTHER = {
    "coefficients": "you",
    "splits": str(EXAMPLES / "splits.yaml"),
    "links": str(EXAMPLES / "links.json"),
}


@pytest.fixture(autouse=True)
def _say_again() -> Iterator[None]:
    messages.say.cache_clear()
    yield
    messages.say.cache_clear()


def new_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))


# Megatron takes a second or two to make its parser; parsing does not change it.
@functools.cache
def stock_parser() -> argparse.ArgumentParser:
    return new_parser()


@functools.cache
def extended_parser() -> tuple[argparse.ArgumentParser, arguments.ParserChanges]:
    parser = new_parser()
    return parser, arguments.add_arguments(parser)


def parse(*words: str, cpu: bool = False) -> tuple[argparse.Namespace, MuonConfig | None]:
    parser, changes = extended_parser()
    args = parser.parse_args(words)
    return args, arguments.apply(args, changes, cpu=cpu)


def settings(*words: str, cpu: bool = False) -> MuonConfig:
    config = parse(*ON, *words, cpu=cpu)[1]
    assert config is not None
    return config


def other_value(field: dataclasses.Field[Any]) -> Any:
    annotation = get_type_hints(MuonConfig)[field.name]
    if field.name in OTHER:
        return OTHER[field.name]
    if annotation is bool:
        return not field.default
    if choices := get_args(annotation):
        return next(choice for choice in choices if choice != field.default)
    if annotation is str:
        return "elsewhere"
    return field.default + 1 if annotation is int else field.default / 2


class TestSettings:
    @pytest.mark.parametrize("field", dataclasses.fields(MuonConfig), ids=lambda field: field.name)
    def test_every_setting_has_a_flag(self, field: dataclasses.Field[Any]) -> None:
        value = other_value(field)
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words = [f"--muon-{name}"] if value else [f"--muon-no-{name}"]
        else:
            words = [f"--muon-{name}", str(value)]
        # Another back end has no teams.
        needed = {"max_team_size": 1} if field.name == "ns_backend" else {}
        words += ["--muon-max-team-size", "1"] * len(needed)
        # FP8 is for experts, and elsewhere than on a CPU for machines with Transformer Engine.
        if cpu := field.name == "moe_fp8":
            words += ["--num-experts", "8", "--transformer-impl", "local"]
            needed = {"ns_dtype": "fp32"}
        assert settings(*words, cpu=cpu) == dataclasses.replace(MuonConfig(), **{field.name: value, **needed})

    @pytest.mark.parametrize("preset", PRESETS)
    def test_unset_flags_take_the_presets_values(self, preset: str) -> None:
        assert settings("--muon-preset", preset) == MuonConfig.from_preset(preset)

    def test_without_a_preset_the_defaults_are_moonlights(self) -> None:
        assert settings() == MuonConfig.from_preset("moonlight") == MuonConfig()

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_flag_overrides_the_preset_even_with_the_default_value(self, preset: str) -> None:
        words = ("--muon-momentum", "0.95", "--muon-nesterov", "--muon-scale-mode", "rms")
        expected = MuonConfig.from_preset(preset, momentum=0.95, nesterov=True, scale_mode="rms")
        assert settings("--muon-preset", preset, *words) == expected

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (("--muon-momentum", "0.8"), {"momentum": 0.8}),
            (("--muon-nesterov",), {"nesterov": True}),
            (("--muon-no-split-qkv",), {"qkv_split": "none"}),
            (("--muon-no-split-qkv", "--muon-qkv-split", "none"), {"qkv_split": "none"}),
            (("--muon-qkv-split", "head", "--muon-mla-split", "part"), {"qkv_split": "head", "mla_split": "part"}),
            (("--muon-scale-mode", "unit_rms_norm"), {"scale_mode": "unit_rms_norm"}),
            (("--muon-num-ns-steps", "4"), {"ns_steps": 4}),
            (("--muon-extra-scale-factor", "0.5"), {"extra_scale_factor": 0.5}),
            (("--muon-fp32-matmul-prec", "low"), {"ns_dtype": "bf16"}),
            (("--muon-fp32-matmul-prec", "medium"), {"ns_dtype": "bf16"}),
            (("--muon-fp32-matmul-prec", "high"), {"ns_dtype": "fp32"}),
            (("--muon-fp32-matmul-prec", "medium", "--muon-ns-dtype", "fp16"), {"ns_dtype": "fp16"}),
            (("--muon-tp-mode", "blockwise"), {"tp_mode": "blockwise"}),
            (("--muon-tp-mode", "duplicated"), {"tp_mode": "exact"}),
            (("--muon-tp-mode", "distributed"), {"tp_mode": "exact"}),
            (("--muon-scalar-optimizer", "adam"), {}),
            *(((("--muon-coefficient-type"), name), {"coefficients": own}) for name, own in ALIASES.items()),
            (("--muon-coefficients", "simple", "--muon-coefficient-type", "keller"), {"coefficients": "keller"}),
            (("--muon-no-nesterov", "--muon-nesterov"), {"nesterov": True}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_megatrons_flags_keep_their_meaning(self, words: tuple[str, ...], expected: dict[str, Any]) -> None:
        # DeepSeek's schedule needs ten steps.
        steps = {"ns_steps": 10} if expected.get("coefficients") == "deepseek_v4" else {}
        words = (*words, *(("--muon-ns-steps", "10") if steps else ()))
        assert settings(*words) == MuonConfig(**expected, **steps)

    def test_what_is_used_is_written_back_and_read_again(self) -> None:
        args, config = parse(*ON, "--muon-preset", "megatron", "--muon-num-ns-steps", "7", "--muon-ns-dtype", "fp32")
        assert config == MuonConfig.from_preset("megatron", ns_steps=7, ns_dtype="fp32")
        for name, value in dataclasses.asdict(config).items():
            assert getattr(args, f"muon_{name}") == value
        assert (args.muon_num_ns_steps, args.muon_coefficient_type, args.muon_fp32_matmul_prec) == (7, "you", "high")
        assert arguments.config_from_args(args) == config

    def test_a_scripts_own_default_counts_as_given(self) -> None:
        parser = new_parser()
        changes = arguments.add_arguments(parser)
        parser.set_defaults(muon_momentum=0.5)
        config = arguments.apply(parser.parse_args(ON), changes)
        assert config is not None and config.momentum == 0.5

    def test_a_parser_without_megatrons_flags_gets_them_all(self) -> None:
        parser = argparse.ArgumentParser()
        arguments.add_arguments(parser)
        args = parser.parse_args(["--distributed-muon", "--muon-ns-steps", "3"])
        assert arguments.config_from_args(args) == MuonConfig(ns_steps=3)

    def test_help_shows_every_flag(self) -> None:
        text = extended_parser()[0].format_help()
        for field in dataclasses.fields(MuonConfig):
            assert f"--muon-{field.name.replace('_', '-')} " in text
        assert "--distributed-muon" in text and "{moonlight,megatron,deepseek-v4,keller}" in text


class TestCpu:
    def test_newton_schulz_is_fp32_unless_chosen(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert settings(cpu=True).ns_dtype == "fp32"
        assert "Newton-Schulz runs in fp32" in capsys.readouterr().out

    @pytest.mark.parametrize("words", [("--muon-ns-dtype", "bf16"), ("--muon-fp32-matmul-prec", "medium")])
    def test_a_given_dtype_stays(self, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        assert settings(*words, cpu=True).ns_dtype == "bf16"
        assert capsys.readouterr().out == ""


class TestStock:
    """Without `--distributed-muon`."""

    @pytest.mark.parametrize(
        "words",
        [
            (),
            ("--optimizer", "muon", "--use-distributed-optimizer"),
            ("--optimizer", "muon", "--muon-momentum", "0.95", "--muon-nesterov", "--muon-num-ns-steps", "6"),
            ("--muon-no-split-qkv", "--muon-tp-mode", "duplicated", "--muon-scalar-optimizer", "lion"),
            ("--muon-coefficient-type", "polar_express", "--muon-fp32-matmul-prec", "high"),
            ("--optimizer", "sgd", "--fp16", "--use-precision-aware-optimizer", "--lr", "-1"),
        ],
        ids=" ".join,
    )
    def test_arguments_are_as_megatron_parses_them(self, words: tuple[str, ...]) -> None:
        expected = stock_parser().parse_args(words)
        args, config = parse(*words)
        assert config is None
        assert vars(args) == vars(expected)

    @pytest.mark.parametrize(
        "words",
        [
            ("--muon-preset", "keller"),
            ("--muon-ns-steps", "5"),
            ("--muon-coefficients", "keller"),
            ("--muon-no-nesterov",),
            ("--muon-qkv-split", "qkv"),
            ("--muon-split-gated",),
            ("--muon-no-split-gated",),
            ("--muon-no-batched",),
            ("--muon-update-rms", "0.2"),
            ("--muon-ns-dtype", "fp32"),
            ("--muon-exchange-dtype", "fp32"),
            ("--muon-router", "adam"),
            ("--muon-scale-mode", "rms"),
            ("--muon-tp-mode", "exact"),
        ],
        ids=" ".join,
    )
    def test_flags_of_this_package_are_refused(self, words: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=rf"^{' '.join(words)}: given without --distributed-muon"):
            parse("--use-distributed-optimizer", *words)

    def test_megatrons_flags_of_muon_without_a_switch_get_one_warning(self, capsys: pytest.CaptureFixture[str]) -> None:
        for _ in range(2):
            parse("--muon-momentum", "0.9", "--muon-num-ns-steps", "6", "--muon-no-split-qkv")
        assert capsys.readouterr().out == (
            "megatron_muon: warning: --muon-momentum 0.9, --muon-num-ns-steps 6, --muon-no-split-qkv: no effect with "
            "--optimizer adam; add --distributed-muon, or --optimizer muon for Megatron's own Muon\n"
        )
        parse("--muon-momentum", "0.9", "--optimizer", "muon")
        parse(*ON, "--muon-momentum", "0.9")
        assert "warning" not in capsys.readouterr().out


class TestValidateArgs:
    """Against Megatron's own `validate_args`."""

    @pytest.mark.parametrize("optimizer", ["adam", "muon", "dist_muon"])
    def test_the_optimizer_stays_megatrons_distributed_one(
        self, optimizer: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from megatron.training.arguments import validate_args

        args, config = self._parse(*ON, "--optimizer", optimizer)
        said = capsys.readouterr().out
        validate_args(args)
        assert config == MuonConfig()
        assert args.optimizer == "adam"
        assert args.use_distributed_optimizer and not args.use_layer_wise_distributed_optimizer
        assert (f"--optimizer {optimizer} becomes adam" in said) == (optimizer != "adam")

    def test_stock_muon_would_become_layer_wise(self) -> None:
        from megatron.training.arguments import validate_args

        args, _ = self._parse("--optimizer", "muon", "--use-distributed-optimizer")
        validate_args(args)
        assert args.use_layer_wise_distributed_optimizer and not args.use_distributed_optimizer

    def test_megatrons_optimizer_config_passes_the_checks(self) -> None:
        from megatron.training.arguments import validate_args
        from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

        args, _ = self._parse(*ON, "--bf16", "--overlap-grad-reduce", "--overlap-param-gather")
        validate_args(args)
        config, _ = get_megatron_optimizer_config(args)
        check_optimizer_config(config, get_megatron_ddp_config(args))
        assert config.muon_momentum == 0.95 and config.muon_num_ns_steps == 5

    @staticmethod
    def _parse(*words: str) -> tuple[argparse.Namespace, MuonConfig | None]:
        args, config = parse(*MODEL, *words)
        # parse_args sets these.
        args.rank, args.world_size = 0, 1
        return args, config


def test_decisions_are_said_once_and_on_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        parse(*ON, "--optimizer", "muon")
    assert capsys.readouterr().out.count("becomes adam") == 1
    messages.say.cache_clear()
    monkeypatch.setenv("RANK", "1")
    parse(*ON, "--optimizer", "muon")
    assert capsys.readouterr().out == ""


# What is refused on a command line: its words, the exception, and how its message must begin.
BAD_WORDS: list[tuple[tuple[str, ...], type[Exception], str]] = [
    (("--muon-coefficients", "nope"), ValueError, ".*nope.*--muon-coefficients nope"),
    (("--muon-coefficient-type", "nope"), ValueError, ".*nope.*given with it: --muon-coefficient-type nope"),
    (("--muon-ns-steps", "0"), ValueError, "--muon-ns-steps: got 0, expected at least 1; correct or omit it$"),
    (
        ("--muon-num-ns-steps", "-3"),
        ValueError,
        "--muon-num-ns-steps: got -3, expected at least 1; correct",
    ),
    (("--muon-momentum", "-0.1"), ValueError, "--muon-momentum: got -0.1, expected in"),
    (("--muon-momentum", "1.0"), ValueError, ".*momentum: got 1.0"),
    (("--muon-momentum", "nan"), ValueError, "--muon-momentum: got nan"),
    (
        ("--muon-preset", "keller", "--muon-ns-backend", "emerging"),
        ValueError,
        "--muon-max-team-size .not given.: got 64, .*; correct or omit it; given with it: --muon-ns-backend emerging "
        "--muon-preset keller$",
    ),
    (("--muon-update-rms", "0"), ValueError, "--muon-update-rms: got 0.0"),
    (("--muon-extra-scale-factor", "-1"), ValueError, "--muon-extra-scale-factor: got -1.0"),
    (("--muon-ns-steps", "4", "--muon-num-ns-steps", "6"), ValueError, "--muon-ns-steps: got 4, expected 6"),
    (("--muon-ns-dtype", "bf16", "--muon-fp32-matmul-prec", "high"), ValueError, "--muon-ns-dtype: got 'bf16'"),
    (("--muon-ns-dtype", "fp32", "--muon-fp32-matmul-prec", "low"), ValueError, "--muon-ns-dtype: got 'fp32'"),
    (
        ("--muon-no-split-qkv", "--muon-qkv-split", "qkv"),
        ValueError,
        "--muon-qkv-split: got 'qkv', expected 'none', which is what --muon-no-split-qkv means; give only one",
    ),
    (("--muon-splits", "nowhere.yaml"), ValueError, "--muon-splits nowhere.yaml: got what cannot be read"),
    (("--muon-links", "nowhere.json"), ValueError, "--muon-links nowhere.json: got a file that cannot be read"),
    (("--muon-scalar-optimizer", "lion"), NotImplementedError, "--muon-scalar-optimizer: got 'lion'"),
    (("--lr=-1e-3",), ValueError, "--lr: got -0.001"),
    (("--lr", "nan"), ValueError, "--lr: got nan"),
    (("--min-lr", "-1"), ValueError, "--min-lr: got -1.0"),
    (("--decoupled-lr", "-1"), ValueError, "--decoupled-lr: got -1.0"),
    (("--weight-decay", "-0.1"), ValueError, "--weight-decay: got -0.1"),
    (("--fp16", "--loss-scale", "1"), ValueError, "--loss-scale: got 1.0"),
    (("--fp16", "--loss-scale", "0"), ValueError, "--loss-scale: got 0.0"),
    (("--optimizer", "sgd"), ValueError, "--optimizer: got 'sgd'"),
    (("--optimizer", "lion"), ValueError, "--optimizer: got 'lion'"),
    (("--optimizer", "soap"), ValueError, "--optimizer: got 'soap'"),
    (("--optimizer", "adaptive_muon"), NotImplementedError, "--optimizer: got 'adaptive_muon'"),
    (("--use-precision-aware-optimizer",), NotImplementedError, "--use-precision-aware-optimizer: got True"),
    (("--optimizer-cpu-offload",), NotImplementedError, "--optimizer-cpu-offload: got True"),
    (("--optimizer-cuda-graph",), NotImplementedError, "--optimizer-cuda-graph: got True"),
    (("--use-megatron-fsdp",), NotImplementedError, "--use-megatron-fsdp: got True"),
    (("--use-torch-fsdp2",), NotImplementedError, "--use-torch-fsdp2: got True"),
    (
        ("--overlap-param-gather-with-optimizer-step",),
        NotImplementedError,
        "--overlap-param-gather-with-optimizer-step: got True",
    ),
    (("--no-use-layer-wise-param-layout",), ValueError, "--no-use-layer-wise-param-layout"),
    (("--use-mup",), ValueError, "--muon-scale-mode: got 'rms', expected 'unit_rms_norm' or 'shape_scaling'"),
    (("--qk-clip", "--qk-clip-threshold", "0"), ValueError, "--qk-clip-threshold: got 0.0, expected a positive number"),
    (("--qk-clip", "--qk-clip-alpha", "1.5"), ValueError, "--qk-clip-alpha: got 1.5, expected a number in"),
    (("--dump-param-to-param-group-map", "x"), NotImplementedError, "--dump-param-to-param-group-map: got 'x'"),
    (("--freeze-all-layers",), ValueError, "--freeze-all-layers: got True"),
    (
        ("--ckpt-format", "torch", "--load", "x", "--ckpt-step", "2"),
        NotImplementedError,
        "--ckpt-step: got 2, expected none with legacy files",
    ),
    (("--tensor-parallel-num-weight-shards", "2"), NotImplementedError, "--tensor-parallel-num-weight-shards: got 2"),
    (
        ("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-num-weight-shards", "4"),
        NotImplementedError,
        "--expert-tensor-parallel-num-weight-shards: got 4, expected at most the tensor-parallel size 2",
    ),
]


class TestBadInput:
    @pytest.mark.parametrize(("words", "error", "message"), BAD_WORDS, ids=[" ".join(bad[0]) for bad in BAD_WORDS])
    def test_command_line(self, words: tuple[str, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error) as raised:
            parse(*ON, *words)
        assert type(raised.value) is error
        text = str(raised.value)
        assert re.match(message, text), text
        assert "got" in text and "expected" in text

    def test_without_distributed_optimizer(self) -> None:
        with pytest.raises(ValueError, match=r"^--use-distributed-optimizer: got False, expected True.*add --use-dist"):
            parse("--distributed-muon")

    @pytest.mark.parametrize(
        "words",
        [
            ("--muon-preset", "nope"),
            ("--muon-scale-mode", "nope"),
            ("--muon-tp-mode", "nope"),
            ("--muon-router", "sgd"),
            ("--muon-exchange-dtype", "fp16"),
        ],
        ids=" ".join,
    )
    def test_choices(self, words: tuple[str, ...]) -> None:
        with pytest.raises(argparse.ArgumentError, match=rf"argument {words[0]}: invalid choice: '{words[1]}'.*choose"):
            parse(*ON, *words)

    @pytest.mark.parametrize(
        "words",
        [
            ("--fp16",),
            ("--fp16", "--loss-scale", "1024"),
            ("--bf16", "--loss-scale", "1"),
            ("--lr", "0"),
            ("--tensor-model-parallel-size", "2", "--tensor-parallel-num-weight-shards", "2"),
            ("--num-distributed-optimizer-instances", "2"),
            ("--qk-clip", "--qk-clip-threshold", "30", "--qk-clip-alpha", "0.4"),
            ("--load", "x", "--ckpt-step", "2"),
            ("--ckpt-format", "torch", "--load", "x", "--ckpt-step", "2", "--no-load-optim"),
            ("--ckpt-format", "torch", "--load", "x"),
            ("--decoupled-lr", "1e-3", "--apply-wd-to-qk-layernorm", "--clip-grad", "0"),
        ],
        ids=" ".join,
    )
    def test_good_input_passes(self, words: tuple[str, ...]) -> None:
        assert settings(*words) == MuonConfig()

    def test_mup_passes_with_a_scale_that_fits_it(self) -> None:
        config = settings("--use-mup", "--muon-scale-mode", "unit_rms_norm")
        assert config == MuonConfig(scale_mode="unit_rms_norm")

    def test_checks_do_not_need_the_flag_to_exist(self) -> None:
        """A Megatron without one of the refused features passes."""
        args = stock_parser().parse_args(ON[1:])
        del args.use_mup, args.qk_clip
        check_arguments(args)


def configs(optimizer: dict[str, Any] | None = None, ddp: dict[str, Any] | None = None) -> tuple[Any, Any]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    good: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "use_distributed_optimizer": True}
    config = OptimizerConfig(**good)
    # Not through the constructor: for some of these it wants Transformer Engine.
    for name, value in (optimizer or {}).items():
        setattr(config, name, value)
    return config, DistributedDataParallelConfig(**{"use_distributed_optimizer": True, **(ddp or {})})


class TestOptimizerConfig:
    """`check_optimizer_config`, which serves other training loops."""

    @pytest.mark.parametrize(
        "optimizer",
        [
            {},
            {"bf16": True, "params_dtype": torch.bfloat16},
            {"fp16": True, "params_dtype": torch.float16},
            {"fp16": True, "loss_scale": 128.0},
            {"lr": None, "min_lr": None},
            {"lr": 0.0},
        ],
        ids=str,
    )
    def test_good(self, optimizer: dict[str, Any]) -> None:
        check_optimizer_config(*configs(optimizer))

    @pytest.mark.parametrize(
        ("optimizer", "error"),
        [
            ({"optimizer": "muon"}, ValueError),
            ({"optimizer": "sgd"}, ValueError),
            ({"lr": -1e-3}, ValueError),
            ({"lr": float("inf")}, ValueError),
            ({"min_lr": -1.0}, ValueError),
            ({"decoupled_lr": -1.0}, ValueError),
            ({"decoupled_min_lr": -1.0}, ValueError),
            ({"weight_decay": -1.0}, ValueError),
            ({"loss_scale": 1.0, "fp16": True}, ValueError),
            ({"use_distributed_optimizer": False}, ValueError),
            ({"use_layer_wise_distributed_optimizer": True}, ValueError),
            ({"use_precision_aware_optimizer": True}, NotImplementedError),
            ({"optimizer_cpu_offload": True}, NotImplementedError),
            ({"overlap_param_gather_with_optimizer_step": True}, NotImplementedError),
            ({"optimizer_cuda_graph": True}, NotImplementedError),
            ({"decoupled_weight_decay": False}, NotImplementedError),
        ],
        ids=str,
    )
    def test_bad_optimizer_config(self, optimizer: dict[str, Any], error: type[Exception]) -> None:
        name, value = next(iter(optimizer.items()))
        with pytest.raises(error, match=rf"^OptimizerConfig\.{name}: got {value!r}, expected .*; \w+") as raised:
            check_optimizer_config(*configs(optimizer))
        assert type(raised.value) is error

    @pytest.mark.parametrize(
        ("ddp", "error"),
        [
            ({"use_distributed_optimizer": False}, ValueError),
            ({"use_megatron_fsdp": True}, NotImplementedError),
            ({"use_custom_fsdp": True}, NotImplementedError),
        ],
        ids=str,
    )
    def test_bad_ddp_config(self, ddp: dict[str, Any], error: type[Exception]) -> None:
        name = next(iter(ddp))
        with pytest.raises(error, match=rf"^DistributedDataParallelConfig\.{name}: got .*, expected .*; \w+"):
            check_optimizer_config(*configs(ddp=ddp))

    def test_torch_fsdp2(self) -> None:
        from megatron.core.distributed.torch_fully_sharded_data_parallel_config import (
            TorchFullyShardedDataParallelConfig,
        )

        with pytest.raises(NotImplementedError, match=r"^ddp_config: got torch FSDP2's config, expected"):
            check_optimizer_config(configs()[0], TorchFullyShardedDataParallelConfig())
