"""Runs `profile links` on every rank: checks, groups, measurements, and what rank 0 prints and writes of them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.stages import Layout
from megatron_muon.observe.console import console, print_list, table
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks
from megatron_muon.profile.measure import SWEEP, Meter, Timing
from megatron_muon.profile.pairs import SUSPICIOUS, Pairs, measure_pairs
from megatron_muon.profile.process_groups import (
    Groups,
    choose_kinds,
    group_sizes,
    layout_for,
    make_groups,
    release_groups,
)
from megatron_muon.profile.settings import GroupKind, LinkSettings
from megatron_muon.profile.traffic import Traffic, model_traffic

# So many of the slowest pairs are shown.
_SHOWN_PAIRS = 10


@dataclass(frozen=True)
class Request:
    """What a rank is about to measure; the same on all ranks.

    Attributes:
        layout: Layout of the world.
        kinds: Kinds of groups.
        traffic: Exchanges.
    """

    layout: Layout
    kinds: tuple[GroupKind, ...]
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class Found:
    """What was measured; the same on all ranks.

    Attributes:
        timings: All-to-alls, those of a plan's exchange first.
        pairs: Every two ranks; None if they were left out.
        links: The content of the planner's file.
    """

    timings: tuple[Timing, ...]
    pairs: Pairs | None
    links: MeasuredLinks


def run(settings: LinkSettings) -> int:
    """Measures, prints and writes. Collective over the world that torchrun's environment describes.

    Returns:
        The exit code: 0; 1 if the file could not be written; 2 on every rank if the settings do not fit the world or
        the ranks disagree, which a line on standard error explains.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    try:
        request = prepare(settings, world_size)
        with _world(settings) as device:
            _agree(settings, request)
            found = measure(settings, request, device)
            if rank == 0:
                show(found, request, console())
    except (ValueError, RuntimeError) as error:
        if rank == 0:
            print(f"megatron_muon links: {error}", file=sys.stderr)
        return 2
    if rank == 0 and settings.json is not None:
        try:
            settings.json.write_text(json.dumps(found.links.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"megatron_muon links: --json: cannot write {settings.json}: {error}", file=sys.stderr)
            return 1
    return 0


def prepare(settings: LinkSettings, world_size: int) -> Request:
    """Checks the settings against a world, before anything is issued.

    Raises:
        ValueError: If they do not fit.
    """
    layout = layout_for(world_size, settings)
    if settings.backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("--backend: got nccl, expected gloo, since torch finds no CUDA device here")
    kinds = choose_kinds(layout, settings.groups)
    sizes = group_sizes(layout)
    for kind in kinds:
        settings.counts(sizes[kind])
    traffic: list[Traffic] = []
    if settings.model is not None:
        if not {"tp_dp", "expert_tp_dp"} & set(kinds):
            raise ValueError(
                f"--model: got it for groups {', '.join(kinds)}, expected tp_dp or expert_tp_dp among them, over which "
                "Distributed Muon exchanges; add them to --groups, or start more ranks"
            )
        muon = {} if settings.exchange_dtype is None else {"exchange_dtype": settings.exchange_dtype}
        traffic = model_traffic(
            settings.model,
            layout,
            MuonConfig(**muon),  # type: ignore[arg-type]  # MuonConfig checks it
            device_type=_device_type(settings),
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )
    return Request(layout, tuple(kinds), tuple(traffic))


def _device_type(settings: LinkSettings) -> str:
    return "cuda" if settings.backend != "gloo" and torch.cuda.is_available() else "cpu"


@contextmanager
def _world(settings: LinkSettings) -> Iterator[torch.device]:
    """Makes the world's process group unless the caller has one, and ends it; gives this rank's device."""
    cuda = _device_type(settings) == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
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


def _agree(settings: LinkSettings, request: Request) -> None:
    """Raises RuntimeError on every rank if one was started with other settings. Collective over the world."""
    gathered: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gathered, repr((settings, request)))
    others = [rank for rank, own in enumerate(gathered) if own != gathered[0]]
    if others:
        raise RuntimeError(f"ranks {others} have other settings than rank 0; start all with the same command line")


