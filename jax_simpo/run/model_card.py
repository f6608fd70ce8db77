"""The model card: a README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jax_simpo.config import TrainConfig, objective_weights
from jax_simpo.config.objectives import ALL_KEYS as OBJECTIVE_SETTINGS
from jax_simpo.config.objectives import code_of, described, is_own
from jax_simpo.data.readers import file_type
from jax_simpo.data.sources import BUILTIN
from jax_simpo.gguf_files import means_gguf
from jax_simpo.run import files
from jax_simpo.run.facts import PACKAGES
from jax_simpo.run.manifest import CARD_SENTENCE, claim
from jax_simpo.run.markdown import code, escape, one_line, table
from jax_simpo.run.objective_texts import texts_of
from jax_simpo.run.origin import Origin, gguf_origin
from jax_simpo.run.report import MEASURES, Run, epochs, read_run
from jax_simpo.run.whole import write_text

# The settings by which runs are compared, in the order of the table.
_HYPERPARAMETERS = (
    "objective",
    "ref_model_name_or_path",
    *OBJECTIVE_SETTINGS,
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


def write(output: Path, config: TrainConfig, *, global_batch_size: int | None = None) -> Path:
    """Writes `README.md` to an output directory, and to the folder of the exported model, which gets uploaded.

    The picture of the curves, where there is one, is shown in the card and lies beside it.

    A card is published, so it names local models and data by the last part of their paths only.

    Args:
        output: the output directory of a run.
        config: its config.
        global_batch_size: pairs per optimizer step, where the config leaves it to the mesh.

    Raises:
        CheckpointError: no training step was logged there, or a `README.md` is there that no run wrote.
    """
    run = read_run(output)
    base = config.model_name_or_path
    adapter = _is_adapter(config)
    origin = _origin(base)
    data = ModelCardData(
        base_model=_one_or_all(origin.base_models),
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        datasets=[source for source in config.dataset_mixer if is_hub_id(source)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*objective_weights(config.objective), "jax", "preference-optimization", *(["lora"] if adapter else [])],
        model_name=one_line(run.name),
        eval_results=_results(run, config) or None,
    )
    pictures = (output / files.CURVES).is_file()
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(run, config, global_batch_size, pictures=pictures)}\n")
    claim(output, files.CARD)
    for folder in (output, output / files.MODEL):
        if folder.is_dir():
            write_text(folder / files.CARD, str(card))
            if pictures and folder != output:
                shutil.copyfile(output / files.CURVES, folder / files.CURVES)
    return output / files.CARD


def _results(run: Run, config: TrainConfig) -> list[EvalResult]:
    """Returns the accuracy and the loss of the exported model on held-out pairs, in the form that the hub shows."""
    if not run.evals:
        return []
    sources = [_name(source).removeprefix(BUILTIN) for source in config.dataset_mixer]
    on_hub = [source for source in config.dataset_mixer if is_hub_id(source)]
    figures = {
        "accuracy": ("Accuracy on held-out pairs", run.exported_eval["eval_rewards/accuracies"]),
        "loss": ("Loss on held-out pairs", run.exported_eval["eval_loss"]),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=on_hub[0] if on_hub else "preference-pairs",
            dataset_name=one_line(f"{', '.join(sources) or 'pairs'} ({', '.join(config.eval_splits) or 'held out'})"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for kind, (name, value) in figures.items()
    ]


def _text(run: Run, config: TrainConfig, global_batch_size: int | None, *, pictures: bool) -> str:
    start = "new weights" if config.model_name_or_path is None else _shown(config.model_name_or_path)
    sources = ", ".join(
        _shown(source) if fraction == 1 else f"{_shown(source)} ({fraction:g} of it)"
        for source, fraction in config.dataset_mixer.items()
    )
    last = run.train[-1]
    texts = texts_of(config.objective)
    own = is_own(config.objective)
    titles = f"the objective {code(_objective(config))}" if own else " and ".join(text.title for text in texts)
    adapter = " These are the weights of a LoRA adapter, to be loaded on that model." if _is_adapter(config) else ""
    parts = [
        f"# {escape(run.name)}",
        f"Trained from {start} on the preference {run.noun} of {sources} with {titles}{CARD_SENTENCE}{adapter}",
        escape(run.outcome()),
        *([f"![Loss, accuracy and margins during training]({files.CURVES})"] if pictures else []),
        "## Training",
        f"{last['step']:,} steps, {run.pairs_seen:,} {run.noun} ({epochs(last['epoch'])}).",
        table(["setting", "value"], _settings(config, global_batch_size or config.global_batch_size)),
    ]
    if run.remarks:
        parts += [f"On the training {run.noun}:", "\n".join(f"- {escape(remark)}" for remark in run.remarks)]
    if run.evals:
        rows = [[str(r["eval_step"]), *(f"{r[f'eval_{key}']:.4f}" for key in MEASURES)] for r in run.evals]
        parts += [
            "## Evaluation",
            f"On the {run.evals[-1]['eval_pairs']:,} {_evaluated(config, run.noun)}. A reward is {texts[0].reward}; "
            f"accuracy is {run.accuracy_text}.",
            table(["step", *MEASURES.values()], rows),
        ]
        if by_split := run.last_by_split:
            rows = [
                [code(split), f"{values['pairs']:,}", *(f"{values[key]:.4f}" for key in MEASURES)]
                for split, values in by_split.items()
            ]
            parts += [f"By split, at step {run.evals[-1]['eval_step']}:"]
            parts += [table(["split", run.noun, *MEASURES.values()], rows)]
    versions = {name: run.facts.get("versions", {}).get(name) for name in ("python", *PACKAGES)}
    if any(versions.values()):
        named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        parts += ["## Versions", escape(named)]
    if citations := "\n\n".join(dict.fromkeys(text.citation for text in texts if text.citation)):
        parts += ["## Citation", f"```bibtex\n{citations}\n```"]
    return "\n\n".join(parts)


def _evaluated(config: TrainConfig, noun: str) -> str:
    """Names what was evaluated: "pairs of the split `test`", "groups of the splits `a` and `b`"."""
    *others, last = [code(split) for split in config.eval_splits] or [""]
    if not last:
        return f"evaluation {noun}"
    return f"{noun} of the splits {', '.join(others)} and {last}" if others else f"{noun} of the split {last}"


def _settings(config: TrainConfig, global_batch_size: int | None) -> list[list[str]]:
    rows = [] if global_batch_size is None else [["`global_batch_size`", str(global_batch_size)]]
    not_worth_a_line = {"label_smoothing": 0.0, "sft_weight": 0.0, "sft_over": "response"}
    keys = _HYPERPARAMETERS + (_ADAPTER if config.use_peft else ())
    values: dict[str, Any] = {key: getattr(config, key) for key in keys} | {"objective": _objective(config)}
    if config.ref_model_name_or_path is not None:
        values["ref_model_name_or_path"] = _name(config.ref_model_name_or_path)
    shown = {key: value for key, value in values.items() if value not in (None, not_worth_a_line.get(key))}
    return rows + [
        [f"`{key}`", str(value) if isinstance(value, int | float) else code(str(value))] for key, value in shown.items()
    ]


def _origin(base: str | None) -> Origin:
    """Returns what is known of the start model. The licence of one on the hub is asked for at an upload."""
    if base is None:
        return Origin()
    return gguf_origin(base) if means_gguf(base) else Origin((base,) if is_hub_id(base) else ())


def _one_or_all(names: tuple[str, ...]) -> str | list[str] | None:
    return names[0] if len(names) == 1 else list(names) or None


def _is_adapter(config: TrainConfig) -> bool:
    """Returns True if the exported folder holds an adapter; the adapter of a new model is merged into the model."""
    base = config.model_name_or_path
    return config.use_peft and base is not None and not means_gguf(base)


def is_hub_id(name: str) -> bool:
    """Returns True for the name of a hub repository: `owner/name`, and no path on this machine."""
    local = name.startswith(BUILTIN) or Path(name).expanduser().exists()
    data_file = file_type(Path(name)) is not None
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and not local and not data_file


def _shown(name: str) -> str:
    """Returns what the card calls a model or data set in a sentence."""
    built_in = name.startswith(BUILTIN)
    return f"the built-in {code(name.removeprefix(BUILTIN))}" if built_in else code(_name(name))


def _name(name: str) -> str:
    """Returns the name that the card gives to a model or data set: a hub id, or the last part of a local path."""
    return name if name.startswith(BUILTIN) or is_hub_id(name) else Path(name).name or name


def _objective(config: TrainConfig) -> str:
    """Returns what the card calls an objective; of one in a file the last part of the path alone."""
    file = code_of(config.objective)
    return f"{Path(file[0]).name}:{file[1]}" if file else described(config.objective)
