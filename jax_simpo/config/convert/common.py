"""The keys that other trainers have from the Hugging Face trainer and peft, and how common values are read."""

from __future__ import annotations

from typing import Any, get_args

from jax_simpo.config import foreign
from jax_simpo.config.convert.rules import CannotKeepError, Do, Draft, Drop, Keep, Refuse, Rule, each, shown_pair
from jax_simpo.config.kinds import Tracker

# Optimizers of the same mathematics. Those that keep their moments in 8 bits, or page them, save memory alone.
_OPTIMIZERS = {
    **foreign.OPTIMIZERS,
    **dict.fromkeys(("adamw", "paged_adamw", "paged_adamw_32bit", "adamw_apex_fused", "adamw_torch_4bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw"),
    **dict.fromkeys(("lion", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit"), "lion"),
    "adafactor": "adafactor",
}


def optimizer(value: Any) -> str:
    """Reads the name of an optimizer."""
    if value not in _OPTIMIZERS:
        raise CannotKeepError(f"there are adamw, adafactor, lion and muon here, and no `{value}`")
    return _OPTIMIZERS[value]


def whole(value: Any) -> int:
    """Reads a number of steps; a number below 1 is a share of the run, which is not known here."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or float(value) != int(value):
        raise CannotKeepError("it is no whole number of steps (a share of the run is not known here); give a number")
    return int(value)


def modules(value: Any) -> list[str] | None:
    """Reads the layers that get an adapter; null stands for all linear ones."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CannotKeepError("expected names of layers, such as [q_proj, v_proj]")
    if names in (["all"], ["all-linear"]):
        return None
    if extra := [name for name in names if name in ("lm_head", "embed_tokens")]:
        raise CannotKeepError(f"the head and the embedding get no adapter here; leave {' and '.join(extra)} out")
    return names


def set_adapter_defaults(draft: Draft, rank: int, alpha: int, dropout: float, whose: str) -> None:
    """Writes out what an adapter has where a file says nothing of it.

    Without names of layers peft takes those of its table: the same for all families that are trained here.
    """
    if "lora_r" not in draft.ours:
        draft.set("lora_r", rank, f"{whose} default")
    if "lora_alpha" not in draft.ours:
        draft.set("lora_alpha", alpha, f"{whose} default")
    if "lora_target_modules" not in draft.ours:
        draft.set("lora_target_modules", ["q_proj", "v_proj"], "peft's default")
    if "lora_dropout" not in draft.ours and "lora_dropout" not in draft.options.drop and dropout:
        draft.set("lora_dropout", 0.0, f"{whose} default is {dropout}", "adapters have no dropout here")


def set_bf16(draft: Draft, key: str, value: Any) -> None:
    """Sets the type that is computed in. `auto` asks the GPU, which has bfloat16 where it is not old."""
    computed = "float32" if value in (False, "false", "no", "off") else "bfloat16"
    draft.set("dtype", computed, shown_pair(key, value), of=key)


def set_remat(draft: Draft, key: str, value: Any) -> None:
    """Sets what is recomputed; Axolotl's `unsloth` and `offload` recompute everything, too."""
    draft.set("remat", "none" if value in (False, None) else "full", shown_pair(key, value), of=key)


def set_warmup(draft: Draft, key: str, value: Any) -> None:
    """Sets warm-up steps; below 1 they are a share of the run, as transformers 5 has it."""
    is_share = isinstance(value, float) and 0 < value < 1
    draft.set("warmup_ratio" if is_share else "warmup_steps", value, shown_pair(key, value), of=key)


def set_trackers(draft: Draft, key: str, value: Any) -> None:
    """Sets the trackers that there are here, and says which there are not."""
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, list):
        raise CannotKeepError("expected names of trackers")
    asked = [str(name) for name in named if not foreign.asks_for_nothing(name)]
    kept = [name for name in asked if name in get_args(Tracker)]
    others = ", ".join(name for name in asked if name not in kept)
    if kept:
        draft.set("report_to", kept, shown_pair(key, value), f"there is no {others} here" if others else "", of=key)
    else:
        draft.dropped[key] = f"there is no {others} here" if others else "it asks for nothing"


def set_hub_strategy(draft: Draft, key: str, value: Any) -> None:
    """Sets when a model is uploaded. Checkpoints are not, so the strategies that upload them become `every_save`."""
    checkpoints = value in ("checkpoint", "all_checkpoints")
    note = "models are uploaded, and no optimizer state" if checkpoints else ""
    draft.set("hub_strategy", "every_save" if checkpoints else value, shown_pair(key, value), note, of=key)


_SAME = (
    "model_name_or_path model_revision trust_remote_code output_dir run_name seed learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_ratio num_train_epochs max_steps max_grad_norm weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon per_device_train_batch_size gradient_accumulation_steps save_strategy save_total_limit "
    "load_best_model_at_end metric_for_best_model greater_is_better eval_strategy do_eval project push_to_hub "
    "hub_model_id hub_private_repo"
)
HUGGING_FACE: dict[str, Rule] = {
    **{key: Drop(why) for key, why in foreign.WITHOUT_MEANING.items()},
    **{key: Refuse(why) for key, why in foreign.NOT_SUPPORTED.items()},
    **{key: Keep(key) for key in _SAME.split()},
    "report_to": Do(set_trackers, "`report_to`"),
    "hub_strategy": Do(set_hub_strategy, "`hub_strategy`"),
    "hub_token": Drop("`hf auth login` or HF_TOKEN says who you are; a token belongs in no file"),
    "evaluation_strategy": Keep("eval_strategy"),
    "eval_steps": Keep("eval_steps", whole),
    "save_steps": Keep("save_steps", whole),
    "logging_steps": Keep("logging_steps", whole),
    "warmup_steps": Do(set_warmup, "`warmup_steps`"),
    "optim": Keep("optim", optimizer),
    "bf16": Do(set_bf16, "`dtype`"),
    "gradient_checkpointing": Do(set_remat, "`remat`"),
    "overwrite_output_dir": Drop("a run continues in its folder; to start afresh, say so on the command line"),
    "use_cpu": Drop("jax takes the devices that there are"),
    "eval_on_start": Drop("the first evaluation is before the first step"),
    "include_num_input_tokens_seen": Drop("every record counts its tokens"),
    "include_tokens_per_second": Drop("every record has them"),
    "ignore_data_skip": Drop("a step's pairs are known from its number"),
    "torch_empty_cache_steps": Drop("XLA plans memory ahead"),
    "accelerator_config": Drop("`mesh` says how devices work together"),
    "parallelism_config": Drop("`mesh` says how devices work together"),
    "trackio_space_id": Drop("with `report_to: trackio` the environment variable TRACKIO_SPACE_ID names a Space"),
    "resume_from_checkpoint": Refuse(
        "checkpoints of another trainer cannot be continued; start from its model", (True,)
    ),
    "train_sampling_strategy": Refuse("pairs are always in the order of `seed`", ("random",)),
    "average_tokens_across_devices": Drop("a step's sums are divided by the counts of all devices"),
    "liger_kernel_config": Drop("log-probs are always taken in tiles"),
    "full_determinism": Drop("the same run on the same devices gives the same numbers"),
    "eval_delay": Refuse("evaluations begin before the first step"),
    **dict(
        each(
            "lora_task_type config_file torch_compile_backend torch_compile_mode ddp_bucket_cap_mb "
            "ddp_broadcast_buffers ddp_static_graph dataloader_multiprocessing_context dataloader_in_order "
            "skip_memory_metrics debug batch_eval_metrics include_for_metrics eval_do_concat_batches "
            "eval_use_gather_object enable_jit_checkpoint restore_callback_states_from_checkpoint label_names "
            "length_column_name trackio_bucket_id trackio_static_space_id",
            Drop("it concerns the Hugging Face trainer's own runtime"),
        )
    ),
}
PEFT: dict[str, Rule] = {
    "use_peft": Keep("use_peft"),
    "lora_r": Keep("lora_r"),
    "lora_alpha": Keep("lora_alpha"),
    "lora_dropout": Keep("lora_dropout"),
    "lora_target_modules": Keep("lora_target_modules", modules),
    "load_in_4bit": Keep("load_in_4bit"),
    "load_in_8bit": Keep("load_in_8bit"),
    "use_rslora": Refuse("an adapter is scaled by `lora_alpha` / `lora_r`; give a `lora_alpha` that says the same"),
    "use_dora": Refuse("adapters are plain LoRA"),
    "lora_target_parameters": Refuse("adapters are for linear layers alone"),
    "bnb_4bit_quant_storage": Drop("weights are not quantised"),
}


def beside(left: float, right: float) -> float:
    """Divides two numbers and leaves the rounding of decimal fractions out: 1.375 / 2.5 is 0.55."""
    return float(f"{left / right:.12g}")
