"""Lets one Markdown serve GitHub and the site: links out of docs/, which the site lacks, lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SOURCE = "https://github.com/jax-simpo/jax-simpo/blob/main/"
ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(((?!https?:|#|mailto:)[^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page.

    Raises:
        FileNotFoundError: a link leads nowhere.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def rewrite(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        outside = (ROOT / "docs") not in target.parents or target.suffix in (".json", ".py") or target.is_dir()
        if not outside:
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri}: the link to {link[1]} leads nowhere")
        return f"]({SOURCE}{target.relative_to(ROOT)}{link[2] or ''})"

    return _LINK.sub(rewrite, markdown)
