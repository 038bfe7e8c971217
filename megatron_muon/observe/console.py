"""Text output of all tools: one console, one kind of table, one progress bar.

Tables fit the console: text folds inside its cell and numbers stay whole, so that nothing is ever cut off. Text that
comes from files is printed as it is, without markup and without characters that control a terminal.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120
"""Columns where the output is no terminal and the environment does not set COLUMNS."""


def console(width: int | None = None, file: IO[str] | None = None) -> Console:
    """A console for a tool's output.

    Args:
        width: Number of columns. None takes the terminal's width, or COLUMNS, or `PIPE_WIDTH`.
        file: Where the text goes; None: standard output.
    """
    stream = file or sys.stdout
    if width is None and not stream.isatty() and not os.environ.get("COLUMNS"):
        width = PIPE_WIDTH
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)


def printable(text: object) -> str:
    """Text without characters that could control a terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", numbers: Sequence[str] = ()
) -> Table:
    """A table that a console of at least 80 columns shows completely.

    Args:
        columns: Headers. A unit belongs here, once, and not into the cells.
        rows: Cells of each row; None is shown as `-`, an empty first cell continues the row above.
        title: Line above the table.
        numbers: Headers of the columns that are aligned to the right and never folded.
    """
    cells = [["-" if cell is None else printable(cell) for cell in row] for row in rows]
    made = Table(title=Text(printable(title)) if title else None, title_justify="left", title_style="bold")
    made.box, made.header_style, made.pad_edge = box.SIMPLE_HEAD, "bold", False
    for index, heading in enumerate(columns):
        if heading in numbers:
            # Rich takes space from columns that may fold only, so the header has to be folded here.
            widest = max((len(row[index]) for row in cells), default=0)
            folded = textwrap.fill(heading, max(widest, *map(len, heading.split())), break_on_hyphens=False)
            made.add_column(Text(folded, justify="right"), justify="right", no_wrap=True)
        else:
            made.add_column(heading, overflow="fold")
    for row in cells:
        made.add_row(*map(Text, row))
    return made


def bullet(text: str, width: int) -> str:
    """A list item: a dash and the text, folded at spaces only, so that flags and paths can be copied."""
    return textwrap.fill(
        printable(text), width, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def print_list(target: Console, texts: Iterable[str]) -> None:
    """Prints notes or findings as a list."""
    for text in texts:
        target.print(bullet(text, target.width), soft_wrap=True)


def as_text(show: Callable[[Console], object], width: int) -> str:
    """What `show` prints on a console of this width, without colors and trailing spaces."""
    buffer = io.StringIO()
    show(Console(file=buffer, width=width, color_system=None, markup=False, highlight=False, emoji=False))
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error that disappears at the end; a call `(text, done, total)` moves it.

    Without a terminal there is no bar. Warnings of libraries are held back meanwhile: they would break it.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    errors = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar,
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        task = bar.add_task("")
        try:
            yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
        finally:
            logging.disable(level)
