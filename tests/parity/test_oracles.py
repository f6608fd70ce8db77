"""Both sides' losses against the numbers of the original code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jax_simpo.objectives import SimPO
from tests.objectives.support import of_means
from torch_ref.losses import Objective as TorchObjective

BETA, RATIO = 2.5, 0.55
CHOSEN, REJECTED = [-0.5, -1.0, -0.8], [-0.9, -0.7, -0.8]
# From the code that the published numbers come from, run on the log-probs above.
CHECK_VALUES = [
    ("sigmoid", 0.0, [0.898123, 2.237822, 1.600413]),
    ("sigmoid", 0.1, [0.860623, 2.025322, 1.462913]),
    ("hinge", 0.0, [1.375, 3.125, 2.375]),
]


@pytest.mark.parametrize(("loss_type", "smoothing", "values"), CHECK_VALUES)
def test_losses_are_those_of_the_original_code(loss_type: Any, smoothing: float, values: list[float]) -> None:
    objective = SimPO(beta=BETA, gamma_beta_ratio=RATIO, loss_type=loss_type, label_smoothing=smoothing)
    jax_losses = objective.losses(of_means(np.float32(CHOSEN)), of_means(np.float32(REJECTED)))
    torch_losses = TorchObjective(BETA, RATIO, loss_type, smoothing).losses(
        torch.tensor(CHOSEN), torch.tensor(REJECTED)
    )
    np.testing.assert_allclose(np.asarray(jax_losses), values, atol=1e-6)
    np.testing.assert_allclose(torch_losses.numpy(), values, atol=1e-6)
