"""Tests that the PyTorch reference refuses what only the trainer in JAX reads."""

from __future__ import annotations

import pytest
import torch

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ModelError
from torch_ref.distributed import Ranks
from torch_ref.setup import Setup


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model_name_or_path"])
@pytest.mark.parametrize("name", ["some/model.gguf", "builtin:smollm2"])
def test_a_gguf_file_is_refused_with_the_way_to_make_a_folder_of_it(key: str, name: str) -> None:
    config = TrainConfig(**{"model_name_or_path": "folder", key: name}, objective="dpo", dataset_mixer={"a.jsonl": 1.0})
    with pytest.raises(ModelError, match=f"reads no GGUF files.*`jax-simpo export CONFIG --model={name} --output="):
        Setup(config, Ranks(0, 1, torch.device("cpu"), False))
