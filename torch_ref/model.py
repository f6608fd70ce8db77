"""Loads transformers models, and computes the log-probabilities of targets from their hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError, ModelError
from jax_simpo.gguf_files import means_gguf
from jax_simpo.run.listed import weight_files
from jax_simpo.run.sums import check_model_sums
from torch_ref.adapters import add_adapter, base_of_adapter, load_adapter, quantization
from torch_ref.attention import RowMask, register
from torch_ref.attention_choice import AttentionChoice, uses_rows
from torch_ref.batches import Batch

TARGETS_A_CHUNK = 1024  # unless `logprob_chunk` says otherwise
_MOST_LAYERS = 10_000  # as on the other side
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TargetLogps(nn.Module):
    """The LM head with a log-softmax over the vocabulary in float32, for a chunk of targets at a time.

    It shares its weight with the model's own head, which is never called. Because it is a module, ZeRO-3 gathers its
    weight once for all chunks, however many chunks a rank has. The backward pass recomputes the logits of each chunk.

    Args:
        head: the model's output layer.
        softcap: the soft cap of the logits; None for none.
        chunk: most targets per chunk.
    """

    def __init__(self, head: nn.Linear, softcap: float | None, chunk: int) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.softcap, self.chunk = softcap, chunk

    def forward(self, hidden: Float[Tensor, "N D"], token: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Returns the log-probability of each token under the hidden state that predicts it, float32."""
        chunks = zip(hidden.split(self.chunk), token.split(self.chunk), strict=True)  # one empty chunk without targets
        logps = [checkpoint(self._chunk, h, t, self.weight, use_reentrant=False) for h, t in chunks]
        return torch.cat(logps)

    def _chunk(self, hidden: Tensor, token: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, self.bias).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


