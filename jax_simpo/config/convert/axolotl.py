"""Files of Axolotl with `rl: simpo`, `dpo`, `ipo` or `orpo` (read off its version 0.19: builders and schemas)."""

from __future__ import annotations

from typing import Any

from jax_simpo.config import foreign
from jax_simpo.config.convert.common import (
    PEFT,
    modules,
    optimizer,
    set_adapter_defaults,
    set_bf16,
    set_hub_strategy,
    set_remat,
    set_warmup,
    whole,
)
from jax_simpo.config.convert.data import Source, file_or_hub, need_data, set_sources
from jax_simpo.config.convert.losses import set_dpo, set_orpo, set_simpo
from jax_simpo.config.convert.rules import (
    CannotKeepError,
    Do,
    Draft,
    Drop,
    Keep,
    Part,
    Refuse,
    Rule,
    Trainer,
    each,
    merged,
    shown_pair,
)

# Its chat_template -> one that comes with this program.
_TEMPLATES = {"llama3": "llama-3", "gemma": "gemma", "mistral_v1": "mistral-instruct"}
# The first part of a data set's `type`, which also writes the template's tokens -> the template.
_TYPES = {"llama3": "llama-3", "zephyr": "zephyr", "chatml": None, "chat_template": None}
_METRICS = Drop("metrics go to metrics.jsonl in `output_dir`")
# Plugins that compute the same numbers, or record them.
_PLUGINS = ("liger", "cut_cross", "kernels", "swanlab")
# The keys of a data set that are read, or that say nothing more.
_OF_DATASETS = frozenset(
    "path data_files type split name ds_type field_messages field_chosen field_rejected message_property_mappings "
    "roles revision trust_remote_code".split()
)
# What those types call the prompt's column.
_PROMPTS = {"intel": "question", "icr": "input", "argilla": "instruction"}


def _set_target(draft: Draft, key: str, value: Any) -> None:
    """Sets the layers with an adapter: a list, or with lora_target_linear all linear ones."""
    if key == "lora_target_linear" and value:
        draft.set("lora_target_modules", None, shown_pair(key, value), of=key)
    elif key == "lora_target_modules" and value and not draft.get("lora_target_linear"):
        draft.set("lora_target_modules", modules(value), shown_pair(key, value), of=key)


def _set_tokens(draft: Draft, key: str, value: Any) -> None:
    """Refuses special tokens that change what is trained; the padding's do not matter."""
    if not isinstance(value, dict) or set(value) - {"pad_token"}:
        draft.refuse(
            key,
            f"tokenizers stay as they are. If yours has these tokens anyway, add --drop {key}; else save one with them "
            "and name it in `tokenizer_name_or_path`",
        )
    else:
        draft.dropped[key] = "padding is masked out and its token does not matter"


def _set_plugins(draft: Draft, key: str, value: Any) -> None:
    """Drops plugins that compute the same numbers otherwise, or record them."""
    names = [value] if isinstance(value, str) else value or []
    if other := [name for name in names if not any(plugin in str(name).lower() for plugin in _PLUGINS)]:
        draft.refuse(key, f"{', '.join(map(str, other))} may change what is trained")
    else:
        draft.dropped[key] = "kernels are chosen by themselves, and metrics go to metrics.jsonl"


def _set_cadence(draft: Draft, key: str, value: Any) -> None:
    """Sets evaluation or saving once an epoch, for any number of times."""
    ours = "eval_strategy" if key == "evals_per_epoch" else "save_strategy"
    if not value:
        draft.set(ours, "no", shown_pair(key, value), of=key)
    else:
        note = "" if value == 1 else f"to do it {value} times an epoch give `steps` and a number of steps"
        draft.set(ours, "epoch", shown_pair(key, value), note, of=key)


def _add_tracker(draft: Draft, key: str, value: Any) -> None:
    """Adds the tracker that `use_NAME` turns on."""
    if value:
        _add(draft, key.removeprefix("use_"), shown_pair(key, value))
    else:
        draft.dropped[key] = "it asks for nothing"


