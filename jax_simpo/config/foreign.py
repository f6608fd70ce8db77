"""Reads the keys of the original SimPO files and of the Hugging Face trainer.

There are three kinds. Keys under another name act as ours do. Keys without a meaning here are accepted with a notice
that says what replaces them. Keys that would change the trained model, and that this program cannot honour, are errors
unless their value asks for nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from jax_simpo.config import shown
from jax_simpo.errors import ConfigError
from jax_simpo.redact import HIDDEN

# A value that asks for nothing is accepted without a notice, whatever its key.
_NOTHING = (None, False, 0, 0.0, "", "no", "none", "None", "off")


def asks_for_nothing(value: Any) -> bool:
    """Returns True for a value that asks for nothing: false, null, 0, no, or a list of such."""
    if isinstance(value, list | tuple | dict):
        return all(asks_for_nothing(v) for v in value)
    return value in _NOTHING


WITHOUT_MEANING: dict[str, str] = {
    "attn_implementation": "`attention` (torch_ref: `torch_attention`) chooses it; all compute the same",
    "use_flash_attention_2": "`attention` (torch_ref: `torch_attention`) chooses it; all compute the same",
    "torch_dtype": "parameters are kept in float32 and `dtype` is the type computed in",
    "gradient_checkpointing_kwargs": "`remat` (none, dots, attention, full) says what is recomputed",
    "activation_checkpointing_kwargs": "`remat` (none, dots, attention, full) says what is recomputed",
    "use_reentrant": "`remat` (none, dots, attention, full) says what is recomputed",
    "hub_always_push": "a save that comes while the one before is still being uploaded is passed over",
    "logging_dir": "`report_to: tensorboard` writes to the folder `tensorboard` in `output_dir`",
    "log_level": "the command line shows progress and warnings",
    "log_level_replica": "only the first process prints",
    "log_on_each_node": "only the first process prints",
    "logging_strategy": "`logging_steps` says how often metrics are written",
    "logging_first_step": "`logging_steps: 1` writes every step",
    "logging_nan_inf_filter": "a loss that is not finite is never hidden",
    "disable_tqdm": "the progress bar is drawn only on a terminal",
    "remove_unused_columns": "only the columns of the format that is found, or named by `dataset_columns`, are read",
    "do_train": "the command (`jax-simpo train`) says what is done",
    "do_predict": "`jax-simpo score` writes log-probs and rewards per pair",
    "dataloader_num_workers": "batches are always built ahead by a background thread",
    "dataloader_pin_memory": "batches are always built ahead by a background thread",
    "dataloader_persistent_workers": "batches are always built ahead by a background thread",
    "dataloader_prefetch_factor": "batches are always built ahead by a background thread",
    "deepspeed": "`mesh` spreads parameters and optimizer state over devices (`fsdp` is ZeRO-3)",
    "fsdp": "`mesh.fsdp` spreads parameters and optimizer state over devices",
    "fsdp_config": "`mesh` spreads parameters and optimizer state over devices",
    "ddp_backend": "`mesh` says how devices work together",
    "ddp_find_unused_parameters": "`mesh` says how devices work together",
    "ddp_timeout": "`mesh` says how devices work together",
    "local_rank": "every process finds its place by itself",
    "tf32": "`dtype` is the type computed in",
    "bf16_full_eval": "`dtype` is the type computed in, evaluation included",
    "torch_compile": "everything is compiled by XLA",
    "use_liger_kernel": "log-probs are always taken in tiles (`logprob_chunk: 1024` never keeps logits)",
    "use_cache": "the exported model always has `use_cache: true`",
    "save_safetensors": "models are always written as safetensors",
    "save_only_model": "checkpoints always hold what a resume needs; `jax-simpo export` writes the model alone",
    "save_on_each_node": "all processes write one shared checkpoint",
    "per_device_eval_batch_size": "evaluation packs pairs into rows too; `rows_per_device` bounds its memory",
    "eval_accumulation_steps": "evaluation keeps only one number per response",
    "prediction_loss_only": "evaluation always writes all metrics",
    "disable_dropout": "the models have no dropout",
    "label_pad_token_id": "targets are listed, prompts and padding never become labels",
    "padding_value": "padding is masked out and its token does not matter",
    "is_encoder_decoder": "only decoder models are trained",
    "model_init_kwargs": "`model_revision`, `trust_remote_code` and `dtype` say how a model is read",
    "max_target_length": "`max_length` and `max_prompt_length` bound a pair",
    "max_completion_length": "`max_length` and `max_prompt_length` bound a pair",
    "truncation_side": "`truncation_mode` says which end of a prompt is kept",
    "text_column": "the columns of the format that is found are read; `dataset_columns` names others",
    "base_model_revision": "`model_revision` names the revision that is read",
    "model_code_revision": "models are built in; no code is taken from a model's repository",
    "data_seed": "`seed` orders the pairs",
    "bnb_4bit_quant_type": "4-bit weights are always NF4",
    "use_bnb_nested_quant": "the scales of quantised weights are not quantised",
}

# Of the keys above, those that ask for something by being off; with this value they ask for what is done anyway.
_DONE_ANYWAY: dict[str, Any] = {
    "disable_dropout": True,
    "do_train": True,
    "logging_strategy": "steps",
    "remove_unused_columns": True,
    "save_safetensors": True,
    "use_cache": True,
}

NOT_SUPPORTED: dict[str, str] = {
    "fp16": "float16 needs loss scaling and is not supported; use `dtype: bfloat16`",
    "fp16_full_eval": "float16 is not supported; use `dtype: bfloat16`",
    "label_smoothing_factor": "this is the cross-entropy's smoothing; SimPO's is `label_smoothing`",
    "neftune_noise_alpha": "noise on embeddings is not supported",
    "dataloader_drop_last": "an epoch's last step trains on the pairs that are left; it cannot be dropped",
    "auto_find_batch_size": "a batch that shrinks silently is not supported; set `rows_per_device` or `row_length`",
    "group_by_length": "packing fills rows whatever the lengths; remove the key",
    "optim_args": "the optimizers take adam_beta1, adam_beta2, adam_epsilon, adam_mu_dtype and weight_decay",
    "optim_target_modules": "one optimizer trains all weights",
    "hub_token": "a token in a file or on a command line is soon seen by others; remove it, and log in with `hf auth "
    "login` or set the environment variable HF_TOKEN",
    "hub_revision": "models are uploaded to the branch `main`; remove the key, or give another `hub_model_id`",
    "hub_model_revision": "models are uploaded to the branch `main`; remove the key, or give another `hub_model_id`",
    "lora_modules_to_save": "with `use_peft` only the adapter is trained; remove the key",
}


def _dtype(value: Any) -> Any:
    return "bfloat16" if value else "float32"


def _remat(value: Any) -> Any:
    return "full" if value else "none"


# Key -> (our key, how its value is read; None: as it stands).
RENAMED: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "evaluation_strategy": ("eval_strategy", None),
    "bf16": ("dtype", _dtype),
    "gradient_checkpointing": ("remat", _remat),
    "activation_checkpointing": ("remat", _remat),
    "dataset_num_proc": ("preprocessing_num_workers", None),
    "max_seq_length": ("max_length", None),
}

# The Hugging Face trainer's names of optimizers that exist here, some of them in several implementations.
OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "lion_32bit": "lion"}

# `gamma` is read by `read_gamma`.
KEYS = frozenset(WITHOUT_MEANING) | frozenset(NOT_SUPPORTED) | frozenset(RENAMED) | {"gamma"}


def translate(values: dict[str, Any], place: Callable[[str], str]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Replaces the foreign keys of one file, of one override or of one call.

    Args:
        values: keys and values as written.
        place: names the place of a key, for messages.

    Returns:
        The values under our keys (a `gamma` is left for the caller, who knows `beta`), the notices for the user, and
        for each of our keys that came from a foreign one, the foreign one.

    Raises:
        ConfigError: with every key that asks for what cannot be done here, and every two names of a setting that
            disagree.
    """
    mistakes: list[str] = []
    result: dict[str, Any] = {}
    notices: list[str] = []
    origin: dict[str, str] = {}
    for key, value in values.items():
        if key in RENAMED:
            ours, read = RENAMED[key]
            if read is not None and not isinstance(value, bool):
                mistakes.append(f"{place(key)}: `{key}` is {shown.value(value)}; expected true or false")
                continue
            translated = value if read is None else read(value)
            other = origin.get(ours, ours)
            if other in values and (result if ours in origin else values)[ours] != translated:
                mistakes.append(
                    f"{place(key)}: `{key}: {_show(value)}` and `{other}: {_show(values[other])}` contradict each "
                    f"other; keep `{ours}`"
                )
            if read is not None:
                notices.append(f"{place(key)}: `{key}: {_show(value)}` is read as `{ours}: {translated}`")
            result[ours] = translated
            origin[ours] = key
        elif key in WITHOUT_MEANING:
            done = value in (None, _DONE_ANYWAY[key]) if key in _DONE_ANYWAY else asks_for_nothing(value)
            if not done:
                notices.append(f"{place(key)}: `{key}` has no effect here: {WITHOUT_MEANING[key]}")
        elif key in NOT_SUPPORTED:
            if not asks_for_nothing(value):
                said = HIDDEN if shown.is_secret(key) else _show(value)
                mistakes.append(f"{place(key)}: `{key}: {said}` cannot be honoured: {NOT_SUPPORTED[key]}")
        elif key == "optim":
            result[key] = OPTIMIZERS.get(value, value) if isinstance(value, str) else value
        else:
            result[key] = value
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return result, notices, origin


def read_gamma(values: dict[str, Any], beta: Any, place: str) -> str:
    """Turns `gamma` of the first published files into the ratio that replaced it, gamma / beta.

    Returns:
        The notice for the user.
    """
    gamma = values.pop("gamma")
    if "gamma_beta_ratio" in values:
        raise ConfigError(f"{place}: `gamma` and `gamma_beta_ratio` are one setting; keep `gamma_beta_ratio`")
    if not (_is_finite(gamma) and _is_finite(beta) and gamma >= 0 and beta > 0 and math.isfinite(gamma / beta)):
        raise ConfigError(
            f"{place}: `gamma` ({shown.value(gamma)}) is read as gamma / beta ({shown.value(beta)}); both must be "
            "numbers > 0"
        )
    values["gamma_beta_ratio"] = gamma / beta
    return f"{place}: `gamma: {gamma}` is read as `gamma_beta_ratio: {gamma / beta:g}` (gamma / beta)"


def _is_finite(value: Any) -> bool:
    """Returns True for a number that is finite as a float, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else shown.one_line(str(value))
