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


Points = Mapping[int, tuple[float, float, float]]
"""Step -> (value, lowest, highest); the last two are drawn as a band."""


def lines(
    title: str,
    series: Sequence[tuple[str, Points]],
    *,
    expected: float | Sequence[float] | None = None,
    height: int = 220,
) -> dict[str, Any]:
    """Lines over whole steps, labelled at their ends; hovering shows all values of a step.

    Args:
        title: What the values are; the axis' title.
        series: Lines: the label at the end, and at least one point.
        expected: A value that is drawn as a line, or two ends of a range that is drawn as a band; None: neither.
        height: Height in pixels; more if the labels need it. Small charts have no title beside their axis.
    """
    height = max(height, _LABEL_PX * (len(series) + 2))
    wanted = [] if expected is None else [float(expected)] if isinstance(expected, int | float) else [*expected]
    values = [v for _, points in series for point in points.values() for v in point]
    scale = _Scale.over([*values, *wanted], height)
    colors = list(islice(cycle(PALETTE), len(series)))
    rows = [
        {"step": step, "series": f"s{i}", "value": _short(v), "low": _short(low), "high": _short(high)}
        for i, (_, points) in enumerate(series)
        for step, (v, low, high) in _thinned(points)
    ]
    last = max(max(points) for _, points in series)
    heights = scale.spread([points[max(points)][0] for _, points in series])
    labels = [
        {"step": last, "value": height, "label": label, "series": f"s{i}"}
        for i, ((label, _), height) in enumerate(zip(series, heights, strict=True))
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
    dashes = [[5, 4] if i >= len(PALETTE) else [1, 0] for i in range(len(series))]
    dash = {"field": "series", "type": "nominal", "legend": None, "scale": {"domain": domain, "range": dashes}}
    tooltip = [{"field": "step", "title": "step", "format": "d"}]
    tooltip += [{"field": f"s{i}", "title": label, "format": ".4~g"} for i, (label, _) in enumerate(series)]
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


def bars(title: str, spans: Sequence[Mapping[str, Any]], *, begins: bool = True) -> dict[str, Any]:
    """Spans of time in rows, colored by phase; hovering shows their length.

    Args:
        title: What is shown.
        spans: `lane` (name of the row), `phase`, `start` and `stop` (ms), in the order of the rows.
        begins: Whether a reader wants to know when a span began.
    """
    lanes = list(dict.fromkeys(span["lane"] for span in spans))
    rows = [{**span, "ms": _short(span["stop"] - span["start"])} for span in spans]
    tooltip = [{"field": "lane", "title": "of"}, {"field": "phase"}, {"field": "ms", "format": ".3~f"}]
    tooltip += [{"field": "start", "title": "begins at, ms", "format": ".3~f"}] if begins else []
    domain = [name for name in SHOWN if name in {span["phase"] for span in spans}]
    colors = {"domain": domain, "range": [SHOWN[name].color for name in domain]}
    return {
        **_chart(title, 24 * len(lanes) + 10),
        "data": {"values": rows},
        "mark": {"type": "bar", "height": {"band": 0.8}},
        "encoding": {
            "x": {"field": "start", "type": "quantitative", "title": "ms", "axis": {"grid": False}},
            "x2": {"field": "stop"},
            "y": {"field": "lane", "type": "nominal", "sort": lanes, "title": None, "axis": {"grid": False}},
            "color": {"field": "phase", "type": "nominal", "legend": None, "scale": colors},
            "tooltip": tooltip,
        },
    }


def _chart(description: str, height: int) -> dict[str, Any]:
    fit = {"type": "fit-x", "contains": "padding", "resize": True}
    return {"description": description, "width": "container", "height": height, "autosize": fit, "config": _CONFIG}


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
