"""Training against TRL's `CPOTrainer` in its SimPO form: the same pairs, the same start, ten AdamW steps."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_simpo.cli import app
from jax_simpo.data.chat import load_tokenizer, render_pair
from jax_simpo.data.synthetic import make_rows
from jax_simpo.run.metrics import read_metrics

BETA, RATIO, STEPS, PAIRS, RATE = 2.5, 0.55, 10, 16, 1e-3


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model and the tokenizer of the built-in pairs, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("start")
    tokenizer = load_tokenizer("builtin:cafe")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trl_history(start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records that TRL logs for each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL and the Trainer warn about their own future
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        tokenizer = load_tokenizer(str(start))
        texts = [render_pair(row, tokenizer, False) for row in make_rows("cafe", "train")[:PAIRS]]
        settings = CPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=BETA * RATIO,
            max_length=128,
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = CPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(start),
            args=settings,
            train_dataset=Dataset.from_list([vars(text) for text in texts]),
            processing_class=tokenizer,
        )
        trainer.train()
    return [record for record in trainer.state.log_history if "grad_norm" in record]


@pytest.mark.parametrize("layout", ["shared and packed", "separate"])
def test_ten_steps_follow_trls_losses_and_gradient_norms(
    layout: str, start: Path, trl_history: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows("cafe", "train")[:PAIRS]))
    config = {
        "model_name_or_path": str(start),
        "dataset_mixer": {str(data): 1.0},
        "auto_insert_empty_system_msg": False,
        "max_length": 128,
        "beta": BETA,
        "gamma_beta_ratio": RATIO,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "global_batch_size": PAIRS,
        "max_steps": STEPS,
        "dtype": "float32",
        "output_dir": str(tmp_path / "run"),
        "data_cache_dir": str(tmp_path / "cache"),
        "mesh": {"fsdp": 8},
        "prefix_sharing": layout != "separate",
        "packing": layout != "separate",
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    app(["train", str(file)], standalone_mode=False)
    ours = read_metrics(tmp_path / "run")
    assert len(ours) == len(trl_history) == STEPS
    for name, bound in (("loss", {"atol": 1e-3}), ("grad_norm", {"rtol": 0.01}), ("rewards/margins", {"atol": 1e-3})):
        values, oracle = (np.array([record[name] for record in records], float) for records in (ours, trl_history))
        distance = np.abs(values - oracle)
        print(f"{name}: largest distance {distance.max():.1e}, relative {(distance / np.abs(oracle)).max():.1e}")
        np.testing.assert_allclose(values, oracle, **bound)
    assert ours[-1]["loss"] < ours[0]["loss"]
