"""Says which backends of the loss head can run in a place, and which of them `auto` prefers there before any was tried.

On an accelerator `training.loss_head` tries the candidates and decides by what it sees (`evidence.py`).
"""

from __future__ import annotations

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.loss_head.backends import BACKENDS, load_backend


def candidates(place: Place, width: int) -> list[str]:
    """Returns the backends that can run in a place, `xla` first: a kernel must be clearly faster than it.

    Args:
        place: where the head is to run.
        width: features of a hidden state.
    """
    return [name for name in BACKENDS if load_backend(name).obstacle(place, width) is None]


def choose(name: str, place: Place, width: int) -> tuple[str, str]:
    """Returns the backend that a config's `loss_head` stands for, from what is known without trying any; and why.

    No kernel has run on hardware yet, so `auto` takes `xla` where nothing can be tried.

    Args:
        name: of the config, `auto` or one of `backends.BACKENDS`.
        place: where it is to run.
        width: features of a hidden state.

    Raises:
        ConfigError: the backend cannot run there.
    """
    if name == "auto":
        return "xla", f"auto on a {place.kind}: no other one is taken untried"
    if obstacle := load_backend(name).obstacle(place, width):
        possible = ", ".join(candidates(place, width))
        raise ConfigError(f"`loss_head: {name}` {obstacle}; choose auto or one of those that can run here: {possible}")
    return name, "as configured"
