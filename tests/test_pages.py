"""A message that names a page of the documentation gives its address on the site; page and heading exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from jax_simpo.config import TrainConfig, help
from jax_simpo.pages import SITE, page_url
from jax_simpo.run.health.rules import AT_START, DURING, Finding
from jax_simpo.run.prose import pieces

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "jax_simpo").rglob("*.py"))


def headings(page: str) -> set[str]:
    """The anchors of a page, as mkdocs makes them of its headings."""
    lines = re.findall(r"^#+ (.*)$", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", line).lower() for line in lines)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", line).strip()) for line in plain}


def texts(module: Path) -> Iterator[str]:
    """The texts of a module but for docstrings, which users do not see."""
    tree = ast.parse(module.read_text("utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def named() -> Iterator[tuple[str, str]]:
    """The page and the heading of every call of `page_url` in the package."""
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "page_url":
                page, *heading = [part.value if isinstance(part, ast.Constant) else "" for part in node.args]
                yield str(page), str(heading[0]) if heading else ""


def test_pages_are_where_the_site_puts_them() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["site_url"] == SITE and site["use_directory_urls"] is False
    assert page_url("decisions/004-attention-choice", "why") == f"{SITE}decisions/004-attention-choice.html#why"


def test_every_page_that_a_message_names_exists_and_so_does_its_heading() -> None:
    found = set(named())
    assert {("healthy-runs", ""), ("data-formats", ""), ("launch", "")} <= found
    for page, heading in found:
        assert (ROOT / "docs" / f"{page}.md").is_file(), page
        assert not heading or heading in headings(page), (page, heading)


def test_every_finding_links_to_its_heading() -> None:
    source = (ROOT / "jax_simpo/run/health/rules.py").read_text("utf-8")
    names = {*re.findall(r'Finding\("([a-z-]+)"', source), "overfitting"}
    assert len(names) == len(AT_START) + len(DURING)
    for name in names:
        (_, shown, address) = pieces(Finding(name, 1, "Text", "Advice").sentence)[1]
        assert shown == f"healthy-runs#{name}" and address == f"{SITE}healthy-runs.html#{name}"
    assert names <= headings("healthy-runs")


def test_no_message_and_no_config_names_a_file_that_users_of_the_wheel_do_not_have() -> None:
    messages = {text for module in MODULES for text in texts(module)}
    configs = [file for file in (ROOT / "configs").rglob("*") if file.is_file()]
    assert len(messages) > 1000 and len(configs) > 10
    said = [*messages, *(file.read_text("utf-8") for file in configs)]
    assert [text for text in said if re.search(r"\bdocs/[\w/-]+\.md\b", text)] == []


def test_the_reference_page_links_to_the_pages_beside_it() -> None:
    page = help.reference_page(TrainConfig)
    assert SITE not in page and "([healthy-runs.md](healthy-runs.md))" in page


def test_a_sentence_is_cut_into_text_code_and_links_to_our_pages_alone() -> None:
    url = page_url("groups", "scores")
    assert pieces(f"`a` is <b> in https://evil.example/ and `` ({url}). `c\nd`") == [
        ("code", "a"),
        ("text", " is <b> in https://evil.example/ and `` ("),
        ("link", "groups#scores", url),
        ("text", "). `c\nd`"),
    ]
    assert pieces("") == [] and pieces(f"{SITE}../evil.html") == [("text", f"{SITE}../evil.html")]
