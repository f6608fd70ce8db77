"""Both trainers, from a config to its records: the same losses and rewards whatever the objective reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from rich.console import Console

from jax_simpo.config import TrainConfig
from jax_simpo.run.metrics import read_metrics
from jax_simpo.training.trainer import train as train_in_jax
from tests.torch_ref.start import make_start
from torch_ref.distributed import Ranks
from torch_ref.trainer import train as train_in_torch

ALONE = Ranks(0, 1, torch.device("cpu"), launched=False)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


# One that reads a reference, one whose cross-entropy reads the prompts, and both in a sum.
@pytest.mark.parametrize("objective", ["dpo", "orpo", {"dpo": 1.0, "orpo": 0.5, "sft": 0.1}], ids=str)
def test_both_trainers_have_the_same_curve(objective: Any, start: Path, tmp_path: Path) -> None:
    def records(trainer: str) -> list[dict[str, Any]]:
        # Pairs with weights, in the sum, whose cross-entropy over prompts they multiply too.
        config = TrainConfig(
            weight_column="weight" if isinstance(objective, dict) else None,
            model_name_or_path=str(start),
            dataset_mixer={str(start.parent): 1.0},
            objective=objective,
            max_length=96,
            max_prompt_length=64,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            global_batch_size=8,
            max_steps=3,
            do_eval=True,
            save_strategy="no",
            dtype="float32",
            mesh={"data": 1, "fsdp": jax.device_count(), "tensor": 1},
            output_dir=str(tmp_path / trainer),
            data_cache_dir=str(tmp_path / "cache"),
        )
        if trainer == "jax":
            train_in_jax(config, QUIET)
        else:
            train_in_torch(config, QUIET, ALONE)
        return read_metrics(Path(config.output_dir))

    for ours, theirs in zip(records("jax"), records("torch"), strict=True):
        names = [n for n in ours if any(part in n for part in ("loss", "rewards/", "logps/", "grad_norm"))]
        for name in names:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-5, err_msg=name)
        assert len(names) >= 7
