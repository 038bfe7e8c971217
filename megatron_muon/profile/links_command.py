"""Runs `links` on every rank: checks, groups, measurements, and what rank 0 prints and writes of them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.stages import Layout
from megatron_muon.observe.nvml import open_current_device
from megatron_muon.profile import flight_recorder, links_table
from megatron_muon.profile.busbw import Collective
from megatron_muon.profile.collectives import OPERATIONS, PLACEMENTS, Operation
from megatron_muon.profile.links import Meter, Row
from megatron_muon.profile.nvml_topology import topology_lines
from megatron_muon.profile.pairs import Pairs, measure_pairs
from megatron_muon.profile.process_groups import (
    Groups,
    choose_kinds,
    group_sizes,
    layout_for,
    make_groups,
    release_groups,
)
from megatron_muon.profile.settings import GroupKind, LinkSettings
from megatron_muon.profile.traffic import Traffic, load_traffic, model_traffic, save_traffic


@dataclass(frozen=True)
class Request:
    """What a rank is about to do; the same on all of them.

    Attributes:
        layout: Of the world.
        kinds: Of groups, to be measured.
        traffic: Exchanges to be measured.
    """

    layout: Layout
    kinds: tuple[GroupKind, ...]
    traffic: tuple[Traffic, ...]


def run(settings: LinkSettings, operations: Mapping[Collective, Operation] = OPERATIONS) -> int:
    """Measures, prints and writes. Collective over the world that torchrun's environment describes.

    Args:
        settings: What to do.
        operations: What is measured; a seam for tests.

    Returns:
        The exit code: 0; 1 if an element was wrong or a file could not be written, on every rank but for a rank's own
        dump; 2 on every rank if the settings do not fit, which a line on standard error explains.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    try:
        request = prepare(settings, world_size)
    except ValueError as error:
        if rank == 0:
            print(f"links: {error}", file=sys.stderr)
        return 2
    with _world(settings) as device:
        try:
            _agree(settings, request, rank)
        except RuntimeError as error:
            if rank == 0:
                print(f"links: {error}", file=sys.stderr)
            return 2
        code = _measure(settings, request, device, operations)
    # Once the group is gone, every call has been recorded as complete.
    return max(code, _write_dump(settings.flight_recorder, rank)) if settings.flight_recorder else code


def prepare(settings: LinkSettings, world_size: int) -> Request:
    """Checks the settings against a world, before anything is issued.

    Raises:
        ValueError: If they do not fit.
    """
    layout = layout_for(
        world_size,
        tp=settings.tp,
        pp=settings.pp,
        ep=settings.ep,
        etp=settings.etp,
        instances=settings.instances,
    )
    if settings.backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("--backend: got nccl, expected gloo, since torch finds no CUDA device here")
    kinds = choose_kinds(layout, settings.groups)
    sizes = group_sizes(layout)
    for kind in kinds:
        for collective in settings.collectives:
            settings.sweep.counts(collective, sizes[kind])
    if (settings.model or settings.traffic) and not {"tp_dp", "expert_tp_dp"} & set(kinds):
        flag = "--model" if settings.model else "--traffic"
        raise ValueError(
            f"{flag}: got it for groups {', '.join(kinds)}, expected tp_dp or expert_tp_dp among them, over which "
            "Distributed Muon exchanges; add them to --groups, or start more ranks"
        )
    traffic: list[Traffic] = []
    if settings.traffic is not None:
        traffic = load_traffic(settings.traffic, layout)
    elif settings.model is not None:
        muon = {} if settings.exchange_dtype is None else {"exchange_dtype": settings.exchange_dtype}
        traffic = model_traffic(
            settings.model,
            layout,
            MuonConfig(**muon),  # type: ignore[arg-type]  # it checks
            device_type=_device_type(settings),
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )
    if settings.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib; run pip install matplotlib, or leave --plot out")
    for flag, path in (
        ("--json", settings.json),
        ("--plot", settings.plot),
        ("--save-traffic", settings.save_traffic),
    ):
        if path is not None and not (path.absolute().parent.is_dir() and not path.is_dir()):
            raise ValueError(f"{flag}: got {path}, expected a file in a directory that exists")
    return Request(layout, tuple(kinds), tuple(traffic))


def _device_type(settings: LinkSettings) -> str:
    return "cuda" if settings.backend != "gloo" and torch.cuda.is_available() else "cpu"


@contextmanager
def _world(settings: LinkSettings) -> Iterator[torch.device]:
    """Makes the world's process group where there is none, and ends it; gives this rank's device."""
    cuda = _device_type(settings) == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if settings.flight_recorder is not None:
        flight_recorder.switch_on()
    if dist.is_initialized():  # the caller's
        yield device
        return
    backend = "nccl" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=device if cuda else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
    finally:
        release_groups()
        dist.destroy_process_group()


def _agree(settings: LinkSettings, request: Request, rank: int) -> None:
    """Raises RuntimeError on every rank if one has other settings than the others, or cannot write."""
    problem = ""
    if settings.flight_recorder is not None:
        try:
            settings.flight_recorder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--flight-recorder: cannot make {settings.flight_recorder}: {error}"
    gathered: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(gathered, (repr((settings, request)), problem))
    problems = [f"rank {r}: {text}" for r, (_, text) in enumerate(gathered) if text]
    if problems:
        raise RuntimeError("; ".join(problems))
    others = [r for r, (own, _) in enumerate(gathered) if own != gathered[0][0]]
    if others:
        raise RuntimeError(f"ranks {others} have other settings than rank 0; start all with the same command line")


