"""Writes texts of users into markdown so that they stay text.

A card is read as markdown with HTML in it, by the hub and by others. A name must not end the code span, the cell or the
line that it stands in, nor become a tag, a link or a picture.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from jax_simpo.terminal import visible

# Punctuation that is markup in the middle of a line. A colon and an at sign make links of addresses, and so do the
# letters www and a dot.
_MARKUP = re.compile(r"[\\`*_\[\]#|~$:@!]|(?<=[wW]{3})\.")
_BAR = r"\|"


def escape(text: str) -> str:
    """Returns markdown that shows a text as it is, on one line."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))


def code(text: str) -> str:
    """Returns a code span of a text. Its fence is longer than the backticks in it."""
    text = one_line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    # One space on either side is not shown, unless there is nothing else.
    pad = " " if text.strip() and text.strip("` ") != text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of cells that are markdown. A cell may hold a `|`, also in a code span."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)


def one_line(text: str) -> str:
    """Returns a visible text whose line ends and tabs are visible too."""
    return visible(text).translate({ord("\t"): "\u2409", ord("\n"): "\u240a"})
