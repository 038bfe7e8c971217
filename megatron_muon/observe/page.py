"""HTML pages: one file that holds its style, charts and scripts, opens without a network, and prints.

All text is escaped here. A policy in the page's head forbids every request, so that nothing can be fetched or sent.
Charts are Vega-Lite specifications, drawn by the libraries that the package vl-convert-python brings.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any


def text(content: object) -> str:
    """Escaped text."""
    return html.escape(str(content))


def paragraph(content: str) -> str:
    """A paragraph of text."""
    return f"<p>{text(content)}</p>"


def items(texts: Sequence[str]) -> str:
    """A list of texts; flags in them are set as code, so that they are not divided."""
    shown = (re.sub(r"(?<!\S)--[a-z0-9-]+", r"<code>\g<0></code>", text(t)) for t in texts)
    return "<ul>" + "".join(f"<li>{t}</li>" for t in shown) + "</ul>"


def section(key: str, heading: str, *content: str) -> str:
    """A section that `page` lists in its contents.

    Args:
        key: Anchor, a word.
        heading: Heading; text.
        *content: HTML from the functions here.
    """
    return f'<section id="{text(key)}"><h2>{text(heading)}</h2>{"".join(content)}</section>'


def details(summary: str, *content: str) -> str:
    """Content that is folded away until a reader asks for it."""
    return f"<details><summary>{text(summary)}</summary>{''.join(content)}</details>"


def html_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Collection[str] = (),
    colors: Sequence[str | None] = (),
) -> str:
    """A table of text.

    Args:
        columns: Headers, with units.
        rows: Cells of each row.
        numbers: Headers of the columns that are aligned to the right.
        colors: For each row, the color of a square before its first cell; None: no square.
    """

    def cell(tag: str, index: int, content: object, before: str = "") -> str:
        return f"<{tag}{' class=n' if columns[index] in numbers else ''}>{before}{text(content)}</{tag}>"

    head = "".join(cell("th", i, column) for i, column in enumerate(columns))
    body = []
    for number, row in enumerate(rows):
        color = colors[number] if number < len(colors) else None
        key = f'<i style="background:{text(color)}"></i>' if color else ""
        body.append("<tr>" + "".join(cell("td", i, c, "" if i else key) for i, c in enumerate(row)) + "</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


class Charts:
    """Collects the charts of a page; `add` returns the place where a chart will be drawn."""

    def __init__(self) -> None:
        self.specs: list[Mapping[str, Any]] = []

    def add(self, spec: Mapping[str, Any]) -> str:
        """Adds a Vega-Lite specification."""
        self.specs.append(spec)
        label = text(spec.get("description", "chart"))
        return f'<div class="chart" role="img" aria-label="{label}" data-chart="{len(self.specs) - 1}"></div>'


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script.

    Raises:
        ValueError: If vl-convert-python is not installed.
    """
    try:
        import vl_convert  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        if error.name != "vl_convert":
            raise
        raise ValueError(
            'charts need the package vl-convert-python, which is not installed; pip install "megatron-muon[report]"'
        ) from None
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def page(title: str, subtitle: str, summary: str, sections: Sequence[tuple[str, str, str]], charts: Charts) -> str:
    """The whole page: summary, contents, sections.

    Args:
        title: Title; text.
        subtitle: Line below it; text.
        summary: HTML of the summary, which comes first.
        sections: (anchor, heading, HTML from `section`).
        charts: Charts that the HTML refers to.

    Raises:
        ValueError: If there is a chart and vl-convert-python is not installed.
    """
    contents = "".join(f'<li><a href="#{text(key)}">{text(heading)}</a></li>' for key, heading, _ in sections)
    specs = json.dumps(charts.specs, separators=(",", ":")).replace("<", "\\u003c")
    scripts = f'<script>{_library()}</script><script type="application/json" id="charts">{specs}</script>'
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline' 'unsafe-eval'\">"
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body><header><h1>{text(title)}</h1>"
        f"<p>{text(subtitle)}</p></header><main>{summary}<nav><h2>Contents</h2><ol>{contents}</ol></nav>"
        f"{''.join(body for *_, body in sections)}</main>"
        f"{scripts if charts.specs else ''}<script>{_SCRIPT}</script></body></html>\n"
    )


# Vega writes colors as attributes of its SVG, which style rules override: one drawing serves light, dark and paper.
_STYLE = """
:root{--ink:#1d2330;--soft:#5b6473;--line:#d9dee7;--paper:#fff;--card:#f5f7fa;--accent:#2f6fde}
@media (prefers-color-scheme:dark){:root{--ink:#e3e7ee;--soft:#9aa5b5;--line:#363d4a;--paper:#15181e;--card:#1e232b;
--accent:#7fb0ff}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0}
header,main{max-width:70rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:1.5rem}header p{color:var(--soft);margin:.25rem 0 1rem}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.25rem 0 .5rem}
h3{font-size:1rem;margin:1.25rem 0 .25rem}
p,li{max-width:48rem;overflow-wrap:anywhere}ul,ol{padding-left:1.25rem}li{margin:.2rem 0}
a{color:var(--accent)}code{white-space:nowrap}nav ol{columns:2 14rem;margin:0}nav li{margin:0 0 .2rem}
.summary{background:var(--card);border-left:4px solid var(--accent);border-radius:4px;padding:.25rem 1.25rem .75rem}
.summary h2{margin-top:.75rem}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .75rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}th.n,td.n{text-align:right}
td i{display:inline-block;width:.75em;height:.75em;margin-right:.5em;border-radius:2px}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--accent)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:.5rem 1rem}
section .grid h3{font-size:.8rem;overflow-wrap:anywhere}
.chart{width:100%;min-height:6rem}.chart svg{max-width:100%;height:auto}
.chart svg .background{fill:none}
.chart .role-axis-label text,.chart .role-axis-title text{fill:var(--soft)}
.chart .role-axis-grid line,.chart .role-axis-domain line,.chart .role-axis-tick line{stroke:var(--line)}
#vg-tooltip-element.vg-tooltip{font:13px system-ui,sans-serif;color:var(--ink);background:var(--card);
border:1px solid var(--line);position:fixed;z-index:9;padding:.4rem .6rem;border-radius:4px;visibility:hidden}
#vg-tooltip-element.visible{visibility:visible}
#vg-tooltip-element td.key{color:var(--soft)}#vg-tooltip-element td{border:0;padding:0 .4rem}
@media (max-width:40rem){header,main{padding:0 .9rem}.summary{padding:.25rem .9rem .75rem}h1{font-size:1.3rem}}
@media print{:root{--ink:#000;--soft:#444;--line:#ccc;--paper:#fff;--card:#fff;--accent:#000}
body{font-size:10pt}nav,details:not([open]){display:none}section{break-inside:avoid}a{text-decoration:none}
.wide{overflow:visible}table{font-size:7.5pt}th,td{padding:.1rem .35rem;white-space:normal}}
"""

_SCRIPT = """
const held=document.getElementById("charts"),specs=held?JSON.parse(held.textContent):[];
const draw=e=>{if(!e.dataset.drawn){e.dataset.drawn=1;
vegaEmbed(e,specs[e.dataset.chart],{actions:false,renderer:"svg",tooltip:{disableDefaultStyle:true}})}};
document.querySelectorAll(".chart").forEach(e=>{const d=e.closest("details");
d?d.addEventListener("toggle",()=>d.open&&draw(e)):draw(e)});
"""
