"""Files of TRL (`CPOConfig`, `DPOConfig`, `ORPOConfig`), and of the alignment handbook: TRL's with a mixer."""

from __future__ import annotations

from typing import Any

from jax_simpo.config import foreign
from jax_simpo.config.convert.common import HUGGING_FACE, PEFT, set_adapter_defaults
from jax_simpo.config.convert.data import Source, file_or_hub, need_data, set_sources
from jax_simpo.config.convert.losses import set_cpo, set_dpo, set_orpo, set_simpo
from jax_simpo.config.convert.rules import Draft, Drop, Keep, Part, Refuse, Rule, Trainer, each, merged

_OF_CPO = ("simpo_gamma", "cpo_alpha")
_OF_DPO = ("rpo_alpha", "loss_weights", "f_divergence_type", "precompute_ref_log_probs", "sync_ref_model", "ld_alpha")
_CPO_LOSSES = ("simpo", "alphapo")  # of CPOTrainer alone
_DPO_LOSSES = ("robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm")

_RULES: dict[str, Rule] = merged(
    HUGGING_FACE,
    PEFT,
    {
        **dict(
            each("loss_type simpo_gamma cpo_alpha alpha loss_weights label_smoothing rpo_alpha", Part("`objective`"))
        ),
        "beta": Part("`beta`"),
        "simpo_gamma": Part("`gamma_beta_ratio`, which is simpo_gamma / beta"),
        "cpo_alpha": Part("`sft_weight`"),
        "rpo_alpha": Part("`sft_weight`"),
        **dict(
            each(
                "dataset_name dataset_config dataset_train_split dataset_test_split datasets dataset_mixture "
                "dataset_mixer dataset_splits dataset_configs",
                Part("`dataset_mixer` and `dataset_splits`"),
            )
        ),
        "test_split_size": Keep("test_size"),
        "dtype": Drop(foreign.WITHOUT_MEANING["torch_dtype"]),
        "chat_template": Keep("chat_template"),
        "tokenizer_name_or_path": Keep("tokenizer_name_or_path"),
        "auto_insert_empty_system_msg": Keep("auto_insert_empty_system_msg"),
        "preprocessing_num_workers": Keep("preprocessing_num_workers"),
        "dataset_num_proc": Keep("preprocessing_num_workers"),
        "max_length": Keep("max_length"),
        "max_prompt_length": Keep("max_prompt_length"),
        "truncation_mode": Keep("truncation_mode"),
        "ref_model": Keep("ref_model_name_or_path"),
        "model_adapter_name": Refuse("a run starts from a model, or from a fresh adapter on it"),
        "ref_adapter_name": Refuse("the reference is a model; name it in `ref_model_name_or_path`"),
        "reference_free": Refuse("a loss with a reference has one; for none take simpo, cpo or orpo"),
        "force_use_ref_model": Drop("objectives with a reference always have one"),
        "f_divergence_type": Refuse("the divergence is the reverse KL", ("reverse_kl",)),
        "f_alpha_divergence_coef": Drop("it is read with `f_divergence_type: alpha_divergence` alone"),
        "use_weighting": Refuse("pairs are not weighted by their probability (WPO); `weight_column` weighs them"),
        "ld_alpha": Refuse("tokens beyond the shorter answer count in full", (1, 1.0)),
        "sync_ref_model": Refuse("the reference is frozen"),
        "discopop_tau": Drop("it is read with `loss_type: discopop` alone"),
        "router_aux_loss_coef": Refuse("mixtures of experts are not trained"),
        "pad_token": Drop("padding is masked out and its token does not matter"),
        "dataset_kwargs": Refuse("unknown settings of a data set; remove them"),
        "streaming": Drop("data sets are read whole"),
        "dataset_streaming": Drop("data sets are read whole"),
        **dict(each("ref_model_mixup_alpha ref_model_sync_steps", Drop("they are read with `sync_ref_model` alone"))),
        **dict(
            each(
                "precompute_ref_log_probs precompute_ref_batch_size reference_batch_size",
                Drop("log-probs of the reference are always computed once, before training"),
            )
        ),
        **dict(
            each(
                "padding_free pad_to_multiple_of activation_offloading use_logits_to_keep base_model_attribute_name "
                "use_liger_loss max_completion_length ignore_bias_buffers",
                Drop("it says how the same numbers are computed; `packing`, `remat` and `logprob_chunk` do here"),
            )
        ),
    },
)


def _method(draft: Draft) -> str | None:
    """Finds the trainer that the file is for: CPOTrainer, DPOTrainer or ORPOTrainer."""
    if draft.options.method is not None:
        return draft.options.method
    loss = draft.get("loss_type")
    losses = loss if isinstance(loss, list) else [loss]
    if any(draft.get(key) is not None for key in _OF_CPO) or set(losses) & set(_CPO_LOSSES):
        return "cpo"
    if any(draft.get(key) is not None for key in _OF_DPO) or set(losses) & set(_DPO_LOSSES) or len(losses) > 1:
        return "dpo"
    draft.errors.append(
        "the file does not say which of TRL's trainers it is for (and other trainers have losses of the same names); "
        "add --from trl-dpo, --from trl-cpo or --from trl-orpo"
    )
    return None


