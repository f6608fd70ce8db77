"""Files of open-instruct's `dpo_tune_cache.py`, the keys of several versions."""

from __future__ import annotations

from typing import Any

from jax_simpo.config.convert.common import optimizer, set_adapter_defaults, set_remat, set_trackers, whole
from jax_simpo.config.convert.data import Source, need_data, set_sources
from jax_simpo.config.convert.rules import Do, Draft, Drop, Keep, Part, Refuse, Rule, Trainer, each

# Keys with other defaults in 2024 (dpo with beta 0.1, 2 epochs, warm-up 0.03) than later (dpo_norm, 5, 1, 0.1).
_UNSETTLED = (
    ("dpo_loss_type", "loss_type"),
    ("dpo_beta", "beta"),
    ("num_epochs", "num_train_epochs", "max_train_steps"),
    ("warmup_ratio",),
    ("max_seq_length", "max_token_length"),
)
# Its loss -> our objective, and the keys of that one which it has.
_LOSSES = {"dpo": "dpo", "dpo_norm": "sigmoid_norm", "simpo": "simpo"}


def _set_last(draft: Draft, key: str, value: Any) -> None:
    """Sets how many checkpoints are kept; -1 keeps all."""
    draft.set("save_total_limit", None if value == -1 else value, f"{key}: {value}", of=key)


def _set_checkpoints(draft: Draft, key: str, value: Any) -> None:
    """Sets when checkpoints are written: after a number of steps, which may be text, or after each epoch."""
    if value == "epoch":
        draft.set("save_strategy", "epoch", f"{key}: epoch", of=key)
        return
    draft.set("save_strategy", "steps", f"{key}: {value}", of=key)
    draft.set("save_steps", whole(int(value) if str(value).isdecimal() else value), f"{key}: {value}", of=key)


def _set_tracking(draft: Draft, key: str, value: Any) -> None:
    """Sets the trackers, which open-instruct reads where `with_tracking` is true alone; it is for wandb."""
    if not draft.get("with_tracking"):
        draft.dropped[key] = "it is read with `with_tracking` alone" if value else "it asks for nothing"
    elif key == "report_to":
        set_trackers(draft, key, ["wandb"] if value == "all" else value)
    elif draft.get("report_to") is None:
        draft.set("report_to", ["wandb"], f"{key}: true", of=key)
    else:
        draft.dropped[key] = "`report_to` says which tracker"


def _set_repository(draft: Draft, key: str, value: Any) -> None:
    """Sets the repository, whose owner open-instruct names by itself."""
    owner = draft.get("hf_entity")
    draft.set("hub_model_id", f"{owner}/{value}" if owner else value, draft.pairs("hf_entity", key), of=key)


