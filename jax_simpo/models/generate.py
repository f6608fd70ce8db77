"""Greedy answers of the parameters as they stand, so that a run can show what it changed.

For a handful of short samples, not for serving: there is no cache of keys and values, every new token costs a forward
pass over the whole buffer. In return it runs wherever training runs: same model, same mask, same mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from jax_simpo.data.packing import ROW_MULTIPLE
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Params
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import constrain, gather_parameter, named

Decode = Callable[
    [Params, Int[Array, "B L"], Int[Array, " B"], Int[Array, ""]], tuple[Int[Array, "B L"], Int[Array, " B"]]
]


def generate(
    forward: Forward,
    params: Params,
    mesh: Mesh,
    prompts: Sequence[Sequence[int] | Int[np.ndarray, " N"]],
    max_new_tokens: int,
    eos_id: int,
) -> list[list[int]]:
    """The most likely next tokens of each prompt, one at a time, up to `max_new_tokens` or EOS, which is left out.

    For a few short samples, see the head of this file. Call it under `jax.set_mesh(mesh)`; every process of a run must.

    Args:
        forward: the model and its attention, as in training.
        params: its parameters on the mesh.
        mesh: as of `jax.set_mesh`.
        prompts: token ids, each prompt at least one; they may differ in length.
        max_new_tokens: at most so many tokens are added.
        eos_id: the token that ends an answer.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError(f"prompt {int(lengths.argmin())} is empty: there is nothing to predict from")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = _round_up(len(prompts), devices)
    tokens = np.zeros((rows, _round_up(int(lengths.max()) + max_new_tokens, ROW_MULTIPLE)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    # Rows that only fill the devices have no length and are finished from the start.
    known = np.pad(lengths, (0, rows - len(prompts)))
    # Every process has all prompts, and its devices take theirs.
    batch = (
        jax.make_array_from_callback(tokens.shape, named(mesh, "batch", None), tokens.__getitem__),
        jax.make_array_from_callback(known.shape, named(mesh, "batch"), known.__getitem__),
    )
    written, ends = jax.device_get(_decoder(forward, mesh, max_new_tokens)(params, *batch, jnp.int32(eos_id)))
    answers = [row[start:end].tolist() for row, start, end in zip(written, lengths, ends, strict=False)]
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in answers]


@lru_cache(maxsize=4)
def _decoder(forward: Forward, mesh: Mesh, max_new_tokens: int) -> Decode:
    """The compiled loop; the same for the samples before and after training, so it is compiled once."""

    def next_tokens(params: Params, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
        # What stands right of a row's last token is not there yet. Causality hides it, so the mask stays the same for
        # all steps: one document per row, as long as the buffer.
        model = forward.model
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        key_end = jnp.full_like(tokens, tokens.shape[1])
        mask = prepare_mask(key_end, positions, forward.model.config.windows, forward.attention, sequences=1)
        hidden = model.hidden_states(params, tokens, positions, mask)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        head = gather_parameter(model.head(params), last.dtype, "vocab", "embed")
        # Log-probs would have the same order, and so would soft-capped logits.
        precision = matmul_precision(last.dtype)
        logits = jnp.einsum("bd,vd->bv", last, head, precision=precision, preferred_element_type=jnp.float32)
        return jnp.argmax(constrain(logits, "batch", "vocab"), axis=-1).astype(jnp.int32)

    def decode(
        params: Params, tokens: Int[Array, "B L"], lengths: Int[Array, " B"], eos: Int[Array, ""]
    ) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
        rows = jnp.arange(tokens.shape[0])

        def unfinished(state: tuple[Array, Array, Bool[Array, " B"], Array]) -> Bool[Array, ""]:
            _, _, finished, added = state
            return (added < max_new_tokens) & ~finished.all()

        def add_token(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            tokens, lengths, finished, added = state
            new = next_tokens(params, tokens, lengths)
            tokens = tokens.at[rows, lengths].set(jnp.where(finished, tokens[rows, lengths], new))
            return tokens, lengths + ~finished, finished | (new == eos), added + 1

        state = (tokens, lengths, lengths == 0, jnp.int32(0))
        tokens, lengths, _, _ = jax.lax.while_loop(unfinished, add_token, state)
        return tokens, lengths

    # On every device whole, so that every process can read all answers.
    return jax.jit(decode, out_shardings=NamedSharding(mesh, P()))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