def measure(settings: LinkSettings, request: Request, device: torch.device) -> Found:
    """Measures everything. Collective over the world; the same result on every rank."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, platform.node())
    meter = Meter(settings, device)
    groups = make_groups(request.layout, request.kinds)
    timings: list[Timing] = []
    for expert, kind in ((False, "tp_dp"), (True, "expert_tp_dp")):
        traffic = [t for t in request.traffic if t.expert == expert]
        over = next((g for g in groups if kind in g.kinds), None)
        if over is not None and traffic:
            timings += meter.exchange(over, traffic, settings.transfers)
    for over in groups:
        timings += meter.sweep(over)
    pairs = measure_pairs(meter, settings.pair_bytes, tuple(hosts)) if settings.pair_bytes else None
    launches: list[float] = [0.0] * len(hosts)
    dist.all_gather_object(launches, meter.launch_us())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    library = ""
    if dist.get_backend() == "nccl":
        library = " " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    source = f"{len(hosts)} x {name}, {dist.get_backend()}{library}, {datetime.date.today().isoformat()}"
    links = links_of(timings, groups, hosts, source=source, launch_us=max(launches))
    return Found(tuple(timings), pairs, links)


def links_of(
    timings: Sequence[Timing], groups: Sequence[Groups], hosts: Sequence[str], *, source: str, launch_us: float
) -> MeasuredLinks:
    """The planner's figures: of the slowest group, the largest all-to-all's bandwidth and the smallest one's time.

    Figures within nodes are those of groups that lie within one host each, the others those of groups that span hosts.
    Where several kinds of groups qualify, those that Muon exchanges over come first, then the largest.
    """
    figures: dict[bool, LinkFigures] = {}
    order = sorted(groups, key=lambda g: ("tp_dp" not in g.kinds, "expert_tp_dp" not in g.kinds, -g.world_size))
    for over in order:
        spans = any(len({hosts[rank] for rank in ranks}) > 1 for ranks in over.ranks)
        own = [t for t in timings if t.groups == over.name and t.what == SWEEP]
        if spans not in figures and over.world_size > 1 and own:
            largest, smallest = (pick(own, key=lambda t: t.sizes_bytes[0]) for pick in (max, min))
            figures[spans] = LinkFigures(min(largest.group_busbw), smallest.slowest_us)
    return MeasuredLinks(source, figures.get(False), figures.get(True), launch_us)


def show(found: Found, request: Request, to: Console) -> None:
    """Prints everything."""
    layout = ", ".join(f"{name} {size}" for name, size in request.layout.sizes.items())
    to.print(f"Links of {found.links.source}; {layout}")
    for name in dict.fromkeys(timing.groups for timing in found.timings):
        _print_groups(to, [t for t in found.timings if t.groups == name], name)
    notes = []
    if found.pairs is not None:
        _print_pairs(to, found.pairs)
        for within, value in sorted(found.pairs.medians.items(), reverse=True):
            notes.append(f"median {'within a host' if within else 'between hosts'}: {value:.3g} GB/s each way")
        slow = [f"rank {rank}" for rank in found.pairs.slow_ranks]
        slow += [f"link {a} - {b}" for a, b in found.pairs.slow_links]
        notes.append(f"below {SUSPICIOUS} of the median: {', '.join(slow) or 'none'}")
    for title, figures in (("within a node", found.links.intra_node), ("between nodes", found.links.inter_node)):
        if figures is not None:
            notes.append(
                f"all-to-all {title}: {figures.bandwidth_gb_per_s:.3g} GB/s a rank; small, {figures.latency_us:.0f} us"
            )
    notes.append(f"a small kernel adds {found.links.launch_us:.1f} us to a stream")
    print_list(to, notes)


def _print_groups(to: Console, timings: Sequence[Timing], name: str) -> None:
    ranks = timings[-1].ranks
    listed = ", ".join(f"[{_ranks(own)}]" for own in ranks[:4]) + (", ..." if len(ranks) > 4 else "")
    at_once = f"{len(ranks)} groups at the same time" if len(ranks) > 1 else "1 group"
    rows = []
    for timing in timings:
        busbw = timing.group_busbw
        worst = min(range(len(busbw)), key=busbw.__getitem__)
        slowest = f"[{_ranks(timing.ranks[worst])}]" if len(busbw) > 1 else ""
        size = max(timing.sizes_bytes)
        rates = (f"{timing.algbw:.3g}", f"{busbw[worst]:.3g}", f"{max(busbw):.3g}")
        rows.append((timing.what, size, f"{timing.slowest_us:.1f}", *rates, slowest))
    numbers = ("size (bytes)", "time (us)", "algbw (GB/s)", "busbw (GB/s)", "best group (GB/s)")
    to.print(f"\n{name}: {at_once}, {listed}")
    to.print(table(("what", *numbers, "slowest group"), rows, numbers=numbers))


def _ranks(ranks: Sequence[int]) -> str:
    shown = [str(rank) for rank in ranks]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])


def _print_pairs(to: Console, pairs: Pairs) -> None:
    numbers = ("GB/s each way", "of the median")
    rows = [(f"{a} - {b}", f"{pairs.link(a, b):.3g}", f"{pairs.ratio(a, b):.2f}") for a, b in pairs.slowest]
    to.print(f"\nPairs of ranks, both directions at once, {pairs.size_bytes} bytes, slowest first")
    to.print(table(("ranks", *numbers), rows[:_SHOWN_PAIRS], numbers=numbers))
