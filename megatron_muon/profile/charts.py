"""Vega-Lite specifications of a report's charts. Data comes in; dictionaries go out, for `observe.page.Charts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from megatron_muon.observe.timing.shown import SHOWN

# Legible on white and on black.
PALETTE = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#b8960c", "#ff7f9a", "#9d755d", "#8a8f98",
)  # fmt: skip
_MOST_POINTS = 400
_LABEL_PX = 12
# Lower charts have their title above them only.
_SMALL = 180
_CONFIG = {
    "font": "system-ui, sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "grid": True},
}


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: Text at its end.
        points: Step -> (value, lowest, highest); the last two are drawn as a band.
        dashed: Whether the line is dashed.
    """

    label: str
    points: Mapping[int, tuple[float, float, float]]
    dashed: bool = False


def lines(
    title: str, series: Sequence[Series], *, expected: float | Sequence[float] | None = None, height: int = 220
) -> dict[str, Any]:
    """Lines over whole steps, labelled at their ends; hovering shows all values of a step.

    Args:
        title: What the values are; the axis' title.
        series: Lines, each with at least one point.
        expected: A value that is drawn as a line, or two ends of a range that is drawn as a band; None: neither.
        height: Height in pixels; more if the labels need it. Small charts have no title beside their axis.
    """
    height = max(height, _LABEL_PX * (len(series) + 2))
    wanted = [] if expected is None else [float(expected)] if isinstance(expected, int | float) else [*expected]
    values = [v for s in series for point in s.points.values() for v in point]
    scale = _Scale.over([*values, *wanted], height)
    colors = list(islice(cycle(PALETTE), len(series)))
    rows = [
        {"step": step, "series": f"s{i}", "value": _short(v), "low": _short(low), "high": _short(high)}
        for i, s in enumerate(series)
        for step, (v, low, high) in _thinned(s.points)
    ]
    ends = [(max(s.points), s.points[max(s.points)][0]) for s in series]
    labels = [
        {"step": max(step for step, _ in ends), "value": value, "label": s.label, "series": f"s{i}"}
        for i, (s, value) in enumerate(zip(series, scale.spread([value for _, value in ends]), strict=True))
    ]
    x = {"field": "step", "type": "quantitative", "title": "step", "scale": {"nice": False, "zero": False}}
    x["axis"] = {
        "tickMinStep": 1,
        "format": "d",
        "labelFlush": True,
        "grid": False,
        "tickCount": {"signal": "width/80"},
    }
    y: dict[str, Any] = {"field": "value", "type": "quantitative", "title": title, "scale": scale.spec}
    y["axis"] = {"format": "~s" if scale.high >= 1e5 else ".4~g", "tickCount": 5}
    if height < _SMALL:
        y["title"] = None
    domain = [f"s{i}" for i in range(len(series))]
    color = {"field": "series", "type": "nominal", "legend": None, "scale": {"domain": domain, "range": colors}}
    dashes = [[5, 4] if s.dashed or i >= len(PALETTE) else [1, 0] for i, s in enumerate(series)]
    dash = {"field": "series", "type": "nominal", "legend": None, "scale": {"domain": domain, "range": dashes}}
    tooltip = [{"field": "step", "title": "step", "format": "d"}]
    tooltip += [{"field": f"s{i}", "title": s.label, "format": ".4~g"} for i, s in enumerate(series)]
    hover = {"name": "hover", "select": {"type": "point", "fields": ["step"], "nearest": True, "on": "pointermove"}}
    return {
        **_chart(f"{title} by step", height),
        "padding": {"left": 2, "top": 6, "bottom": 2, "right": 4},
        "data": {"values": rows},
        "encoding": {"x": x},
        "layer": [
            *_expected(wanted, scale),
            *([_band(y, color)] if any(row["low"] != row["high"] for row in rows) else []),
            {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"y": y, "color": color, "strokeDash": dash}},
            {
                "mark": {"type": "point", "filled": True, "size": 40},
                "encoding": {"y": y, "color": color, "opacity": _if_hovered(1)},
            },
            {
                "data": {"values": labels},
                "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "baseline": "middle"},
                "encoding": {"y": y, "text": {"field": "label"}, "color": color},
            },
            {
                "transform": [{"pivot": "series", "value": "value", "groupby": ["step"]}],
                "params": [hover],
                "mark": {"type": "rule", "color": "#8a8f98"},
                "encoding": {"opacity": _if_hovered(0.6), "tooltip": tooltip},
            },
        ],
    }