def _set_project(draft: Draft, key: str, value: Any) -> None:
    """Sets the project of a tracker, which Axolotl turns on by naming one."""
    if value:
        draft.set("project", value, shown_pair(key, value), of=key)
        _add(draft, key.partition("_")[0], shown_pair(key, value))
    else:
        draft.dropped[key] = "it asks for nothing"


def _add(draft: Draft, tracker: str, origin: str) -> None:
    former = draft.ours.get("report_to")
    if former is None:
        draft.set("report_to", [tracker], origin)
    elif tracker not in former.value:
        draft.set("report_to", [*former.value, tracker], f"{former.origin}, {origin}")


def _set_repository(draft: Draft, key: str, value: Any) -> None:
    """Sets the repository, which Axolotl uploads to where it is named."""
    draft.set("push_to_hub", True, shown_pair(key, value), of=key)
    draft.set("hub_model_id", value, shown_pair(key, value), of=key)


_RULES: dict[str, Rule] = merged(
    {key: Drop(why) for key, why in foreign.WITHOUT_MEANING.items()},
    {key: Refuse(why) for key, why in foreign.NOT_SUPPORTED.items()},
    {key: rule for key, rule in PEFT.items() if key not in ("use_peft", "use_rslora", "use_dora")},
    {
        "base_model": Keep("model_name_or_path"),
        "revision_of_model": Keep("model_revision"),
        "tokenizer_config": Keep("tokenizer_name_or_path"),
        "trust_remote_code": Keep("trust_remote_code"),
        "rl": Part("`objective`"),
        "rl_beta": Part("`beta`"),
        "dpo_beta": Part("`beta`"),
        "orpo_alpha": Part("`beta`"),
        "trl": Part("`beta`"),
        "simpo_gamma": Part("`gamma_beta_ratio`, which is simpo_gamma / rl_beta"),
        "cpo_alpha": Part("`sft_weight`"),
        "rpo_alpha": Part("`sft_weight`"),
        "dpo_loss_type": Part("`objective`"),
        "dpo_loss_weights": Part("`objective`"),
        "dpo_label_smoothing": Part("`label_smoothing`"),
        "dpo_use_weighting": Refuse("pairs are not weighted by their probability (WPO)"),
        "datasets": Part("`dataset_mixer` and `dataset_splits`"),
        "test_datasets": Part("`dataset_splits`"),
        "val_set_size": Part("`test_size`"),
        "chat_template": Part("`chat_template`"),
        "chat_template_jinja": Part("`chat_template`"),
        "default_system_message": Refuse("give each row a `system` message, or change `chat_template`"),
        "sequence_len": Keep("max_length", note="there longer rows are dropped, here they are cut"),
        "max_prompt_len": Keep("max_prompt_length"),
        "excess_length_strategy": Drop("what does not fit is cut"),
        "min_sample_len": Refuse("rows are not left out by their length"),
        "eval_sequence_len": Refuse("evaluation has the lengths of training"),
        "micro_batch_size": Keep("per_device_train_batch_size"),
        "gradient_accumulation_steps": Keep("gradient_accumulation_steps"),
        "batch_size": Refuse("give micro_batch_size and gradient_accumulation_steps"),
        "eval_batch_size": Drop("evaluation packs pairs into rows too"),
        "num_epochs": Keep("num_train_epochs"),
        "max_steps": Keep("max_steps"),
        "learning_rate": Keep("learning_rate"),
        "lr_scheduler": Part("`lr_scheduler_type`"),
        "cosine_min_lr_ratio": Part("`lr_scheduler_type: cosine_with_min_lr`"),
        "lr_scheduler_kwargs": Keep("lr_scheduler_kwargs"),
        "warmup_ratio": Keep("warmup_ratio"),
        "warmup_steps": Do(set_warmup, "`warmup_steps`"),
        "optimizer": Keep("optim", optimizer),
        "weight_decay": Keep("weight_decay"),
        "max_grad_norm": Keep("max_grad_norm"),
        "adam_beta1": Keep("adam_beta1"),
        "adam_beta2": Keep("adam_beta2"),
        "adam_epsilon": Keep("adam_epsilon"),
        "seed": Keep("seed"),
        "adapter": Part("`use_peft`"),
        "lora_model_dir": Refuse("a run starts from a model; merge the adapter, and name the merged model"),
        "lora_target_linear": Do(_set_target, "`lora_target_modules`, where null stands for all linear layers"),
        "lora_target_modules": Do(_set_target, "`lora_target_modules`"),
        "bf16": Do(set_bf16, "`dtype`"),
        "bfloat16": Do(set_bf16, "`dtype`"),
        "float16": Refuse("float16 needs loss scaling and is not supported; use `dtype: bfloat16`"),
        "fp8": Refuse("`dtype` is float32 or bfloat16"),
        "gradient_checkpointing": Do(set_remat, "`remat`"),
        "output_dir": Keep("output_dir"),
        "logging_steps": Keep("logging_steps", whole),
        "eval_steps": Part("`eval_steps`"),
        "save_steps": Part("`save_steps`"),
        "eval_strategy": Part("`eval_strategy`"),
        "save_strategy": Part("`save_strategy`"),
        "evals_per_epoch": Do(_set_cadence, "`eval_strategy`"),
        "saves_per_epoch": Do(_set_cadence, "`save_strategy`"),
        "save_total_limit": Keep("save_total_limit"),
        "load_best_model_at_end": Keep("load_best_model_at_end"),
        "metric_for_best_model": Keep("metric_for_best_model"),
        "greater_is_better": Keep("greater_is_better"),
        "early_stopping_patience": Keep("early_stopping_patience"),
        "dataset_processes": Keep("preprocessing_num_workers"),
        "dataset_num_proc": Keep("preprocessing_num_workers"),
        "special_tokens": Do(_set_tokens, "the tokenizer's own"),
        "tokens": Refuse("tokenizers stay as they are"),
        "added_tokens_overrides": Refuse("tokenizers stay as they are"),
        "plugins": Do(_set_plugins, "nothing, where they are kernels"),
        "train_on_inputs": Refuse("prompts are not scored"),
        "resume_from_checkpoint": Refuse("checkpoints of another trainer cannot be continued; start from its model"),
        "shuffle_merged_datasets": Refuse("pairs are always shuffled, by `seed`", (True,)),
        "dataset_exact_deduplication": Refuse("equal rows are all trained on"),
        "unfrozen_parameters": Refuse("all parameters are trained, or with `use_peft` the adapter"),
        "overrides_of_model_config": Refuse("models are trained as their `config.json` says"),
        "trainer_cls": Refuse("there is one trainer"),
        "embedding_lr": Refuse("all parameters have one learning rate"),
        "embedding_lr_scale": Refuse("all parameters have one learning rate"),
        "lr_groups": Refuse("all parameters have one learning rate"),
        **dict(
            each(
                "loraplus_lr_ratio peft_use_dora peft_use_rslora peft_layers_to_transform lora_rank_pattern "
                "lora_alpha_pattern peft_init_lora_weights loftq_bits relora lisa_n_layers qat quantization gptq "
                "use_pose use_onebitllms reward_model process_reward_model noisy_embedding_alpha scaling_softmax "
                "use_eaft",
                Refuse("there is no such method here"),
            )
        ),
        **dict(
            each(
                "model_type tokenizer_type type_of_model is_llama_derived_model is_mistral_derived_model "
                "is_qwen_derived_model is_falcon_derived_model base_model_config tokenizer_use_fast tokenizer_legacy",
                Drop("models and tokenizers are known by their own files"),
            )
        ),
        **dict(
            each(
                "flash_attention sdp_attention xformers_attention flex_attention eager_attention sage_attention "
                "s2_attention flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm "
                "fused_attn_kernel",
                Drop("`attention` chooses the kernel; all compute the same"),
            )
        ),
        **dict(
            each(
                "sample_packing eval_sample_packing pad_to_sequence_len pad_to_multiple_of sample_packing_group_size "
                "sample_packing_bin_size batch_flattening dpo_padding_free curriculum_sampling",
                Drop("pairs are always packed (`packing`), which changes no step"),
            )
        ),
        **dict(each("use_wandb use_mlflow use_tensorboard use_trackio", Do(_add_tracker, "`report_to`"))),
        **dict(
            each(
                "wandb_project mlflow_experiment_name trackio_project_name",
                Do(_set_project, "`project` and `report_to`"),
            )
        ),
        "hub_model_id": Do(_set_repository, "`hub_model_id` and `push_to_hub`"),
        "hub_private_repo": Keep("hub_private_repo"),
        "hub_strategy": Do(set_hub_strategy, "`hub_strategy`"),
        **dict(
            each(
                "use_comet use_swanlab hf_mlflow_log_artifacts include_tokens_per_second include_tkps",
                _METRICS,
            )
        ),
        **dict(
            each(
                "dataset_prepared_path push_dataset_to_hub dataset_keep_in_memory skip_prepare_dataset "
                "shuffle_before_merging_datasets hf_use_auth_token auto_resume_from_checkpoints local_rank world_size "
                "device device_map ddp low_cpu_mem_usage strict debug gc_steps gc_collect_steps "
                "torch_empty_cache_steps profiler_steps lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
                "lora_embedding_kernel use_kernels use_scattermoe use_sonicmoe experimental_skip_move_to_device "
                "eot_tokens cut_cross_entropy chunked_cross_entropy activation_offloading layer_offloading "
                "fsdp_version deepcompile dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size "
                "sequence_parallel_degree precompute_ref_log_probs dpo_use_liger_kernel dpo_generate_during_eval "
                "dpo_use_logits_to_keep max_memory gpu_memory_limit lora_on_cpu lora_fan_in_fan_out save_first_step "
                "eval_table_size eval_max_new_tokens loss_watchdog_threshold loss_watchdog_patience "
                "accelerator_config resize_token_embeddings_to_32x torch_compile_backend tokenizer_save_jinja_files "
                "do_bench_eval do_causal_lm_eval ddp_bucket_cap_mb ddp_broadcast_buffers save_safetensors "
                "bnb_config_kwargs",
                Drop("it concerns Axolotl's own runtime"),
            )
        ),
    },
)


