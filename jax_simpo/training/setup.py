"""From a config to the things a run is made of: mesh, tokenizer, model, pairs, plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_simpo import hf
from jax_simpo.config import TrainConfig, torch_only
from jax_simpo.data import chat, sources
from jax_simpo.data.loader import Known
from jax_simpo.data.packing import (
    PackingReport,
    StepPlan,
    grow_micro_batches,
    make_step_plan,
    micro_batch_line,
)
from jax_simpo.data.prompts import PromptEncoder
from jax_simpo.data.selection import HELD_OUT, Selection
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.errors import CheckpointError, ConfigError, DataError, ModelError
from jax_simpo.gguf_files import means_gguf
from jax_simpo.hf import adapters
from jax_simpo.hf.config import read_model_config
from jax_simpo.hf.lora_targets import choose_targets
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.lora import Lora
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model, Params
from jax_simpo.objectives import Objective
from jax_simpo.ops.attention.evidence import Shape
from jax_simpo.processes import distributed
from jax_simpo.run.checkpoint import Checkpoints, abstract_state
from jax_simpo.run.files import CHECKPOINTS
from jax_simpo.run.sums import check_model_sums
from jax_simpo.sharding import make_mesh, slice_count
from jax_simpo.training import capacity, loss_head
from jax_simpo.training.attention import choose_attention, shape_of
from jax_simpo.training.backend_choice import BackendChoice
from jax_simpo.training.groups import packing_line, require_data, tokenize_on_first
from jax_simpo.training.objective import objective_of
from jax_simpo.training.start import StartModel, find_start_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Setup:
    """Builds the objects a run needs from its config, lazily, in order of cost. It prints nothing.

    Attributes:
        config: the run's settings.
        model_choice: the value of `--model`, as in `find_start_model`; None takes the model the config starts from.
        any_mesh: use the devices there are instead of the config's mesh (scoring needs no particular mesh).
        memory_pairs: training pairs handed over in Python; they stand in for the config's `dataset_mixer`.
        memory_eval_pairs: evaluation pairs handed over in Python.
        given_mesh: the mesh to use, whatever the config says.
        given_tokenizer: the tokenizer to use, whatever the model says.
    """

    config: TrainConfig
    model_choice: str | None = None
    any_mesh: bool = False
    memory_pairs: sources.RawSplit | None = None
    memory_eval_pairs: sources.RawSplit | None = None
    given_mesh: Mesh | None = None
    given_tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        for reason in torch_only(self.config).values():
            raise ConfigError(reason)

    @cached_property
    def mesh(self) -> Mesh:
        if self.given_mesh is not None:
            return self.given_mesh
        if not self.any_mesh:
            return make_mesh(**self.config.mesh.model_dump())
        # Parameters over as many devices as divide the model's width, those of one TPU slice at most; rows over all.
        together = jax.device_count() // slice_count(jax.devices())
        return make_mesh(data=-1, fsdp=math.gcd(together, self.model.config.hidden_size))

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
    def start(self) -> StartModel:
        """The model to start from, or the one that `--model` names."""
        return find_start_model(self.config, self.model_choice)

    @cached_property
    def model_folder(self) -> Path | None:
        """Folder with the model's configuration, its weights not necessarily downloaded; None for a new model."""
        return self.start.folder(weights=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the config, of the adapter where one was saved with it, or of the model."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        folder = self.model_folder
        if self.start.adapter is not None and (self.start.adapter.folder / "tokenizer_config.json").exists():
            folder = self.start.adapter.folder  # saved with it
        name = self.config.tokenizer_name_or_path or str(folder)
        own = self.config.tokenizer_name_or_path is None  # the revision is the model's
        return chat.load_tokenizer(
            name,
            chat_template=self.config.chat_template,
            chat_rendering=self.config.chat_rendering,
            trust_remote_code=self.config.trust_remote_code,
            revision=self.config.model_revision if own else None,
        )

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """Makes token ids of prompts that the model is to answer."""
        keys = ("auto_insert_empty_system_msg", "special_tokens_in_messages")
        return PromptEncoder(self.tokenizer, **{key: getattr(self.config, key) for key in keys})

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's EOS, and those that the model's files name.

        Raises:
            ModelError: what `generation_config.json` names are no token ids.
        """
        config = self.model.config.eos_token_id
        of_config = config if isinstance(config, tuple) else () if config is None else (config,)
        of_folder = () if self.model_folder is None else hf.load_end_ids(self.model_folder)
        return tuple(dict.fromkeys((int(self.tokenizer.eos_token_id), *(of_folder or of_config))))

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
            model_config = read_model_config(self.new_model_mapping(), source="model_config")
        if len(self.tokenizer) > model_config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model only {model_config.vocab_size}. Use the "
                "tokenizer the model was trained with (`tokenizer_name_or_path`), or raise `model_config.vocab_size`"
            )
        return Model(model_config, self.config.dtype, self.config.remat, self._lora(model_config))

    def _lora(self, model_config: ModelConfig) -> Lora | None:
        """The adapter of `--model`, or of the run."""
        config = self.config
        if self.start.adapter is not None:
            return self.start.adapter.lora(model_config)
        if not config.use_peft or (self.model_choice is not None and self.start.step is None):
            return None
        targets = choose_targets(config.lora_target_modules, model_config.model_type)
        return Lora(config.lora_r, config.lora_alpha, targets)

    def new_model_mapping(self) -> dict[str, Any]:
        """`model_config`, with the tokenizer's size and special tokens where it does not give its own."""
        ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {"vocab_size": len(self.tokenizer), **ids, **(self.config.new_model_config or {})}

    def choose_attention(self, plan: StepPlan | None = None) -> BackendChoice:
        """Returns the attention backend and the reason for it. The first call decides, by the rows of its plan.

        On an accelerator that call may try backends, so it should come before the weights are loaded.

        Args:
            plan: the step plan whose rows are computed; None takes typical rows.

        Raises:
            ConfigError: the backend cannot run here, or no backend is right here.
            MeshError: the mesh does not divide the model.
        """
        if not self._attention_choices:
            self._attention_choices.append(self._attention_choice(plan))
        return self._attention_choices[0]

    @cached_property
    def _attention_choices(self) -> list[BackendChoice]:
        return []

    def _attention_choice(self, plan: StepPlan | None) -> BackendChoice:
        self.model.shardings(self.mesh)  # raises before anything is tried
        return choose_attention(self.config, self.attention_shape(plan), self.mesh.local_devices[0])

    def attention_shape(self, plan: StepPlan | None = None) -> Shape:
        """Returns the part of the run's shapes that its attention depends on; of typical rows without a plan."""
        longest = capacity.longest_row(self.model, self.mesh, capacity.least_rows(self.config), self.device_memory)
        return shape_of(self.config, self.model, self.mesh, longest, plan)

    def choose_loss_head(self, plan: StepPlan | None = None) -> BackendChoice:
        """Returns the loss head's backend and the reason for it, as `choose_attention` does.

        Raises:
            ConfigError: the backend cannot run here, or no backend is right here.
        """
        if not self._loss_head_choices:
            self._loss_head_choices.append(self._loss_head_choice(plan))
        return self._loss_head_choices[0]

    @cached_property
    def _loss_head_choices(self) -> list[BackendChoice]:
        return []

    def _loss_head_choice(self, plan: StepPlan | None) -> BackendChoice:
        shape = loss_head.shape_of(self.model, self.mesh, plan)
        return loss_head.choose_loss_head(self.config, shape, self.mesh.local_devices[0])

    @property
    def attention(self) -> str:
        """The name of the attention backend."""
        return self.choose_attention().backend

    @cached_property
    def forward(self) -> Forward:
        """The forward pass of rows of which no plan is known."""
        head = self.choose_loss_head().backend
        return Forward(self.model, self.attention, self.config.logprob_chunk, loss_head=head)

    def forward_of(self, plan: StepPlan) -> Forward:
        """Returns the forward pass that scores the rows of a step plan."""
        self.choose_attention(plan)
        self.choose_loss_head(plan)
        return self.forward.up_to(plan.longest, plan.span)

    def training_forward_of(self, plan: StepPlan) -> Forward:
        """Returns the forward pass of training: with memory to spare, it keeps logits for the backward pass."""
        return capacity.training_forward(self.forward_of(plan), self.mesh, self.device_memory)

    @cached_property
    def device_memory(self) -> int:
        """Bytes of memory of the smallest device: every process must plan the same rows."""
        return min(distributed.collect("device memory", capacity.device_memory(self.mesh)))

    @cached_property
    def objective(self) -> Objective:
        """The objective that the config asks for."""
        return objective_of(self.config)

    @cached_property
    def reference(self) -> Setup:
        """The setup of the frozen reference, on the same mesh: `ref_model_name_or_path`, or what the run starts from.

        A fresh adapter adds nothing to its base, so the start of a run that trains an adapter is its base. The
        reference scores the tokens of the run, whatever its own tokenizer.
        """
        config, name = self.config, self.config.ref_model_name_or_path
        if name is not None:
            config = config.model_copy(update={"use_peft": False})
            name = f"./{name}" if name.isdecimal() else name  # a bare number is the step of a run
        return Setup(config, name, given_mesh=self.mesh, given_tokenizer=self.tokenizer)

    def load_params(self) -> Params:
        """The parameters to start from, split over the mesh: of a step of the run, a folder, or new ones."""
        if self.start.step is not None:
            with open_checkpoints(self.config) as checkpoints:
                return self.restore_params(checkpoints, self.start.step)
        return self._start_params()

    def restore_params(self, checkpoints: Checkpoints, step: int) -> Params:
        """The parameters of a step of the run. What is frozen is in no checkpoint, but where the run started from."""
        trained, _ = self.model.split(abstract_state(self.model.abstract, self.model.shardings(self.mesh)))
        frozen = {} if self.model.lora is None else self.model.split(self._start_params())[1]
        return self.model.join(checkpoints.params(step, trained), frozen)

    @cached_property
    def start_folder(self) -> Path | None:
        """The folder of the base model with its weights, which are as they were exported; None for a new model.

        Raises:
            ModelError: weights of it, or of the adapter that lies on it, are missing or have changed.
        """
        base, adapter = self.start.folder(weights=True), self.start.adapter
        for folder in (base, None if adapter is None else adapter.folder):
            if folder is not None:
                check_model_sums(folder, share=distributed.number(), shares=distributed.count())
        return base

    def _start_params(self) -> Params:
        folder = self.start_folder
        if folder is None:
            return self.model.init(self.config.seed, self.mesh)
        base = hf.load_params(folder, self.model, self.mesh)
        if self.model.lora is None:
            return base
        if self.start.adapter is None:
            return self.model.join(self.model.init_trained(self.config.seed, self.mesh), base)
        return self.model.join(adapters.load(self.start.adapter.folder, self.model, self.mesh), base)

    def export(
        self, params: Params, folder: Path, *, merge: bool = False, max_shard_bytes: int = hf.MAX_SHARD_BYTES
    ) -> str:
        """Writes the model as a Hugging Face folder; where an adapter was trained, the adapter as a peft folder.

        The adapter of a new model is always merged: its base has no name by which it could be found again. So is one of
        a GGUF file, which peft does not read.

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
        base = self.start.base
        if self.model.lora is None or merge or base is None or means_gguf(base):
            hf.save_model(params, self.model, folder, dtype, tokenizer=self.tokenizer, max_shard_bytes=max_shard_bytes)
            if self.model.lora is None:
                return "model"
            if merge:
                return "model, adapter merged"
            reason = "a new model has no name to refer to" if base is None else "peft reads no GGUF file"
            return f"model, adapter merged: {reason}"
        name, revision = base, self.start.revision
        local = Path(name).expanduser()
        if local.is_dir():  # it is to be found from any other folder too
            name, revision = str(local.absolute()), None
        revision = None if revision == "main" else revision
        adapters.save(params, self.model, folder, dtype, base=name, revision=revision, tokenizer=self.tokenizer)
        return f"adapter of {name}"

    def tokenize(self, raw: sources.RawSplit) -> GroupDataset:
        """Tokenises a split as the config says. Every process calls it; see `tokenize_on_first`."""
        return tokenize_on_first(self.config, raw, self.tokenizer)

    def _require_data(self) -> None:
        """Makes sure that data is named, and that its files and the model's folder are there.

        Raises:
            ConfigError: the config names no data.
            DataError: files or folders are missing; the message names all of them, and a model that is missing too.
            ModelError: only the model is missing.
        """
        require_data(self.config)
        mistakes: list[DataError | ModelError] = []
        for look in (lambda: sources.check_present(self.config.dataset_mixer), lambda: self.model_folder):
            try:
                look()
            except (DataError, ModelError) as error:
                mistakes.append(error)
        if mistakes:
            raise type(mistakes[0])("\n".join(map(str, mistakes)))

    def train_pairs(self) -> GroupDataset:
        """Tokenises the training pairs, each source cut to its fraction.

        Raises:
            ConfigError: the config names no data, and no pairs were handed over.
            DataError: a source cannot be read, or a row cannot be used.
        """
        config = self.config
        if self.memory_pairs is not None:
            return self.tokenize(self.memory_pairs)
        self._require_data()
        selection = Selection.of(config)
        raw = sources.load_train(
            config.dataset_mixer, config.train_splits, selection, weight_column=config.weight_column
        )
        return self.tokenize(raw)

    def eval_pairs(self) -> GroupDataset:
        """Tokenises the pairs of all evaluation splits, or those that `test_size` holds out.

        Raises:
            ConfigError: `dataset_splits` names no split to evaluate, or there is no data at all.
            DataError: a source cannot be read, or a row cannot be used.
        """
        config = self.config
        if self.memory_eval_pairs is not None:
            return self.tokenize(self.memory_eval_pairs)
        self._require_data()
        if config.test_size is not None:
            return self.split_pairs(HELD_OUT)
        if not config.eval_splits:
            raise ConfigError(
                f"`dataset_splits` {config.dataset_splits} names no split to evaluate: those have no `train` in their "
                "name. Add one, or set `do_eval: false`"
            )
        raw = sources.load_eval(config.dataset_mixer, config.eval_splits, Selection.of(config))
        return self.tokenize(raw)

    def split_pairs(self, split: str) -> GroupDataset:
        """Tokenises the pairs of one split of all sources, uncut and in file order; `held_out` is `test_size`'s.

        Raises:
            ConfigError: the config names no data.
            DataError: a source cannot be read, or a row cannot be used.
        """
        config = self.config
        self._require_data()
        raw = sources.load_named(config.dataset_mixer, split, config.train_splits, Selection.of(config))
        return self.tokenize(raw)

    def known(self, groups: GroupDataset, reference: np.ndarray | None = None, *, training: bool = False) -> Known:
        """Returns what the objective reads of groups besides their tokens.

        Args:
            groups: the groups of a split.
            reference: the sums of their responses under the reference, for an objective that needs one.
            training: True for the groups that are trained on, which may have weights.

        Raises:
            DataError: the objective weighs comparisons by scores, and some groups have none.
        """
        weights = groups.weights if training and self.config.weight_column is not None else None
        scores = groups.scores if self.objective.compare_weights == "score_gap" else None
        return Known(reference, scores, weights)

    def step_plan(self, pairs: GroupDataset, *, batch: int, seed: int | None) -> StepPlan:
        """Makes the step plan of a split and checks that every pair fits a row.

        Args:
            pairs: the split.
            batch: pairs a step.
            seed: of the order; None keeps file order.
        """
        config, model = self.config, self.model
        rows = capacity.least_rows(config)
        plan = make_step_plan(
            pairs.lengths,
            global_batch_size=batch,
            rows_per_micro_batch=rows * self.data_parallel,
            prefix_sharing=config.prefix_sharing,
            packing=config.packing,
            seed=seed,
            row_length=None if config.row_length == "auto" else config.row_length,
            max_row_length=capacity.longest_row(model, self.mesh, rows, self.device_memory),
            row_multiple=capacity.row_multiple(self.mesh),
            prompt_targets=self.objective.reads_prompts,
        )
        plan.check(pairs.origin)
        most = self.most_rows(plan)
        return plan if most is None else grow_micro_batches(plan, self.data_parallel, most)

    def most_rows(self, plan: StepPlan) -> int | None:
        """The rows of a step plan that fit a device's memory, with `rows_per_device: auto`; otherwise None."""
        if self.config.rows_per_device != "auto":
            return None
        keeps_logits = self.config.logprob_chunk == "auto"
        return capacity.most_rows(self.model, self.mesh, plan.shape, self.device_memory, keeps_logits=keeps_logits)

    def packing_lines(self, name: str, plan: StepPlan, report: PackingReport) -> str:
        """Describes the rows and the micro-batches of a split, in a line each."""
        micro_batches = micro_batch_line(plan, report, self.data_parallel, self.most_rows(plan))
        return f"{packing_line(name, plan, report)}\n{name}: {micro_batches}"


def open_checkpoints(config: TrainConfig) -> Checkpoints:
    """The checkpoints of the config's output directory, to read.

    Raises:
        CheckpointError: there are none.
    """
    folder = Path(config.output_dir) / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: no checkpoint of a run was written to `output_dir`")
    return Checkpoints(folder)
