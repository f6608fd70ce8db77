"""Eight fake CPU devices for every test, so that each mesh of the design can be tried; jax must not be imported yet."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pairs, tokenizers and golden tokens, where the machine has them."""
    folder = os.environ.get("SIMPO_SHARED")
    if not folder:
        pytest.skip("SIMPO_SHARED is not set: no real preference pairs and tokenizers here")
    return Path(folder)