def _set_objective(draft: Draft) -> None:
    method = draft.get("rl")
    trl = draft.get("trl") if isinstance(draft.get("trl"), dict) else {}
    given = next((key for key in ("rl_beta", "dpo_beta", "orpo_alpha") if draft.get(key) is not None), "rl_beta")
    beta = ("trl.beta", trl["beta"]) if trl.get("beta") is not None else (given, draft.get(given, 0.1))
    smoothing = ("dpo_label_smoothing", draft.get("dpo_label_smoothing", 0.0))
    origin = f"rl: {method}"
    if method == "simpo":
        if draft.get("simpo_gamma") is None:
            draft.errors.append("`rl: simpo` needs `simpo_gamma`")
            return
        gamma = ("simpo_gamma", draft.get("simpo_gamma"))
        set_simpo(draft, beta, gamma, ("cpo_alpha", draft.get("cpo_alpha", 1.0)), origin)
    elif method == "orpo":
        set_orpo(draft, beta, origin)
    elif method in ("dpo", "ipo"):
        losses = draft.get("dpo_loss_type", ["sigmoid"]) if method == "dpo" else ["ipo"]
        weights = ("dpo_loss_weights", draft.get("dpo_loss_weights"))
        set_dpo(draft, ("dpo_loss_type", losses), weights, beta, smoothing if method == "dpo" else ("", 0.0), origin)
        if weight := draft.get("rpo_alpha"):
            draft.set("sft_weight", weight, draft.pairs("rpo_alpha"), of="rpo_alpha")
    else:
        draft.refuse("rl", "there are simpo, dpo, ipo and orpo here; without `rl` it is supervised fine-tuning")


