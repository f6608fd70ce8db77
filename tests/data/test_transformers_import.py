"""transformers says nothing of a missing PyTorch, which nothing here needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_TORCH = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""


@pytest.mark.parametrize(
    ("imports", "told"),
    [
        ("import transformers", True),
        ("from jax_simpo.data.transformers_import import import_transformers as do; do()", False),
    ],
)
def test_a_missing_pytorch_is_no_news(imports: str, told: bool) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH + imports], capture_output=True, text=True, check=True)
    assert ("PyTorch was not found" in done.stderr + done.stdout) == told
