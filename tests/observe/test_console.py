"""Tables at 80, 100 and 160 columns: names fold, numbers stay whole, nothing controls the terminal."""

from __future__ import annotations

import io
import logging
import warnings

import pytest

from megatron_muon.observe.console import as_text, bullet, console, progress_bar, table

NAME = "decoder.layers.12.mlp.experts.local_experts.63.linear_fc1.weight.gate.and.a.tail.that.is.long.indeed"
NUMBERS = [f"column {i}" for i in range(6)]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_names_fold_and_numbers_stay_whole(width: int) -> None:
    cells = [f"{10**i}.25" for i in range(6)]
    made = table(["name", *NUMBERS], [[NAME, *cells]], numbers=NUMBERS)
    lines = as_text(lambda c: c.print(made), width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text and all(f" {cell}" in text for cell in cells)
    # The name's column comes first; read from top to bottom it is whole.
    assert NAME in "".join(line.split("  ")[0].strip() for line in lines[2:])


def test_numbers_are_aligned_to_the_right() -> None:
    made = table(["name", "ms"], [["a", "1.00"], ["b", "100.00"], ["c", None]], numbers=["ms"])
    rows = as_text(lambda c: c.print(made), 80).splitlines()[-4:-1]
    assert [row.split()[-1] for row in rows] == ["1.00", "100.00", "-"]
    assert len({len(row) for row in rows}) == 1


def test_text_from_files_does_not_control_the_terminal() -> None:
    hostile = "\x1b[2J[bold]x[/bold]\x07"
    made = as_text(lambda c: c.print(table(["a", "b"], [[hostile, hostile]], title=hostile)), 80)
    assert "\x1b" not in made and made.count("?[2J[bold]x[/bold]?") == 3 and "\x07" not in made


def test_flags_in_lists_are_not_divided() -> None:
    text = bullet("A larger buffer makes fewer rounds: " + "--muon-exchange-buffer-mb 2048 " * 3, 80)
    assert text.startswith("- ") and all(len(line) <= 80 for line in text.splitlines())
    assert "".join(text.split()).count("--muon-exchange-buffer-mb2048") == 3 and "--muon-\n" not in text


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(file=io.StringIO()).width == 120
    monkeypatch.setenv("COLUMNS", "100")
    assert console(file=io.StringIO()).width == 100


def test_warnings_of_libraries_do_not_break_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as move:
        move("half", 1, 2)
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("library").warning("noise")
    logging.getLogger("library").warning("heard again")
    assert "noise" not in capsys.readouterr().err
    assert logging.root.manager.disable == 0
