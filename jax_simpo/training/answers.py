"""Answers of a model as text, and the figures of many: what `generate` writes and an evaluation logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_simpo.data.prompts import Prompt
from jax_simpo.models.generate import BATCH_SIZE, Generation, Prompts, Tokens, generate
from jax_simpo.models.transformer import Params
from jax_simpo.training.setup import Setup

NGRAM = 4  # tokens in a row that count as repeated when they come again


@dataclass(frozen=True)
class AnswerFigures:
    """Figures over the answers to some prompts.

    Attributes:
        length: mean number of tokens, without the one that ends an answer.
        ended: share of answers that the model ended; the others were cut.
        repetition: mean of `repetition_rate`.
    """

    length: float
    ended: float
    repetition: float

    @classmethod
    def of(cls, answers: Sequence[Tokens]) -> AnswerFigures:
        """Computes the figures of at least one answer."""
        return cls(
            float(np.mean([len(answer.ids) for answer in answers])),
            float(np.mean([answer.ended for answer in answers])),
            float(np.mean([repetition_rate(answer.ids) for answer in answers])),
        )


def repetition_rate(ids: Sequence[int]) -> float:
    """Returns the share of an answer's runs of four tokens that it has written before; 0 for fewer than four tokens.

    An answer of n tokens has n - 3 runs of four, which overlap. The rate is 1 minus the share of distinct ones among
    them (the measure `rep-4` of Welleck et al., arXiv 1908.04319): 0 if no run comes twice, close to 1 for a loop.
    """
    runs = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def answer(
    setup: Setup,
    params: Params,
    prompts: Prompts,
    asked: Generation,
    *,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[int], object] = lambda prompts: None,
) -> list[list[Tokens]]:
    """Answers prompts with the model of a setup. Every process calls it; see `jax_simpo.models.generate.generate`."""
    forward = setup.forward  # it may try attention backends on one device, which is no work for the mesh below
    with jax.set_mesh(setup.mesh):
        return generate(forward, params, setup.mesh, prompts, asked, batch_size=batch_size, on_batch=on_batch)


def answer_records(
    prompts: Iterable[Prompt], answers: Sequence[Sequence[Tokens]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Returns a dict for each prompt, with the keys that the command `jax-simpo generate` writes."""
    return [
        {
            "prompt": prompt.given,
            "answers": [
                {
                    "text": str(tokenizer.decode(found.ids, skip_special_tokens=True)),
                    "tokens": len(found.ids),
                    "finished": found.ended,
                }
                for found in of_prompt
            ],
        }
        for prompt, of_prompt in zip(prompts, answers, strict=True)
    ]