def timeline(spans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each rank did in a step, and below it the collectives in flight.

    Args:
        spans: `lane` (name of the row), `phase`, `start` and `stop` (ms), in the order of the rows.
    """
    lanes = list(dict.fromkeys(span["lane"] for span in spans))
    rows = [{**span, "ms": _short(span["stop"] - span["start"])} for span in spans]
    names = [{"field": "phase", "title": "phase"}, {"field": "ms", "title": "ms", "format": ".3~f"}]
    begin = {"field": "start", "type": "quantitative", "title": "ms", "axis": {"grid": False}}
    return {
        **_chart("What each rank did in one step", 24 * len(lanes) + 10),
        "data": {"values": rows},
        "mark": {"type": "bar", "height": {"band": 0.8}},
        "encoding": {
            "x": begin,
            "x2": {"field": "stop"},
            "y": {"field": "lane", "type": "nominal", "sort": lanes, "title": None, "axis": {"grid": False}},
            "color": _phase_color({span["phase"] for span in spans}),
            "tooltip": [*names, {"field": "start", "title": "begins at, ms", "format": ".3~f"}],
        },
    }


def stacked(rows: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """A step's time of each rank, divided into phases: (rank, phase, ms)."""
    ranks, order = list(dict.fromkeys(rank for rank, *_ in rows)), list(SHOWN)
    values = [{"rank": r, "phase": p, "ms": _short(ms), "order": order.index(p)} for r, p, ms in rows]
    return {
        **_chart("Where the time of each rank goes", 24 * len(ranks) + 10),
        "data": {"values": values},
        "mark": {"type": "bar", "height": {"band": 0.8}},
        "encoding": {
            "x": {"field": "ms", "type": "quantitative", "stack": "zero", "title": "ms", "axis": {"grid": False}},
            "y": {"field": "rank", "type": "nominal", "sort": ranks, "title": None, "axis": {"grid": False}},
            "order": {"field": "order"},
            "color": _phase_color({phase for _, phase, _ in rows}),
            "tooltip": [{"field": "rank"}, {"field": "phase"}, {"field": "ms", "format": ".3~f"}],
        },
    }


def _chart(description: str, height: int) -> dict[str, Any]:
    fit = {"type": "fit-x", "contains": "padding", "resize": True}
    return {"description": description, "width": "container", "height": height, "autosize": fit, "config": _CONFIG}


def _phase_color(present: set[str]) -> dict[str, Any]:
    domain = [name for name in SHOWN if name in present]
    return {
        "field": "phase",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": domain, "range": [SHOWN[name].color for name in domain]},
    }


def _if_hovered(opacity: float) -> dict[str, Any]:
    return {"condition": {"param": "hover", "empty": False, "value": opacity}, "value": 0}


def _band(y: Mapping[str, Any], color: Mapping[str, Any]) -> dict[str, Any]:
    encoding = {"y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color}
    return {"mark": {"type": "area", "opacity": 0.13}, "encoding": encoding}


def _expected(wanted: Sequence[float], scale: _Scale) -> list[dict[str, Any]]:
    if not wanted:
        return []
    if len(wanted) == 1:
        mark: dict[str, Any] = {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5, "color": "#8a8f98"}
        shown = [{"mark": mark, "encoding": {"x": None, "y": {"datum": wanted[0], "scale": scale.spec}}}]
        text = f"{wanted[0]:g} expected"
    else:
        low, high = wanted
        mark = {"type": "rect", "color": "#8a8f98", "opacity": 0.18}
        shown = [
            {"mark": mark, "encoding": {"x": None, "y": {"datum": low, "scale": scale.spec}, "y2": {"datum": high}}}
        ]
        text = f"{low:.2g} to {high:.2g} expected"
    label = {"type": "text", "text": text, "align": "left", "baseline": "bottom", "dx": 4, "dy": -3, "fontSize": 10}
    shown.append(
        {
            "mark": {**label, "color": "#8a8f98"},
            "encoding": {"x": {"value": 0}, "y": {"datum": max(wanted), "scale": scale.spec}},
        }
    )
    return [{"data": {"values": [{}]}, **layer} for layer in shown]


@dataclass(frozen=True)
class _Scale:
    """A vertical axis: ends, pixels, and whether it is logarithmic."""

    low: float
    high: float
    height: int
    is_log: bool

    @classmethod
    def over(cls, values: Sequence[float], height: int) -> _Scale:
        low, high = min(values), max(values)
        if low > 0 and high > 50 * low:
            return cls(low / 1.1, high * 1.1, height, True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        # A little space counts as none: zero is a better end of an axis than a number beside it.
        return cls(0.0 if 0 <= low < 0.2 * high else low - room, high + room, height, False)

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "type": "log" if self.is_log else "linear",
            "domain": [self.low, self.high],
            "nice": False,
            "zero": False,
        }

    def _forward(self, value: float) -> float:
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.is_log else (
            self.low, self.high, value,
        )  # fmt: skip
        return float((at - low) / (high - low) * self.height)

    def _backward(self, pixels: float) -> float:
        share = pixels / self.height
        if self.is_log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def spread(self, values: Sequence[float]) -> list[float]:
        """The values moved apart, so that their labels do not overlap."""
        order = sorted(range(len(values)), key=values.__getitem__)
        places = [self._forward(values[index]) for index in order]
        for i in range(1, len(places)):
            places[i] = max(places[i], places[i - 1] + _LABEL_PX)
        top = self.height - _LABEL_PX / 2
        for i in reversed(range(len(places))):
            places[i] = min(places[i], top)
            top = places[i] - _LABEL_PX
        out = [0.0] * len(values)
        for index, place in zip(order, places, strict=True):
            out[index] = self._backward(place)
        return out


def _thinned(points: Mapping[int, tuple[float, float, float]]) -> list[tuple[int, tuple[float, float, float]]]:
    """At most `_MOST_POINTS` points, the last one among them."""
    ordered = sorted(points.items())
    stride = -(-len(ordered) // _MOST_POINTS)
    return [*ordered[:-1:stride], ordered[-1]]


def _short(value: float) -> float:
    """Five digits: more would only make the page larger."""
    return float(f"{value:.5g}")
