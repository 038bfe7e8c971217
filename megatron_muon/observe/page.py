"""Reports as one HTML page that holds its pictures, so that it opens without a network and can be sent around alone.

What is passed as text is escaped here; nothing else of a page comes from outside.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any


def png(figure: Any) -> bytes:
    """A matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def plain(text: str) -> str:
    """Text for matplotlib, which reads dollars as mathematics and hides labels that begin with an underscore."""
    return text.replace("$", r"\$").lstrip("_") or "?"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{html.escape(text)}</p>"


def section(heading: str, text: str, picture: bytes) -> str:
    """A heading, a paragraph and a picture."""
    source = base64.b64encode(picture).decode("ascii")
    return (
        f"<h2>{html.escape(heading)}</h2>{paragraph(text)}"
        f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{source}">'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def items(texts: Sequence[str]) -> str:
    """A list of text."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def page(title: str, summary: str, body: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: Of the page; text.
        summary: A line below it; text.
        body: What the functions above have returned.
    """
    return _PAGE.format(title=html.escape(title), summary=html.escape(summary), body="".join(body))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Muon: {title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} td, th {{ padding: .1em .7em; text-align: left }} table {{ font-size: 85% }}
</style></head><body><h1>Muon: {title}</h1><p>{summary}</p>{body}</body></html>
"""