_RULES: dict[str, Rule] = {
    "model_name_or_path": Keep("model_name_or_path"),
    "model_revision": Keep("model_revision"),
    "tokenizer_name": Keep("tokenizer_name_or_path"),
    "tokenizer_name_or_path": Keep("tokenizer_name_or_path"),
    "trust_remote_code": Keep("trust_remote_code"),
    "chat_template_name": Part("`chat_template`"),
    **dict(each("dpo_loss_type loss_type", Part("`objective`"))),
    **dict(each("dpo_beta beta", Part("`beta`"))),
    **dict(each("dpo_gamma_beta_ratio gamma_beta_ratio", Part("`gamma_beta_ratio`"))),
    **dict(each("dpo_label_smoothing label_smoothing", Part("`label_smoothing`"))),
    **dict(
        each(
            "dataset_name dataset_mixer dataset_mixer_list mixer_list dataset_mixer_list_splits mixer_list_splits "
            "dataset_config_name train_file",
            Part("`dataset_mixer` and `dataset_splits`"),
        )
    ),
    "max_train_samples": Keep("max_samples"),
    "max_seq_length": Keep("max_length"),
    "max_token_length": Keep("max_length"),
    "preprocessing_num_workers": Keep("preprocessing_num_workers"),
    "per_device_train_batch_size": Keep("per_device_train_batch_size"),
    "gradient_accumulation_steps": Keep("gradient_accumulation_steps"),
    "learning_rate": Keep("learning_rate"),
    "lr_scheduler_type": Keep("lr_scheduler_type"),
    "warmup_ratio": Keep("warmup_ratio"),
    "weight_decay": Keep("weight_decay"),
    "num_train_epochs": Keep("num_train_epochs"),
    "num_epochs": Keep("num_train_epochs"),
    "max_train_steps": Keep("max_steps"),
    "clip_grad_norm": Keep("max_grad_norm", lambda norm: 0.0 if norm == -1 else norm),
    "max_grad_norm": Keep("max_grad_norm", lambda norm: 0.0 if norm == -1 else norm),
    "seed": Keep("seed"),
    "gradient_checkpointing": Do(set_remat, "`remat`"),
    "logging_steps": Keep("logging_steps", whole),
    "checkpointing_steps": Do(_set_checkpoints, "`save_steps`"),
    "keep_last_n_checkpoints": Do(_set_last, "`save_total_limit`"),
    "output_dir": Keep("output_dir"),
    "run_name": Keep("run_name"),
    "with_tracking": Do(_set_tracking, "`report_to`"),
    "report_to": Do(_set_tracking, "`report_to`"),
    "wandb_project_name": Keep("project"),
    "wandb_project": Keep("project"),
    "push_to_hub": Keep("push_to_hub"),
    "hf_repo_id": Do(_set_repository, "`hub_model_id`"),
    "hf_entity": Drop("it is the first part of `hub_model_id`"),
    "exp_name": Drop("`run_name` names the run"),
    "use_lora": Keep("use_peft"),
    "lora_rank": Keep("lora_r"),
    "lora_alpha": Keep("lora_alpha"),
    "lora_dropout": Keep("lora_dropout"),
    "use_qlora": Refuse("weights are not quantised"),
    "load_balancing_loss": Refuse("mixtures of experts are not trained"),
    "packing": Drop("pairs are always packed (`packing`), which changes no step"),
    "resume_from_checkpoint": Refuse("checkpoints of another trainer cannot be continued; start from its model"),
    "config_name": Refuse("a model has its own `config.json`"),
    "optimizer_type": Keep("optim", optimizer),
    "optimizer_kwargs": Refuse("the optimizers take adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "additional_model_arguments": Refuse("models are trained as their `config.json` says"),
    "reduce_loss": Drop("sums and means are those of the objective"),
    "use_8bit_optimizer": Drop("moments are kept in 32 bits, which changes no more than rounding"),
    "overwrite_output_dir": Drop("a run continues in its folder; to start afresh, say so on the command line"),
    **dict(
        each(
            "use_flash_attn use_slow_tokenizer low_cpu_mem_usage concatenated_forward fused_optimizer add_bos timeout "
            "dataset_mix_dir dataset_skip_cache dataset_cache_mode dataset_local_cache_dir dataset_transform_fn "
            "dataset_target_columns dataset_config_hash overwrite_cache load_balancing_weight tokenizer_revision "
            "reference_logprobs_cache_path use_liger_kernel dpo_use_paged_optimizer tensor_parallel_degree "
            "context_parallel_degree cache_logprobs_only fsdp_shard_degree fsdp_num_replicas sync_each_batch "
            "zero_stage offload_optimizer offload_param zero_hpz_partition_size transform_fn target_columns "
            "do_not_randomize_output_dir profiling verbose compile_model activation_memory_budget config_hash "
            "cache_mode local_cache_dir skip_cache cache_dataset_only",
            Drop("it concerns open-instruct's own runtime"),
        )
    ),
    **dict(
        each(
            "wandb_entity save_to_hub hf_repo_revision hf_repo_url hf_metadata_dataset try_launch_beaker_eval_jobs "
            "try_auto_save_to_beaker gs_bucket_path oe_eval_tasks oe_eval_max_length oe_eval_gpu_multiplier "
            "eval_workspace eval_priority send_slack_alerts",
            Drop("it concerns open-instruct's own services"),
        )
    ),
}


def _first(draft: Draft, *keys: str, default: Any) -> tuple[str, Any]:
    """Returns the first of some keys that the file gives, and its value; the first key and the default otherwise."""
    return next(((key, draft.get(key)) for key in keys if draft.get(key) is not None), (keys[0], default))


def _set_objective(draft: Draft) -> None:
    missing = ["/".join(keys) for keys in _UNSETTLED if all(draft.get(key) is None for key in keys)]
    if missing:
        draft.errors.append(
            f"the file leaves {', '.join(missing)} to open-instruct's defaults, which its versions differ in; add what "
            "yours has"
        )
        return
    key, loss = _first(draft, "dpo_loss_type", "loss_type", default=None)
    beta_key, beta = _first(draft, "dpo_beta", "beta", default=None)
    if loss not in _LOSSES:
        draft.refuse(key, f"there are {', '.join(_LOSSES)} here")
        return
    draft.set("objective", _LOSSES[loss], draft.pairs(key))
    draft.set("beta", beta, draft.pairs(beta_key), of=beta_key)
    if loss == "simpo":
        key, ratio = _first(draft, "dpo_gamma_beta_ratio", "gamma_beta_ratio", default=0.3)
        draft.set("gamma_beta_ratio", ratio, draft.pairs(key) or f"{key}: 0.3, its default", of=key)
    else:
        draft.dropped |= {k: "it is read with simpo alone" for k in draft.theirs if k.endswith("gamma_beta_ratio")}
    key, smoothing = _first(draft, "dpo_label_smoothing", "label_smoothing", default=0.0)
    if smoothing:
        draft.set("label_smoothing", smoothing, draft.pairs(key), of=key)


def _set_method(draft: Draft) -> None:
    if not draft.get("use_lora"):
        return
    draft.set("lora_target_modules", None, "all linear layers, as there")
    set_adapter_defaults(draft, 64, 16, 0.1, "open-instruct's")


def _set_data(draft: Draft) -> None:
    key, splits = _first(draft, "dataset_mixer_list_splits", "mixer_list_splits", default=["train"])
    if not isinstance(splits, list) or len(set(splits)) != 1:
        draft.refuse(key, "all data are of one split here")
        return
    (split,) = set(splits)
    keys = ("dataset_mixer", "dataset_mixer_list", "mixer_list", "dataset_name", "train_file")
    key, value = _first(draft, *keys, default=None)
    sources = []
    if draft.options.data or value is None:
        pass
    elif key in ("dataset_name", "train_file"):
        sources.append(Source(value, split if key == "dataset_name" else "train", draft.get("dataset_config_name")))
    else:
        listed = list(value.items()) if isinstance(value, dict) else list(zip(value[::2], value[1::2], strict=False))
        if not isinstance(value, dict) and len(value) % 2:
            draft.refuse(key, "expected data sets and numbers in turn")
            return
        for name, amount in listed:
            fraction = _fraction(amount)
            if fraction is None:
                draft.refuse(key, f"{name}: {amount} counts rows; write it as a share of all, such as 0.5")
                return
            sources.append(Source(name, split, fraction=fraction))
    set_sources(draft, key, sources, [], f"{key} ({len(sources)})")
    need_data(draft, "`dataset_mixer`")


def _fraction(amount: Any) -> float | None:
    """Reads a share of rows; a whole number, `1` too, counts rows. 1.0 takes all."""
    try:
        number = float(amount)
    except (TypeError, ValueError):
        return None
    return number if "." in str(amount) and 0 <= number <= 1 else None


def _set_template(draft: Draft) -> None:
    if (name := draft.get("chat_template_name")) is not None:
        draft.refuse(
            "chat_template_name",
            f"open-instruct's template {name} does not come with this program; write it to a file, name that in "
            "`chat_template`, and leave this key out with --drop. Without it the tokenizer's own is used",
        )


def _together(draft: Draft) -> None:
    _set_objective(draft)
    _set_method(draft)
    _set_template(draft)
    _set_data(draft)


OPEN_INSTRUCT = Trainer(
    name="open-instruct",
    title="open-instruct",
    markers=frozenset(
        {
            "dpo_loss_type",
            "dpo_gamma_beta_ratio",
            "dataset_mixer_list",
            "mixer_list",
            "use_lora",
            "tokenizer_name",
            "use_slow_tokenizer",
            "with_tracking",
            "checkpointing_steps",
            "max_train_steps",
        }
    ),
    rules=_RULES,
    together=_together,
    # Gradients are not clipped unless asked for; accelerate computes in bfloat16.
    defaults={
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "dtype": "bfloat16",
        "auto_insert_empty_system_msg": False,
        "chat_rendering": "in_context",
        "special_tokens_in_messages": "tokens",
    },
)
