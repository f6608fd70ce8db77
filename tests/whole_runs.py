"""Makes whole runs quick in tests: runs of the same settings share their traced programs, and no pictures are drawn.

Import the fixture `quick_runs` into a test module (or a `conftest.py`), and all runs of its process are quick. The
pictures have tests of their own, and so has a run as a user starts it, in a process of its own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_simpo.config import TrainConfig, identity_of
from jax_simpo.models.transformer import Model, Params
from jax_simpo.run import curves
from jax_simpo.sharding import make_mesh
from jax_simpo.training import optim, reference, step, trainer

# A PNG of one black pixel.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)
_optimizers: dict[tuple[str, int], Any] = {}


def _run_optimizer(config: TrainConfig, total_steps: int) -> Any:
    """Returns the same optimizer for the same settings, so that the functions made with it are found again."""
    key = json.dumps(identity_of(config), default=str), total_steps
    return _optimizers.setdefault(key, optim.run_optimizer(config, total_steps))


@lru_cache(maxsize=8)
def _drawn(model: Model, seed: int) -> Params:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(_init(model, seed, mesh))


def _shared_init(model: Model, seed: int, mesh: Mesh) -> Params:
    """Draws the parameters of equal models once; they are the same on every mesh."""
    if jax.process_count() > 1:
        return _init(model, seed, mesh)
    # A copy, because a step takes the memory of its parameters, and a CPU's may be that of the host.
    return jax.device_put(jax.tree.map(np.array, _drawn(model, seed)), model.shardings(mesh))


_init = Model.init
_make_train_functions = lru_cache(maxsize=8)(step.make_train_functions)
_make_score_function = lru_cache(maxsize=8)(step.make_score_function)


@contextmanager
def made_quick() -> Iterator[None]:
    """Makes the runs of this process quick inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "run_optimizer", _run_optimizer)
        patch.setattr(trainer, "make_train_functions", _make_train_functions)
        for module in (trainer, reference):
            patch.setattr(module, "make_score_function", _make_score_function)
        patch.setattr(Model, "init", _shared_init)
        patch.setattr(curves, "draw_curves", lambda *_, **__: PICTURE)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    with made_quick():
        yield
