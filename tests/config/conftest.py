"""Loads configs from a minimal file."""

from __future__ import annotations

import pytest

from jax_simpo.config import TrainConfig, load_config
from jax_simpo.errors import ConfigError

MINIMAL = "model_name_or_path: some/model\ndataset_mixer: {pairs.jsonl: 1.0}\nlearning_rate: 1e-6\n"


@pytest.fixture
def load(tmp_path):
    """Loads a config from the minimal file, with more lines and overrides."""

    def load_text(more: str = "", *overrides: str, base: str = MINIMAL) -> TrainConfig:
        path = tmp_path / "run.yaml"
        path.write_text(base + more)
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def message(load):
    """The message of the ConfigError that a config raises."""

    def message_of(more: str = "", *overrides: str, base: str = MINIMAL) -> str:
        with pytest.raises(ConfigError) as caught:
            load(more, *overrides, base=base)
        return str(caught.value)

    return message_of
