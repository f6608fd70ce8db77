"""Generates greedy answers, so that a run can show samples from before and after training.

It is made for a handful of short samples, not for serving: without a cache of keys and values, every new token costs a
forward pass over the whole buffer. In return it runs wherever training runs: same model, same mask, same mesh.
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

from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Params
from jax_simpo.ops.attention import prepare_causal_mask
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import constrain, gather_parameter, named

# Buffers are a multiple of this long: attention kernels and matmuls work on blocks of 128 positions.
_LENGTH_MULTIPLE = 128

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
    """Returns the most likely continuation of each prompt, token by token, without the EOS that ends it.

    Every process of a run must call it, under `jax.set_mesh(mesh)`.

    Args:
        forward: the model and its attention, as in training.
        params: the model's parameters on the mesh.
        mesh: the mesh of `jax.set_mesh`.
        prompts: token ids, at least one per prompt; prompts may differ in length.
        max_new_tokens: the most tokens of an answer.
        eos_id: the token that ends an answer.

    Raises:
        ValueError: a prompt is empty.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError(f"prompt {int(lengths.argmin())} is empty: there is nothing to predict from")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = _round_up(len(prompts), devices)
    tokens = np.zeros((rows, _round_up(int(lengths.max()) + max_new_tokens, _LENGTH_MULTIPLE)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    # Rows that only fill the devices have length 0 and are finished from the start.
    prompt_lengths = np.pad(lengths, (0, rows - len(prompts)))
    # Every process has all prompts and gives each of its devices the rows of that device.
    batch = (
        jax.make_array_from_callback(tokens.shape, named(mesh, "batch", None), tokens.__getitem__),
        jax.make_array_from_callback(prompt_lengths.shape, named(mesh, "batch"), prompt_lengths.__getitem__),
    )
    written, ends = jax.device_get(_jit_decode(forward, mesh, max_new_tokens)(params, *batch, jnp.int32(eos_id)))
    answers = [row[start:end].tolist() for row, start, end in zip(written, lengths, ends, strict=False)]
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in answers]


@lru_cache(maxsize=4)
def _jit_decode(forward: Forward, mesh: Mesh, max_new_tokens: int) -> Decode:
    """Makes the jitted decoding loop. It is cached, so that samples before and after training share one compilation."""

    def next_tokens(params: Params, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
        # Causality hides the positions right of a row's last token, which are still to be written. So all steps share
        # one mask: one document per row, as long as the buffer.
        model = forward.model
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        mask = prepare_causal_mask(positions, model.config.windows, forward.attention)
        hidden = model.hidden_states(params, tokens, positions, mask)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        head = gather_parameter(model.head(params), last.dtype, "vocab", "embed")
        # Argmax needs neither log-probs nor the soft cap: both keep the order of the logits.
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

    # The result is replicated, so that every process can read all answers.
    return jax.jit(decode, out_shardings=NamedSharding(mesh, P()))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
