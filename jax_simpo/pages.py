"""The addresses of the documentation's pages, for messages: a user of the wheel has no folder `docs`."""

from __future__ import annotations

SITE = "https://jax-simpo.github.io/jax-simpo/"
"""Where the pages are, as mkdocs.yml has it."""


def page_url(name: str, heading: str = "") -> str:
    """Returns the address of a page.

    Args:
        name: its file in docs/, without `.md`.
        heading: the anchor of a heading on it; empty for the whole page.
    """
    return f"{SITE}{name}.html{f'#{heading}' if heading else ''}"
