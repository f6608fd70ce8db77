"""Log-probabilities of the targets from their hidden states, without ever holding the logits of all of them.

Only the hidden states that predict a target reach the head. They are taken in chunks; the forward keeps one float per
target (the log-sum-exp), the backward makes each chunk's logits again. Under a mesh the head is gathered over `fsdp`
once before the loop over the chunks and its gradient is reduced and scattered once after it: the loops below run inside
`shard_map`, where no partitioner can put a collective of the head's size into them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.ops.blockwise import matmul_precision
from jax_simpo.sharding import RULES, psum, spec

DEFAULT_CHUNK = 512


def target_logps(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    target_index: Int[Array, "B T"],
    target_token: Int[Array, "B T"],
    *,
    softcap: float | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> Float[Array, "B T"]:
    """Log-probability of each target token, float32.

    Args:
        hidden: hidden states after the final norm, in the compute dtype.
        head: the LM head (the embedding of a tied model), float32 master weights, `[vocabulary, width]`.
        target_index: int32, index in the row of the hidden state that predicts the target.
        target_token: int32, the token predicted.
        softcap: caps the logits, `softcap * tanh(logits / softcap)` (Gemma 2).
        chunk: most targets per device whose logits are alive at once; at most a quarter of them are.
    """
    return _target_logps(_Static(softcap, chunk), hidden, head, target_index, target_token)


class _Static(NamedTuple):
    softcap: float | None
    chunk: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _target_logps(static: _Static, hidden: Array, head: Array, index: Array, token: Array) -> Array:
    return _forward(static, hidden, head, index, token)[0]


def _forward(
    static: _Static, hidden: Array, head: Array, index: Array, token: Array
) -> tuple[Array, tuple[Array, ...]]:
    logps, lse = _per_shard(partial(_local_forward, *static), "hidden head targets targets", "targets targets")(
        hidden, head, index, token
    )
    return logps, (hidden, head, index, token, lse)


def _backward(static: _Static, saved: tuple[Array, ...], dlogps: Array) -> tuple[Array | None, ...]:
    run = _per_shard(partial(_local_backward, *static), "hidden head targets targets targets targets", "hidden head")
    dhidden, dhead = run(*saved, dlogps)
    return dhidden, dhead, None, None


_target_logps.defvjp(_forward, _backward)


def _per_shard(f, inputs: str, outputs: str):  # type: ignore[no-untyped-def]
    """Runs `f` on every device's own rows and its own part of the head, if there is a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return partial(f, meshed=False)
    specs = {
        "hidden": P(RULES["batch"], None, None),
        "targets": P(RULES["batch"], None),
        "head": spec("vocab", "embed"),
    }
    in_specs, out_specs = (tuple(specs[name] for name in names.split()) for names in (inputs, outputs))
    return jax.shard_map(partial(f, meshed=True), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local_forward(
    softcap: float | None, chunk: int, hidden: Array, head: Array, index: Array, token: Array, *, meshed: bool
) -> tuple[Array, Array]:
    whole_head = _gather_head(head, hidden.dtype, meshed)
    states, tokens = _chunks(chunk, _take(hidden, index), token.reshape(-1))

    def one_chunk(args: tuple[Array, Array]) -> tuple[Array, Array]:
        h, target = args
        logits = _logits(h, whole_head, softcap)
        top = _over_tensor(jax.lax.pmax, logits.max(-1), meshed)
        total = _over_tensor(jax.lax.psum, jnp.exp(logits - top[:, None]).sum(-1), meshed)
        lse = top + jnp.log(total)
        chosen = jnp.where(_is_target(target, logits.shape[-1], meshed), logits, 0.0).sum(-1)
        return _over_tensor(jax.lax.psum, chosen, meshed) - lse, lse

    logps, lse = jax.lax.map(one_chunk, (states, tokens))
    return _unchunk(logps, index.shape), _unchunk(lse, index.shape)


def _local_backward(
    softcap: float | None,
    chunk: int,
    hidden: Array,
    head: Array,
    index: Array,
    token: Array,
    lse: Array,
    dlogps: Array,
    *,
    meshed: bool,
) -> tuple[Array, Array]:
    whole_head = _gather_head(head, hidden.dtype, meshed)
    precision = matmul_precision(hidden.dtype)
    per_target = _chunks(chunk, _take(hidden, index), *(x.reshape(-1) for x in (token, lse, dlogps)))

    def one_chunk(dhead: Array, args: tuple[Array, ...]) -> tuple[Array, Array]:
        h, target, chunk_lse, g = args
        logits = _logits(h, whole_head, softcap)
        dlogits = _is_target(target, logits.shape[-1], meshed) - jnp.exp(logits - chunk_lse[:, None])
        if softcap is not None:
            dlogits *= 1.0 - (logits / softcap) ** 2
        dlogits = (g[:, None] * dlogits).astype(h.dtype)
        dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        return dhead + dot("nv,nd->vd", dlogits, h), dot("nv,vd->nd", dlogits, whole_head)

    dhead, dstates = jax.lax.scan(one_chunk, jnp.zeros(whole_head.shape, jnp.float32), per_target)
    dstates = _over_tensor(jax.lax.psum, _unchunk(dstates, (*index.shape, hidden.shape[-1])), meshed)
    rows = jnp.arange(len(hidden))[:, None]
    dhidden = jnp.zeros(hidden.shape, jnp.float32).at[rows, index].add(dstates).astype(hidden.dtype)
    if meshed:
        dhead = jax.lax.psum_scatter(dhead, RULES["embed"], scatter_dimension=1, tiled=True)
        dhead = psum(dhead, "data")
    return dhidden, dhead.astype(head.dtype)


def _gather_head(head: Array, dtype: jnp.dtype, meshed: bool) -> Array:
    head = head.astype(dtype)
    return jax.lax.all_gather(head, RULES["embed"], axis=1, tiled=True) if meshed else head


def _take(hidden: Float[Array, "B L D"], index: Int[Array, "B T"]) -> Float[Array, "N D"]:
    return jnp.take_along_axis(hidden, index[..., None], axis=1).reshape(-1, hidden.shape[-1])


def _logits(h: Array, head: Array, softcap: float | None) -> Float[Array, "C V"]:
    logits = jnp.einsum("nd,vd->nv", h, head, precision=matmul_precision(h.dtype), preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _is_target(target: Int[Array, " C"], vocabulary: int, meshed: bool) -> Array:
    """One-hot of the target in this device's part of the vocabulary, boolean [C, V]."""
    first = jax.lax.axis_index(RULES["vocab"]) * vocabulary if meshed else 0
    return target[:, None] == first + jnp.arange(vocabulary)[None, :]


def _over_tensor(reduce, x: Array, meshed: bool) -> Array:  # type: ignore[no-untyped-def]
    # A reduction over one device is not free on every backend.
    return reduce(x, RULES["vocab"]) if meshed and jax.lax.axis_size(RULES["vocab"]) > 1 else x


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Cuts [N, ...] arrays into [chunks, chunk, ...], padded with zeros at the end."""
    count = len(arrays[0])
    size = max(1, min(chunk, -(-count // 4)))
    padding = -count % size
    return tuple(jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]) for x in arrays)


def _unchunk(x: Array, shape: tuple[int, ...]) -> Array:
    size = 1
    for n in shape[:2]:
        size *= n
    return x.reshape(-1, *shape[2:])[:size].reshape(shape)
