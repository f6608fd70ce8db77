"""Both sides against a third: TRL's functions, and the numbers of the original code."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from jax_simpo.train.step import Objective as JaxObjective
from parity.cases import Cell, make_plan
from parity.results import Found, read_found
from tests.parity.conftest import Matrix
from torch_ref.distributed import Ranks
from torch_ref.losses import Objective as TorchObjective
from torch_ref.setup import Setup

BETA, RATIO = 2.5, 0.55
CHOSEN, REJECTED = [-0.5, -1.0, -0.8], [-0.9, -0.7, -0.8]
# From the code that the published numbers come from, run on the log-probs above.
CHECK_VALUES = [
    ("sigmoid", 0.0, [0.898123, 2.237822, 1.600413]),
    ("sigmoid", 0.1, [0.860623, 2.025322, 1.462913]),
    ("hinge", 0.0, [1.375, 3.125, 2.375]),
]
BACKENDS = ["jax, 1 device", "jax, fsdp=4 x tensor=2", "torch, 1 process"]


def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, about its future
        from trl.experimental.cpo import CPOTrainer
    return CPOTrainer


@pytest.mark.parametrize(("loss_type", "smoothing", "values"), CHECK_VALUES)
def test_losses_are_those_of_the_original_code(loss_type: Any, smoothing: float, values: list[float]) -> None:
    jax_losses = JaxObjective(BETA, RATIO, loss_type, smoothing).losses(np.float32(CHOSEN), np.float32(REJECTED))
    torch_losses = TorchObjective(BETA, RATIO, loss_type, smoothing).losses(
        torch.tensor(CHOSEN), torch.tensor(REJECTED)
    )
    np.testing.assert_allclose(np.asarray(jax_losses), values, atol=1e-6)
    np.testing.assert_allclose(torch_losses.numpy(), values, atol=1e-6)


@pytest.fixture(scope="module", params=["llama", "llama3"])
def trl_means(request: pytest.FixtureRequest, matrix: Matrix) -> tuple[str, np.ndarray]:
    """Mean log-probs of the first step's pairs by TRL's function, from transformers' logits, one response at a time."""
    from transformers import AutoModelForCausalLM

    job, cell = matrix.job, Cell(request.param, "separate", "float32", "torch, 1 process")
    config = job.config(cell)
    pairs = Setup(config, Console(quiet=True), Ranks(0, 1, torch.device("cpu"), launched=False)).train_pairs()
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    means = []
    for pair in pairs.pairs(make_plan(job, config, pairs.lengths).pairs(0)):
        for response in pair.responses:
            ids = torch.from_numpy(response.ids.astype(np.int64))[None]
            labels = ids.clone()
            labels[:, : response.prompt_length] = -100
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            means.append(trl().get_batch_logps(logits, labels, average_log_prob=True).item())
    return request.param, np.array(means).reshape(-1, 2)


def found_in(matrix: Matrix, family: str, layout: str, backend: str) -> Found:
    return read_found(matrix.job.found(Cell(family, layout, "float32", backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["separate", "shared + packed"])
def test_mean_log_probs_and_losses_are_trls(
    layout: str, backend: str, trl_means: tuple[str, np.ndarray], matrix: Matrix
) -> None:
    family, means = trl_means
    found = found_in(matrix, family, layout, backend)
    np.testing.assert_allclose(found.means, means, atol=2e-5)
    settings = SimpleNamespace(
        beta=BETA,
        simpo_gamma=BETA * RATIO,
        label_smoothing=0.0,
        loss_type="simpo",
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, rejected = trl().cpo_loss(settings, *torch.from_numpy(means).T)
    np.testing.assert_allclose(found.losses, losses.numpy(), atol=2e-5)
    first = found.steps[0]
    np.testing.assert_allclose(first["rewards/chosen"], chosen.mean().item(), atol=2e-5)
    np.testing.assert_allclose(first["rewards/rejected"], rejected.mean().item(), atol=2e-5)
