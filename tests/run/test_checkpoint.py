"""A step is written beside training, and is whole or not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.errors import CheckpointError
from jax_simpo.run import checkpoint
from jax_simpo.run.checkpoint import Checkpoints
from jax_simpo.run.sums import NOTHING, sums_of


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path / "checkpoints", keep=1) as opened:
        yield opened


def arrays(seed: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"w": jax.random.normal(keys[0], (64, 32))}, {"m": jax.random.normal(keys[1], (64, 32))}


def save(checkpoints: Checkpoints, step: int, state: Any) -> None:
    checkpoints.save(step, *state, {"seed": step}, NOTHING)


def restored(checkpoints: Checkpoints, step: int, like: Any) -> Any:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    return checkpoints.params(step, abstract[0]), checkpoints.optimizer(step, abstract[1])


def held_up(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> threading.Event:
    """Lets saves stop before their sums are made, until the event is set."""
    go_on = threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        assert go_on.wait(30)
        then()
        return sums_of(*args, **options)

    monkeypatch.setattr(checkpoint, "sums_of", slow)
    return go_on


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_an_update_in_place_while_a_step_is_written_does_not_reach_it(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_up(monkeypatch)
    state = arrays(0)
    before = jax.tree.map(np.array, state)
    update = jax.jit(lambda state: jax.tree.map(lambda x: 2 * x + 1, state), donate_argnums=0)
    save(checkpoints, 1, state)
    assert checkpoints.steps() == []  # `save` is back, and the step is not whole yet
    state = update(state)
    go_on.set()
    jax.tree.map(np.testing.assert_array_equal, restored(checkpoints, 1, state), before)


def test_a_save_waits_for_the_one_before(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = held_up(monkeypatch)
    save(checkpoints, 1, arrays(1))
    second = threading.Thread(target=save, args=(checkpoints, 2, arrays(2)))
    second.start()
    assert checkpoints.steps() == []
    go_on.set()
    second.join()
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_without_room_in_memory_a_save_returns_when_the_step_is_whole(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    little = tmp_path / "meminfo"
    little.write_text("MemTotal: 100 kB\nMemAvailable: 31 kB\n")  # the arrays have 16 kB
    monkeypatch.setattr(checkpoint, "_MEMORY", little)
    save(checkpoints, 1, arrays(0))
    assert checkpoints.steps() == [1]
    go_on = held_up(monkeypatch)
    little.write_text("MemTotal: 100 kB\nMemAvailable: 32 kB\n")
    save(checkpoints, 2, arrays(0))
    assert checkpoints.steps() == [1]
    go_on.set()


def test_a_write_that_fails_in_the_background_is_told_at_the_next_step(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1, arrays(0))
    checkpoints.wait()
    go_on = held_up(monkeypatch, then=fail)
    save(checkpoints, 2, arrays(0))
    checkpoints.check()  # it has not failed yet
    go_on.set()
    with pytest.raises(CheckpointError, match=r"step 2 cannot be saved: No space left on device\. Make room .* step 1"):
        checkpoints.wait()
    checkpoints.check()  # it is told once
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]


def test_leaving_the_context_waits_and_tells_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, arrays(0))
    assert checkpoints.steps() == [1]
    go_on = held_up(monkeypatch, then=fail)
    with pytest.raises(CheckpointError, match="step 2 cannot be saved"), Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 2, arrays(0))
        go_on.set()
    with pytest.raises(RuntimeError, match="what the run failed of"), Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 2, arrays(0))
        raise RuntimeError("what the run failed of")
    assert checkpoints.steps() == [1]


def test_copies_have_their_arrays_shardings() -> None:
    state = {"w": jnp.arange(8.0)}
    copies, apart = checkpoint._apart(state)
    assert apart and copies["w"].sharding == state["w"].sharding
    assert copies["w"].unsafe_buffer_pointer() != state["w"].unsafe_buffer_pointer()
