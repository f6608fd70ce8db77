"""The learning rates and target margins of published runs, and how far from them a run may lie without a remark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

# Full fine-tuning of models of 7 to 9 billion parameters with AdamW: the configs that come with the program (SimPO 3e-7
# to 1e-6, DPO 5e-7 to 1e-6). With a cross-entropy term in the loss: 5e-6, ORPO in Hugging Face's alignment handbook.
_LOW, _HIGH, _HIGH_WITH_SFT = 3e-7, 1e-6, 5e-6
_PUBLISHED_PARAMETERS = 8e9
# Beyond these factors of the published rates a run is remarked on: SimPO's authors warn of 1e-5, where answers become
# incoherent (README of princeton-nlp/SimPO), and 5 x 1e-6 lies below that.
_BELOW, _ABOVE = 10.0, 5.0
_OF_ADAPTERS = 10.0  # LoRA takes about ten times the rate of full fine-tuning (Biderman et al., arXiv 2405.09673)
_OF_LION = (10.0, 3.0)  # "3-10x smaller than that for AdamW" (Chen et al., arXiv 2302.06675)
# Around the rate of Kaplan et al. for a model that is trained from random weights.
_BELOW_KAPLAN, _ABOVE_KAPLAN = 30.0, 10.0
_GPT3_RATE = 6e-5  # of 175 billion parameters (Brown et al., arXiv 2005.14165, table 2.1)

MOST_GAMMA_BETA_RATIO = 2.0
"""The published runs have 0.1 to 0.8, and SimPO's README searches 0 to 1. A ratio above twice that is remarked on."""


def rate(value: float) -> str:
    """Writes a learning rate as configs do: 3e-7, 1.3e-3."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


class Band(NamedTuple):
    """The learning rates that get no remark, and in words what they are measured by."""

    low: float
    high: float
    source: str


@dataclass(frozen=True)
class Trainee:
    """Describes the model and the optimizer, by which a learning rate is judged.

    Attributes:
        parameters: numbers of the whole model, frozen ones included.
        new_model: it starts from random weights.
        adapter: an adapter is trained.
        with_sft: the loss has a term of cross-entropy.
        optim: the optimizer.
    """

    parameters: int
    new_model: bool = False
    adapter: bool = False
    with_sft: bool = False
    optim: str = "adamw"

    def band(self) -> Band:
        """Returns the learning rates that get no remark.

        Smaller models take larger rates, so the published ones are multiplied by the square root of how many times
        smaller a model is than 8 billion parameters; for larger models they stay. That is a rule of thumb, hence the
        generous factors on both sides.
        """
        if self.new_model:
            # Kaplan et al., arXiv 2001.08361, appendix D.6, and for models far beyond theirs GPT-3's.
            usual = max(0.003239 - 0.0001395 * math.log(self.parameters), _GPT3_RATE)
            words = f"{rate(usual)} is usual for a new model of this size"
            band = Band(usual / _BELOW_KAPLAN, usual * _ABOVE_KAPLAN, words)
        else:
            size = math.sqrt(max(1.0, _PUBLISHED_PARAMETERS / self.parameters))
            high = _HIGH_WITH_SFT if self.with_sft else _HIGH
            adapter = _OF_ADAPTERS if self.adapter else 1.0
            words = f"published runs of 8B models use {rate(_LOW)} to {rate(high)}"
            words += ", an adapter ten times that" if self.adapter else ""
            words += ", and smaller models more" if size > 1.5 else ""
            band = Band(_LOW * size / _BELOW, high * size * adapter * _ABOVE, words)
        if self.optim == "lion":
            below, above = _OF_LION
            band = Band(band.low / below, band.high / above, f"{band.source}; Lion takes a third to a tenth of it")
        return band
