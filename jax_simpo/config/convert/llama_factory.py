"""Files of LLaMA-Factory, stage `dpo` (read off its version 0.9.5: `hparams`, `train/dpo`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_simpo.config.convert.common import HUGGING_FACE, modules
from jax_simpo.config.convert.data import Source, need_data, set_sources
from jax_simpo.config.convert.losses import set_dpo, set_simpo
from jax_simpo.config.convert.rules import (
    CannotKeepError,
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
from jax_simpo.pages import page_url

# Its template -> one that comes with this program.
TEMPLATES = {
    "llama3": "llama-3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "mistral": "mistral-instruct",
    "zephyr": "zephyr",
}
# A column of its dataset_info.json -> ours, and the name it has where nothing is said.
_COLUMNS = {
    "alpaca": {
        "prompt": ("instruction", "instruction"),
        "query": ("input", "input"),
        "history": ("history", None),
        "system": ("system", None),
        "tools": ("tools", None),
        "chosen": ("chosen", None),
        "rejected": ("rejected", None),
    },
    "sharegpt": {
        "messages": ("conversation", "conversations"),
        "system": ("system", None),
        "tools": ("tools", None),
        "chosen": ("chosen", None),
        "rejected": ("rejected", None),
    },
}
_COLUMNS["openai"] = _COLUMNS["sharegpt"]
_FOUND = {"conversation": ("conversations", "messages", "conversation")}  # names that are found without being told
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}

_RULES: dict[str, Rule] = merged(
    HUGGING_FACE,
    {
        **dict(
            each(
                "stage pref_loss pref_beta simpo_gamma pref_ftx dpo_label_smoothing",
                Part("`objective`, `beta`, `gamma_beta_ratio` (simpo_gamma / pref_beta) and `sft_weight` (pref_ftx)"),
            )
        ),
        "pref_beta": Part("`beta`"),
        "simpo_gamma": Part("`gamma_beta_ratio`, which is simpo_gamma / pref_beta"),
        "pref_ftx": Part("`sft_weight`"),
        "dpo_label_smoothing": Part("`label_smoothing`"),
        **dict(each("finetuning_type lora_rank lora_alpha lora_target", Part("`use_peft`, `lora_r` and their like"))),
        "lora_rank": Part("`lora_r`"),
        **dict(each("dataset dataset_dir eval_dataset val_size media_dir", Part("`dataset_mixer` and `test_size`"))),
        "template": Part("`chat_template`"),
        "model_name_or_path": Keep("model_name_or_path"),
        "cutoff_len": Keep("max_length"),
        "max_samples": Keep("max_samples"),
        "preprocessing_num_workers": Keep("preprocessing_num_workers"),
        "lora_dropout": Keep("lora_dropout"),
        "ref_model": Keep("ref_model_name_or_path"),
        "quantization_bit": Refuse("weights are not quantised; `mesh.fsdp` and `remat` save memory"),
        "adapter_name_or_path": Refuse("a run starts from a model; merge the adapter, and name the merged model"),
        "ref_model_adapters": Refuse("the reference is a model; merge the adapter and name the model"),
        "ref_model_quantization_bit": Refuse("weights are not quantised"),
        "pref_bco_weight": Refuse("there is no sum with the BCO loss"),
        "ld_alpha": Refuse("tokens beyond the shorter answer count in full", (1, 1.0)),
        "additional_target": Refuse("with `use_peft` only the adapter is trained"),
        "loraplus_lr_ratio": Refuse("both matrices of an adapter have one learning rate"),
        "use_rslora": Refuse("an adapter is scaled by `lora_alpha` / `lora_r`; give a `lora_alpha` that says the same"),
        "freeze_trainable_layers": Drop("it is read with `finetuning_type: freeze` alone"),
        "create_new_adapter": Drop("an adapter is always new"),
        "rope_scaling": Refuse("models are trained with the positions of their `config.json`"),
        "train_on_prompt": Refuse("prompts are not scored"),
        "streaming": Drop("data sets are read whole"),
        "mix_strategy": Refuse("sources are put together and shuffled", ("concat",)),
        "interleave_probs": Refuse("sources are put together and shuffled; `dataset_mixer` has fractions"),
        "disable_shuffling": Refuse("pairs are always shuffled, by `seed`"),
        "default_system": Refuse("give each row a `system` message, or change `chat_template`"),
        "tool_format": Drop("the chat template writes calls of tools"),
        "enable_thinking": Drop("the chat template writes what messages say"),
        "mask_history": Drop("only the last answer is scored, unless `train_on` says otherwise"),
        "flash_attn": Drop("`attention` chooses the kernel; all compute the same"),
        "pure_bf16": Drop("parameters that are trained are kept in float32"),
        "disable_gradient_checkpointing": Drop("`remat` says what is recomputed"),
        "split_special_tokens": Keep("special_tokens_in_messages", lambda splits: "text" if splits else "tokens"),
        "fp8": Refuse("`dtype` is float32 or bfloat16"),
        "early_stopping_steps": Keep("early_stopping_patience"),
        "resize_vocab": Refuse("a model's vocabulary stays as it is"),
        **dict(each("add_tokens add_special_tokens new_special_tokens_config", Refuse("tokenizers stay as they are"))),
        "hf_hub_token": Drop("`hf auth login` serves private models and data sets"),
        "cache_dir": Drop("HF_HOME says where downloads are kept"),
        **dict(
            each(
                "use_dora pissa_init use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro use_dft_loss "
                "use_asft_loss use_eaft_loss use_mca shift_attn use_kt mixture_of_depths use_hyper_parallel",
                Refuse("there is no such method here"),
            )
        ),
        **dict(
            each(
                "packing neat_packing overwrite_cache preprocessing_batch_size tokenized_path data_shared_file_system "
                "eval_on_each_dataset ignore_pad_token_for_loss buffer_size eval_num_beams plot_loss compute_accuracy "
                "include_effective_tokens_per_second use_fast_tokenizer low_cpu_mem_usage enable_liger_kernel "
                "use_unsloth use_unsloth_gc use_reentrant_gc upcast_layernorm upcast_lmhead_output double_quantization "
                "quantization_type quantization_method quantization_device_map print_param_status infer_backend "
                "infer_dtype offload_folder use_kv_cache use_v1_kernels freeze_vision_tower "
                "freeze_multi_modal_projector freeze_language_model image_max_pixels image_min_pixels "
                "video_max_pixels video_min_pixels ray_num_workers ray_init_kwargs master_addr master_port "
                "predict_with_generate use_swanlab swanlab_project swanlab_run_name swanlab_workspace swanlab_mode "
                "swanlab_api_key swanlab_logdir",
                Drop("it concerns LLaMA-Factory's own runtime"),
            )
        ),
    },
)


def _set_objective(draft: Draft) -> None:
    if "train_dataset" in draft.theirs and "stage" not in draft.theirs:
        draft.errors.insert(
            0, "this is the form of LLaMA-Factory's version 1 (`train_dataset`), which is not read here"
        )
        return
    if draft.get("stage", "sft") != "dpo":
        draft.refuse("stage", "only `stage: dpo` (DPO, SimPO, ORPO and their like) is trained here")
        return
    loss = draft.get("pref_loss", "sigmoid")
    beta = ("pref_beta", draft.get("pref_beta", 0.1))
    sft = ("pref_ftx", draft.get("pref_ftx", 0.0))
    smoothing = ("dpo_label_smoothing", draft.get("dpo_label_smoothing", 0.0))
    origin = f"stage: dpo, pref_loss: {loss}"
    if loss == "simpo":
        set_simpo(draft, beta, ("simpo_gamma", draft.get("simpo_gamma", 0.5)), sft, origin)
    elif loss == "orpo":
        draft.set("objective", "orpo", origin)
        draft.set("beta", beta[1], draft.pairs("pref_beta") or "its default", of="pref_beta")
        draft.set("sft_over", "response", origin, "TRL's ORPO takes prompt and response")
        draft.set("sft_weight", 1.0 + sft[1], f"ORPO's own 1 + pref_ftx {sft[1]:g}", of="pref_ftx")
    elif loss in ("sigmoid", "hinge", "ipo"):
        set_dpo(draft, ("pref_loss", loss), ("", None), beta, smoothing, "stage: dpo", smoothing_note="")
        draft.set("sft_weight", sft[1], draft.pairs("pref_ftx") or "pref_ftx: 0, its default", of="pref_ftx")
    else:
        draft.refuse("pref_loss", "there are sigmoid, hinge, ipo, simpo and orpo here")
        return
    line = draft.ours["sft_weight"]
    if line.value:
        note = "there the mean over responses of each one's mean, here the mean over all their tokens"
        draft.set("sft_weight", line.value, line.origin, note, of="pref_ftx")


def _set_method(draft: Draft) -> None:
    kind = draft.get("finetuning_type", "lora")
    origin = draft.pairs("finetuning_type") or "finetuning_type: lora, its default"
    if kind == "full":
        draft.set("use_peft", False, origin)
        return
    if kind != "lora":
        draft.refuse("finetuning_type", "there are full and lora here")
        return
    rank = draft.get("lora_rank", 8)
    draft.set("use_peft", True, origin)
    draft.set("lora_r", rank, draft.pairs("lora_rank") or "lora_rank: 8, its default", of="lora_rank")
    alpha = draft.get("lora_alpha", 2 * rank if isinstance(rank, int) else rank)
    draft.set("lora_alpha", alpha, draft.pairs("lora_alpha") or "twice lora_rank, its default", of="lora_alpha")
    try:
        layers = modules(draft.get("lora_target", "all"))
    except CannotKeepError as error:
        draft.refuse("lora_target", str(error))
        return
    draft.set("lora_target_modules", layers, draft.pairs("lora_target") or "lora_target: all, its default")


def _set_template(draft: Draft) -> None:
    template = draft.get("template")
    if template in TEMPLATES:
        draft.set("chat_template", TEMPLATES[template], shown_pair("template", template))
    elif template is not None:
        draft.dropped["template"] = (
            "the tokenizer's own chat template is used; if it is not this one, name a file in `chat_template`"
        )


def _names(value: Any) -> list[str]:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])


def _set_data(draft: Draft) -> None:
    sources = []
    if not draft.options.data:
        folder, names = draft.get("dataset_dir", "data"), _names(draft.get("dataset"))
        infos = {} if folder == "ONLINE" else _dataset_info(draft, folder, names)
        if infos is None:
            return
        for name in names:
            source = Source(name) if folder == "ONLINE" else _source(draft, name, infos.get(name))
            if source is None:
                return
            sources.append(source)
    set_sources(draft, "dataset", sources, [], draft.pairs("dataset", "dataset_dir"))
    if (held_out := draft.get("val_size")) is not None and held_out > 0:
        draft.set("test_size", held_out, draft.pairs("val_size"), of="val_size")
    if draft.get("eval_dataset") is not None:
        draft.refuse(
            "eval_dataset",
            "evaluation data are a split of the training data's folder here: put both into one folder as train.jsonl "
            "and test.jsonl, and give it with --data; or take `val_size`",
        )
    need_data(draft, "`dataset`")


def _dataset_info(draft: Draft, folder: str, names: list[str]) -> dict[str, Any] | None:
    """Reads dataset_info.json, which says what the names of data sets stand for."""
    places = [Path(draft.folder) / folder, Path(folder)]
    file = next((place / "dataset_info.json" for place in places if (place / "dataset_info.json").is_file()), None)
    if file is None:
        if names:
            draft.refuse(
                "dataset",
                f"its names stand in dataset_info.json, which is not in {places[0]}; give the data with --data SOURCE "
                f"(its formats are read: {page_url('data-formats')})",
            )
        return None if names else {}
    try:
        infos = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        draft.refuse("dataset_dir", f"{file} cannot be read ({error})")
        return None
    if not isinstance(infos, dict):
        draft.refuse("dataset_dir", f"{file} is no mapping of names")
        return None
    draft.dropped.setdefault("dataset_dir", f"{file} has been read")
    # Files are named beside dataset_info.json.
    return {name: {**info, "folder": str(file.parent)} for name, info in infos.items() if isinstance(info, dict)}


def _source(draft: Draft, name: str, info: Any) -> Source | None:
    """Makes a source of an entry of dataset_info.json."""
    if not isinstance(info, dict):
        draft.refuse("dataset", f"dataset_info.json has no entry {name}")
        return None
    formatting = info.get("formatting", "alpaca")
    if not info.get("ranking"):
        draft.refuse("dataset", f"{name} is no ranking (`ranking: true`), so it has nothing to prefer")
        return None
    tags = info.get("tags") or {}
    odd = [f"{tag}: {tags[tag]}" for tag in tags if tags[tag] not in _TAGS.get(tag, ())]
    if formatting not in _COLUMNS or odd or info.get("num_samples"):
        reason = ", ".join(odd) or (f"formatting: {formatting}" if formatting not in _COLUMNS else "num_samples")
        draft.refuse("dataset", f"{name} in dataset_info.json has {reason}, which is not read here")
        return None
    path = info.get("hf_hub_url") or (f"{info['folder']}/{info['file_name']}" if "file_name" in info else None)
    if path is None:
        draft.refuse("dataset", f"{name} in dataset_info.json has neither `hf_hub_url` nor `file_name`")
        return None
    given = info.get("columns") or {}
    columns = []
    # Without a column for the input, a prompt is the instruction alone.
    alone = formatting == "alpaca" and bool(given) and not {"query", "history"} & given.keys()
    for theirs, (ours, default) in _COLUMNS[formatting].items():
        ours = "prompt" if alone and ours == "instruction" else ours
        column = given.get(theirs) if given else default
        if column is not None and column not in _FOUND.get(ours, (ours,)):
            columns.append((ours, column))
    name_of_format = "pairs" if alone else "alpaca" if formatting == "alpaca" else "conversation"
    return Source(path, info.get("split") or "train", info.get("subset"), 1.0, name_of_format, tuple(columns))


def _together(draft: Draft) -> None:
    _set_objective(draft)
    _set_method(draft)
    _set_template(draft)
    _set_data(draft)


LLAMA_FACTORY = Trainer(
    name="llama-factory",
    title="LLaMA-Factory",
    markers=frozenset(
        {"stage", "finetuning_type", "pref_beta", "pref_loss", "pref_ftx", "cutoff_len", "dataset_dir", "lora_target"}
    ),
    rules=_RULES,
    together=_together,
    # Those of the Hugging Face trainer; without bf16 it computes in float32.
    defaults={
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "max_length": 2048,
        "dtype": "float32",
        "auto_insert_empty_system_msg": False,
        "chat_rendering": "in_context",
        "special_tokens_in_messages": "tokens",
    },
)
