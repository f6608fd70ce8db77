"""The model card: a README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from jax_simpo.config import TrainConfig
from jax_simpo.data.readers import FILE_TYPES
from jax_simpo.data.sources import BUILTIN
from jax_simpo.run.report import MEASURES, PACKAGES, Run, read_run

CARD_FILE = "README.md"

# What a reader wants to compare with another run, in this order.
_HYPERPARAMETERS = (
    "beta",
    "gamma_beta_ratio",
    "loss_type",
    "label_smoothing",
    "sft_weight",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "max_prompt_length",
    "dtype",
    "seed",
)
_ADAPTER = ("lora_r", "lora_alpha", "lora_target_modules")

_CITATION = """\
```bibtex
@inproceedings{meng2024simpo,
  title     = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author    = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}
```"""


def write(output: Path, config: TrainConfig, *, global_batch_size: int | None = None) -> Path:
    """Writes `README.md` of an output directory, and next to the exported model, which is what gets uploaded.

    Local paths stay out of it: a card is published, and they mean nothing elsewhere.

    Args:
        output: the output directory of a run.
        config: its config.
        global_batch_size: pairs per optimizer step, where the config leaves it to the mesh.
    """
    run = read_run(output)
    base = config.model_name_or_path
    adapter = _is_adapter(config)
    data = ModelCardData(
        base_model=base if base is not None and _is_hub_id(base) else None,
        datasets=[source for source in config.dataset_mixer if _is_hub_id(source)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["simpo", "jax", "preference-optimization", *(["lora"] if adapter else [])],
        model_name=run.name,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(run, config, global_batch_size)}\n")
    path = output / CARD_FILE
    for folder in (output, output / "model"):
        if folder.is_dir():
            (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    return path


def _text(run: Run, config: TrainConfig, global_batch_size: int | None) -> str:
    start = "new weights" if config.model_name_or_path is None else _shown(config.model_name_or_path)
    sources = ", ".join(
        _shown(source) if fraction == 1 else f"{_shown(source)} ({fraction:g} of it)"
        for source, fraction in config.dataset_mixer.items()
    )
    last = run.train[-1]
    adapter = " These are the weights of a LoRA adapter, to be loaded on that model." if _is_adapter(config) else ""
    parts = [
        f"# {run.name}",
        f"Trained from {start} on the preference pairs of {sources} with SimPO (simple preference optimization with a "
        f"reference-free reward), using jax-simpo.{adapter}",
        run.outcome(),
        "## Training",
        f"{last['step']:,} steps, {run.pairs_seen:,} pairs ({last['epoch']:.3g} epochs).",
        _table(["setting", "value"], _settings(config, global_batch_size or config.global_batch_size)),
    ]
    if run.evals:
        rows = [[str(r["eval_step"]), *(f"{r[f'eval_{key}']:.4f}" for key in MEASURES)] for r in run.evals]
        splits = ", ".join(f"`{split}`" for split in config.eval_splits[:1])
        parts += [
            "## Evaluation",
            f"On the {run.evals[-1]['eval_pairs']:,} pairs of the split {splits}. Rewards are beta times the mean "
            "log-probability of a response; accuracy is the share of pairs whose chosen response has the higher one.",
            _table(["step", *MEASURES.values()], rows),
        ]
    versions = {name: run.facts.get("versions", {}).get(name) for name in ("python", *PACKAGES)}
    if any(versions.values()):
        parts += ["## Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)]
    return "\n\n".join([*parts, "## Citation", _CITATION])


def _settings(config: TrainConfig, global_batch_size: int | None) -> list[list[str]]:
    rows = [] if global_batch_size is None else [["`global_batch_size`", str(global_batch_size)]]
    defaults = {"label_smoothing": 0.0, "sft_weight": 0.0, "lora_target_modules": None}  # not worth a line
    keys = _HYPERPARAMETERS + (_ADAPTER if config.use_peft else ())
    values: dict[str, Any] = {key: getattr(config, key) for key in keys}
    return rows + [[f"`{key}`", str(value)] for key, value in values.items() if value != defaults.get(key)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_adapter(config: TrainConfig) -> bool:
    """Whether the folder holds an adapter: that of a new model is merged into it."""
    return config.use_peft and config.model_name_or_path is not None


def _is_hub_id(name: str) -> bool:
    """Whether a source is one of the hub: `owner/name`, and no path on this machine."""
    local = name.startswith(BUILTIN) or Path(name).expanduser().exists()
    data_file = Path(name).suffix.lower() in FILE_TYPES
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and not local and not data_file


def _shown(name: str) -> str:
    """A model or data set as the card names it: a hub id, or the last part of a local path."""
    if name.startswith(BUILTIN):
        return f"the built-in `{name.removeprefix(BUILTIN)}`"
    if _is_hub_id(name):
        return f"`{name}`"
    return f"`{Path(name).name}`"
