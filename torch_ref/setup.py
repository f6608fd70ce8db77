"""Builds the objects of a run from its config: tokenizer, data, step plan, model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float

from jax_simpo.config import TrainConfig
from jax_simpo.data import chat, sources
from jax_simpo.data.loader import Known
from jax_simpo.data.packing import StepPlan, grow_micro_batches, make_step_plan
from jax_simpo.data.selection import HELD_OUT, Selection
from jax_simpo.data.tokenize import GroupDataset, settings_of, tokenize_split
from jax_simpo.errors import ConfigError, ModelError
from jax_simpo.run.reference_cache import model_digest
from torch_ref.adapters import base_of_adapter
from torch_ref.attention_choice import AttentionChoice, choose_attention
from torch_ref.distributed import Ranks
from torch_ref.model import DTYPES, Policy, count_parameters, load_model_config, load_policy, refuse_gguf
from torch_ref.objectives import Objective
from torch_ref.start_weights import weights_folder

_LONGEST_ROW = 16384  # longer rows would not be filled better
_LONGEST_DENSE_ROW = 2048  # attention that skips no blocks costs the square of the length
_BYTES_PER_TOKEN_AND_WIDTH = 200  # a rough upper bound for a layer's activations and the inputs that are kept


@dataclass(frozen=True)
class Setup:
    """The objects of a run, each built from the config when it is first used. It prints nothing.

    Attributes:
        config: the run's settings.
        ranks: the place of this process among the ranks.
        model_choice: the value of `--model`: a folder or hub id in place of the config's model.
        given_tokenizer: the tokenizer to use, whatever the model says.
    """

    config: TrainConfig
    ranks: Ranks
    model_choice: str | None = None
    given_tokenizer: Any = None

    def __post_init__(self) -> None:
        refuse_gguf(self.start_name, self.config.ref_model_name_or_path)

    @cached_property
    def objective(self) -> Objective:
        """The loss that the config describes."""
        return Objective.of(self.config)

    @property
    def start_name(self) -> str | None:
        """The folder or hub id of the model; None for a new one with random weights."""
        return self.model_choice or self.config.model_name_or_path

    @cached_property
    def reference(self) -> Setup:
        """The setup of the frozen reference: `ref_model_name_or_path`, or the model that the run starts from.

        A run's adapter adds nothing to its base at first, so the start of a run with one is the base. The reference
        scores the tokens of the run, whatever its own tokenizer.
        """
        return Setup(self.config, self.ranks, self.config.ref_model_name_or_path, self.tokenizer)

    @cached_property
    def start_weights(self) -> list[str] | dict[str, Any]:
        """Identifies the weights to start from. Every rank asks for it.

        It is the digest of the model's folder; for an adapter, those of its base's folder and its own. For a new model
        it is all that random weights depend on.
        """
        config, ranks, name = self.config, self.ranks, self.start_name
        if name is not None:
            return ranks.first(lambda: _digests(name, config.model_revision if self.model_choice is None else None))
        # What a seed gives depends on the libraries, on the device, and on whether models are made partitioned.
        return {
            "model": self.new_model_mapping(),
            "seed": config.seed,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": ranks.device.type,
            "partitioned": ranks.launched,
        }

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with its chat template.

        Raises:
            DataError: there is no such tokenizer, or its template cannot be used.
        """
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        config = self.config
        return chat.load_tokenizer(
            config.tokenizer_name_or_path or self.model_choice or config.model_name_or_path or "",
            chat_template=config.chat_template,
            chat_rendering=config.chat_rendering,
            trust_remote_code=config.trust_remote_code,
            revision=config.model_revision if not config.tokenizer_name_or_path and not self.model_choice else None,
        )

    @cached_property
    def model_config(self) -> Any:
        """The model's transformers configuration.

        Raises:
            ModelError: there is no such model, it is not supported, or it has fewer tokens than the tokenizer.
        """
        model_config = load_model_config(self.config, self.model_choice, self.new_model_mapping())
        if len(self.tokenizer) > model_config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model only {model_config.vocab_size}. Use the "
                "tokenizer the model was trained with (`tokenizer_name_or_path`), or raise `model_config.vocab_size`"
            )
        return model_config

    def new_model_mapping(self) -> dict[str, Any]:
        """Returns `model_config`, with the tokenizer's size and special tokens where it does not give its own."""
        ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {"vocab_size": len(self.tokenizer), **ids, **(self.config.new_model_config or {})}

    @cached_property
    def parameter_count(self) -> int:
        """The number of the model's parameters. Ask for it before a model is made partitioned."""
        return count_parameters(self.model_config)

    @cached_property
    def attention(self) -> AttentionChoice:
        """The attention implementation and the reason for it."""
        return choose_attention(self.config, self.model_config, self.ranks.device)

    def load_policy(self, dtype: torch.dtype | None = None, *, trained: bool) -> Policy:
        """Builds the model and loads its weights, in `dtype` or else the compute dtype."""
        return load_policy(
            self.config,
            self.model_config,
            self.attention,
            self.ranks.device,
            choice=self.model_choice,
            dtype=dtype or DTYPES[self.config.dtype],
            trained=trained,
        )

    # --- data

    def global_batch_size(self, saved: int | None = None) -> int:
        """Returns the groups per optimizer step: as configured, else as `saved`, else from the per-device keys.

        Args:
            saved: the groups per step of the run that is continued.

        Raises:
            ConfigError: the groups cannot be shared out equally among the ranks.
        """
        config, world = self.config, self.ranks.world
        per_device = config.per_device_train_batch_size * config.gradient_accumulation_steps
        batch = config.global_batch_size or saved or per_device * world
        if batch % world:
            raise ConfigError(
                f"`global_batch_size` is {batch}, which {world} ranks cannot share out equally. Give a multiple of "
                f"{world}, such as {batch // world * world + world}, or start another number of processes"
            )
        return batch

    def train_pairs(self) -> GroupDataset:
        """Reads and tokenises the training groups."""
        config = self.config
        selection = Selection.of(config)
        raw = sources.load_train(
            config.dataset_mixer, config.train_splits, selection, weight_column=config.weight_column
        )
        return self._tokenize(raw)

    def known(
        self, groups: GroupDataset, reference: Float[np.ndarray, " R"] | None = None, *, training: bool = False
    ) -> Known:
        """Returns what the objective reads of groups besides their tokens.

        Args:
            groups: the groups of a split.
            reference: the sums of their responses under the reference, for an objective that needs one.
            training: True for the groups that are trained on, whose weights count.

        Raises:
            DataError: the objective weighs comparisons by scores, and some groups have none.
        """
        scores = groups.scores if self.objective.compare_weights == "score_gap" else None
        weights = groups.weights if training and self.config.weight_column is not None else None
        return Known(reference, scores, weights)

    def eval_pairs(self) -> GroupDataset:
        """Reads and tokenises the groups of all evaluation splits, or those that `test_size` holds out.

        Raises:
            ConfigError: `dataset_splits` names no split to evaluate.
        """
        config = self.config
        if config.test_size is not None:
            return self.split_pairs(HELD_OUT)
        if not config.eval_splits:
            raise ConfigError(
                f"`dataset_splits` {config.dataset_splits} names no split to evaluate: those have no `train` in their "
                "name. Add one, or set `do_eval: false`"
            )
        raw = sources.load_eval(config.dataset_mixer, config.eval_splits, Selection.of(config))
        return self._tokenize(raw)

    def split_pairs(self, split: str) -> GroupDataset:
        """Reads and tokenises the groups of a whole split, in file order; `held_out` is `test_size`'s."""
        config = self.config
        raw = sources.load_named(config.dataset_mixer, split, config.train_splits, Selection.of(config))
        return self._tokenize(raw)

    def _tokenize(self, raw: sources.RawSplit) -> GroupDataset:
        config = self.config
        return tokenize_split(  # one rank of a machine tokenises; the others wait and read its cache
            raw,
            self.tokenizer,
            **settings_of(config),
            progress=None if self.ranks.is_first else False,
        )

    def step_plan(self, groups: GroupDataset, *, batch: int, seed: int | None) -> StepPlan:
        """Makes the step plan of a split and checks that every group fits a row.

        Args:
            groups: the groups of the split.
            batch: groups per step.
            seed: the seed of the order; None keeps file order.

        Raises:
            DataError: a group does not fit.
        """
        config = self.config
        rows = 1 if config.rows_per_device == "auto" else config.rows_per_device
        plan = make_step_plan(
            groups.lengths,
            global_batch_size=batch,
            rows_per_micro_batch=rows * self.ranks.world,
            prefix_sharing=config.prefix_sharing,
            packing=config.packing,
            seed=seed,
            row_length=None if config.row_length == "auto" else config.row_length,
            max_row_length=min(
                self._most_tokens // rows, _LONGEST_ROW if self.attention.name == "flex" else _LONGEST_DENSE_ROW
            ),
            prompt_targets=self.objective.reads_prompts,
        )
        plan.check(groups.origin)
        most = self.most_rows(plan)
        return plan if most is None else grow_micro_batches(plan, self.ranks.world, most)

    def most_rows(self, plan: StepPlan) -> int | None:
        """The rows of a step plan that fit a device's memory, with `rows_per_device: auto`; otherwise None."""
        return max(1, self._most_tokens // plan.shape.length) if self.config.rows_per_device == "auto" else None

    @cached_property
    def _most_tokens(self) -> int:
        """A rough guess at the tokens of a micro-batch that fit the memory. One that is too low only costs speed."""
        device = self.ranks.device
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.ranks.world
        left = memory // 2 - 18 * self.parameter_count // self.ranks.world
        width = self.model_config.hidden_size + 2 * self.model_config.num_hidden_layers
        return max(0, left) // (_BYTES_PER_TOKEN_AND_WIDTH * width)


def _digests(name: str, revision: str | None) -> list[str]:
    """Returns the digest of a model's folder; of an adapter, those of its base's folder and its own."""
    base = base_of_adapter(name)
    folders = [weights_folder(name, revision)] if base is None else [weights_folder(base, None), Path(name)]
    return [model_digest(folder) for folder in folders]
