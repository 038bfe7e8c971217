"""`--muon-moe-fp8` sets what it implies, makes experts alone FP8, and refuses what cannot be before anything is built.

No Transformer Engine here: it is stood in for by its version number, and its linears by `LinearStandIn`. What Megatron
decides for a linear is Megatron's own code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import nn

from megatron_muon.config import MoeFp8, MuonConfig
from megatron_muon.megatron.entry import active, arguments, seams
from megatron_muon.megatron.entry.fp8_checks import RECIPES, check_arguments_fp8, this_machine
from megatron_muon.megatron.entry.fp8_checks import Fp8Machine as Machine
from megatron_muon.megatron.model import expert_fp8 as moe_fp8
from tests import models
from tests.distributed import run_ranks
from tests.megatron.test_arguments import ON, extended_parser
from tests.models import Layout
from tests.seams import seams_removed_afterwards

HOPPER, BLACKWELL = Machine("2.20.2", (9, 0)), Machine("2.20.2", (10, 0))
MODEL = (
    *("--num-layers", "2", "--hidden-size", "256", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--max-position-embeddings", "32", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3", "--bf16"),
)
MOE = (
    *("--num-experts", "8", "--moe-ffn-hidden-size", "128", "--moe-shared-expert-intermediate-size", "256"),
    *("--moe-token-dispatcher-type", "alltoall", "--swiglu", "--disable-bias-linear"),
)


@pytest.fixture(autouse=True)
def _stock_afterwards() -> Iterator[None]:
    with seams_removed_afterwards():
        yield


@pytest.fixture
def machine_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Megatron and our checks see of Transformer Engine 2.20.2, its version, and of a Hopper device."""
    import megatron.core.utils
    from packaging.version import Version

    monkeypatch.setattr(megatron.core.utils, "_te_version", Version("2.20.2"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def parse(*words: str, machine: Machine = BLACKWELL, cpu: bool = False) -> tuple[argparse.Namespace, MuonConfig]:
    parser, changes = extended_parser()
    args = parser.parse_args([*MODEL, *ON, *words])
    config = arguments.apply(args, changes, cpu=cpu, machine=machine)
    assert config is not None
    # parse_args sets these.
    args.rank, args.world_size = 0, 1
    return args, config


class TestFlag:
    def test_every_recipe_has_its_needs(self) -> None:
        assert set(get_args(MoeFp8)) == {"off", *RECIPES}

    @pytest.mark.parametrize(
        ("recipe", "fp8_format"),
        [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
    )
    def test_sets_what_it_implies_and_says_so(
        self, recipe: MoeFp8, fp8_format: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args, config = parse(*MOE, "--muon-moe-fp8", recipe)
        assert config.moe_fp8 == args.muon_moe_fp8 == recipe
        assert (args.fp8, args.fp8_recipe) == (fp8_format, recipe)
        assert args.moe_grouped_gemm and args.moe_router_padding_for_quantization
        said = [line for line in capsys.readouterr().out.splitlines() if "moe-fp8" in line]
        assert said == [
            f"megatron_muon: --muon-moe-fp8 {recipe} sets {words}"
            for words in (
                f"--fp8-format {fp8_format}",
                f"--fp8-recipe {recipe}",
                f"--te-precision-config-file {moe_fp8.PRECISION_FILE}",
                "--moe-grouped-gemm",
                "--moe-router-padding-for-quantization",
            )
        ]

    def test_without_it_nothing_is_set(self, capsys: pytest.CaptureFixture[str]) -> None:
        args, config = parse(*MOE)
        assert config.moe_fp8 == "off" and args.fp8 is None and not args.moe_grouped_gemm
        assert capsys.readouterr().out == ""

    def test_megatrons_own_flags_stay_as_they_are(self) -> None:
        args, config = parse(*MOE, "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather")
        assert config.moe_fp8 == "off" and args.te_precision_config_file is None
        assert (args.fp8, args.fp8_recipe, args.fp8_param_gather) == ("hybrid", "tensorwise", True)

    def test_on_a_cpu_it_sets_nothing_and_says_what_it_does(self, capsys: pytest.CaptureFixture[str]) -> None:
        args, config = parse(*MOE, "--muon-moe-fp8", "mxfp8", "--transformer-impl", "local", cpu=True)
        assert config.moe_fp8 == "mxfp8" and args.fp8 is None and not args.moe_grouped_gemm
        assert "--muon-moe-fp8 mxfp8: the experts' products are emulated in fp32" in capsys.readouterr().out

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("words", [(), ("--fp8-param-gather",)], ids=" ".join)
    def test_megatron_makes_a_config_of_it(
        self, recipe: MoeFp8, words: tuple[str, ...], machine_stand_in: None
    ) -> None:
        from megatron.core.quantization.quant_config import RecipeConfig
        from megatron.training.arguments import core_transformer_config_from_args, validate_args

        args, _ = parse(*MOE, "--muon-moe-fp8", recipe, *words)
        validate_args(args)
        config = core_transformer_config_from_args(args)
        assert isinstance(config.quant_recipe, RecipeConfig)
        assert config.fp8_param == bool(words)
        # Another training loop makes the same of what we give it.
        settings = {"num_moe_experts": 8, "moe_token_dispatcher_type": "alltoall", **moe_fp8.config_settings(recipe)}
        own = type(config)(num_layers=2, hidden_size=64, num_attention_heads=4, bf16=True, **settings)
        assert repr(own.quant_recipe) == repr(config.quant_recipe)
        for name in settings.keys() - {"quant_recipe"}:
            assert getattr(own, name) == getattr(config, name), name


def te_names(layers: tuple[str, ...]) -> dict[str, bool]:
    """Names of Transformer Engine linears under `layers`, as Megatron-Core's specs make them, and whether experts'."""
    dense = (
        *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.linear_q_proj"),
        *("self_attention.linear_kv_down_proj", "self_attention.linear_kv_up_proj", "self_attention.linear_q_up_proj"),
        *("cross_attention.linear_q", "cross_attention.linear_kv", "mlp.linear_fc1", "mlp.linear_fc2"),
        *("mlp.fc1_latent_proj", "mlp.fc2_latent_proj", "mixer.in_proj", "mixer.out_proj"),
    )
    experts = (
        *("mlp.experts.linear_fc1", "mlp.experts.linear_fc2", "mlp.shared_experts.linear_fc1"),
        *("mlp.shared_experts.linear_fc2", "mlp.experts.local_experts.3.linear_fc1"),
    )
    names = {f"{layer}.{name}": name in experts for layer in layers for name in (*dense, *experts)}
    return {**names, "output_layer": False, "mtp.layers.0.eh_proj": False}


LAYERS = ("decoder.layers.0", "module.decoder.layers.11", "mtp.layers.0.mtp_model_layer")


class LinearStandIn(nn.Module):
    """One of Megatron's Transformer Engine linears, as far as it decides on its precision: with Megatron's own code."""

    def __init__(self, shape: tuple[int, int] = (256, 128)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.te_quant_params: Any = None

    def finish_init(self, quantization_config: Any) -> None:
        from megatron.core.extensions.transformer_engine import TEQuantizationParams

        if quantization_config is not None:
            self.te_quant_params = TEQuantizationParams.parse_from_config(quantization_config)

    def will_execute_quantized(self, is_context_quantized: bool) -> bool:
        from megatron.core.extensions import transformer_engine

        decide = transformer_engine._get_should_context_be_quantized_params
        return bool(decide(self.te_quant_params, self.training, is_context_quantized))


def model_stand_in(names: list[str], recipe: MoeFp8, shape: tuple[int, int] = (256, 128)) -> nn.Module:
    """A model of `LinearStandIn`s at these names, given their precisions as `GPTModel` gives them."""
    from megatron.core.quantization.utils import get_quant_config_or_none

    model = nn.Module()
    for name in names:
        owner = model
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(last, LinearStandIn(shape))
    settings = {"num_moe_experts": 8} | ({} if recipe == "off" else moe_fp8.config_settings(recipe))
    model.config = SimpleNamespace(**settings)  # type: ignore[assignment]
    for name, linear in model.named_modules():
        if isinstance(linear, LinearStandIn):
            linear.finish_init(get_quant_config_or_none(name, settings.get("quant_recipe")))
    return model


class TestPrecisionOfLayers:
    @pytest.mark.parametrize("training", [True, False])
    def test_experts_alone_are_fp8(self, training: bool) -> None:
        names = te_names(LAYERS)
        model = model_stand_in(list(names), "blockwise").train(training)
        fp8 = {name: model.get_submodule(name).will_execute_quantized(True) for name in names}  # type: ignore[operator]
        assert fp8 == names
        # Where Megatron enters no FP8 autocast (first and last layers in bf16), all are bf16.
        assert not any(model.get_submodule(name).will_execute_quantized(False) for name in names)  # type: ignore[operator]

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_such_a_model_passes(self, recipe: MoeFp8) -> None:
        moe_fp8.prepare_model(model_stand_in(list(te_names(LAYERS)), recipe), recipe, machine=BLACKWELL)

    @pytest.mark.parametrize("model", ["moe", "mla"])
    def test_names_of_a_real_model(self, model: str) -> None:
        run_ranks(real_names, 1, model)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["encoder.linear"], "encoder.linear: got FP8, expected bf16"),
            (["decoder.layers.0.attention.mlp.experts.linear_fc1"], "experts.linear_fc1: got bf16, expected FP8"),
        ],
    )
    def test_an_unknown_layer_is_refused(self, names: list[str], message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            moe_fp8.prepare_model(model_stand_in(names, "mxfp8"), "mxfp8", machine=BLACKWELL)

    def test_an_fp8_weight_outside_experts_is_refused(self) -> None:
        model = model_stand_in(["decoder.layers.0.self_attention.linear_qkv"], "mxfp8")
        with (
            mock.patch("megatron.core.fp8_utils.is_float8tensor", return_value=True),
            pytest.raises(RuntimeError, match=r"linear_qkv\.weight: got an FP8 weight, expected bf16"),
        ):
            moe_fp8.prepare_model(model, "mxfp8", machine=BLACKWELL)


def real_names(rank: int, world_size: int, model: str) -> None:
    """All parallel linears of a real model match the file unless they are experts', and bear names when built."""
    from megatron.core.quantization.utils import get_quant_config_or_none, load_quantization_recipe
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP

    names: list[str | None] = []
    original = MLP.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kwargs.get("name"))
        original(self, *args, **kwargs)

    layout = Layout(1)
    models.initialize(layout)
    seams.install_core_seams()
    recipe = load_quantization_recipe(str(moe_fp8.PRECISION_FILE))
    with mock.patch.object(MLP, "__init__", recording):
        for config in (None, MuonConfig(moe_fp8="delayed")):
            names.clear()
            active.activate(config)
            chunk = models.make_chunks(model, layout, torch.float32)[0]
            assert all(name is None for name in names) if config is None else all(name for name in names)
    # The dense layer's MLP, the experts, the shared expert: those at construction match what they match afterwards.
    matched = [get_quant_config_or_none(name, recipe) is not None for name in names]
    linears = [n for n, m in chunk.named_modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    assert sum(map(moe_fp8.is_expert, linears)) == 2 * (4 + 1)
    for name in linears:
        assert (get_quant_config_or_none(name, recipe) is None) == moe_fp8.is_expert(name), name
    assert len(matched) == 1 + 4 + 1
    # An MLP's own name ends before its linears'.
    ends = [f"{name}.linear_fc1" for name in names]
    assert [get_quant_config_or_none(end, recipe) is None for end in ends] == [moe_fp8.is_expert(e) for e in ends]
    assert sum(map(moe_fp8.is_expert, ends)) == 5


FP8 = ("--muon-moe-fp8", "tensorwise")
GLOBAL = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise")
# Words, machine, exception, and how its message must begin and end.
BAD: list[tuple[tuple[str, ...], Machine, type[Exception], str, str]] = [
    (FP8, HOPPER, ValueError, "--num-experts: got None, expected at least 1", "for a dense model"),
    ((*MOE, *FP8, "--fp8-format", "hybrid"), HOPPER, ValueError, "--fp8-format: got 'hybrid', expected None", "two"),
    ((*MOE, *FP8, "--fp4-format", "e2m1"), HOPPER, ValueError, "--fp4-format: got 'e2m1', expected None", "two"),
    ((*MOE, *FP8, "--fp8-recipe", "mxfp8"), HOPPER, ValueError, "--fp8-recipe: got 'mxfp8', expected 'tensorw", "two"),
    ((*MOE, *FP8, "--fp8-output-proj"), HOPPER, ValueError, "--fp8-output-proj: got True, expected False", "two"),
    (
        (*MOE, *FP8, "--te-precision-config-file", "x.yaml"),
        *(HOPPER, ValueError, "--te-precision-config-file: got 'x.yaml', expected None", "omit one of the two"),
    ),
    (
        (*MOE, *FP8, "--use-transformer-engine-op-fuser"),
        *(HOPPER, NotImplementedError, "--use-transformer-engine-op-fuser: got True, expected False", "of the two"),
    ),
    (
        (*MOE, *FP8, "--use-grouped-gemm-for-shared-expert"),
        *(HOPPER, NotImplementedError, "--use-grouped-gemm-for-shared-expert: got True", "omit one of the two"),
    ),
    (
        (*MOE, *FP8, "--use-grouped-gemm-for-dense-mlp"),
        *(HOPPER, NotImplementedError, "--use-grouped-gemm-for-dense-mlp: got True", "omit one of the two"),
    ),
    (
        (*MOE, "--muon-moe-fp8", "delayed", "--first-last-layers-bf16"),
        *(HOPPER, ValueError, "--first-last-layers-bf16: got True, expected False", "choose another recipe"),
    ),
    (
        (*MOE, "--fp8-format", "hybrid", "--first-last-layers-bf16"),
        *(HOPPER, ValueError, "--first-last-layers-bf16: got True, expected False", "choose another recipe"),
    ),
    (
        (*MOE, *FP8, "--moe-token-dispatcher-type", "allgather"),
        *(HOPPER, ValueError, "--moe-token-dispatcher-type: got 'allgather', expected 'alltoall' or 'flex'", "these"),
    ),
    (
        (*MOE, *GLOBAL, "--moe-token-dispatcher-type", "allgather", "--moe-router-padding-for-quantization"),
        *(HOPPER, ValueError, "--moe-token-dispatcher-type: got 'allgather'.*--moe-router-padding-for-quant", "these"),
    ),
    (
        (*MOE, *GLOBAL, "--moe-token-dispatcher-type", "allgather", "--moe-router-padding-for-fp8"),
        *(HOPPER, ValueError, "--moe-token-dispatcher-type: got 'allgather'.*--moe-router-padding-for-fp8", "these"),
    ),
    (
        (*MOE, *FP8, "--use-precision-aware-optimizer"),
        *(HOPPER, NotImplementedError, "--use-precision-aware-optimizer: got True, expected False", "omit it"),
    ),
    (
        (*MOE, *FP8, "--transformer-impl", "local"),
        *(HOPPER, ValueError, "--transformer-impl: got 'local', expected 'transformer_engine'", "one of the two"),
    ),
    (
        ("--fp8-param-gather",),
        HOPPER,
        ValueError,
        "--fp8-param-gather: got True, expected False without FP8",
        "omit it",
    ),
    # Dimensions, as they are on a rank.
    (
        (*MOE, *FP8, "--hidden-size", "264"),
        HOPPER,
        ValueError,
        "--hidden-size: got 264 on a rank, expected .* of 16",
        "",
    ),
    (
        (*MOE, "--muon-moe-fp8", "blockwise", "--moe-ffn-hidden-size", "192"),
        *(HOPPER, ValueError, "--moe-ffn-hidden-size: got 192 on a rank, expected a multiple of 128", "or mxfp8"),
    ),
    (
        (*MOE, "--muon-moe-fp8", "mxfp8", "--moe-ffn-hidden-size", "48"),
        *(BLACKWELL, ValueError, "--moe-ffn-hidden-size: got 48 on a rank, expected a multiple of 32", "or tensorwise"),
    ),
    (
        tuple(
            f"{' '.join(MOE)} --muon-moe-fp8 blockwise --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 "
            "--moe-shared-expert-intermediate-size 384".split()
        ),
        *(
            HOPPER,
            ValueError,
            "--moe-shared-expert-intermediate-size 384 / --tensor-model-parallel-size 2: got 192",
            "",
        ),
    ),
    (
        (*MOE, "--muon-moe-fp8", "blockwise", "--expert-tensor-parallel-size", "4"),
        *(HOPPER, ValueError, "--moe-ffn-hidden-size 128 / --expert-tensor-parallel-size 4: got 32 on a rank", ""),
    ),
    (
        (*MOE, "--muon-moe-fp8", "blockwise", "--moe-latent-size", "64"),
        *(HOPPER, ValueError, "--moe-latent-size: got 64 on a rank, expected a multiple of 128", ""),
    ),
    (
        (*GLOBAL, "--ffn-hidden-size", "24"),
        *(HOPPER, ValueError, "--ffn-hidden-size: got 24 on a rank, expected a multiple of 16", "tensor-parallel size"),
    ),
    # The machine.
    (
        (*MOE, *FP8),
        *(
            Machine(None, (9, 0)),
            RuntimeError,
            "--muon-moe-fp8 tensorwise: got Transformer Engine none, expected 2.2.0",
        ),
        r"pip install 'megatron-muon\[te\]', or omit it",
    ),
    (
        (*MOE, *FP8),
        Machine("2.1.0", (9, 0)),
        RuntimeError,
        ".* got Transformer Engine 2.1.0, expected 2.2.0",
        "omit it",
    ),
    (GLOBAL, Machine(None, (9, 0)), RuntimeError, "--fp8-recipe tensorwise: got Transformer Engine none", "omit it"),
    (
        (*MOE, "--muon-moe-fp8", "blockwise"),
        *(Machine("2.2.0", (9, 0)), RuntimeError, "--muon-moe-fp8 blockwise: got Transformer Engine 2.2.0", "omit it"),
    ),
    (
        (*MOE, "--muon-moe-fp8", "mxfp8"),
        *(HOPPER, RuntimeError, "--muon-moe-fp8 mxfp8: got compute capability 9.0, expected 10.0 or later, below 12.0"),
        "choose delayed or tensorwise or blockwise",
    ),
    (
        (*MOE, "--muon-moe-fp8", "mxfp8"),
        *(Machine("2.20.2", (12, 0)), RuntimeError, ".* got compute capability 12.0, expected 10.0", "or blockwise"),
    ),
    (
        (*MOE, "--muon-moe-fp8", "blockwise"),
        *(Machine("2.20.2", (8, 9)), RuntimeError, ".* got compute capability 8.9, expected 9.0", "or tensorwise"),
    ),
    (
        GLOBAL,
        Machine("2.20.2", (8, 0)),
        RuntimeError,
        ".* got compute capability 8.0, expected 8.9 or later",
        "omit it",
    ),
    ((*MOE, *FP8), Machine("2.20.2", None), RuntimeError, ".*: got no CUDA device, expected 8.9 or later", "omit it"),
]


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "machine", "error", "begin", "end"),
        BAD,
        ids=[" ".join(w[-4:]) + f" {i}" for i, (w, *_) in enumerate(BAD)],
    )
    def test_command_line(
        self, words: tuple[str, ...], machine: Machine, error: type[Exception], begin: str, end: str
    ) -> None:
        with pytest.raises(error) as raised:
            parse(*words, machine=machine)
        assert type(raised.value) is error
        assert re.match(begin, str(raised.value)), str(raised.value)
        assert re.search(f"{end}$", str(raised.value)), str(raised.value)
        assert "got" in str(raised.value) and "expected" in str(raised.value)

    def test_not_in_bf16(self) -> None:
        parser, changes = extended_parser()
        args = parser.parse_args([*MODEL[:-1], *MOE, *ON, *FP8])
        with pytest.raises(ValueError, match=r"^--bf16: got False, expected True with --muon-moe-fp8 .*; add --bf16"):
            arguments.apply(args, changes, machine=HOPPER)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("fp8", "e5m2", "--fp8-format: got 'e5m2', expected 'e4m3' or 'hybrid'"),
            ("fp8", True, "--fp8-format: got True"),
            ("fp8_recipe", "rowwise", "--fp8-recipe: got 'rowwise', expected one of 'delayed'"),
        ],
    )
    def test_names_that_a_script_sets_itself(self, name: str, value: Any, message: str) -> None:
        """argparse checks the command line only."""
        args = extended_parser()[0].parse_args([*MODEL, *GLOBAL])
        setattr(args, name, value)
        with pytest.raises(ValueError, match=f"^{message}"):
            check_arguments_fp8(args, "off", machine=HOPPER)

    def test_fp8_weights_on_a_cpu(self) -> None:
        with pytest.raises(NotImplementedError, match=r"^--fp8-param-gather: got True, expected False on a CPU"):
            parse(*MOE, *FP8, "--transformer-impl", "local", "--fp8-param-gather", cpu=True)

    def test_megatrons_fp8_on_a_cpu_without_transformer_engine(self) -> None:
        """Megatron would train in bf16 without a word."""
        with pytest.raises(RuntimeError, match="--fp8-recipe tensorwise: got Transformer Engine none"):
            parse(*GLOBAL, machine=Machine(None, None), cpu=True)

    def test_with_transformer_engine_a_cpus_device_is_not_checked(self) -> None:
        parse(*MOE, *GLOBAL, machine=Machine("2.20.2", None), cpu=True)

    def test_this_machine(self, machine_stand_in: None) -> None:
        assert this_machine() == Machine("2.20.2", None)
        with (
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.get_device_capability", side_effect=lambda device: (9, device)),
            mock.patch.dict("os.environ", LOCAL_RANK="3"),
        ):
            assert this_machine() == Machine("2.20.2", (9, 3))

    def test_this_machine_has_no_transformer_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import megatron.core.utils
        from packaging.version import Version

        monkeypatch.setattr(megatron.core.utils, "_te_version", Version("0.0.0"))  # what Megatron makes of none
        assert this_machine() == Machine(None, None)


