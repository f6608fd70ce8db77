"""Oracles of every objective: TRL's own code, or a transcription of its paper where TRL has none, and numbers to try.

Inputs are random sums, lengths and reference sums, among them log-ratios of a thousand.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Per pair: the sums of chosen and rejected, their lengths, and the sums under the reference.
Numbers = dict[str, np.ndarray]
Oracle = Callable[[Any, dict[str, Any]], Any]


def random_numbers(pairs: int = 200) -> Numbers:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (2, pairs))
    sums = -rng.gamma(2.0, 1.0, (2, pairs)) * lengths
    reference = sums + rng.normal(0, 5, (2, pairs))
    return numbers(sums, lengths, reference)


def extreme_numbers() -> Numbers:
    """Every combination of log-ratios of -1e3, 0 and 1e3, of short and long responses, and of tiny probabilities."""
    ratios = np.array([-1e3, 0.0, 1e3])
    grid = np.array(np.meshgrid(ratios, ratios, [1, 40], [-1e-6, -2000.0])).reshape(4, -1)
    sums = np.stack([grid[3], grid[3] - 1.0])
    return numbers(sums, np.stack([grid[2], 41 - grid[2]]), sums - grid[:2])


def numbers(sums: np.ndarray, lengths: np.ndarray, reference: np.ndarray) -> Numbers:
    names = ("sum", "length", "reference")
    return {
        f"{side}_{name}": np.float32(values[i])
        for name, values in zip(names, (sums, lengths, reference), strict=True)
        for i, side in enumerate(("chosen", "rejected"))
    }


def theirs(oracle: Oracle, settings: dict[str, Any], n: Numbers) -> tuple[np.ndarray, list[np.ndarray]]:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in n.items()}
    sums = [tensors[f"{side}_sum"].requires_grad_() for side in ("chosen", "rejected")]
    losses = oracle(SimpleNamespace(**tensors), settings)
    gradients = torch.autograd.grad(losses.sum(), sums)
    return losses.detach().numpy(), [g.numpy() for g in gradients]


# --- oracles: TRL


@functools.cache
def trl(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns about its own future
        if name == "dpo":
            from trl import DPOTrainer as Trainer
        elif name == "cpo":
            from trl.experimental.cpo import CPOTrainer as Trainer
        else:
            from trl.experimental.orpo import ORPOTrainer as Trainer
    return Trainer


class _Model:
    """Stands in for a model of one token a sequence, whose log-prob is the given sum."""

    training = True

    def __init__(self, sums: Any) -> None:
        self._sums = sums

    def __call__(self, **_: Any) -> Any:
        return SimpleNamespace(log_probs=self._sums[:, None], loss=None)


class _Losses(Exception):
    """Carries the losses of single pairs out of TRL's function, which returns their mean."""


def trl_dpo(loss_type: str) -> Oracle:
    """Runs `DPOTrainer._compute_loss` up to the first mean: that of the losses of the pairs."""

    def losses(n: Any, settings: dict[str, Any]) -> Any:
        sums = torch.cat([n.chosen_sum, n.rejected_sum])
        lengths = torch.cat([n.chosen_length, n.rejected_length]).long()
        width = int(lengths.max())
        # TRL counts a response's tokens in its completion mask, and sums all log-probs that the model returns.
        mask = (torch.arange(width)[None] < lengths[:, None]).long()
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu"),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            use_weighting=False,
            beta=settings["beta"],
            label_smoothing=settings.get("label_smoothing", 0.0),
        )
        inputs = {
            "input_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": n.chosen_reference,
            "ref_rejected_logps": n.rejected_reference,
        }

        def mean(per_pair: Any, *_: Any, **__: Any) -> Any:
            raise _Losses(per_pair)

        original = torch.Tensor.mean
        torch.Tensor.mean = mean
        try:
            trl("dpo")._compute_loss(trainer, _Model(sums), inputs, False)
        except _Losses as caught:
            return caught.args[0]
        finally:
            torch.Tensor.mean = original
        raise AssertionError("TRL's function took no mean")

    return losses


def trl_cpo(loss_type: str, *, mean: bool) -> Oracle:
    def losses(n: Any, settings: dict[str, Any]) -> Any:
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu"),
            loss_type=loss_type,
            beta=settings["beta"],
            simpo_gamma=settings["beta"] * settings.get("gamma_beta_ratio", 0.0),
            label_smoothing=settings.get("label_smoothing", 0.0),
            alpha=settings.get("alpha", 0.0),
        )
        chosen, rejected = (
            s / (length if mean else 1)
            for s, length in ((n.chosen_sum, n.chosen_length), (n.rejected_sum, n.rejected_length))
        )
        return trl("cpo").cpo_loss(trainer, chosen, rejected)[0]

    return losses