def _set_method(draft: Draft) -> None:
    adapter = draft.get("adapter")
    if adapter is None or adapter == "":
        draft.set("use_peft", False, "no adapter")
        return
    # What qlora adds is `load_in_4bit`, which it requires and which is told by itself.
    note = "the same adapter, on weights that are not quantised" if adapter == "qlora" else ""
    draft.set("use_peft", True, shown_pair("adapter", adapter), note)
    if adapter not in ("lora", "qlora"):
        draft.refuse("adapter", "there is lora here")
    if "lora_r" not in draft.ours or "lora_alpha" not in draft.ours:
        draft.errors.append("an adapter needs `lora_r` and `lora_alpha`")
        return
    set_adapter_defaults(draft, 0, 0, 0.0, "Axolotl's")


def _set_template(draft: Draft, types: list[str]) -> None:
    template = draft.get("chat_template")
    by_type = {first for kind in types if (first := kind.partition(".")[0]) in _TYPES and _TYPES[first]}
    if template == "jinja" or draft.get("chat_template_jinja") is not None:
        draft.set("chat_template", draft.get("chat_template_jinja"), "chat_template_jinja", of="chat_template_jinja")
    elif template in _TEMPLATES:
        draft.set("chat_template", _TEMPLATES[template], shown_pair("chat_template", template))
    elif template is None and len(by_type) == 1:
        (first,) = by_type
        draft.set("chat_template", _TYPES[first], f"the data's type {first}")
    elif template not in (None, "tokenizer_default"):
        draft.dropped["chat_template"] = (
            "the tokenizer's own chat template is used; if it is not this one, name a file in `chat_template`"
        )


