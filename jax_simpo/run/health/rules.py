"""The rules: each recognises one way in which runs fail, in the settings of a run or in its records.

A rule is a pure function. It returns a finding, or None. All thresholds stand here, and docs/healthy-runs.md says how
often they are wrong. They are meant to miss a mild case rather than to cry wolf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from jax_simpo.data.token_signs import TokenSigns
from jax_simpo.pages import page_url
from jax_simpo.run.health.published import MOST_GAMMA_BETA_RATIO, Trainee, rate
from jax_simpo.run.metrics import ANSWERS

OVERFITTING = "overfitting"  # the report names the best step where this was found

_CLEAR = 4.0  # standard errors beyond which a share is not chance: one run in 30,000, looked at once


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Attributes:
        name: its name, which is also its heading in docs/healthy-runs.md.
        step: optimizer steps done when it was found; 0 before training.
        text: what was seen, with figures.
        advice: what to do, with the config key to change.
        level: how bad it is; the meaning is the rule's own, and more is worse.
    """

    name: str
    step: int
    text: str
    advice: str
    level: float = 1.0

    @property
    def docs(self) -> str:
        """The address of the page and the heading that explain it."""
        return page_url("healthy-runs", self.name)

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        return f"{self.text}. {self.advice} ({self.docs})"


@dataclass(frozen=True)
class RunTraits:
    """Describes a run, as far as the rules need to know it besides its records.

    Attributes:
        total_steps: optimizer steps of the whole run.
        learning_rate: the peak.
        trainee: what the learning rate is judged by.
        gamma_beta_ratio: of objectives with a target margin; None for the others.
        starts_as_reference: all rewards are 0 before the first update.
        logps_are_sums: `logps/*` are sums over a response's tokens, not means.
        chosen_tokens: mean number of scored tokens of the best responses.
        signs: what was counted in the training tokens.
        noun: "pairs" or "groups".
    """

    total_steps: int
    learning_rate: float
    trainee: Trainee
    gamma_beta_ratio: float | None = None
    starts_as_reference: bool = False
    logps_are_sums: bool = False
    chosen_tokens: float = 1.0
    signs: TokenSigns = field(default_factory=TokenSigns)
    noun: str = "pairs"

    @property
    def tokens_per_logp(self) -> float:
        """Divides a difference of `logps/*` so that it is one of means per token."""
        return max(1.0, self.chosen_tokens) if self.logps_are_sums else 1.0


class History:
    """The records of a run so far."""

    def __init__(self) -> None:
        self.train: list[Mapping[str, Any]] = []
        self.evals: list[Mapping[str, Any]] = []
        self.last: Mapping[str, Any] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a record of `metrics.jsonl`."""
        (self.train if "step" in record else self.evals).append(record)
        self.last = record

    @property
    def step(self) -> int:
        """Optimizer steps done at the last record."""
        return int(self.last.get("step", self.last.get("eval_step", 0)))

    @property
    def window(self) -> Sequence[Mapping[str, Any]]:
        """The last tenth of the training records so far, at least 5 and at most 200."""
        return self.train[-min(200, max(5, len(self.train) // 10)) :]


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(float(record[key]) for record in records)


def _accuracy(records: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Returns the accuracy over all pairs of some training records, and their number."""
    pairs = sum(record["pairs"] for record in records)
    return sum(record["rewards/accuracies"] * record["pairs"] for record in records) / pairs, pairs


def _errors_from_half(accuracy: float, pairs: int) -> float:
    """Returns how many standard errors an accuracy lies above that of a coin."""
    return (accuracy - 0.5) * 2 * math.sqrt(pairs)


# --- before training


def learning_rate(traits: RunTraits) -> Finding | None:
    """The learning rate is far from published ones."""
    peak, band = traits.learning_rate, traits.trainee.band()
    if band.low <= peak <= band.high:
        return None
    high = peak > band.high
    factor = peak / band.high if high else band.low / peak
    text = f"`learning_rate: {rate(peak)}` is far {'above' if high else 'below'} what is usual: {band.source}"
    why = "answers become incoherent" if high else "the model hardly changes"
    between = f"Values from {rate(band.low)} to {rate(band.high)} get no such remark"
    return Finding("learning-rate", 0, text, f"With such a rate {why}; change `learning_rate`. {between}", factor)


def gamma(traits: RunTraits) -> Finding | None:
    """The target margin is far from published ones."""
    ratio = traits.gamma_beta_ratio
    if ratio is None or ratio <= MOST_GAMMA_BETA_RATIO:
        return None
    text = f"`gamma_beta_ratio: {ratio:g}` asks for a far larger margin than published runs do: they have 0.1 to 0.8"
    advice = "Every pair then pulls with full force, however well it is told apart: lower `gamma_beta_ratio`, which is "
    return Finding("gamma", 0, text, advice + "gamma divided by beta", ratio / MOST_GAMMA_BETA_RATIO)


