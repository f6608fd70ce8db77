"""The console that everything is printed to, and how characters are shown that would steer the terminal.

Prompts, answers, column names and file names are other people's. They may hold control sequences, which clear the
screen, change the window's title or write over what you have read, and overrides of the writing direction, which make a
text look like another one. Each such character is shown as one visible character, so widths stay right.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.protocol import rich_cast
from rich.segment import Segment
from rich.text import Text

# Unicode has a picture of every C0 control (U+241B for ESC) and of DEL. There is none for the C1 controls, for the
# overrides and isolates of the writing direction, and for surrogates, which stand for bytes of a file name that are not
# UTF-8 and which no terminal can show.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def visible(text: str) -> str:
    """Returns a text with a visible character in place of each that would steer a terminal or the writing direction.

    Line ends and tabs stay.
    """
    return text.translate(_PICTURES)


def open_console(*, stderr: bool = True, quiet: bool = False, file: TextIO | None = None) -> Console:
    """Opens a console: for notes and progress on stderr, or for results on stdout.

    What is printed holds paths and texts of users: nothing in it is markup, an emoji's name or a control sequence, and
    the lines of stderr are left unwrapped.

    Args:
        stderr: print to stderr, otherwise to stdout.
        quiet: print nothing. Of several processes only the first prints.
        file: print to this file instead.
    """
    return _Console(stderr=stderr, quiet=quiet, file=file, markup=False, emoji=False, highlight=False, soft_wrap=stderr)


class _Console(Console):
    """A console that never hands a control character of a text on.

    rich makes its own control sequences, as for colours and bars, from what `render` returns, so they still work. It
    measures a `Text` in a table or a title before that: a caller who puts a user's text there makes it visible first.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        # Not in `render` alone, because a `Text` drops some controls, such as CR, when it is made.
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        renderable = rich_cast(renderable)
        if isinstance(renderable, Text):
            renderable = renderable.copy()
            renderable.plain = visible(renderable.plain)
        return super().render(renderable, options)
