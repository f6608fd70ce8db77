"""From a config to the things a run is made of: mesh, tokenizer, model, pairs, plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from jax_simpo import hf
from jax_simpo.config import TrainConfig, torch_only
from jax_simpo.data import chat, sources
from jax_simpo.data.packing import PackingReport, StepPlan, make_step_plan, measure
from jax_simpo.data.tokenize import PairDataset, tokenize_split
from jax_simpo.errors import CheckpointError, ConfigError, DataError, ModelError
from jax_simpo.hf import adapters
from jax_simpo.hf.config import read_model_config
from jax_simpo.hf.lora_targets import choose_targets
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.lora import Lora
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model, Params
from jax_simpo.objectives.simpo import Objective
from jax_simpo.ops.attention import resolve_implementation
from jax_simpo.processes import distributed
from jax_simpo.run.checkpoint import Checkpoints, abstract_state
from jax_simpo.run.files import CHECKPOINTS
from jax_simpo.sharding import make_mesh
from jax_simpo.train import capacity


@dataclass(frozen=True)
class Setup:
    """What a config describes. Everything is made when it is first asked for, cheap things before dear ones.

    Attributes:
        config: the run's settings.
        console: where notes for the user go.
        model_choice: `--model`: a folder, of a model or of an adapter, or the number of a step of the run; None is the
            config's own start model.
        any_mesh: ignore the config's mesh and use the devices there are (scoring needs no particular mesh).
    """

    config: TrainConfig
    console: Console
    model_choice: str | None = None
    any_mesh: bool = False

    def __post_init__(self) -> None:
        for why in torch_only(self.config).values():  # a config made in Python has not been asked
            raise ConfigError(why)

    @cached_property
    def mesh(self) -> Mesh:
        if not self.any_mesh:
            return make_mesh(**self.config.mesh.model_dump())
        # Parameters over as many devices as divide the model's width, rows over all of them.
        return make_mesh(data=-1, fsdp=math.gcd(jax.device_count(), self.model.config.hidden_size))

    @property
    def data_parallel(self) -> int:
        """Devices that each take rows of their own."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def global_batch_size(self, saved: int | None = None) -> int:
        """Pairs per optimizer step: as configured, or of the run that is continued, or from the per-device keys."""
        config = self.config
        per_device = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return config.global_batch_size or saved or per_device * self.data_parallel

    @cached_property
    def step(self) -> int | None:
        """The step of the run that `--model` names, if it names one."""
        return int(self.model_choice) if self.model_choice is not None and self.model_choice.isdecimal() else None

    @cached_property
    def adapter(self) -> adapters.AdapterFolder | None:
        """The adapter that `--model` names, if it names one."""
        if self.model_choice is None or self.step is not None:
            return None
        if adapters.find(hf.resolve_model_folder(self.model_choice, weights=False)) is None:
            return None
        # Which layers it sits on, its tensors say.
        return adapters.find(hf.resolve_model_folder(self.model_choice))

    @cached_property
    def base(self) -> tuple[str, str | None] | None:
        """The model that the run starts from or that `--model` means, below an adapter: name and revision.

        None for a new model.

        Raises:
            ModelError: an adapter does not say which model it belongs to, and neither does the config.
        """
        own = self.config.model_name_or_path
        if self.adapter is not None and self.adapter.base is not None:
            if own is None or Path(self.adapter.base).resolve() != Path(own).resolve():
                self.console.print(f"note: the adapter's own base model is used: {self.adapter.base}", style="yellow")
            return self.adapter.base, self.adapter.revision
        if self.adapter is not None and own is None:
            raise ModelError(
                f"{self.adapter.folder / adapters.CONFIG}: names no `base_model_name_or_path`; give the adapter's base "
                "model as `model_name_or_path`"
            )
        if self.model_choice is not None and self.step is None and self.adapter is None:
            return self.model_choice, None
        return None if own is None else (own, self.config.model_revision)

    def _resolve_model(self, *, weights: bool) -> Path | None:
        return None if self.base is None else hf.resolve_model_folder(*self.base, weights=weights)

    @cached_property
    def model_folder(self) -> Path | None:
        """Folder with the model's config; None for a new model. Its weights may not be there yet."""
        return self._resolve_model(weights=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        folder = self.model_folder
        if self.adapter is not None and (self.adapter.folder / "tokenizer_config.json").exists():
            folder = self.adapter.folder  # saved with it
        name = self.config.tokenizer_name_or_path or str(folder)
        own = self.config.tokenizer_name_or_path is None  # the revision is the model's
        return chat.load_tokenizer(
            name,
            chat_template=self.config.chat_template,
            trust_remote_code=self.config.trust_remote_code,
            revision=self.config.model_revision if own else None,
        )

    @cached_property
    def model(self) -> Model:
        """The decoder without its weights.

        Raises:
            ModelError: the model is of no supported kind, or has fewer tokens than the tokenizer, or does not fit the
                adapter.
            ConfigError: the config's adapter names layers that the model does not have.
        """
        if self.model_folder is not None:
            model_config, _ = hf.load_model_config(self.model_folder)
        else:
            model_config = read_model_config(self._new_model_mapping(), where="model_config")
        if len(self.tokenizer) > model_config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model only {model_config.vocab_size}. Use the "
                "tokenizer the model was trained with (`tokenizer_name_or_path`), or raise `model_config.vocab_size`"
            )
        return Model(model_config, self.config.dtype, self.config.remat, self._lora(model_config))

    def _lora(self, model_config: ModelConfig) -> Lora | None:
        """The adapter of `--model`, or of the run."""
        config = self.config
        if self.adapter is not None:
            return self.adapter.lora(model_config)
        if not config.use_peft or (self.model_choice is not None and self.step is None):
            return None
        targets = choose_targets(config.lora_target_modules, model_config.model_type)
        return Lora(config.lora_r, config.lora_alpha, targets)

    def _new_model_mapping(self) -> dict[str, Any]:
        """`model_config`, with the tokenizer's size and special tokens where it does not give its own."""
        ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {"vocab_size": len(self.tokenizer), **ids, **(self.config.new_model_config or {})}

    @cached_property
    def attention(self) -> str:
        model = self.model.config
        name, why = resolve_implementation(
            self.config.attention,
            self.mesh.devices.flat[0],
            dtype=self.model.dtype,
            head_dim=model.head_dim,
            softcap=model.attention_softcap,
        )
        self.console.print(f"attention: {name} ({why})")
        return name

    @cached_property
    def forward(self) -> Forward:
        return Forward(self.model, self.attention, self.config.logprob_chunk)

    @cached_property
    def training_forward(self) -> Forward:
        """With memory to spare, a micro-batch's logits are kept for the backward pass."""
        if self.config.logprob_chunk != "auto":
            return self.forward
        return replace(self.forward, logits_bytes=capacity.logits_bytes(self.model, self.mesh, self.device_memory))

    @cached_property
    def device_memory(self) -> int:
        """Bytes of memory of the smallest device: every process must plan the same rows."""
        return min(distributed.collect("device memory", capacity.device_memory(self.mesh)))

    @cached_property
    def objective(self) -> Objective:
        c = self.config
        return Objective(c.beta, c.gamma_beta_ratio, c.loss_type, c.label_smoothing, c.sft_weight)

    def load_params(self) -> Params:
        """The parameters to start from, split over the mesh: of a step of the run, a folder, or new ones."""
        if self.step is not None:
            with open_checkpoints(self.config) as checkpoints:
                return self.restore_params(checkpoints, self.step)
        return self._start_params()

    def restore_params(self, checkpoints: Checkpoints, step: int) -> Params:
        """The parameters of a step of the run. What is frozen is in no checkpoint, but where the run started from."""
        trained, _ = self.model.split(abstract_state(self.model.abstract, self.model.shardings(self.mesh)))
        frozen = {} if self.model.lora is None else self.model.split(self._start_params())[1]
        return self.model.join(checkpoints.params(step, trained), frozen)

    def _start_params(self) -> Params:
        folder = self._resolve_model(weights=True)
        if folder is None:
            return self.model.init(self.config.seed, self.mesh)
        base = hf.load_params(folder, self.model, self.mesh)
        if self.model.lora is None:
            return base
        if self.adapter is None:
            return self.model.join(self.model.init_trained(self.config.seed, self.mesh), base)
        return self.model.join(adapters.load(self.adapter.folder, self.model, self.mesh), base)

    def export(
        self, params: Params, folder: Path, *, merge: bool = False, max_shard_bytes: int = hf.MAX_SHARD_BYTES
    ) -> str:
        """Writes the model as a Hugging Face folder; where an adapter was trained, the adapter as a peft folder.

        The adapter of a new model is always merged: its base has no name by which it could be found again.

        Args:
            params: as `load_params` gives them.
            folder: where to.
            merge: write the whole model, adapter included.
            max_shard_bytes: most bytes of a model's weight file.

        Returns:
            What was written, in words.

        Raises:
            ModelError: the folder cannot be written.
        """
        dtype = self.config.export_dtype or self.config.dtype
        if self.model.lora is None or merge or self.base is None:
            if self.model.lora is not None and not merge:
                self.console.print(
                    "note: a new model has no name for an adapter to refer to: it is merged", style="yellow"
                )
            hf.save_model(params, self.model, folder, dtype, tokenizer=self.tokenizer, max_shard_bytes=max_shard_bytes)
            return "model" if self.model.lora is None else "model, adapter merged"
        name, revision = self.base
        local = Path(name).expanduser()
        if local.is_dir():  # it is to be found from any other folder too
            name, revision = str(local.absolute()), None
        revision = None if revision == "main" else revision
        adapters.save(params, self.model, folder, dtype, base=name, revision=revision, tokenizer=self.tokenizer)
        return f"adapter of {name}"

    def train_pairs(self) -> PairDataset:
        """The tokenised training pairs, each source cut to its fraction."""
        config = self.config
        return self.tokenize(
            sources.load_train(config.dataset_mixer, config.train_splits, dataset_configs=config.dataset_configs)
        )

    def eval_pairs(self) -> PairDataset:
        """The tokenised pairs of all evaluation splits, whole.

        Raises:
            ConfigError: `dataset_splits` names none.
        """
        config = self.config
        if not config.eval_splits:
            raise ConfigError(
                f"`dataset_splits` {config.dataset_splits} names no split to evaluate: those have no `train` in their "
                "name. Add one, or set `do_eval: false`"
            )
        whole = dict.fromkeys(config.dataset_mixer, 1.0)
        return self.tokenize(sources.load_train(whole, config.eval_splits, dataset_configs=config.dataset_configs))

    def split_pairs(self, split: str) -> PairDataset:
        """The tokenised pairs of one split of all sources, whole and in file order."""
        config = self.config
        return self.tokenize(sources.load_split(config.dataset_mixer, split, dataset_configs=config.dataset_configs))

    def tokenize(self, raw: sources.RawSplit) -> PairDataset:
        """Tokenises a split as the config says, and tells which rows were skipped and why.

        Of several processes the first one tokenises and the others find its work in the shared cache.
        """
        c = self.config
        pairs = distributed.first_then_others(
            f"tokenise {raw.name}",
            lambda: tokenize_split(
                raw,
                self.tokenizer,
                max_length=c.max_length,
                max_prompt_length=c.max_prompt_length,
                truncation_mode=c.truncation_mode,
                auto_insert_empty_system_msg=c.auto_insert_empty_system_msg,
                on_bad_row=c.on_bad_row,
                num_proc=c.preprocessing_num_workers,
                cache_dir=c.data_cache_dir,
            ),
        )
        advice = "Give all hosts the same data files and the same versions of transformers and tokenizers"
        distributed.check_same(f"the pairs of {raw.name}", pairs.fingerprint, advice, DataError)
        alone = distributed.collect("cache", pairs.cache_hit)[1:].count(False)
        if alone:
            self.console.print(
                f"note: {alone} process(es) did not find what process 0 tokenised and did it again: set "
                "`data_cache_dir` to a folder that all hosts share",
                style="yellow",
            )
        if pairs.skipped:
            self.console.print(pairs.skipped_report(), style="yellow")
        return pairs

    def plan(self, pairs: PairDataset, *, batch: int, seed: int | None) -> StepPlan:
        """Makes the step plan of a split and checks that every pair fits a row.

        Args:
            pairs: the split.
            batch: pairs a step.
            seed: of the order; None keeps file order.
        """
        config, model = self.config, self.model
        rows = config.rows_per_device * self.data_parallel
        plan = make_step_plan(
            pairs.lengths,
            global_batch_size=batch,
            rows_per_micro_batch=rows,
            prefix_sharing=config.prefix_sharing,
            packing=config.packing,
            seed=seed,
            row_length=None if config.row_length == "auto" else config.row_length,
            max_row_length=capacity.longest_row(model, self.mesh, config.rows_per_device, self.device_memory),
        )
        plan.check(pairs.origin)
        return plan

    def describe_plan(self, name: str, plan: StepPlan) -> PackingReport:
        """Says what the plan costs, and warns where devices are left idle."""
        report = measure(plan)
        saved = 1 - report.input_tokens / report.separate_tokens
        self.console.print(
            f"{name}: {len(plan.lengths)} pairs, rows of {plan.shape.length} tokens and {plan.shape.targets} targets, "
            f"filled {report.fill:.1%} and {report.targets / report.computed_targets:.1%} (the rest is padding); "
            f"prefix sharing saves {saved:.1%} of the tokens"
        )
        if report.empty_rows > 0.25:
            self.console.print(
                f"warning: {report.empty_rows:.0%} of the rows computed are empty: {self.data_parallel} devices are "
                f"too many for {report.pairs:.0f} pairs a step in rows of {plan.shape.length} tokens. Raise "
                "`global_batch_size`, set a shorter `row_length`, or move devices from `fsdp` or `data` to `tensor`",
                style="yellow",
            )
        return report


def open_checkpoints(config: TrainConfig) -> Checkpoints:
    """The checkpoints of the config's output directory, to read.

    Raises:
        CheckpointError: there are none.
    """
    folder = Path(config.output_dir) / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: no checkpoint of a run was written to `output_dir`")
    return Checkpoints(folder, read_only=True)