def _set_objective(draft: Draft, method: str) -> None:
    beta = ("beta", draft.get("beta", 0.1))
    smoothing = ("label_smoothing", draft.get("label_smoothing", 0.0))
    if method == "orpo":
        set_orpo(draft, beta, "ORPOTrainer")
        return
    loss = draft.get("loss_type", "sigmoid")
    if method == "dpo":
        set_dpo(draft, ("loss_type", loss), ("loss_weights", draft.get("loss_weights")), beta, smoothing, "DPOTrainer")
        if weight := draft.get("rpo_alpha"):
            draft.set("sft_weight", weight, draft.pairs("rpo_alpha"), of="rpo_alpha")
        return
    origin = f"CPOTrainer, loss_type: {loss}"
    alpha = draft.get("alpha", 0.0)
    sft = ("cpo_alpha", 0.0 if loss == "alphapo" else draft.get("cpo_alpha", 1.0))
    if loss in ("simpo", "alphapo"):
        set_simpo(draft, beta, ("simpo_gamma", draft.get("simpo_gamma", 0.5)), sft, origin, alpha)
    elif loss in ("sigmoid", "hinge") and not alpha:
        set_cpo(draft, loss, beta, sft, origin)
    else:
        draft.refuse("loss_type", "of CPOTrainer's losses there are simpo, alphapo, sigmoid and hinge here")
        return
    if smoothing[1]:
        draft.set("label_smoothing", smoothing[1], draft.pairs("label_smoothing"), of="label_smoothing")


def _set_data(draft: Draft) -> None:
    test = draft.get("dataset_test_split", "test")
    train = draft.get("dataset_train_split", "train")
    evaluated = _is_evaluated(draft) and not draft.get("test_split_size")
    if mixer := draft.get("dataset_mixer"):
        if not isinstance(mixer, dict):
            draft.refuse("dataset_mixer", "expected a mapping from source to fraction")
            return
        splits = draft.get("dataset_splits", ["train", "test"])
        draft.set("dataset_mixer", mixer, draft.pairs("dataset_mixer"), of="dataset_mixer")
        draft.set("dataset_splits", splits, draft.pairs("dataset_splits") or "its default", of="dataset_splits")
        if configs := draft.get("dataset_configs"):
            draft.set("dataset_configs", configs, draft.pairs("dataset_configs"), of="dataset_configs")
    elif name := draft.get("dataset_name"):
        source = Source(name, train, draft.get("dataset_config"))
        origin = draft.pairs("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
        set_sources(draft, "dataset_name", [source], [test] if evaluated else [], origin)
    elif mixture := draft.get("dataset_mixture"):
        _set_mixture(draft, mixture)
    elif (listed := draft.get("datasets")) and (sources := _listed(draft, "datasets", listed)) is not None:
        set_sources(draft, "datasets", sources, [], f"datasets ({len(sources)})")
    elif draft.options.data:
        set_sources(draft, "dataset_name", [], [test] if evaluated else [], "--data")
    need_data(draft, "`dataset_name` or `dataset_mixer`")


def _is_evaluated(draft: Draft) -> bool:
    """Returns True if the file asks for evaluations."""
    strategy = draft.get("eval_strategy", draft.get("evaluation_strategy", "no"))
    return strategy not in ("no", False) or draft.get("do_eval") is True


def _set_mixture(draft: Draft, mixture: Any) -> None:
    """Sets the handbook's newer mixture: data sets with weights, and perhaps the size of the test split.

    Its recipes put the splits for training and for testing of a data set together and draw the test split anew.
    """
    mixture = mixture if isinstance(mixture, dict) else {}
    sources = _listed(draft, "dataset_mixture", mixture.get("datasets"))
    if sources is None:
        return
    trained = [source for source in sources if "train" in source.split]
    others = list(dict.fromkeys(source.split for source in sources if source not in trained))
    size = mixture.get("test_split_size")
    if not trained or not others or not size:
        trained, others = sources, []
    set_sources(draft, "dataset_mixture", trained, others, f"dataset_mixture ({len(sources)})")
    if others and "dataset_splits" in draft.ours:
        note = f"there {', '.join(others)} is trained on too, and a test split of {size} drawn from all"
        line = draft.ours["dataset_splits"]
        draft.set("dataset_splits", line.value, line.origin, note)
    elif size:
        draft.set("test_size", size, "dataset_mixture.test_split_size", of="dataset_mixture")
    if any(source.fraction < 1 for source in trained):
        draft.set("shuffle_seed", mixture.get("seed") or 0, "dataset_mixture.seed", of="dataset_mixture")


def _listed(draft: Draft, key: str, listed: Any) -> list[Source] | None:
    """Reads a list of data sets."""
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        draft.refuse(key, "expected a list of data sets, each a mapping")
        return None
    sources = []
    for entry in listed:
        name = file_or_hub(draft, key, entry.get("path") or entry.get("id"), entry.get("data_files"))
        config = entry.get("name") or entry.get("config")
        fraction = entry.get("fraction") if entry.get("fraction") is not None else entry.get("weight")
        if name is None:
            return None
        sources.append(Source(name, entry.get("split") or "train", config, 1.0 if fraction is None else fraction))
    return sources


def _together(draft: Draft) -> None:
    method = _method(draft)
    if method is not None:
        _set_objective(draft, method)
    _set_data(draft)
    if draft.get("use_peft"):
        set_adapter_defaults(draft, 16, 32, 0.05, "TRL's")
    if "auto_insert_empty_system_msg" not in draft.ours:
        handbook = draft.get("dataset_mixer") is not None
        origin = "the alignment handbook's default" if handbook else "TRL writes none"
        draft.set("auto_insert_empty_system_msg", handbook, origin)
    if draft.get("dataset_mixer") is None:  # the handbook writes answers as the original SimPO does
        draft.set("chat_rendering", "in_context", "TRL's way")


TRL = Trainer(
    name="trl",
    title="TRL",
    markers=frozenset({*_OF_CPO, *_OF_DPO, "dataset_name", "dataset_train_split", "dataset_mixture"}),
    rules=_RULES,
    together=_together,
    # Those of TRL's three configurations, which differ from transformers' and from ours.
    defaults={"learning_rate": 1e-6, "max_length": 1024, "dtype": "bfloat16", "special_tokens_in_messages": "tokens"},
)
