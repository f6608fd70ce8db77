"""A step is written beside training, and is whole or not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from jax_simpo.errors import CheckpointError
from jax_simpo.run import checkpoint
from jax_simpo.run.checkpoint import Checkpoints
from jax_simpo.run.sums import NOTHING, sums_of

ORBAX_WRITES = "orbax.checkpoint._src.checkpointers.async_checkpointer._background_wait_for_commit_futures"


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


def buffers(state: Any) -> set[int]:
    """Returns where the numbers of the arrays lie in memory."""
    return {array.unsafe_buffer_pointer() for array in jax.tree.leaves(state)}


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_an_update_in_place_while_a_step_is_written_does_not_reach_it(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, given = held_up(monkeypatch), []
    to_disk = checkpoints._orbax.save
    monkeypatch.setattr(
        checkpoints._orbax, "save", lambda *a, args, **k: (given.append(args), to_disk(*a, args=args, **k))
    )
    state = arrays(0)
    before, own = jax.tree.map(np.array, state), buffers(state)
    update = jax.jit(lambda state: jax.tree.map(lambda x: 2 * x + 1, state), donate_argnums=0)
    save(checkpoints, 1, state)
    assert len(own) == 2 and not own & buffers([given[0]["params"].item, given[0]["optimizer"].item])
    assert checkpoints.steps() == []  # `save` is back, and the step is not whole yet
    state = update(state)
    go_on.set()
    jax.tree.map(np.testing.assert_array_equal, restored(checkpoints, 1, state), before)


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = held_up(monkeypatch), []
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, arrays(1))
        monkeypatch.setattr(checkpoints, "check_room", lambda *_: begun.append(checkpoints.steps()))
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(save, checkpoints, 2, arrays(2))
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
            assert not begun
            go_on.set()
            second.result(timeout=30)
    assert begun == [[1]] and checkpoints.steps() == [1, 2]


def test_without_room_in_memory_a_save_returns_when_the_step_is_whole(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    little = tmp_path / "meminfo"
    little.write_text("MemTotal: 100 kB\nMemAvailable: 31 kB\n")  # the arrays have 16 kB
    monkeypatch.setattr(checkpoint, "_MEMORY", little)
    monkeypatch.setattr(checkpoint, "_CONTAINER", tmp_path)
    save(checkpoints, 1, arrays(0))
    assert checkpoints.steps() == [1]
    go_on = held_up(monkeypatch)
    little.write_text("MemTotal: 100 kB\nMemAvailable: 32 kB\n")
    save(checkpoints, 2, arrays(0))
    assert checkpoints.steps() == [1]
    go_on.set()
    checkpoints.wait()
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("67233\n")  # the container has a byte less
    save(checkpoints, 3, arrays(0))
    assert checkpoints.steps() == [3]


def test_a_write_that_fails_in_the_background_is_told_at_the_next_step(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1, arrays(0))
    checkpoints.wait()
    go_on = held_up(monkeypatch, then=fail)
    save(checkpoints, 2, arrays(0))
    checkpoints.raise_failed()  # it has not failed yet
    go_on.set()
    with pytest.raises(CheckpointError, match=r"step 2 cannot be saved: No space left on device\. Make room .* step 1"):
        checkpoints.wait()
    checkpoints.raise_failed()  # it is told once
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]


def test_a_disk_that_is_full_while_arrays_are_written_leaves_nothing_of_the_step(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: Path, writes: Any, *_: object, **__: object) -> None:
        for write in writes:
            write.result()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\n[tensorstore spec of 200 lines]")

    monkeypatch.setattr(
        "orbax.checkpoint._src.checkpointers.async_checkpointer._background_wait_for_commit_futures", full
    )
    save(checkpoints, 1, arrays(0))
    with pytest.raises(CheckpointError, match=r"step 1 cannot be saved: No space left on device\. Make room"):
        checkpoints.wait()
    assert list(checkpoints.directory.iterdir()) == []
    assert not caplog.records  # no traceback beside the line


def test_a_process_that_dies_during_a_save_is_no_full_disk(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(folder: Path, writes: Any, *_: object, **__: object) -> None:
        for write in writes:
            write.result()
        raise TimeoutError("Timed out while waiting for async_write_complete barrier.") from JaxRuntimeError(
            "UNAVAILABLE"
        )

    monkeypatch.setattr(
        "orbax.checkpoint._src.checkpointers.async_checkpointer._background_wait_for_commit_futures", lost
    )
    save(checkpoints, 1, arrays(0))
    with pytest.raises(JaxRuntimeError, match="UNAVAILABLE"):
        checkpoints.wait()


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
    copies, copied = checkpoint._safe_from_updates(state)
    assert copied and copies["w"].sharding == state["w"].sharding
    assert copies["w"].unsafe_buffer_pointer() != state["w"].unsafe_buffer_pointer()