class TestOtherLoops:
    """Models that a training loop without Megatron's flags built, when DDP is to wrap them."""

    NAMES = ("decoder.layers.0.mlp.experts.linear_fc1", "decoder.layers.0.self_attention.linear_qkv")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("fp8", None), ("fp8_recipe", "delayed"), ("moe_grouped_gemm", False), ("quant_recipe", None)],
    )
    def test_a_config_that_says_otherwise(self, name: str, value: Any) -> None:
        model = model_stand_in(list(self.NAMES), "blockwise")
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=rf"^TransformerConfig\.{name}: got {value!r}, expected .*config_settings"):
            moe_fp8.prepare_model(model, "blockwise", machine=HOPPER)

    def test_no_experts(self) -> None:
        model = model_stand_in([], "blockwise")
        model.config.num_moe_experts = None  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"^moe_fp8: got 'blockwise', expected 'off' for a model without experts"):
            moe_fp8.prepare_model(model, "blockwise", machine=HOPPER)

    def test_a_weights_shape(self) -> None:
        model = model_stand_in(list(self.NAMES), "blockwise", (256, 192))
        with pytest.raises(
            ValueError, match=r"experts\.linear_fc1\.weight: got 192 on a rank, expected a multiple of 128"
        ):
            moe_fp8.prepare_model(model, "blockwise", machine=HOPPER)

    @pytest.mark.parametrize(
        ("settings", "machine", "error", "message"),
        [
            ({"fp8": "e5m2", "fp8_recipe": "delayed"}, HOPPER, ValueError, r"TransformerConfig\.fp8: got 'e5m2'"),
            ({"fp8": "hybrid", "fp8_recipe": "x"}, HOPPER, ValueError, r"TransformerConfig\.fp8_recipe: got 'x'"),
            ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, HOPPER, RuntimeError, r".* got compute capability 9\.0"),
            (
                {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
                Machine(None, None),
                RuntimeError,
                ".* got Transformer Engine none",
            ),
        ],
    )
    def test_megatrons_own_fp8(
        self, settings: dict[str, Any], machine: Machine, error: type[Exception], message: str
    ) -> None:
        model = model_stand_in([], "off")
        vars(model.config).update(settings)
        with pytest.raises(error, match=f"^{message}"):
            moe_fp8.prepare_model(model, "off", machine=machine)

    def test_megatrons_own_fp8_passes_where_it_runs(self) -> None:
        from megatron.core.enums import Fp8Recipe

        model = model_stand_in([], "off")
        for recipe in ("mxfp8", Fp8Recipe.mxfp8):
            vars(model.config).update(fp8="e4m3", fp8_recipe=recipe)
            moe_fp8.prepare_model(model, "off", machine=BLACKWELL)
        vars(model.config).update(fp8=None)
        moe_fp8.prepare_model(model, "off", machine=Machine(None, None))