class Policy(nn.Module):
    """A causal language model that returns the log-probabilities of targets.

    Args:
        causal_lm: a transformers model with a plain output layer, or peft's wrapper of one.
        chunk: most targets that the head takes at a time.

    Raises:
        ConfigError: the output layer is quantised or has an adapter.
    """

    causal_lm: Any  # a `PreTrainedModel`, or peft's wrapper of one

    def __init__(self, causal_lm: Any, chunk: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        config = causal_lm.config
        head = causal_lm.get_output_embeddings()
        # `isinstance` would accept subclasses: adapted and quantised layers, whose weight alone is not the head.
        if type(head) is not nn.Linear:
            raise ConfigError(
                f"the model's output layer is a {type(head).__name__}, and must be a plain one. Leave it out of "
                "`lora_target_modules`"
            )
        self.head = TargetLogps(head, getattr(config, "final_logit_softcapping", None), chunk)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head, and without peft's wrapper."""
        base = self.causal_lm.get_base_model() if hasattr(self.causal_lm, "get_base_model") else self.causal_lm
        return base.get_decoder()

    def forward(self, batch: Batch) -> Float[Tensor, " N"]:
        """Returns the log-probability of every target of a batch, float32. Prompts and padding never reach the head."""
        if batch.key_end is not None:
            assert batch.positions is not None
            mask = {"position_ids": batch.positions, "rows": RowMask(batch.key_end, batch.positions)}
        else:
            mask = {"attention_mask": batch.attention_mask}
        hidden = self.decoder(input_ids=batch.tokens, use_cache=False, **mask).last_hidden_state
        return self.head(hidden[batch.target_line, batch.target_index], batch.target_token)

    def free(self) -> None:
        """Frees the memory of the weights; the policy cannot be used any more.

        Letting go of a policy is not enough: DeepSpeed keeps partitioned modules in caches until the process ends.
        """
        for parameter in self.parameters():
            partition = getattr(parameter, "ds_tensor", parameter)
            partition.data = partition.new_empty(0)
            parameter.data = parameter.new_empty(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------
# Configuration and weights
# ---------------------------------------------------------------------------------------------------------------


def load_model_config(config: TrainConfig, choice: str | None, new_model: dict[str, Any]) -> Any:
    """Returns the transformers configuration of the model that a run starts from, with every dropout switched off.

    Args:
        config: the run's settings.
        choice: a folder or hub id in place of the config's model.
        new_model: `model_config` with the tokenizer's sizes filled in, used if there is no model to start from.

    Raises:
        ModelError: there is no such model, transformers does not know its family, or the family is not supported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    name = base_of_adapter(choice) or choice or config.model_name_or_path
    try:
        if name is not None:
            revision = (config.model_revision if choice is None else None) or "main"
            _check_layers(f"model {name}", PretrainedConfig.get_config_dict(name, revision=revision)[0])
            model_config = AutoConfig.from_pretrained(name, revision=revision)
        else:
            fields = dict(new_model)
            model_type = fields.pop("model_type", None)
            if model_type is None:
                raise ModelError("`model_config` has no `model_type`, such as llama, mistral, gemma2 or qwen3; add it")
            _check_layers("`model_config`", fields)
            model_config = AutoConfig.for_model(model_type, **fields)
    # transformers raises different types for a missing folder, no network, broken JSON and an unknown family.
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". Should contain one of")[0]  # not hundreds of names
        raise ModelError(
            f"model {name or '`model_config`'}: its configuration cannot be used ({reason}). Give a folder with "
            "config.json or a hub id, of a family that transformers knows"
        ) from error
    if type(model_config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"model {name or '`model_config`'}: the family `{model_config.model_type}` is no causal language model. "
            "Use a decoder-only one, such as llama, mistral, gemma2 or qwen3"
        )
    for key in ("logit_scale", "logits_scaling"):
        if getattr(model_config, key, None) not in (None, 1, 1.0):
            raise ModelError(
                f"the family `{model_config.model_type}` scales its logits (`{key}`), which is not built in"
            )
    for key in vars(model_config):
        if key.endswith(("dropout", "pdrop")) and isinstance(getattr(model_config, key), float):
            setattr(model_config, key, 0.0)
    return model_config


def refuse_gguf(*names: str | None) -> None:
    """Raises ModelError if a model is a GGUF file, which the trainer in JAX alone reads."""
    for name in names:
        if name is not None and means_gguf(name):
            raise ModelError(
                f"model {name}: the PyTorch reference reads no GGUF files. Make a folder of it first with "
                f"`jax-simpo export CONFIG --model={name} --output=FOLDER`, and give that as the model"
            )


def _check_layers(name: str, fields: dict[str, Any]) -> None:
    """Raises ModelError for more layers than any model has: transformers lists them all before it sees the weights."""
    layers = fields.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(f"{name}: num_hidden_layers={layers}, expected at most {_MOST_LAYERS:,}")


def count_parameters(model_config: Any) -> int:
    """Returns the number of a model's parameters, without building it. A tied head counts once.

    Raises:
        RuntimeError: models are made partitioned now, so that their parameters look empty.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise RuntimeError("count a model's parameters before a `Zero3Model` exists: partitioned ones look empty")
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())


def load_policy(
    config: TrainConfig,
    model_config: Any,
    attention: AttentionChoice,
    device: torch.device,
    *,
    choice: str | None = None,
    dtype: torch.dtype,
    trained: bool = True,
) -> Policy:
    """Builds the model and loads its weights.

    Under ZeRO-3 (while a `HfDeepSpeedConfig` exists) parameters are created partitioned, and the checkpoint is copied
    into them one module at a time.

    Args:
        config: the run's settings.
        model_config: from `load_model_config`.
        attention: from `choose_attention`.
        device: the device of the weights; under ZeRO-3 DeepSpeed chooses it.
        choice: a folder or hub id in place of the config's model.
        dtype: the dtype of the weights.
        trained: True prepares the model for training, with adapter and gradient checkpointing as configured.

    Raises:
        ModelError: the weights are missing or do not fit the configuration, or the model cannot use rows.
        ConfigError: the adapter or the quantisation cannot be used here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    logging.disable_progress_bar()
    register()
    base = base_of_adapter(choice)
    name = base or choice or config.model_name_or_path
    for folder in filter(None, (name, choice)):  # what a hub id names has no such folder
        check_model_sums(Path(folder))
        weight_files(Path(folder))  # transformers would read whatever file an index names
    extra: dict[str, Any] = {"attn_implementation": attention.registered, "dtype": dtype}
    torch.manual_seed(config.seed)
    if name is None:
        causal_lm = AutoModelForCausalLM.from_config(model_config, **extra)
    else:
        partitioned = is_deepspeed_zero3_enabled()
        quantized = quantization(config, device, partitioned=partitioned) if choice is None else {}
        try:
            causal_lm, loading = AutoModelForCausalLM.from_pretrained(
                name,
                config=model_config,
                revision=config.model_revision if choice is None else None,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
                **quantized,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"model {name}: its weights cannot be loaded ({reason})") from error
        _check_complete(name, loading)
        if base is not None:
            assert choice is not None
            causal_lm = load_adapter(causal_lm, choice)
    if uses_rows(config) and not causal_lm._supports_attention_backend:
        raise ModelError(
            f"transformers' `{model_config.model_type}` has no exchangeable attention, which rows need. Set "
            "`prefix_sharing` and `packing` to false"
        )
    if trained:
        if config.remat != "none":
            _recompute_layers(causal_lm)
        causal_lm = add_adapter(config, causal_lm)
    policy = Policy(causal_lm, TARGETS_A_CHUNK if config.logprob_chunk == "auto" else config.logprob_chunk)
    if not is_deepspeed_zero3_enabled() and not getattr(causal_lm, "is_quantized", False):
        policy.to(device)
    return policy.train(trained)


def _recompute_layers(causal_lm: Any) -> None:
    """Makes the layers keep only their input, and recompute the rest in the backward pass."""
    # Later releases of transformers 5 have a new name for it.
    renamed = getattr(causal_lm, "activation_checkpointing_enable", None)
    enable = renamed or causal_lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check_complete(name: str, loading: dict[str, Any]) -> None:
    """Raises ModelError for an incomplete checkpoint: transformers only warns, and fills it with random numbers."""
    missing, wrong = sorted(loading["missing_keys"]), sorted(map(str, loading["mismatched_keys"]))
    if missing or wrong:
        fault = f"lacks {len(missing)} tensors, such as {missing[0]}" if missing else f"has other shapes: {wrong[0]}"
        raise ModelError(f"model {name}: the checkpoint {fault}. Its files are incomplete, or not of this config.json")