def double_bos(traits: RunTraits) -> Finding | None:
    """Rows begin with two BOS tokens."""
    signs = traits.signs
    if not signs.responses or signs.double_bos / signs.responses < 0.01:
        return None
    text = f"{signs.double_bos:,} of {signs.responses:,} training responses looked at begin with two BOS tokens"
    advice = "Take BOS out of `chat_template`, or out of the prompts of your data; `jax-simpo inspect` shows the tokens"
    return Finding("double-bos", 0, text, advice, signs.double_bos / signs.responses)


def missing_eos(traits: RunTraits) -> Finding | None:
    """Many answers have lost their end, and with it EOS."""
    signs = traits.signs
    share = signs.without_eos / signs.responses if signs.responses else 0.0
    if share < 0.2:
        return None
    text = f"{signs.without_eos:,} of {signs.responses:,} training responses looked at do not end with EOS"
    advice = "The model does not learn from them to end its answers: raise `max_length`, or leave such rows out"
    return Finding("missing-eos", 0, text, advice, share)


# --- during training


def swapped_labels(traits: RunTraits, history: History) -> Finding | None:
    """Chosen and rejected seem swapped: the start model prefers the rejected, or training and evaluation disagree."""
    advice = (
        "If the model has seen answers like the chosen ones before, chosen and rejected are swapped: look at them with "
        "`jax-simpo inspect`, and name the columns in `dataset_columns`"
    )
    if history.step <= 1:
        if traits.starts_as_reference or traits.trainee.new_model:
            return None
        record = history.last
        accuracy = record.get("eval_rewards/accuracies", record.get("rewards/accuracies"))
        pairs = record.get("eval_pairs", record.get("pairs"))
        if accuracy < 0.3 and _errors_from_half(accuracy, pairs) < -_CLEAR:
            share = f"{1 - accuracy:.0%} of {pairs:,} {traits.noun}"
            text = f"Before training the model prefers the rejected answer in {share}"
            return Finding("swapped-labels", history.step, text, advice, 1 - accuracy)
        return None
    if "eval_step" not in history.last or not history.train:
        return None
    last = history.last
    evaluated, pairs = last["eval_rewards/accuracies"], last["eval_pairs"]
    trained, seen = _accuracy(history.window)
    apart = evaluated < 0.4 and trained > 0.6
    if not apart or _errors_from_half(evaluated, pairs) > -_CLEAR or _errors_from_half(trained, seen) < _CLEAR:
        return None
    text = (
        f"The model has learned to prefer the chosen answer in training ({trained:.0%} of the last {seen:,} "
        f"{traits.noun}) and the rejected one in evaluation ({1 - evaluated:.0%} of {pairs:,})"
    )
    advice = (
        "In one of the two splits chosen and rejected are swapped: look at both with `jax-simpo inspect --split`, and "
        "name the columns in `dataset_columns`"
    )
    return Finding("swapped-labels", history.step, text, advice, 1 - evaluated)


def chosen_falls(traits: RunTraits, history: History) -> Finding | None:
    """The chosen answers become much less likely, together with the rejected ones."""
    if "step" not in history.last or len(history.train) < 7:
        return None
    first, last = history.train[:2], history.window
    keys = ("logps/chosen", "logps/rejected")
    before, after = ([_mean(records, key) / traits.tokens_per_logp for key in keys] for records in (first, last))
    fallen, rejected_fallen = (old - new for old, new in zip(before, after, strict=True))
    if fallen < 1.0 or rejected_fallen < 0.5:
        return None
    text = (
        f"The chosen answers have become less likely along with the rejected ones: from {before[0]:.2f} to "
        f"{after[0]:.2f} a token (the rejected ones from {before[1]:.2f} to {after[1]:.2f})"
    )
    advice = "The model unlearns what it could say: lower `learning_rate`, or hold it with `sft_weight`"
    return Finding("chosen-falls", history.step, text, advice, fallen)


def loss_rises(traits: RunTraits, history: History) -> Finding | None:
    """The training loss is much higher than at the start."""
    if "step" not in history.last or len(history.train) < 10:
        return None
    before, after = _mean(history.train[:3], "loss"), _mean(history.window, "loss")
    if before <= 0 or after < 1.3 * before:
        return None
    text = f"The training loss has risen, from {before:.3f} in the first steps to {after:.3f}"
    return Finding("loss-rises", history.step, text, "Lower `learning_rate`, or raise `warmup_ratio`", after / before)


