"""Exports the trained model as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_simpo.run.whole import replacing
from torch_ref.distributed import Ranks
from torch_ref.engine import Engine
from torch_ref.model import DTYPES


def export_model(engine: Engine, folder: Path, dtype: str, tokenizer: Any, ranks: Ranks) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads; for an adapter, the adapter alone.

    All ranks call it, and gather the weights one by one on the first rank's host.

    Args:
        engine: the trained model.
        folder: the folder to write; an earlier export there is replaced as a whole.
        dtype: the dtype of the stored weights, `float32` or `bfloat16`.
        tokenizer: the tokenizer, saved alongside.
        ranks: the ranks of the run; the first writes.

    Raises:
        ModelError: a file that is no part of a model is in the way, or the folder cannot be written.
    """
    causal_lm = engine.policy.causal_lm
    weights = engine.weights(DTYPES[dtype], trained_only=hasattr(causal_lm, "peft_config"))

    def write() -> None:
        with replacing(folder) as temporary:
            causal_lm.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            _correct_config(temporary / "config.json", dtype)
            for file in temporary.glob("*.safetensors"):
                file.chmod(0o644)  # safetensors makes files that other users cannot read

    ranks.first(write)


def _correct_config(file: Path, dtype: str) -> None:
    """Replaces the dtype of the computation, which transformers writes, and a setting that only training needs."""
    if file.exists():
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= {"dtype": dtype, "use_cache": True}
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
