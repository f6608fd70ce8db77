"""Attention backends that are wrong on purpose, to be found out, and one that is right and slow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from jax_simpo.ops.attention import backends, choice, dense
from jax_simpo.ops.attention.backends import Backend, Place, ScoreRule, runs_anywhere
from jax_simpo.ops.attention.mask import Mask

Attend = Callable[[Array, Array, Array, Mask, ScoreRule], Array]


def _branches_see_each_other(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    causal = jnp.where(mask.real, mask.key_end.shape[1], 0)
    return dense.attend(q, k, v, replace(mask, key_end=causal), rule)


def _one_key_too_much(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    """Lets the only token of a branch see the last token of the branch before it, beside 150 that it may see."""
    return dense.attend(q, k, v, replace(mask, key_end=mask.key_end.at[1, 409].add(1)), rule)


def _no_window(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    return dense.attend(q, k, v, mask, rule._replace(window=None))


def _no_softcap(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    return dense.attend(q, k, v, mask, rule._replace(softcap=None))


def _nan(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    return dense.attend(q, k, v, mask, rule).at[0, 5, 0, 0].set(jnp.nan)


def _crash(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    raise NotImplementedError("no lowering for this [type] of\nchip")


def _no_gradient(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    return dense.attend(q, jax.lax.stop_gradient(k), v, mask, rule)


def _slow(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    """Computes the right result thirty times; each time needs the one before."""

    def again(_: int, out: Array) -> Array:
        return dense.attend(q + 0 * out, k, v, mask, rule)

    return jax.lax.fori_loop(0, 30, again, dense.attend(q, k, v, mask, rule))


def _wrong_in_long_rows(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    """Is right on the rows of 640 tokens, as a kernel may be that takes larger blocks in longer rows."""
    return (_branches_see_each_other if q.shape[1] > 640 else dense.attend)(q, k, v, mask, rule)


def _wrong_in_the_last_block(q: Array, k: Array, v: Array, mask: Mask, rule: ScoreRule) -> Array:
    """Leaves out the keys beyond the last whole block of 512, in rows in which a kernel may have so large ones."""
    length = q.shape[1]
    whole = length if length <= 640 else length - length % 512
    hidden = jnp.minimum(mask.key_end, jnp.arange(length) + 1)  # seen by its own query alone
    key_end = jnp.where(jnp.arange(length) < whole, mask.key_end, jnp.where(mask.real, hidden, 0))
    return dense.attend(q, k, v, replace(mask, key_end=key_end), rule)


PLANTED: dict[str, Attend] = {
    "wrong_in_long_rows": _wrong_in_long_rows,
    "wrong_in_the_last_block": _wrong_in_the_last_block,
    "wrong_mask": _branches_see_each_other,
    "one_key_too_much": _one_key_too_much,
    "no_window": _no_window,
    "no_softcap": _no_softcap,
    "nan": _nan,
    "crash": _crash,
    "no_gradient": _no_gradient,
    "slow": _slow,
}


def plant(monkeypatch: pytest.MonkeyPatch, *names: str, obstacle: Callable[[Place], Any] = runs_anywhere) -> None:
    """Makes `auto` on a CPU choose among these planted backends and `dense`, in this order."""
    for name in names:
        module = ModuleType(f"planted_{name}")
        module.BACKEND = Backend(dense.prepare, PLANTED[name], obstacle)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(backends.BACKENDS, name, module.__name__)
    preferred = tuple((name, "planted by a test") for name in (*names, "dense"))
    monkeypatch.setitem(choice.PREFERENCES, "CPU", preferred)
