"""Links files: what they may hold, what is said about invalid ones, and that plans are made with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.matrices.spec import MatrixSpec, whole
from megatron_muon.plan.build import CostModel, PlanOptions, build_plan
from megatron_muon.plan.cost_model import LAUNCHES_PER_STAGE, band_cost, band_flops, band_sent_bytes, own_area
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks, load_links
from megatron_muon.plan.seats import Seat
from tests.paths import EXAMPLES
from tests.plans import evenly

MEASURED = MeasuredLinks("test", LinkFigures(310.0, 18.0), LinkFigures(42.0, 34.5), 3.5)


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for links in (MEASURED, replace(MEASURED, inter_node=None), replace(MEASURED, launch_us=None, intra_node=None)):
        assert load_links(written(tmp_path / "links.json", links.to_json())) == links


def test_the_example_holds_the_defaults() -> None:
    assert CostModel.for_device("cuda", load_links(EXAMPLES / "links.json")) == CostModel()


INVALID: list[tuple[Any, str]] = [
    ("{", "got a file that is not valid JSON"),
    ("[]", 'got a file without "format": "megatron_muon_links"'),
    ({"version": 1}, 'got a file without "format": "megatron_muon_links"'),
    ({**MEASURED.to_json(), "version": 2}, "version: got 2, expected 1"),
    ({**MEASURED.to_json(), "source": 3}, "source: got 3, expected text"),
    ({**MEASURED.to_json(), "extra": 3}, "got unknown extra"),
    ({k: v for k, v in MEASURED.to_json().items() if k != "launch_us"}, "got no launch_us"),
    ({**MEASURED.to_json(), "launch_us": -1}, "launch_us: got -1, expected a number that is not negative"),
    ({**MEASURED.to_json(), "launch_us": True}, "launch_us: got True"),
    ({**MEASURED.to_json(), "intra_node": [1, 2]}, "intra_node: got [1, 2], expected an object"),
    ({**MEASURED.to_json(), "intra_node": {"latency_us": 1}}, "intra_node: got no bandwidth_gb_per_s"),
    (
        {**MEASURED.to_json(), "inter_node": {"bandwidth_gb_per_s": 0, "latency_us": 1}},
        "inter_node: bandwidth_gb_per_s: got 0, expected a positive number",
    ),
    (json.dumps(MEASURED.to_json()).replace("34.5", "NaN"), "inter_node: latency_us: got nan"),
]


@pytest.mark.parametrize(("content", "message"), INVALID)
def test_an_invalid_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "links.json", content)
    with pytest.raises(ValueError) as raised:
        load_links(path, "--links")
    assert str(raised.value).startswith(f"--links {path}: ") and message in str(raised.value)


def test_measured_figures_replace_the_defaults_of_what_was_measured() -> None:
    cost, default = CostModel.for_device("cuda", MEASURED), CostModel()
    assert (cost.node_bytes_per_s, cost.node_latency_s) == (310e9, pytest.approx(18e-6))
    assert (cost.bytes_per_s, cost.latency_s, cost.launch_s) == (42e9, pytest.approx(34.5e-6), pytest.approx(3.5e-6))
    assert (cost.flops_per_s, cost.device_type) == (default.flops_per_s, "cuda")
    without = CostModel.for_device("cuda", MeasuredLinks("", None, None, None))
    assert without == default


def test_a_teams_stages_cost_their_latency_and_launches() -> None:
    """Eight members, five steps: in a node 11 all-to-alls there; over two nodes 10 within and 11 between them."""
    cost = CostModel.for_device("cuda", MEASURED)
    short, long, size, steps = 512, 4096, 8, 5
    for placement, groups, near_stages, far_stages in (("node", 1, 11, 0), ("across", 1, 0, 11), ("nodes", 2, 10, 11)):
        seat = Seat(size - 1, size, groups)
        near, far = band_sent_bytes(short, seat, steps, 2, divided=False)
        if groups == 1:
            near, far = (near + far, 0) if placement == "node" else (0, near + far)
        seconds = near / 310e9 + far / 42e9 + near_stages * 18e-6 + far_stages * 34.5e-6
        seconds += (near_stages + far_stages) * LAUNCHES_PER_STAGE * 3.5e-6
        flops = band_flops(short, long // size, own_area(short, seat, seat.member), steps, divided=False)
        got, divided = band_cost(short, long, size, placement, groups, steps, 2, cost)  # type: ignore[arg-type]
        assert not divided and got == pytest.approx(flops + seconds * cost.flops_per_s, abs=1)


def test_ranks_with_other_links_have_another_fingerprint() -> None:
    """Also where the figures change no owner: here there is no team."""
    grid = evenly([MatrixSpec(f"m{i}", (8, 8), 1, None, whole(8)) for i in range(3)], 1, 2)
    options = PlanOptions(cost=CostModel.for_device("cuda", MEASURED))
    measured, default = build_plan(*grid, ns_steps=5, options=options), build_plan(*grid, ns_steps=5)
    assert measured.owners == default.owners and measured.fingerprint != default.fingerprint


def test_slow_links_make_smaller_teams() -> None:
    grid = evenly([MatrixSpec("m", (2048, 8192), 1, None, whole(2048))], 1, 8)
    slow = MeasuredLinks("", LinkFigures(1.0, 500.0), LinkFigures(1.0, 500.0), 100.0)
    sizes = {}
    for name, links in (("fast", MEASURED), ("slow", slow)):
        cost = CostModel.for_device("cuda", links)
        options = PlanOptions(cost=cost, node_of=(0,) * 8)
        sizes[name] = len(build_plan(*grid, ns_steps=5, options=options).owners[0][0])
    assert sizes["fast"] > sizes["slow"] == 1
