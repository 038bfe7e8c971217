"""The seams bring Distributed Muon into stock Megatron when it is active, and pass through when it is not."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.package_info import __version__ as INSTALLED

import megatron_muon
from megatron_muon.config import MuonConfig
from megatron_muon.megatron.entry import active, seams
from megatron_muon.megatron.entry.checks import check_megatron_version
from tests.distributed import run_ranks
from tests.paths import ROOT as REPOSITORY
from tests.seams import seams_removed_afterwards


@pytest.fixture(autouse=True)
def _stock_afterwards() -> Iterator[None]:
    with seams_removed_afterwards():
        yield


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], MuonConfig | None]]:
    """Replaces both builders by ones that only note how they were called."""
    import megatron.core.optimizer as stock

    from megatron_muon.megatron.optimizer import build

    calls: list[tuple[str, tuple[Any, ...], MuonConfig | None]] = []

    def get_megatron_optimizer(
        config: Any,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: Any = True,
        pg_collection: Any = None,
        dump_param_to_param_group_map: Any = None,
    ) -> str:
        rest = (config_overrides, use_gloo_process_groups, pg_collection, dump_param_to_param_group_map)
        calls.append(("stock", (config, model_chunks, *rest), None))
        return "stock"

    def ours(*args: Any, muon: MuonConfig) -> str:
        calls.append(("muon", args, muon))
        return "muon"

    monkeypatch.setattr(stock, "get_megatron_optimizer", get_megatron_optimizer)
    monkeypatch.setattr(build, "get_megatron_optimizer", ours)
    return calls


def mup_learning_rates(parameters: dict[str, torch.nn.Parameter]) -> dict[str, float | None]:
    """What muP's overrides set as learning rate and eps, for a model four times as wide as its base."""
    import megatron.core.optimizer as stock

    config = stock.OptimizerConfig(lr=0.4, min_lr=0.04, adam_eps=1e-8)
    overrides = stock.get_mup_config_overrides(config, 4.0, "adam")
    out: dict[str, float | None] = {}
    for name, parameter in parameters.items():
        matching = [override for key, override in overrides.items() if key.matches(parameter, name)]
        out[name] = matching[0]["max_lr"] if matching else None
        assert len(matching) <= 1
        assert not matching or matching[0]["eps"] == pytest.approx(0.25e-8)
    return out