def gradient_spikes(traits: RunTraits, history: History) -> Finding | None:
    """A gradient norm stands out from those before it, and from those of the first steps."""
    if "step" not in history.last or len(history.train) < 20:
        return None
    norm = float(history.last["grad_norm"])
    usual = median(float(record["grad_norm"]) for record in history.train[-65:-1])
    at_first = max(float(record["grad_norm"]) for record in history.train[:10])
    if not usual or norm < 10 * usual or norm < 3 * at_first:
        return None
    text = f"The gradient norm of step {history.step:,} is {norm:.3g}, {norm / usual:.0f} times its median before"
    advice = "Lower `learning_rate`, raise `warmup_ratio`, or leave such steps out (`on_bad_step: skip`, `spike_sigma`)"
    return Finding("gradient-spikes", history.step, text, advice, norm / usual)


def no_learning(traits: RunTraits, history: History) -> Finding | None:
    """The accuracy stays at 50 %."""
    if "step" not in history.last or len(history.train) < 12 or history.step < 0.35 * traits.total_steps:
        return None
    recent = history.train[-min(200, len(history.train) // 2) :]
    accuracy, pairs = _accuracy(recent)
    best = max((record["eval_rewards/accuracies"] for record in history.evals if record["eval_step"]), default=0.0)
    error = 0.5 / math.sqrt(pairs)
    if error > 0.0225 or abs(accuracy - 0.5) > 0.03 or accuracy + 2 * error > 0.56 or best > 0.56:
        return None
    text = f"The accuracy stays at a coin's: {accuracy:.1%} of the last {pairs:,} {traits.noun} of training"
    advice = (
        "Nothing is learned: raise `learning_rate`, and see with `jax-simpo inspect` whether chosen and rejected "
        "differ in what you mean"
    )
    return Finding("no-learning", history.step, text, advice)


def overfitting(traits: RunTraits, history: History) -> Finding | None:
    """Training is at 100 % while evaluation gets worse."""
    evals = [record for record in history.evals if record["eval_step"]]
    if "eval_step" not in history.last or len(evals) < 3 or not history.train:
        return None
    accuracy, _ = _accuracy(history.window)
    best = min(evals[:-2], key=lambda record: record["eval_loss"])
    lost = min(record["eval_loss"] for record in evals[-2:]) - best["eval_loss"]  # by both of the last two
    if accuracy < 0.99 or lost < max(0.1 * abs(best["eval_loss"]), 0.02):
        return None
    last, step = evals[-1], best["eval_step"]
    text = (
        f"Training is at {accuracy:.1%} accuracy while evaluation gets worse: its loss was {best['eval_loss']:.3f} at "
        f"step {step:,}, the best, and is {last['eval_loss']:.3f} (accuracy {best['eval_rewards/accuracies']:.1%} and "
        f"{last['eval_rewards/accuracies']:.1%})"
    )
    advice = (
        f"The best step so far is {step:,}: keep such a one with `load_best_model_at_end: true`, and lower "
        "`num_train_epochs` or `learning_rate`"
    )
    return Finding(OVERFITTING, history.step, text, advice, 1 + lost)


def long_answers(traits: RunTraits, history: History) -> Finding | None:
    """The model's answers have become much longer than they were, and than the chosen ones."""
    lengths = [(r["eval_step"], r[f"{ANSWERS}length"], r[f"{ANSWERS}ended"]) for r in history.evals if _answers(r)]
    if not _answers(history.last) or len(lengths) < 3:
        return None
    shortest = min(length for _, length, _ in lengths[:-2])
    latest = min(length for _, length, _ in lengths[-2:])
    if latest < 1.8 * shortest or latest < 1.5 * traits.chosen_tokens:
        return None
    ended = lengths[-1][2]
    text = (
        f"The model's answers have grown from {shortest:.0f} to {lengths[-1][1]:.0f} tokens, and {ended:.0%} of them "
        f"end; the chosen ones have {traits.chosen_tokens:.0f}"
    )
    advice = (
        "Lower `learning_rate` or `beta`, take an objective that divides by the length (`simpo`, `sigmoid_norm`), and "
        "see whether the chosen answers end (`jax-simpo inspect`)"
    )
    return Finding("long-answers", history.step, text, advice, latest / shortest)


def _answers(record: Mapping[str, Any]) -> bool:
    return f"{ANSWERS}length" in record


AT_START: tuple[Callable[[RunTraits], Finding | None], ...] = (learning_rate, gamma, double_bos, missing_eos)
DURING: tuple[Callable[[RunTraits, History], Finding | None], ...] = (
    swapped_labels,
    chosen_falls,
    loss_rises,
    gradient_spikes,
    no_learning,
    overfitting,
    long_answers,
)
