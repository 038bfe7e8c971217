"""Ranks with other settings are told so, on every rank and by name, before anything is built."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.config import MuonConfig
from megatron_muon.megatron.entry import agreement
from megatron_muon.megatron.entry.agreement import MEGATRON_SETTINGS, differences, settings_of
from tests.distributed import run_ranks
from tests.models import Layout, initialize, make_chunks, optimizer_config, wrap
from tests.test_config import FIELDS, OTHER_VALUES

CONFIG_SETTINGS = dict(lr=0.5, min_lr=1e-5, weight_decay=0.2, clip_grad=2.0, adam_beta2=0.5, loss_scale=64.0)
MODEL_SETTINGS = dict(qk_clip=True, qk_clip_threshold=30.0, qk_clip_alpha=0.4, log_max_attention_logit=True)
FILES = ("splits", "links")


def with_field(name: str) -> MuonConfig:
    """The defaults, but for one field and what it needs to be valid."""
    return MuonConfig(**{name: OTHER_VALUES[name], **({"max_team_size": 1} if name == "ns_backend" else {})})


def shown(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _refusal(call: Any) -> str:
    with pytest.raises(RuntimeError, match=r"^the ranks have different settings: ") as raised:
        call()
    return str(raised.value)


def build_with_other_settings(rank: int, world_size: int, directory: Path) -> dict[str, str]:
    """What building the optimizer says if rank 1 alone has another setting; each case comes to the first collective."""
    from megatron_muon.megatron.entry import agreement
    from megatron_muon.megatron.model.routing import tag_parameters
    from megatron_muon.megatron.optimizer.build import get_megatron_optimizer

    layout, other = Layout(world_size), rank == 1
    initialize(layout)
    chunks = make_chunks("dense", layout, torch.float32)
    tag_parameters(chunks, MuonConfig())
    wrapped = wrap(chunks, layout)
    said = {}

    def build(muon: MuonConfig | None = None, **settings: Any) -> str:
        config = optimizer_config(layout, torch.float32, **settings)
        return _refusal(lambda: get_megatron_optimizer(config, wrapped, muon=muon))

    for name in FIELDS:
        said[name] = build(with_field(name) if other else MuonConfig())
    for name, value in CONFIG_SETTINGS.items():
        said[name] = build(**({name: value} if other else {}))
    config: Any = chunks[0].config
    for name, value in MODEL_SETTINGS.items():
        before = getattr(config, name)
        setattr(config, name, value if other else before)
        said[name] = build()
        setattr(config, name, before)
    # The same name of another file on each machine.
    (directory / str(rank)).mkdir()
    os.chdir(directory / str(rank))
    Path("file").write_text(f"of rank {rank}")
    for name in FILES:
        said[f"contents of {name}"] = build(MuonConfig(**{name: "file"}))
    versions = agreement._versions
    for name in versions():
        agreement._versions = lambda name=name: {**versions(), name: "9.9"} if other else versions()  # type: ignore
        said[name] = build()
    agreement._versions = versions
    return said


def test_every_setting_is_compared_over_the_world(tmp_path: Path) -> None:
    ranks = run_ranks(build_with_other_settings, 3, tmp_path)
    assert ranks[0] == ranks[1] == ranks[2]
    said = ranks[0]
    assert said.keys() >= {*FIELDS, *CONFIG_SETTINGS, *MODEL_SETTINGS}
    for name, setting in FIELDS.items():
        default, other = map(shown, (setting.default, OTHER_VALUES[name]))
        assert f"{name}: {default} on ranks 0, 2; {other} on rank 1" in said[name]
        assert said[name].count(" on ranks ") == (2 if name == "ns_backend" else 1)
    for name, value in {**CONFIG_SETTINGS, **MODEL_SETTINGS}.items():
        assert f": {name}: " in said[name] and f"; {value} on rank 1. Start all ranks" in said[name]
    for name in FILES:
        assert said[f"contents of {name}"].startswith(
            f"the ranks have different settings: contents of the file of {name} (SHA-256): "
        )
    for package in ("megatron-muon", "torch", "megatron-core"):
        assert "; 9.9 on rank 1. Start" in said[f"version of {package}"]


def test_megatrons_names_exist() -> None:
    """A setting that Megatron renames would be compared no more."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from tests.megatron.test_arguments import stock_parser

    flags = {action.dest for action in stock_parser()._actions}
    fields = {f.name for config in (OptimizerConfig, TransformerConfig) for f in dataclasses.fields(config)}
    assert set(MEGATRON_SETTINGS) <= flags | fields
    assert {*CONFIG_SETTINGS, *MODEL_SETTINGS} <= set(MEGATRON_SETTINGS) & fields


def test_a_file_that_one_rank_alone_has_is_no_difference(tmp_path: Path) -> None:
    """The links are read on rank 0 alone, which may be on another machine."""
    path = tmp_path / "links.json"
    muon = MuonConfig(links=str(path))
    before = settings_of(muon)
    path.write_text("{}")
    assert differences([before, settings_of(muon)]) == []
    path.write_text("[]")
    assert len(differences([settings_of(muon), before, {**before, "lr": 1}, {**before, "lr": 2}])) == 1
    assert differences([{"a": 1}] * 3 + [{"a": 2}] + [{"a": 1}] * 2 + [{"a": 3}]) == [
        "a: 1 on ranks 0-2, 4, 5; 2 on rank 3; 3 on rank 6"
    ]


def test_one_rank_without_muon_and_one_with() -> None:
    assert differences([settings_of(MuonConfig()), settings_of(None)]) == [
        "distributed_muon: on on rank 0; off on rank 1"
    ]


@pytest.mark.parametrize("agree", [agreement.all_or_none, agreement.from_first])
@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda: json.loads("{"), ValueError, "Expecting property name enclosed in double quotes"),
        (lambda: Path("nowhere").read_bytes(), OSError, r"\[Errno 2\] No such file or directory: 'nowhere'"),
        (lambda: b"\xff".decode(), ValueError, "invalid start byte"),
    ],
    ids=["json", "file", "text"],
)
def test_an_error_of_one_process_is_its_own(agree: Any, work: Any, error: type[Exception], message: str) -> None:
    """Errors that cannot be made from their message alone keep the message, as the class that ranks can make."""
    with pytest.raises(error, match=message) as raised:
        agree(work)
    assert type(raised.value) is error
