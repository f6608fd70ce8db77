"""The card of a model that was trained from a GGUF file names the model that the file was made of, and its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_simpo.run.origin import Origin, gguf_origin
from tests.gguf_models import add, finish, gguf

HUB = "https://huggingface.co/"
LINK = f"{HUB}o/n/blob/main/LICENSE"
OTHER = {"general.license": "other", "general.license.name": "Qwen", "general.license.link": LINK}


@pytest.mark.parametrize(
    ("metadata", "origin"),
    [
        ({}, Origin()),
        ({"general.license": "Apache-2.0"}, Origin((), "apache-2.0")),
        # The hub refuses a card with a licence that it has no word for.
        ({"general.license": "tongyi-qianwen"}, Origin((), "other", "tongyi-qianwen")),
        (OTHER, Origin((), "other", "Qwen", LINK)),
        ({"general.source.url": f"{HUB}o/n"}, Origin(("o/n",))),
        (
            {"general.repo_url": f"{HUB}o/n-GGUF.git", "general.source.url": "https://github.com/o/n"},
            Origin(("o/n-GGUF",)),
        ),
        ({"general.base_model.0.repo_url": f"{HUB}o/base"}, Origin(("o/base",))),
        # The model itself before what it was made of.
        (
            {"general.base_model.0.repo_url": f"{HUB}o/base", "general.source.repo_url": f"{HUB}o/n/tree/main"},
            Origin(("o/n",)),
        ),
        ({f"general.base_model.{i}.repo_url": f"{HUB}o/{i}" for i in range(2)}, Origin(("o/0", "o/1"))),
        ({"general.source.url": f"{HUB}datasets/o/n", "general.license": 7}, Origin()),
    ],
)
def test_a_file_says_where_it_comes_from(metadata: dict[str, Any], origin: Origin, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add(writer, metadata)
    finish(writer)
    assert gguf_origin(str(tmp_path / "model.gguf")) == origin


def test_the_built_in_model_is_known_without_its_package() -> None:
    assert gguf_origin("builtin:smollm2") == Origin(("HuggingFaceTB/SmolLM2-135M-Instruct",), "apache-2.0")


def test_a_file_that_is_gone_says_nothing(tmp_path: Path) -> None:
    assert gguf_origin(str(tmp_path / "gone.gguf")) == Origin()