def test_mup_scales_adamws_matrices_and_leaves_muons_alone() -> None:
    """AdamW's matrices get lr / width; vectors, embeddings and what is tagged as Muon's keep theirs."""
    from megatron_muon.megatron.model.routing import TAG

    shapes = {
        "mlp.linear_fc1.weight": (8, 8),
        "output_layer.weight": (8, 8),
        "word_embeddings.weight": (8, 8),
        "b": (8,),
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for name, parameter in parameters.items():
        setattr(parameter, TAG, name == "mlp.linear_fc1.weight")
    adamw = {"output_layer.weight": pytest.approx(0.1), "word_embeddings.weight": None, "b": None}
    seams.install_core_seams()
    assert mup_learning_rates(parameters) == {"mlp.linear_fc1.weight": pytest.approx(0.1), **adamw}
    megatron_muon.enable(scale_mode="unit_rms_norm")
    assert mup_learning_rates(parameters) == {"mlp.linear_fc1.weight": None, **adamw}
    megatron_muon.enable()
    with pytest.raises(ValueError, match="muon-scale-mode: got 'rms'"):
        mup_learning_rates(parameters)


class TestOptimizerSeam:
    def test_passes_through_until_enabled(self, built: list[Any]) -> None:
        import megatron.core.optimizer as stock

        seams.install_core_seams()
        assert stock.get_megatron_optimizer("config", ["chunk"], pg_collection="groups") == "stock"
        config = megatron_muon.enable(momentum=0.9)
        assert config == MuonConfig(momentum=0.9)
        assert stock.get_megatron_optimizer("config", model_chunks=["chunk"], use_gloo_process_groups=False) == "muon"
        assert built == [
            ("stock", ("config", ["chunk"], None, True, "groups", None), None),
            ("muon", ("config", ["chunk"], None, False, None, None), config),
        ]

    def test_reaches_modules_that_imported_it_by_name(self, built: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        import megatron.core.optimizer as stock

        loop: Any = ModuleType("some_training_loop")
        loop.get_megatron_optimizer = loop.under_another_name = stock.get_megatron_optimizer
        monkeypatch.setitem(sys.modules, "some_training_loop", loop)
        megatron_muon.enable()
        assert loop.get_megatron_optimizer("config", ["chunk"]) == "muon"
        assert loop.under_another_name("config", ["chunk"]) == "muon"

    def test_installing_twice_wraps_once(self, built: list[Any]) -> None:
        import megatron.core.optimizer as stock

        megatron_muon.enable()
        first = stock.get_megatron_optimizer
        megatron_muon.enable(momentum=0.5)
        assert stock.get_megatron_optimizer is first
        stock.get_megatron_optimizer("config", ["chunk"])
        assert [muon.momentum for _, _, muon in built] == [0.5]

    def test_the_explicit_function(self, built: list[Any]) -> None:
        with pytest.raises(RuntimeError, match=r"not enabled in this process; call megatron_muon\.enable\(\)"):
            megatron_muon.get_megatron_optimizer("config", ["chunk"])  # type: ignore[arg-type, list-item]
        muon = MuonConfig(momentum=0.7)
        megatron_muon.get_megatron_optimizer("config", ["chunk"], muon=muon)  # type: ignore[arg-type, list-item]
        config = megatron_muon.enable()
        megatron_muon.get_megatron_optimizer("config", ["chunk"])  # type: ignore[arg-type, list-item]
        assert [entry[2] for entry in built] == [muon, config]


class TestEnable:
    def test_presets(self) -> None:
        config = megatron_muon.enable(preset="keller", momentum=0.9)
        assert config == active.active_config() == MuonConfig.from_preset("keller", momentum=0.9)
        given = MuonConfig(ns_steps=3)
        assert megatron_muon.enable(given) is active.active_config() is given

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"preset": "nope"}, "preset: got 'nope'"),
            ({"momentums": 0.9}, "no setting momentums"),
            ({"momentum": -1.0}, "momentum: got -1.0"),
            ({"coefficients": "nope"}, "nope"),
            ({"config": MuonConfig(), "momentum": 0.9}, "got config and momentum, expected one or the other"),
        ],
        ids=str,
    )
    def test_bad_input_activates_nothing(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            megatron_muon.enable(**arguments)
        assert active.active_config() is None

    def test_newton_schulz_is_fp32_on_the_cpu_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(active, "cpu_backend_installed", lambda: True)
        assert megatron_muon.enable().ns_dtype == "fp32"
        assert megatron_muon.enable(ns_dtype="bf16").ns_dtype == "bf16"

    def test_importing_the_package_imports_neither_torch_nor_megatron(self) -> None:
        import subprocess

        code = "import sys, megatron_muon; print(sorted({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert out.stdout == "[]\n"


class TestVersion:
    @pytest.mark.parametrize("version", ["0.18.2", "0.19.0", "0.19.7+abc123", "0.20.0rc0", "0.20.0"])
    def test_supported(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron.core.package_info.__version__", version)
        assert check_megatron_version() == version

    @pytest.mark.parametrize(
        ("version", "why"),
        [
            ("0.17.1", "since older ones have no buffers for the parameters of another optimizer"),
            ("0.18.1", "which megatron_muon's seams were made for"),
            ("0.21.0", "which megatron_muon's seams were made for"),
            ("1.0", "which megatron_muon's seams were made for"),
        ],
    )
    def test_unsupported(self, version: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron.core.package_info.__version__", version)
        for install in (seams.install_core_seams, seams.install_training_seams, megatron_muon.enable):
            with pytest.raises(
                RuntimeError, match=rf"^megatron-core: got {version}, expected >=0\.18\.2,<0\.21, {why}.*pip inst"
            ):
                install()
        assert active.active_config() is None


SEAMS = {seam.target: seam for seam in (*seams.CORE, *seams.TRAINING)}


class TestTable:
    """A Megatron whose functions differ is refused, with its version; the document is the table's."""

    @pytest.mark.parametrize("target", [target for target, seam in SEAMS.items() if seam.parameters])
    def test_other_parameters(self, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def changed(something: Any, else_: Any) -> None: ...

        monkeypatch.setattr(target.replace(":", "."), changed)
        with pytest.raises(RuntimeError) as raised:
            self._install(target)
        message = str(raised.value)
        assert message.startswith(f"megatron_muon does not fit megatron-core {INSTALLED} with torch")
        expected = "expected" if SEAMS[target].exact else "expected to begin with"
        assert (
            f"{target}: got parameters (something, else_), {expected} ({', '.join(SEAMS[target].parameters)})"
            in message
        )

    @pytest.mark.parametrize("target", SEAMS)
    def test_missing(self, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, name = target.partition(":")
        # A class without the method may inherit it.
        monkeypatch.delattr(f"{module}.{name.partition('.')[0]}")
        with pytest.raises(RuntimeError, match=rf"{target}: there is no {name} in megatron\."):
            self._install(target)

    def test_versions_that_need_no_seam_have_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        older = replace(SEAMS["megatron.core.optimizer.qk_clip:clip_qk"], versions="<0.18")
        monkeypatch.setattr(seams, "CORE", (older,))
        seams.install_core_seams()
        assert seams._installed == {}

    def test_removed_seams_leave_nothing(self) -> None:
        import megatron.training.training as loop

        functions = (loop.get_megatron_optimizer, loop.setup_model_and_optimizer)
        seams.install_core_seams()
        seams.install_training_seams()
        assert all(
            now is not then
            for now, then in zip((loop.get_megatron_optimizer, loop.setup_model_and_optimizer), functions)
        )
        seams.remove_seams()
        assert (loop.get_megatron_optimizer, loop.setup_model_and_optimizer) == functions

    def test_the_document(self) -> None:
        text = (REPOSITORY / "docs" / "seams.md").read_text()
        assert seams.markdown() in text, (
            "run: python -c 'from megatron_muon.megatron.entry import seams; print(seams.markdown())'"
        )

    def _install(self, target: str) -> None:
        (seams.install_core_seams if SEAMS[target] in seams.CORE else seams.install_training_seams)()


class TestParserSeam:
    def _parse(self, monkeypatch: pytest.MonkeyPatch, *words: str, **kwargs: Any) -> Namespace:
        from megatron.training import arguments

        seams.install_training_seams()
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        args: Namespace = arguments.parse_args(**kwargs)
        return args

    def test_the_flag_activates_its_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = ("--distributed-muon", "--use-distributed-optimizer", "--muon-momentum", "0.9", "--mine", "7")

        def add_mine(parser: ArgumentParser) -> ArgumentParser:
            parser.add_argument("--mine", type=int)
            return parser

        args = self._parse(monkeypatch, *words, extra_args_provider=add_mine)
        assert args.mine == 7
        assert active.active_config() == MuonConfig(momentum=0.9)
        # As inprocess_restart and ft_integration do, before the script.
        self._parse(monkeypatch, *words, ignore_unknown_args=True)
        assert active.active_config() == MuonConfig(momentum=0.9)
        self._parse(monkeypatch)
        assert active.active_config() is None

    def test_no_flag_leaves_what_enable_did(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = megatron_muon.enable()
        args = self._parse(monkeypatch)
        assert active.active_config() is config
        assert not any("distributed_muon" in name for name in vars(args))

    def test_bad_input_activates_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"--use-distributed-optimizer: got False"):
            self._parse(monkeypatch, "--distributed-muon")
        assert active.active_config() is None

    def test_yaml_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "megatron.training.yaml_arguments.load_yaml",
            lambda path: Namespace(yaml_cfg=path, disable_msc_deprecated=False, enable_msc=False),
        )
        words = ("--yaml-cfg", "run.yaml", "--use-distributed-optimizer")
        with pytest.raises(NotImplementedError, match=r"^--yaml-cfg: got a file, expected none"):
            self._parse(monkeypatch, *words, "--distributed-muon")
        assert self._parse(monkeypatch, *words).yaml_cfg == "run.yaml"

    def test_help_shows_megatrons_flags_and_ours(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as left:
            self._parse(monkeypatch, "--help")
        text = capsys.readouterr().out
        assert left.value.code == 0
        assert "--num-layers" in text and "--distributed-muon" in text and "--muon-update-rms" in text


def _wrap(chunks: list[Any], how: str) -> list[Any]:
    """Wraps chunks with DDP in one of the ways that training loops do."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    if how == "DDP":
        return [DistributedDataParallel(c.config, ddp_config, c) for c in chunks]
    if how == "DDP with a layout":  # computed by the loop, as copies of megatron.training's code do
        size = ps.get_data_parallel_world_size()
        layouts = [
            DistributedOptimizer.compute_full_param_layout(list(c.parameters()), None, size, ddp_config) for c in chunks
        ]
        return [DistributedDataParallel(c.config, ddp_config, c, full_param_layout=f) for c, f in zip(chunks, layouts)]
    if how == "megatron.training.get_model":
        from megatron.training.training import wrap_model_chunks_with_ddp

        return list(wrap_model_chunks_with_ddp(model_chunks=chunks, config=chunks[0].config, ddp_config=ddp_config))
    from megatron.training.models.dist_utils import _ddp_wrap

    return list(
        _ddp_wrap(chunks, False, ddp_config, False, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    )


# How a loop wraps its model, and how often that computes a layout of DDP's buffers.
WAYS = {"DDP": 1, "DDP with a layout": 2, "megatron.training.get_model": 1, "megatron.training.models": 1}


def _train(how: str) -> dict[str, Any]:
    """Three steps of a loop that knows nothing of Muon."""
    from megatron.core import optimizer as stock
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from tests.models import Layout, make_chunks, optimizer_config, train_step

    layout = Layout(2)
    chunks = make_chunks("dense", layout, torch.float32)
    compute = DistributedOptimizer.compute_full_param_layout
    with mock.patch.object(DistributedOptimizer, "compute_full_param_layout", side_effect=compute) as computed:
        wrapped = _wrap(chunks, how)
    config: Any = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = stock.get_megatron_optimizer(optimizer_config(layout, torch.float32, lr=0.01), wrapped)
    return {
        "losses": [train_step(wrapped, optimizer, step) for step in range(3)],
        "optimizers": sorted(type(o).__name__ for o in optimizer.chained_optimizers),
        "layouts": computed.call_count,
    }


def _train_every_way(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    from tests.models import Layout, initialize

    initialize(Layout(world_size))
    stock = _train("megatron.training.get_model")
    seams.install_training_seams()
    megatron_muon.enable()
    return stock, {how: _train(how) for how in WAYS}


def test_every_way_to_wrap_a_model_trains_alike() -> None:
    """Same losses bitwise however the loop wraps its model: the tags are in place before any layout is used."""
    stock, runs = run_ranks(_train_every_way, 2)[0]
    assert stock["optimizers"] == ["DistributedOptimizer"]
    for how, layouts in WAYS.items():
        assert runs[how]["optimizers"] == ["AdamDistributedOptimizer", "MuonDistributedOptimizer"], how
        assert runs[how]["losses"] == runs["DDP"]["losses"], how
        # megatron.training computes its layouts from tagged parameters, so that DDP need not do it again.
        assert runs[how]["layouts"] == layouts, how
    # The loss is before the update: AdamW's and Muon's first ones agree, later ones do not.
    losses = runs["DDP"]["losses"]
    assert stock["losses"][0] == losses[0]
    assert abs(stock["losses"][2] - losses[2]) > 1e-3
