"""What was measured, as tables with nccl-tests' columns, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_muon.profile.busbw import bus_factor
from megatron_muon.profile.collectives import PLACEMENTS, Placement
from megatron_muon.profile.links import Row, Timing, average_busbw
from megatron_muon.profile.pairs import SUSPICIOUS, Pairs

VERSION = 1
MATRIX_RANKS = 16
"""Up to so many ranks the pairs are printed as a matrix, beyond as the slowest."""
WORST = 10


def header_lines() -> list[str]:
    """nccl-tests' three lines above a table."""
    columns = f"{'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>6}"
    units = f"{'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}"
    lines = [
        f"# {'':>12} {'':>12} {'':>9} {'':>6} {'':>6}  {'out-of-place':^32}  {'in-place':^32}",
        f"# {'size':>12} {'count':>12} {'type':>9} {'redop':>6} {'root':>6}  {columns}  {columns}",
        f"# {'(B)':>12} {'(elements)':>12} {'':>9} {'':>6} {'':>6}  {units}  {units}",
    ]
    return [line.rstrip() for line in lines]


def row_line(row: Row) -> str:
    """A row in nccl-tests' columns. Times and bandwidths are the slowest rank's."""
    cells = [_cells(row, placement) for placement in PLACEMENTS]
    root = -1
    line = f"  {row.size_bytes:>12} {row.count:>12} {row.dtype:>9} {row.redop:>6} {root:>6}  {'  '.join(cells)}"
    return f"{line}  {row.label}".rstrip()


def _cells(row: Row, placement: Placement) -> str:
    timing = row.timings[placement]
    if timing is None:
        return f"{'N/A':>9} {'N/A':>7} {'N/A':>7} {'N/A':>6}"
    algbw, busbw = row.algbw(placement), row.busbw(placement)
    return f"{timing.slowest_us:>9.2f} {_gbps(algbw):>7} {_gbps(busbw):>7} {timing.wrong:>6}"


def _gbps(value: float | None) -> str:
    """As nccl-tests writes it, with another digit for what is slow."""
    if value is None:
        return "N/A"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def section_title(rows: Sequence[Row]) -> str:
    """What a table is about."""
    row = rows[0]
    groups = f"{len(row.ranks)} group{'s' if len(row.ranks) > 1 else ''} of {row.world_size} ranks at the same time"
    listed = ", ".join(f"[{_ranks(ranks)}]" for ranks in row.ranks[:4]) + (", ..." if len(row.ranks) > 4 else "")
    return f"# {row.collective} over {row.groups}: {groups if len(row.ranks) > 1 else groups[:-17]}: {listed}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = [str(r) for r in ranks]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])


def straggler_line(rows: Sequence[Row]) -> str:
    """Which rank was slowest at the largest size, and which group."""
    row = max(rows, key=lambda r: r.size_bytes)
    placement, timing = _first(row)
    words = f"# largest size: slowest rank {timing.slowest_rank}, {timing.imbalance:.2f} of the median time"
    busbws = row.group_busbw(placement)
    if len(busbws) > 1:
        worst = min(range(len(busbws)), key=busbws.__getitem__)
        words += (
            f"; slowest group [{_ranks(row.ranks[worst])}], bus bandwidth {busbws[worst]:.2f}, best {max(busbws):.2f}"
        )
    return words