def _measure(
    settings: LinkSettings, request: Request, device: torch.device, operations: Mapping[Collective, Operation]
) -> int:
    is_first = dist.get_rank() == 0
    nvml, problem = open_current_device()
    hosts = _hosts(problem)
    if is_first:
        for line in _opening_lines(settings, request, device, hosts):
            print(line, flush=True)
    meter = Meter(settings.sweep, device, nvml, operations)
    rows: list[Row] = []
    for section in _sections(settings, request, meter, make_groups(request.layout, request.kinds)):
        rows += section
        if is_first and section:
            print("#", *links_table.table_lines(section), sep="\n", flush=True)
    pairs = measure_pairs(meter, settings.pair_bytes) if settings.pair_bytes else None
    if is_first and pairs is not None:
        print("#", *links_table.pairs_lines(pairs), sep="\n", flush=True)
    failed = []
    if is_first:
        failed = _write_files(settings, request, _describe(settings, request, device, hosts), rows, pairs)
        for text in failed:
            print(f"links: {text}", file=sys.stderr)
    failures: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(failures, len(failed))
    return int(any(failures) or any(row.wrong for row in rows))


def _sections(settings: LinkSettings, request: Request, meter: Meter, groups: Sequence[Groups]) -> Iterator[list[Row]]:
    """The rows of each table: what is exchanged by a plan first, then each collective over all kinds of groups."""
    for expert, kind in ((False, "tp_dp"), (True, "expert_tp_dp")):
        traffic = [t for t in request.traffic if t.expert == expert]
        over = next((g for g in groups if kind in g.kinds), None)
        if over is not None and traffic:
            yield list(meter.exchange_rows(over, traffic, settings.rounds))
    for collective in settings.collectives:
        for over in groups:
            rows = list(meter.sweep_rows(over, collective))
            # What exists in neither placement, such as sending to oneself, is left out.
            yield [row for row in rows if any(row.timings[p] is not None for p in PLACEMENTS)]


def _hosts(nvml_problem: str) -> list[tuple[str, str, list[str]]]:
    """For each rank: host, what NVML lacks, and on the first rank of each host the host's topology."""
    own_host = platform.node()
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, own_host)
    is_first_of_host = names.index(own_host) == dist.get_rank()
    lines = topology_lines() if is_first_of_host and not nvml_problem else []
    gathered: list[tuple[str, str, list[str]]] = [("", "", [])] * len(names)
    dist.all_gather_object(gathered, (own_host, nvml_problem, lines))
    return gathered


def _opening_lines(
    settings: LinkSettings, request: Request, device: torch.device, hosts: Sequence[tuple[str, str, list[str]]]
) -> Iterator[str]:
    sweep = settings.sweep
    layout = " ".join(f"{name} {size}" for name, size in request.layout.sizes.items())
    yield f"# {layout}; {dist.get_backend()} on {device.type}, torch {torch.__version__}"
    yield (
        f"# minBytes {sweep.min_bytes} maxBytes {sweep.max_bytes} step: {sweep.factor}(factor) "
        f"warmup iters: {sweep.warmup} iters: {sweep.iterations}"
    )
    names = list(dict.fromkeys(host for host, _, _ in hosts))
    if len(names) > 1:
        for name in names:
            own = [str(rank) for rank, (host, _, _) in enumerate(hosts) if host == name]
            yield f"# host {name}: ranks {' '.join(own)}"
    for text in dict.fromkeys(problem for _, problem, _ in hosts if problem):
        yield f"# {text}"
    for text in dict.fromkeys("\n".join(f"# {line}" for line in lines) for _, _, lines in hosts if lines):
        yield text


def _describe(
    settings: LinkSettings, request: Request, device: torch.device, hosts: Sequence[tuple[str, str, list[str]]]
) -> dict[str, Any]:
    sweep = settings.sweep
    return {
        "layout": request.layout.sizes,
        "backend": dist.get_backend(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "hosts": [host for host, _, _ in hosts],
        "warmup": sweep.warmup,
        "iterations": sweep.iterations,
        "nvml_problems": sorted({problem for _, problem, _ in hosts if problem}),
        "topology": [lines for _, _, lines in hosts if lines],
    }


def _write_dump(directory: Path, rank: int) -> int:
    """Writes this rank's Flight Recorder dump; 1 if that failed, which a line on standard error explains."""
    try:
        problem = flight_recorder.write_dump(directory, rank)
    except OSError as error:
        problem = f"rank {rank}: {error}"
    if problem:
        print(f"links: --flight-recorder: {problem}", file=sys.stderr)
    return int(bool(problem))


def _write_files(
    settings: LinkSettings, request: Request, run_facts: dict[str, Any], rows: Sequence[Row], pairs: Pairs | None
) -> list[str]:
    """Writes what was asked for; says what failed. All is printed by now, so that nothing else is lost."""
    failed = []
    try:
        if settings.json is not None:
            settings.json.write_text(json.dumps(links_table.to_json(run_facts, rows, pairs)), encoding="utf-8")
        if settings.save_traffic is not None:
            save_traffic(settings.save_traffic, request.traffic)
    except OSError as error:
        failed.append(f"cannot write: {error}")
    if settings.plot is not None:
        try:
            links_table.plot(rows, settings.plot)
        except ValueError as error:
            failed.append(str(error))
    return failed
