"""Small runs of the program: their config, their records, and a way to kill one."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jax_simpo.config import TrainConfig
from jax_simpo.run.metrics import read_metrics
from jax_simpo.training import trainer
from jax_simpo.training.loop import TrainingLoop

Records = list[dict[str, Any]]

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    settings = {
        "model_config": MODEL,
        "tokenizer_name_or_path": "builtin:cafe",
        "dataset_mixer": {"builtin:cafe": 0.02},  # 81 pairs
        "max_length": 128,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "global_batch_size": 16,
        "num_train_epochs": 2,
        "save_steps": 4,
        "dtype": "float32",
        "output_dir": str(folder / "run"),
        "data_cache_dir": str(folder / "cache"),
    }
    return TrainConfig(**{**settings, **changes})


def run(config: TrainConfig) -> Records:
    """Trains and returns the training records."""
    return run_printing(config)[0]


def run_printing(config: TrainConfig) -> tuple[Records, str]:
    """Trains, and returns the training records and what was printed."""
    console = Console(record=True, width=1000, file=StringIO())
    trainer.train(config, console)
    return [r for r in read_metrics(Path(config.output_dir)) if "step" in r], console.export_text()


def losses(records: Records) -> list[float]:
    return [record["loss"] for record in records]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a run as it logs a step."""
    write = TrainingLoop._write

    def killed(self: Any, batch: Any, values: Any) -> None:
        write(self, batch, values)
        if batch.step + 1 == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_write", killed)
