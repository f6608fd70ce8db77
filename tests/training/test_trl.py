"""Training against TRL's trainers: the same pairs, the same start, ten AdamW steps."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_simpo.cli import app
from jax_simpo.data.chat import load_tokenizer, render_group
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.synthetic import make_rows
from jax_simpo.run.metrics import read_metrics

STEPS, PAIRS, RATE = 10, 16, 1e-3


@dataclass(frozen=True)
class Case:
    """A run of TRL and the same run of ours.

    Attributes:
        trainer: `cpo`, `dpo` or `orpo`.
        theirs: keys of the trainer's config.
        ours: keys of our config.
        rewards: False where TRL logs other rewards than we do.
    """

    trainer: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    rewards: bool = True


SIMPO = {"beta": 2.5, "gamma_beta_ratio": 0.55}
CPO_SIMPO = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 2.5 * 0.55}
CASES = {
    "simpo": Case("cpo", {**CPO_SIMPO, "cpo_alpha": 0.0}, {"objective": "simpo", **SIMPO}),
    "simpo + nll": Case("cpo", {**CPO_SIMPO, "cpo_alpha": 0.5}, {"objective": "simpo", **SIMPO, "sft_weight": 0.5}),
    "alphapo": Case(
        "cpo", {**CPO_SIMPO, "cpo_alpha": 0.0, "alpha": 0.25}, {"objective": "alphapo", **SIMPO, "alpha": 0.25}
    ),
    "cpo + nll": Case("cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1}, {"objective": "cpo"}),
    "dpo": Case("dpo", {"loss_type": "sigmoid"}, {"objective": "dpo"}),
    "ipo": Case("dpo", {"loss_type": "ipo"}, {"objective": "ipo"}),
    "robust": Case("dpo", {"loss_type": "robust", "label_smoothing": 0.1}, {"objective": "robust"}),
    "sigmoid_norm": Case(
        "dpo", {"loss_type": "sigmoid_norm", "beta": 5.0}, {"objective": "sigmoid_norm"}, rewards=False
    ),
    "orpo": Case("orpo", {"beta": 0.1}, {"objective": "orpo"}),
    "apo_zero": Case("dpo", {"loss_type": "apo_zero"}, {"objective": "apo_zero"}),
    "dpo + sft": Case(
        "dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}, {"objective": {"dpo": 1.0, "sft": 0.1}}
    ),
}
QUICK = ("orpo", "dpo")  # the losses themselves are compared in tests/objectives


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
def histories() -> dict[str, Any]:
    """The records of the runs of TRL that were made already."""
    return {}


def trl_history(case: Case, start: Path, folder: Path) -> list[dict[str, Any]]:
    """The records that TRL logs for each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL and the Trainer warn about their own future
        from datasets import Dataset
        from transformers import AutoModelForCausalLM

        if case.trainer == "dpo":
            from trl import DPOConfig as Config
            from trl import DPOTrainer as Trainer
        elif case.trainer == "orpo":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        else:
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer

        tokenizer = load_tokenizer(str(start))
        texts = [render_group(read_conversation(row), tokenizer, False) for row in make_rows("cafe", "train")[:PAIRS]]
        settings = Config(
            output_dir=str(folder),
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
            **case.theirs,
        )
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(start),
            args=settings,
            train_dataset=Dataset.from_list(
                [dict(zip(("prompt", "chosen", "rejected"), (t.prompt, *t.responses), strict=True)) for t in texts]
            ),
            processing_class=tokenizer,
        )
        trainer.train()
    return [record for record in trainer.state.log_history if "grad_norm" in record]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("simpo", "separate"),
        *(pytest.param(name, "shared and packed", marks=[] if name in QUICK else pytest.mark.slow) for name in CASES),
    ],
)
def test_ten_steps_follow_trls_losses_and_gradient_norms(
    name: str, layout: str, start: Path, histories: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]
    if name not in histories:
        histories[name] = trl_history(case, start, tmp_path / "trl")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows("cafe", "train")[:PAIRS]))
    config = {
        "model_name_or_path": str(start),
        "dataset_mixer": {str(data): 1.0},
        "auto_insert_empty_system_msg": False,
        "max_length": 128,
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
        **case.ours,
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    app(["train", str(file)], standalone_mode=False)
    ours, theirs = read_metrics(tmp_path / "run"), histories[name]
    assert len(ours) == len(theirs) == STEPS

    def distances(key: str) -> np.ndarray:
        values, oracle = (np.array([record[key] for record in records], float) for records in (ours, theirs))
        # Relative where the value is above 1.
        distance = np.abs(values - oracle) / np.maximum(1.0, np.abs(oracle))
        print(f"{key}: largest distance {distance.max():.1e}")
        return distance

    assert distances("loss").max() < 1e-3
    norms = [np.array([record["grad_norm"] for record in records], float) for records in (ours, theirs)]
    print(f"grad_norm: largest relative distance {np.abs(norms[0] / norms[1] - 1).max():.1e}")
    np.testing.assert_allclose(*norms, rtol=0.01)
    if case.rewards:
        assert distances("rewards/margins").max() < 1e-3
    assert ours[-1]["loss"] < ours[0]["loss"]
