"""The trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch_ref.distributed import Ranks
from torch_ref.engine import Engine
from torch_ref.model import DTYPES


def export_model(engine: Engine, folder: Path, dtype: str, tokenizer: Any, ranks: Ranks) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads; of an adapter, the adapter alone.

    All ranks call it, and gather the weights one by one on the first rank's host. The folder is written under another
    name and then moved, so that a killed export leaves the former model, or none.
    """
    causal_lm = engine.policy.causal_lm
    weights = engine.weights(DTYPES[dtype], trained_only=hasattr(causal_lm, "peft_config"))

    def write() -> None:
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            causal_lm.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            _correct_config(temporary / "config.json", dtype)
            temporary.chmod(0o755)  # mkdtemp and safetensors close what they make to other users
            for file in temporary.glob("*.safetensors"):
                file.chmod(0o644)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    ranks.first(write)


def _correct_config(file: Path, dtype: str) -> None:
    """transformers writes the dtype that was computed in, and what training needed."""
    if file.exists():
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= {"dtype": dtype, "use_cache": True}
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
