"""Lets the model of a run answer a few prompts: before and after training, and at evaluations."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.models.generate import Generation, Tokens
from jax_simpo.models.transformer import Params
from jax_simpo.processes import distributed
from jax_simpo.run.metrics import answer_figures
from jax_simpo.run.samples import (
    Sample,
    When,
    drop_later,
    read_answers,
    read_samples,
    sample_prompts,
    with_answers,
    write_samples,
)
from jax_simpo.training.answers import AnswerFigures, answer
from jax_simpo.training.setup import Setup


class Sampler:
    """Answers the first prompts of a split greedily and keeps the answers in `samples.jsonl`.

    All its methods do nothing in a run without `sample_prompts`. Every process calls them.
    """

    def __init__(self, setup: Setup, pairs: GroupDataset, output: Path) -> None:
        """Takes the prompts from the split.

        Args:
            setup: the setup of the run.
            pairs: the split.
            output: the output directory.
        """
        self._setup, self._pairs, self._output = setup, pairs, output
        self._last: tuple[int, list[Tokens]] | None = None  # what was answered last, and by the model of which step

    @cached_property
    def _samples(self) -> tuple[list[Sample], list[Int[np.ndarray, " N"]]]:
        return sample_prompts(self._pairs, self._setup.tokenizer, self._setup.config.sample_prompts)

    def resume(self, step: int) -> None:
        """Drops the answers of later steps than the one that the run goes on from."""
        if self._setup.config.sample_prompts:
            distributed.on_first("samples", lambda: drop_later(self._output, step))

    def answer(self, params: Params, step: int, when: When) -> dict[str, float]:
        """Answers the prompts, writes the answers down, and returns figures for the record of an evaluation.

        Args:
            params: the model's parameters.
            step: the optimizer steps that they have had.
            when: the occasion. One model is asked once, on however many occasions.
        """
        config, tokenizer = self._setup.config, self._setup.tokenizer
        if not config.sample_prompts:
            return {}
        if step == 0:
            when = "before"  # the evaluation before the first step
        samples, prompts = self._samples
        if self._last is None or self._last[0] != step:
            asked = Generation(config.sample_tokens, self._setup.end_ids)
            self._last = step, [found for (found,) in answer(self._setup, params, prompts, asked)]
        answers = self._last[1]
        if distributed.is_first():
            if when != "before":
                samples = read_samples(self._output) or samples  # with what the model said before
            texts = read_answers([found.ids for found in answers], tokenizer)
            write_samples(self._output, with_answers(samples, when, texts, step))
        return answer_figures(vars(AnswerFigures.of(answers)))
