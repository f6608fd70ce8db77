"""Tokenises the pairs of a run, once for all its processes, and says what the user should know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax_simpo.config import TrainConfig
from jax_simpo.data.packing import PackingReport, StepPlan
from jax_simpo.data.sources import RawSplit
from jax_simpo.data.tokenize import GroupDataset, settings_of, tokenize_split
from jax_simpo.errors import ConfigError, DataError
from jax_simpo.processes import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IDLE = 0.25  # share of empty rows from which on the user is warned


def require_data(config: TrainConfig) -> None:
    """Raises ConfigError where the config names no data."""
    if not config.dataset_mixer:
        raise ConfigError(
            "no data: give `dataset_mixer`, such as `dataset_mixer: {pairs.jsonl: 1.0}`, or hand pairs over in Python "
            "(`train(config, pairs=...)`)"
        )


def tokenize_on_first(config: TrainConfig, raw: RawSplit, tokenizer: PreTrainedTokenizerBase) -> GroupDataset:
    """Tokenises a split as the config says. Every process calls it.

    The first process tokenises; the others find its work in the shared cache.

    Raises:
        DataError: a row cannot be used (`on_bad_row: error`), or the processes read different pairs.
    """
    pairs = distributed.first_then_others(
        f"tokenise {raw.name}",
        lambda: tokenize_split(
            raw,
            tokenizer,
            **settings_of(config),
        ),
    )
    advice = "Give all hosts the same data files and the same versions of transformers and tokenizers"
    distributed.check_same(f"the pairs of {raw.name}", pairs.fingerprint, advice, DataError)
    return pairs


def notes_on(pairs: GroupDataset) -> list[str]:
    """Lists how the rows were read, and what the user should know of them and of their tokens in the cache.

    Every process calls it.
    """
    notes = [] if pairs.skipped else [layout.line for layout in pairs.layouts]  # the report of skipped rows has them
    repeated = distributed.collect("cache", pairs.cache_hit)[1:].count(False)
    if repeated:
        notes.append(
            f"note: {repeated} process(es) did not find what process 0 tokenised and did it again: set "
            "`data_cache_dir` to a folder that all hosts share"
        )
    if pairs.cache_damage:
        notes.append(f"warning: {pairs.cache_damage}; the tokens were made again")
    if pairs.skipped:
        notes.append(pairs.skipped_report())
    return notes + [f"note: {remark}" for remark in pairs.remarks()]


def packing_line(name: str, plan: StepPlan, report: PackingReport) -> str:
    """Describes the rows of a split in one line: their size, their fill, and the tokens that sharing saves."""
    saved = 1 - report.input_tokens / report.separate_tokens
    return (
        f"{name}: {len(plan.lengths)} {plan.lengths.noun}, rows of {plan.shape.length} tokens and "
        f"{plan.shape.targets} targets, filled {report.fill:.1%} and {report.targets / report.computed_targets:.1%} "
        "(the rest is padding); "
        f"prefix sharing saves {saved:.1%} of the tokens"
    )


def idle_warning(plan: StepPlan, report: PackingReport, devices: int) -> str:
    """Returns a warning where many rows are empty; an empty text otherwise.

    Args:
        plan: the step plan of the training pairs.
        report: the plan as `measure` has measured it.
        devices: devices that each compute rows of their own.
    """
    if report.empty_rows <= _IDLE:
        return ""
    return (
        f"warning: {report.empty_rows:.0%} of the rows computed are empty: {devices} devices are "
        f"too many for {report.groups:.0f} {plan.lengths.noun} a step in rows of {plan.shape.length} tokens. Raise "
        "`global_batch_size`, set a shorter `row_length`, or move devices from `fsdp` or `data` to `tensor`"
    )
