"""The number of steps of a run follows from its config, or cannot be counted."""

from __future__ import annotations

import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError
from jax_simpo.run.cadence import count_steps


def test_a_part_of_an_epoch_is_rounded_up_to_whole_steps() -> None:
    assert count_steps(TrainConfig(model_name_or_path="m", num_train_epochs=1.5), 5) == 8


@pytest.mark.parametrize("epochs", [1e9, 1e308])
def test_epochs_of_more_steps_than_a_counter_holds_are_an_error(epochs: float) -> None:
    with pytest.raises(ConfigError, match=r"`num_train_epochs` is 1e\+.*: at 5 steps an epoch"):
        count_steps(TrainConfig(model_name_or_path="m", num_train_epochs=epochs), 5)
