"""MkDocs hooks: pages that come from elsewhere in the repository, the table of flags, and a check of the result.

Pages outside docs/ (CONTRIBUTING.md, CHANGELOG.md, benchmarks/results) are added under the names below, so that each
text has one home. The table of flags is made from `MuonConfig`, so that it cannot differ from the program.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLAGS_MARK = "<!-- flags -->"
PRESETS_MARK = "<!-- presets -->"
PLANS_MARK = "<!-- plans -->"

# Rows of benchmarks/results/plans.json that the page of layouts shows: name, model, (dp, tp, pp, ep).
PLANS = (
    ("Moonlight 16B", "moonlight-16b", (64, 1, 4, 8)),
    ("Kimi K2", "kimi-k2", (64, 1, 16, 16)),
    ("Qwen3 8B", "qwen3-8b", (128, 1, 1, 1)),
    ("Llama 3 70B", "llama3-70b", (8, 8, 16, 1)),
    ("Llama 3 405B", "llama3-405b", (16, 8, 16, 1)),
)


def generated_pages() -> dict[str, Path]:
    """Pages of the site that lie outside docs/, by their address in the site."""
    pages = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
    for path in sorted(RESULTS.glob("*.md")) + sorted(RESULTS.glob("*.png")):
        pages[f"results/{path.name}"] = path
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for address, path in generated_pages().items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.file.src_uri in generated_pages():
        # Written for the repository's root, shown at the site's.
        markdown = markdown.replace("](docs/", "](")
    if FLAGS_MARK in markdown:
        markdown = markdown.replace(FLAGS_MARK, flag_tables()).replace(PRESETS_MARK, preset_table())
    if PLANS_MARK in markdown:
        markdown = markdown.replace(PLANS_MARK, plan_table())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Puts drawings into the page itself, where they take the colour of its text, in light and in dark mode."""

    def drawing(match: re.Match[str]) -> str:
        svg = (ROOT / "docs" / "drawings" / match[1]).read_text(encoding="utf-8")
        return f'<div class="drawing-scroll">{svg}</div>'

    return re.sub(r"<!-- drawing: (\S+) -->", drawing, html)


def flag_tables() -> str:
    """One table for each group of flags: flag, values, default, meaning."""
    from megatron_muon.config import MuonConfig

    hints = get_type_hints(MuonConfig)
    groups: dict[str, list[str]] = {}
    for setting in fields(MuonConfig):
        title = setting.metadata.get("group", "settings")
        groups.setdefault(title, []).append(_flag_row(setting, hints[setting.name]))
    out = []
    for title, rows in groups.items():
        head = ["| flag | values | default | meaning |", "|---|---|---|---|"]
        out += [f"### {title[0].upper()}{title[1:]}\n", '<div class="flags" markdown>\n', *head, *rows, "\n</div>\n"]
    return "\n".join(out)


def _flag_row(setting: Any, hint: Any) -> str:
    option = f"--muon-{setting.name.replace('_', '-')}"
    cells = [f"`{option}`", "", f"`{setting.default}`", setting.metadata["help"]]
    if hint is bool:
        cells[0] = f"`{option}`, `{option.replace('--muon-', '--muon-no-')}`"
        cells[2] = "on" if setting.default else "off"
    elif choices := get_args(hint):
        cells[1] = ", ".join(f"`{choice}`" for choice in choices)
    else:
        cells[1] = {"str": "text", "int": "whole number", "float": "number"}[hint.__name__]
        if setting.default == "":
            cells[2] = "empty"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plan_table() -> str:
    """Usual layouts, from the measurements' own file."""
    rows = json.loads((RESULTS / "plans.json").read_text(encoding="utf-8"))["rows"]
    by_layout = {(row["model"], row["dp"], row["tp"], row["pp"], row["ep"]): row for row in rows}
    out = [
        "| model, ranks (dp tp pp ep) | NS max/ideal: time | `--muon-balance flops` | Megatron-Core 0.19's "
        "| padding % | Megatron's padding % | sent %, mean / max |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, model, layout in PLANS:
        row = by_layout[model, *layout]
        ours, upstream = row["megatron_muon"], row["megatron_layer_wise"]
        cells = [
            f"{name}, {row['ranks']} ({' '.join(map(str, layout))})",
            f"{ours['max_over_ideal']:.2f}",
            f"{row['flops_max_over_ideal']:.2f}",
            f"{upstream['max_over_ideal']:.2f}",
            f"{100 * ours['padding']:.0f}",
            f"{100 * upstream['padding']:.0f}",
            f"{100 * ours['sent_over_adamw_mean']:.1f} / {100 * ours['sent_over_adamw_max']:.1f}",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def preset_table() -> str:
    """What each preset sets, as flags."""
    from megatron_muon.config import PRESETS

    rows = ["| preset | sets |", "|---|---|"]
    for name, settings in PRESETS.items():
        flags = [f"`{_given(setting, value)}`" for setting, value in settings.items()]
        rows.append(f"| `{name}` | {', '.join(flags) or 'nothing: these are the defaults below'} |")
    return "\n".join(rows)


def _given(setting: str, value: object) -> str:
    name = setting.replace("_", "-")
    if isinstance(value, bool):
        return f"--muon-{name}" if value else f"--muon-no-{name}"
    return f"--muon-{name} {value}"


class _Fetches(HTMLParser):
    """Collects what a page would fetch from another host. Links that a reader follows are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
        address = values.get(loads.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and values.get("rel") != "canonical":
            self.found.append(address)


def on_post_build(config: MkDocsConfig) -> None:
    """Fails the build if a page would fetch something from a network."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        parser = _Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        if parser.found:
            raise PluginError(f"{page}: would fetch {parser.found[0]}, expected a page that needs no network")