def _set_data(draft: Draft) -> list[str]:
    """Sets the sources; returns their types."""
    listed = draft.get("datasets", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        draft.refuse("datasets", "expected a list of data sets, each a mapping with a `path`")
        return []
    sources: list[Source | None] = [] if draft.options.data else [_source(draft, entry) for entry in listed]
    if None not in sources:
        eval_splits = _eval_splits(draft, [source for source in sources if source is not None])
        found = [source for source in sources if source is not None]
        set_sources(draft, "datasets", found, eval_splits, f"datasets ({len(listed)})")
    if size := draft.get("val_set_size"):
        draft.set("test_size", size, draft.pairs("val_set_size"), of="val_set_size")
    need_data(draft, "`datasets`")
    return [str(entry.get("type")) for entry in listed]


def _eval_splits(draft: Draft, sources: list[Source]) -> list[str]:
    """Returns the splits of `test_datasets`, which must be of the same sources."""
    listed = draft.get("test_datasets", [])
    names = [entry.get("path") if isinstance(entry, dict) else None for entry in listed]
    if set(names) - {source.name for source in sources} and not draft.options.data:
        draft.refuse(
            "test_datasets",
            "evaluation data are splits of the training data's sources here; put them into one folder as train.jsonl "
            "and test.jsonl, and give it with --data; or take `val_set_size`",
        )
        return []
    return list(dict.fromkeys(str(entry.get("split") or "test") for entry in listed))


def _source(draft: Draft, entry: dict[str, Any]) -> Source | None:
    name = file_or_hub(draft, "datasets", entry.get("path"), entry.get("data_files"))
    if name is None:
        return None
    kind = entry.get("type")
    columns: dict[str, Any] = {}
    odd = sorted(entry.keys() - _OF_DATASETS)
    if isinstance(kind, dict):
        columns = {"prompt": kind.get("field_prompt"), "system": kind.get("field_system")}
        columns |= {role: kind.get(f"field_{role}") for role in ("chosen", "rejected")}
        odd += [key for key in ("prompt_format", "chosen_format", "rejected_format") if not _is_plain(kind, key)]
    else:
        first, _, second = str(kind).partition(".")
        if first not in _TYPES or second == "user_defined":
            odd.append(f"type: {kind}")
        columns["prompt"] = _PROMPTS.get(second) if first != "chat_template" else None
        columns["conversation"] = entry.get("field_messages")
        columns |= {role: entry.get(f"field_{role}") for role in ("chosen", "rejected")}
    mapping = entry.get("message_property_mappings") or {}
    if mapping not in ({}, {"role": "role", "content": "content"}, {"role": "from", "content": "value"}):
        odd.append("message_property_mappings")
    if entry.get("revision"):
        odd.append("revision")
    if odd:
        draft.refuse("datasets", f"{name} has {', '.join(odd)}, which is not read here; give the data with --data")
        return None
    found = {"conversation": ("messages", "conversations", "conversation"), "prompt": ("prompt", "question")}
    named = [(ours, column) for ours, column in columns.items() if column and column not in found.get(ours, (ours,))]
    return Source(name, entry.get("split") or "train", entry.get("name"), columns=tuple(named))


def _is_plain(kind: dict[str, Any], key: str) -> bool:
    """Returns True for a format that writes the text of its column alone."""
    return kind.get(key) in (None, "{" + key.removesuffix("_format") + "}")


def _set_schedule(draft: Draft) -> None:
    schedule = draft.get("lr_scheduler", "cosine")
    origin = draft.pairs("lr_scheduler") or "lr_scheduler: cosine, its default"
    share = draft.get("cosine_min_lr_ratio")
    if schedule == "cosine" and share:
        draft.set("lr_scheduler_type", "cosine_with_min_lr", origin, of="lr_scheduler")
        draft.set("lr_scheduler_kwargs", {"min_lr_rate": share}, draft.pairs("cosine_min_lr_ratio"))
    else:
        draft.set("lr_scheduler_type", schedule, origin, of="lr_scheduler")
    if draft.get("warmup_steps") is None and draft.get("warmup_ratio") is None:
        draft.set("warmup_ratio", 0.03, "its default", "there at most 100 steps")


def _set_steps(draft: Draft) -> None:
    """Sets when to evaluate and save; a number of steps goes before a strategy."""
    for what in ("eval", "save"):
        steps, strategy = draft.get(f"{what}_steps"), draft.get(f"{what}_strategy")
        if steps:
            draft.set(f"{what}_strategy", "steps", draft.pairs(f"{what}_steps"))
            try:
                draft.set(f"{what}_steps", whole(steps), draft.pairs(f"{what}_steps"), of=f"{what}_steps")
            except CannotKeepError as error:
                draft.refuse(f"{what}_steps", str(error))
        elif strategy is not None:
            draft.set(f"{what}_strategy", strategy, draft.pairs(f"{what}_strategy"), of=f"{what}_strategy")
    if "save_strategy" not in draft.ours:
        draft.set("save_strategy", "epoch", "its default")


def _together(draft: Draft) -> None:
    _set_objective(draft)
    _set_method(draft)
    _set_template(draft, _set_data(draft))
    _set_schedule(draft)
    _set_steps(draft)


AXOLOTL = Trainer(
    name="axolotl",
    title="Axolotl",
    markers=frozenset({"base_model", "micro_batch_size", "sequence_len", "adapter", "rl", "rl_beta"}),
    rules=_RULES,
    together=_together,
    prefixes={
        **dict(each("wandb_ mlflow_ comet_ trackio_ swanlab_ otel_", _METRICS)),
        "liger_": Drop("log-probs are always taken in tiles"),
    },
    defaults={
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_length": 512,
        "dtype": "float32",
        "auto_insert_empty_system_msg": False,
        "chat_rendering": "in_context",
        "special_tokens_in_messages": "tokens",
    },
)