def _first(row: Row) -> tuple[Placement, Timing]:
    return next((p, t) for p, t in row.timings.items() if t is not None)


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A table of the rows of one collective over one kind of groups."""
    yield section_title(rows)
    yield from header_lines()
    yield from map(row_line, rows)
    wrong = sum(row.wrong for row in rows)
    yield f"# Out of bounds values : {wrong} {'FAILED' if wrong else 'OK'}"
    yield f"# Avg bus bandwidth    : {average_busbw(rows):.4g}"
    yield straggler_line(rows)
    if nvml := _nvml_words(rows):
        yield nvml


def _nvml_words(rows: Sequence[Row]) -> str:
    """What NVML says of the largest size, over the ranks."""
    _, timing = _first(max(rows, key=lambda r: r.size_bytes))
    counted = [entry for entry in timing.nvml if entry]
    if not counted:
        return ""

    def values(key: str) -> list[Any]:
        return [entry[key] for entry in counted if entry[key] is not None]

    words = []
    for key, title in (("nvlink_data_sent_bytes", "NVLink"), ("pcie_sent_bytes", "PCIe")):
        if found := values(key):
            rates = [entry[key] / entry["seconds"] / 1e9 for entry in counted if entry[key] is not None]
            words.append(f"{title} sent {max(found) / 1e9:.3f} GB, {max(rates):.1f} GB/s at most on a GPU")
    if power := values("mean_power_w"):
        words.append(f"power at most {max(power):.0f} W")
    if clocks := values("sm_clock_mhz"):
        words.append(f"SM clock at least {min(clocks)} MHz")
    throttled = {
        f"{reason} on rank {rank}"
        for rank, entry in enumerate(timing.nvml)
        for reason in (entry["throttled"] if entry else ())
    }
    words.append(f"throttled: {', '.join(sorted(throttled)) or 'no'}")
    return f"# NVML: {'; '.join(words)}"


def pairs_lines(pairs: Pairs) -> Iterator[str]:
    """The matrix, or the slowest of it, and who is slow."""
    size = len(pairs.gbps)
    yield f"# pairs: GB/s each way, both at once, {pairs.size_bytes} bytes, as the row's rank timed it"
    if size <= MATRIX_RANKS:
        yield "# rank " + "".join(f"{rank:>8}" for rank in range(size)) + f"{'of median':>12}"
        for rank, row in enumerate(pairs.gbps):
            cells = "".join(f"{'-' if value is None else f'{value:.2f}':>8}" for value in row)
            yield f"  {rank:>4} {cells}{pairs.rank_ratios[rank]:>12.2f}"
    else:
        for a, b in pairs.slowest[:WORST]:
            yield f"  {a:>5} - {b:<5} {pairs.link(a, b):>8.2f}, {pairs.ratio(a, b):.2f} of the median"
    for within, value in sorted(pairs.medians.items(), reverse=True):
        yield f"# median {'within a host' if within else 'between hosts'}: {value:.2f}"
    a, b = pairs.slowest[0]
    yield f"# slowest link {a} - {b}: {pairs.link(a, b):.2f}, {pairs.ratio(a, b):.2f} of the median of its kind"
    named = [f"rank {rank}" for rank in pairs.slow_ranks] + [f"link {a} - {b}" for a, b in pairs.slow_links]
    yield f"# below {SUSPICIOUS} of the median: {', '.join(named) or 'none'}"


def to_json(run: Mapping[str, Any], rows: Sequence[Row], pairs: Pairs | None) -> dict[str, Any]:
    """Everything, for programs.

    Args:
        run: What else to say of the run, plain values.
        rows: What was measured.
        pairs: Between ranks; None in a world of one, or if not asked for.
    """
    return {
        "version": VERSION,
        **run,
        "rows": [_row_json(row) for row in rows],
        "pairs": None
        if pairs is None
        else {
            "size_bytes": pairs.size_bytes,
            "gbps": [list(row) for row in pairs.gbps],
            "slow_ranks": list(pairs.slow_ranks),
            "slow_links": [list(link) for link in pairs.slow_links],
        },
    }


def _row_json(row: Row) -> dict[str, Any]:
    out: dict[str, Any] = {
        "groups": row.groups,
        "ranks": [list(ranks) for ranks in row.ranks],
        "collective": row.collective,
        "label": row.label,
        "size_bytes": row.size_bytes,
        "count": row.count,
        "type": row.dtype,
        "redop": row.redop,
        "root": -1,
        "bus_factor": bus_factor(row.collective, row.world_size),
        "sent_bytes": [list(sent) for sent in row.sent_bytes] or None,
    }
    for placement in PLACEMENTS:
        timing = row.timings[placement]
        out[placement] = None
        if timing is not None:
            out[placement] = {
                "time_us": timing.slowest_us,
                "rank_us": list(timing.rank_us),
                "slowest_rank": timing.slowest_rank,
                "imbalance": timing.imbalance,
                "algbw_gbps": row.algbw(placement),
                "busbw_gbps": row.busbw(placement),
                "group_busbw_gbps": row.group_busbw(placement),
                "wrong": timing.wrong,
                "nvml": list(timing.nvml) if any(timing.nvml) else None,
            }
    return out


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws bus bandwidth over size: a panel for each collective, a line for each kind of groups.

    Where there are several groups of a kind, the line is the slowest and a band reaches to the fastest. Exchanges by a
    plan are points.

    Args:
        rows: What was measured.
        path: The file; matplotlib takes the format from its suffix.

    Raises:
        ValueError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    collectives = list(dict.fromkeys(row.collective for row in rows))
    names = list(dict.fromkeys(row.groups for row in rows))
    columns = min(3, len(collectives))
    lines = -(-len(collectives) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for collective in collectives:
        panel = next(panels)
        for index, name in enumerate(names):
            chosen = sorted(
                (r for r in rows if r.collective == collective and r.groups == name), key=lambda r: r.size_bytes
            )
            _draw(panel, chosen, name, f"C{index}", swept=collective != "all_to_allv")
        panel.set_title(collective, fontsize="medium")
        panel.set_xscale("log", base=2)
        highest = max(b for r in rows if r.collective == collective for p in PLACEMENTS for b in r.group_busbw(p))
        panel.set_ylim(0, 1.1 * highest or 1)
        panel.set_xlabel("size, bytes")
        panel.set_ylabel("busbw, GB/s")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    for panel in panels:
        panel.set_axis_off()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot: cannot write {path}: {error}") from error


def _draw(panel: Any, rows: Sequence[Row], name: str, color: str, *, swept: bool) -> None:
    points = [(row.size_bytes, row.group_busbw(_first(row)[0])) for row in rows]
    if not points:
        return
    sizes = [size for size, _ in points]
    slowest, fastest = [min(b) for _, b in points], [max(b) for _, b in points]
    panel.plot(sizes, slowest, "o-" if swept else "o", markersize=3, color=color, label=name)
    if swept and len(points[0][1]) > 1:
        panel.fill_between(sizes, slowest, fastest, color=color, alpha=0.2, linewidth=0)
