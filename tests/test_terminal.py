"""No text of a user's reaches the terminal with a character that would steer it."""

from __future__ import annotations

import ast
import io
import re

import pytest
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jax_simpo.errors import DataError
from jax_simpo.terminal import open_console, visible
from tests.test_imports import sources

STEERING = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
HOSTILE = "".join(map(chr, STEERING)) + "\udc80"
STYLING = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal with colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "400")
    return io.StringIO()


def test_each_steering_character_is_one_visible_one_and_all_others_stay() -> None:
    assert len(visible(HOSTILE)) == len(HOSTILE)
    assert visible(HOSTILE).isprintable()
    assert visible("\x1b[31m\x7f\x9b") == "\u241b[31m\u2421\ufffd"
    kept = "a\tb\nnaïve 🙂 日本 שלום \u200f\u200d"
    assert visible(kept) == kept


@pytest.mark.parametrize("markup", ["[bold]", "\x1b[31m", ":smile:"])
def test_text_is_printed_as_it_is_and_styles_still_work(markup: str, out: io.StringIO) -> None:
    open_console(file=out).print(f"{markup} one", style="red")
    assert out.getvalue() == f"\x1b[31m{visible(markup)} one\x1b[0m\n"


def test_all_that_is_printed_on_a_console_is_visible(out: io.StringIO) -> None:
    console = open_console(file=out)
    shown = "a" + HOSTILE + "b"
    table = Table(title=shown, caption=shown)
    table.add_column(shown)
    table.add_column(Text(shown))
    table.add_row(shown, Text(shown))
    panel = Panel(shown, title=Text(shown), subtitle=shown)
    for printed in (shown, Text(shown), Text.assemble((shown, "red"), "x"), table, panel):
        console.print(printed, Text(shown), style="bold")
    console.rule(shown)
    lines = STYLING.sub("", out.getvalue())
    assert lines.count("a\u2400") >= 14
    assert visible(lines) == lines


def test_a_progress_bar_keeps_its_own_control_sequences_and_none_of_a_description(out: io.StringIO) -> None:
    console = open_console(file=out)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task("\x1b]0;owned\x07 names", total=1)
    assert "\x1b[?25l" in out.getvalue()
    assert "\u241b]0;owned" in out.getvalue() and "\x1b]" not in out.getvalue()


def test_cells_are_as_wide_as_what_they_show(out: io.StringIO) -> None:
    table = Table()
    table.add_row("\x1b[31mred", Text(visible("\x1b[31mred")))
    open_console(file=out).print(table)
    lines = STYLING.sub("", out.getvalue()).splitlines()
    assert {len(line) for line in lines} == {len("│ ␛[31mred │ ␛[31mred │")}
    assert lines[-2] == "│ ␛[31mred │ ␛[31mred │"


def test_a_quiet_console_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    open_console(quiet=True).print("x")
    open_console(stderr=False, quiet=True).print("x")
    assert capsys.readouterr() == ("", "")


def test_the_message_of_an_error_is_visible_in_a_traceback_too() -> None:
    assert str(DataError("pairs.jsonl: row \x1b[2J")) == "pairs.jsonl: row \u241b[2J"


def test_every_console_that_prints_is_opened_in_one_place() -> None:
    opened = {
        source.module
        for source in sources().values()
        if source.module.partition(".")[0] in ("jax_simpo", "torch_ref")
        for node in ast.walk(ast.parse(source.text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == Console.__name__
    }
    assert opened == set()  # jax_simpo.terminal calls its own subclass
