"""Cuts our sentences into pieces for a page: `code` between backticks, and links to our own documentation.

Sentences quote names of users. Whatever these hold, it becomes text, and no other address becomes a link. Pieces are
shown by `templates/prose.html.jinja`, which escapes each, and by the script of the charts.
"""

from __future__ import annotations

import re

from jax_simpo.pages import SITE

Piece = tuple[str, ...]
"""`("text", TEXT)`, `("code", TEXT)` or `("link", TEXT, ADDRESS)`."""

_MARKED = re.compile(rf"`(?P<code>[^`\s][^`\n]*)`|{re.escape(SITE)}(?P<page>[\w/-]+)\.html(?P<heading>#[\w-]+)?")


def pieces(text: str) -> list[Piece]:
    """Cuts a text into what is shown alike. Nothing of it is lost but the backticks."""
    found: list[Piece] = []
    end = 0
    for match in _MARKED.finditer(text):
        found.append(("text", text[end : match.start()]))
        if match["code"] is not None:
            found.append(("code", match["code"]))
        else:
            found.append(("link", f"{match['page']}{match['heading'] or ''}", match[0]))
        end = match.end()
    return [piece for piece in (*found, ("text", text[end:])) if piece[1]]