def trl_orpo(n: Any, settings: dict[str, Any]) -> Any:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=settings["beta"])
    # TRL computes in float32 whatever it is given; this keeps the oracle in float64.
    original = torch.Tensor.float
    torch.Tensor.float = lambda self: self
    try:
        means = n.chosen_sum / n.chosen_length, n.rejected_sum / n.rejected_length
        return -trl("orpo").odds_ratio_loss(trainer, *means)[0]
    finally:
        torch.Tensor.float = original


# --- oracles: the papers


def simper(n: Any, _: dict[str, Any]) -> Any:
    """Xiao et al. 2025: the inverse perplexity of the rejected response minus that of the chosen one."""
    return torch.exp(n.rejected_sum / n.rejected_length) - torch.exp(n.chosen_sum / n.chosen_length)


def slic(n: Any, settings: dict[str, Any]) -> Any:
    """Zhao et al. 2023: max(0, delta - log P(y+|x) + log P(y-|x))."""
    return torch.clamp(settings["delta"] - n.chosen_sum + n.rejected_sum, min=0)


def conservative_dpo(n: Any, settings: dict[str, Any]) -> Any:
    """Mitchell 2023: the labels are flipped with probability eps."""
    z = settings["beta"] * ((n.chosen_sum - n.chosen_reference) - (n.rejected_sum - n.rejected_reference))
    eps = settings["label_smoothing"]
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def dpop(n: Any, settings: dict[str, Any]) -> Any:
    """Pal et al. 2024: -log sigmoid(beta (log r_w - log r_l - lambda max(0, log(ref_w / pi_w))))."""
    chosen, rejected = n.chosen_sum - n.chosen_reference, n.rejected_sum - n.rejected_reference
    penalty = torch.clamp(n.chosen_reference - n.chosen_sum, min=0)
    return -F.logsigmoid(settings["beta"] * (chosen - rejected - settings["dpop_lambda"] * penalty))


def smoothed_sigmoid_norm(n: Any, settings: dict[str, Any]) -> Any:
    chosen = (n.chosen_sum - n.chosen_reference) / n.chosen_length
    rejected = (n.rejected_sum - n.rejected_reference) / n.rejected_length
    z, eps = settings["beta"] * (chosen - rejected), settings["label_smoothing"]
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


CASES: list[tuple[str, dict[str, Any], Oracle]] = [
    ("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.55}, trl_cpo("simpo", mean=True)),
    ("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.55, "label_smoothing": 0.1}, trl_cpo("simpo", mean=True)),
    ("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.1, "alpha": 0.25}, trl_cpo("simpo", mean=True)),
    ("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.1, "alpha": -0.5}, trl_cpo("simpo", mean=True)),
    ("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.1, "alpha": 0.0}, trl_cpo("simpo", mean=True)),
    ("simper", {}, simper),
    ("cpo", {"beta": 0.1}, trl_cpo("sigmoid", mean=False)),
    ("cpo", {"beta": 0.1, "label_smoothing": 0.2}, trl_cpo("sigmoid", mean=False)),
    ("cpo", {"beta": 0.1, "loss_type": "hinge"}, trl_cpo("hinge", mean=False)),
    ("slic", {"delta": 3.0}, slic),
    ("orpo", {"beta": 0.1}, trl_orpo),
    ("dpo", {"beta": 0.1}, trl_dpo("sigmoid")),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, conservative_dpo),
    ("dpo", {"beta": 0.1, "loss_type": "hinge"}, trl_dpo("hinge")),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, trl_dpo("robust")),
    ("ipo", {"beta": 0.1}, trl_dpo("ipo")),
    ("sigmoid_norm", {"beta": 5.0}, trl_dpo("sigmoid_norm")),
    ("sigmoid_norm", {"beta": 5.0, "label_smoothing": 0.1}, smoothed_sigmoid_norm),
    ("dpop", {"beta": 0.3, "dpop_lambda": 50.0}, dpop),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, trl_dpo("exo_pair")),
    ("apo_zero", {"beta": 0.1}, trl_dpo("apo_zero")),
    ("apo_down", {"beta": 0.1}, trl_dpo("apo_down")),
    ("nca_pair", {"beta": 0.1}, trl_dpo("nca_pair")),
    ("bco_pair", {"beta": 0.1}, trl_dpo("bco_pair")),
    ("sppo_hard", {"beta": 0.01}, trl_dpo("sppo_hard")),
]
NAMES = [f"{name}-{'-'.join(f'{k}={v}' for k, v in settings.items())}" for name, settings, _ in CASES]
