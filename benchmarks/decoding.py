"""How fast are answers generated, beside a program that stores no keys and values?

The baseline recomputes the whole sequence for each token: one compiled loop over the same model, with the same
attention, whose every step is a forward pass over prompts and answers so far. (The program worked like that before it
stored keys and values.) Both write the same greedy answers of a random model, which never ends one, and take turns in
one process.

Expected: at 512 new tokens an answer is written at least 20 times as fast. Several samples of one prompt share the
prompt's keys, so they are written about as fast as answers to as many prompts, in less memory.

Takes about 10 minutes on two cores, nearly all of it in the baseline (`--quick`: a few seconds).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.facts import machine_facts
from benchmarks.models import MODELS, model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table
from benchmarks.steps import device_name, one_device
from benchmarks.timing import in_turns, speed_up, timed
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.generate import Generation, generate
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model, Params
from jax_simpo.ops.attention import prepare_causal_mask
from jax_simpo.ops.numerics import matmul_precision

STORED, SHARED = "stored, a prompt for each answer", "stored, all answers to one prompt"
RECOMPUTED = "recompute the whole sequence for each token"


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    model: Annotated[str, Option("See benchmarks/models.py.", choices=list(MODELS))] = "small",
    dtype: Annotated[str, Option("Type computed in.", choices=["float32", "bfloat16"])] = "float32",
    prompt: Annotated[int, Option("Tokens of a prompt.")] = 120,
    new: Annotated[int, Option("Tokens of an answer.")] = 512,
    rounds: Annotated[int, Option("Runs of each.")] = 1,
    name: Annotated[str, Option("Stem of the files.")] = "decoding",
    quick: Annotated[bool, Option("A tiny model and short answers, to see that it runs.")] = False,
) -> None:
    """Measures both ways of decoding."""
    if quick:
        model, prompt, new, rounds = "tiny", 20, 16, 1
    forward = Forward(Model(read_model_config(model_mapping(model)), dtype), "blockwise")
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = forward.model.init(0, mesh)
        measured = {answers: _measure(forward, params, mesh, answers, prompt, new, rounds) for answers in (1, 4)}
    rows = []
    for answers, seconds in measured.items():
        for way, times in seconds.items():
            ratio = speed_up(seconds[RECOMPUTED], times)
            rows.append((answers, way, min(times), 1e3 * min(times) / new, answers * new / min(times), ratio))
    columns = ("answers", "way", "seconds", "ms a step", "tokens/s", "speed-up")
    note = (
        f"The model `{model}` ({forward.model.parameter_count:,} parameters), {dtype}, prompts of {prompt} tokens, "
        f"greedy answers of {new} tokens. A step writes a token of every answer. Seconds are of the fastest of "
        f"{rounds} run(s), compilation left out and the pass over the prompts counted; the speed-up is the median over "
        "rounds of the ratio within a round, to the way that recomputes."
    )
    tables = [Table(f"{new} tokens an answer", columns, rows, note)]
    device = device_name()
    about = (
        "How fast answers are generated with stored keys and values, and by a loop that recomputes the whole sequence "
        "for each token. Answers to the same prompt are the same tokens. Each way ran "
        f"{'once' if rounds == 1 else f'{rounds} times'}, on {device}, with a model of "
        f"{forward.model.parameter_count / 1e6:.1f} million parameters; the ratios hold for nothing else."
    )
    Result(name, "Decoding", about, machine_facts(device), tables, {"measured": measured}).write(output)


def _measure(
    forward: Forward, params: Params, mesh: Any, answers: int, length: int, new: int, rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds of each run of each way. All must have written the same answer to the same prompt."""
    rng = np.random.default_rng(answers)
    prompts = rng.integers(3, forward.model.config.vocab_size, (answers, length)).tolist()
    recompute = _recomputing(forward, -(-(length + new) // 128) * 128)

    def stored(prompts: list[list[int]], samples: int) -> list[list[int]]:
        asked = Generation(new, (), samples)  # no token ends an answer
        written = generate(forward, params, mesh, prompts, asked, batch_size=answers)
        return [answer.ids for of_prompt in written for answer in of_prompt]

    ways: dict[str, Callable[[], list[list[int]]]] = {STORED: lambda: stored(prompts, 1)}
    if answers > 1:
        ways[SHARED] = lambda: stored(prompts[:1], answers)
    for way in ways.values():
        way()  # compiles
    recompute(params, prompts, 1)
    ways[RECOMPUTED] = lambda: recompute(params, prompts, new)
    written: dict[str, list[list[int]]] = {}

    def seconds(way: str, _: int) -> float:
        written[way], taken = timed(ways[way])
        return taken

    found = in_turns({way: partial(seconds, way) for way in ways}, rounds)
    if forward.model.dtype == jnp.float32:  # in bfloat16 two ways to compute a logit round it differently
        assert written[STORED] == written[RECOMPUTED], "the two ways have written different answers"
        assert written.get(SHARED, []) in ([], [written[STORED][0]] * answers), "samples have written another answer"
    return found


def _recomputing(forward: Forward, length: int) -> Callable[[Params, list[list[int]], int], list[list[int]]]:
    """Makes the baseline: `params, prompts, new tokens -> answers`, for prompts of one length.

    Args:
        forward: the model and its attention.
        length: places of a sequence, prompt and answer.
    """
    model = forward.model

    def next_tokens(params: Params, tokens: jax.Array, end: jax.Array) -> jax.Array:
        # Causality hides the places that are still to be written, so all steps share one mask.
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        mask = prepare_causal_mask(positions, model.config.windows, forward.attention)
        hidden = model.hidden_states(params, tokens, positions, mask)
        last = jax.lax.dynamic_slice_in_dim(hidden, end - 1, 1, axis=1)[:, 0]
        head = model.head(params).astype(last.dtype)
        precision = matmul_precision(last.dtype)
        logits = jnp.einsum("bd,vd->bv", last, head, precision=precision, preferred_element_type=jnp.float32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    @jax.jit
    def decode(params: Params, tokens: jax.Array, start: jax.Array, new: jax.Array) -> jax.Array:
        def add_token(number: jax.Array, tokens: jax.Array) -> jax.Array:
            end = start + number
            chosen = next_tokens(params, tokens, end)
            return jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], end, axis=1)

        return jax.lax.fori_loop(0, new, add_token, tokens)

    def run(params: Params, prompts: list[list[int]], new: int) -> list[list[int]]:
        start = len(prompts[0])
        tokens = np.zeros((len(prompts), length), np.int32)
        tokens[:, :start] = prompts
        written = jax.device_get(decode(params, tokens, jnp.int32(start), jnp.int32(new)))
        return [row[start : start + new].tolist() for row in written]

    return run


if __name__ == "__main__":
    run(main)
