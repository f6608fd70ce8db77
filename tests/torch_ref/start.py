"""A small saved model, and a config file of a short run that starts from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_simpo.data.chat import load_tokenizer
from jax_simpo.data.synthetic import make_rows

PAIRS, TEST_PAIRS = 21, 8
DPO = ("--objective=dpo", "--beta=0.1", "--gamma_beta_ratio=null", "--sft_weight=0")
"""Overrides that make a run of `config_file` one with a reference."""
BEST = (
    *("--eval_strategy=steps", "--eval_steps=1", "--save_strategy=epoch", "--weight_column=weight"),
    *("--load_best_model_at_end=true", "--greater_is_better=true", "--early_stopping_patience=2"),
)
"""Overrides that take the model with the greatest loss for the best, which is soon reached, and weigh the pairs."""
SKIPPING = ("--on_bad_step=skip", "--save_strategy=no", "--lr_scheduler_type=linear")
"""Overrides that leave out bad steps, with a learning rate that shows which updates were counted."""


def weight_of(index: int) -> float:
    """The weight of a pair, in the column `weight` of the files; some are 0."""
    return index % 4 * 0.7


def make_start(folder: Path, *, tied: bool = False) -> Path:
    """A random Llama with the tokenizer of the built-in pairs, and beside it two files of these pairs with weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer("builtin:cafe")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = folder / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for split, count in (("train", PAIRS), ("test", TEST_PAIRS)):
        rows = [{**row, "weight": weight_of(k)} for k, row in enumerate(make_rows("cafe", split)[:count])]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model


def config_file(start: Path, folder: Path, *, steps: int, name: str = "config", **keys: Any) -> Path:
    """Writes the config of a run into a folder; what the run writes goes to `folder/run`."""
    values = {
        "model_name_or_path": str(start),
        "dataset_mixer": {str(start.parent): 1.0},
        "max_length": 96,
        "max_prompt_length": 64,
        "beta": 2.5,
        "gamma_beta_ratio": 0.55,
        "sft_weight": 0.3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "global_batch_size": 6,
        "max_steps": steps,
        "save_steps": 3,
        "logprob_chunk": 64,
        "dtype": "float32",
        "row_length": 128,
        "output_dir": str(folder / "run"),
        "data_cache_dir": str(start.parent / "cache"),
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(values))
    return file
