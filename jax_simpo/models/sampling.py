"""Chooses the next token of each answer from its logits: the most likely one, or one drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt

from jax_simpo.errors import ConfigError
from jax_simpo.sharding import constrain


@dataclass(frozen=True)
class Sampling:
    """Describes how tokens are drawn. The filters apply one after the other, in this order, as in transformers.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draws among so many of the most likely tokens; None among all.
        top_p: draws among the fewest tokens, the most likely first, whose probabilities add up to this; None among all.

    Raises:
        ConfigError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"`temperature` is {self.temperature}; expected a number >= 0 (0: the most likely token)")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"`top_k` is {self.top_k}; expected a whole number >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` is {self.top_p}; expected a number above 0 and at most 1")

    @property
    def is_greedy(self) -> bool:
        """True if no token is drawn at random."""
        return self.temperature == 0

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """Returns a token for each row, int32. The key of a row alone decides what is drawn for it."""
        if self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        filtered = self.filtered(constrain(logits, "batch", None))
        return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Returns the logits that are drawn from: divided by the temperature, -inf for tokens that are left out.

        Tokens as likely as the last one that is kept are kept too.
        """
        logits = logits / self.temperature
        vocabulary = logits.shape[-1]
        if self.top_k is not None and self.top_k < vocabulary:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            shares = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(shares, axis=-1) - shares  # the probability of all likelier tokens
            kept = (before < self.top_p).sum(-1, keepdims=True)
            least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return logits


def answer_keys(seed: UInt[Array, ""], prompts: Int[Array, " B"], samples: int) -> Key[Array, " BN"]:
    """Returns a key for each sample of each prompt, the samples of a prompt side by side.

    A key depends on the seed, the number of the prompt and the number of the sample, so an answer is the same whichever
    prompts are computed beside it.
    """
    base = jax.random.key(seed)

    def of_prompt(number: Array) -> Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(base, number), jnp.arange(samples))

    return jax.vmap(of_prompt)(prompts).reshape(-1)


def keys_at(keys: Key[Array, " B"], place: Int[Array, ""]) -> Key[Array, " B"]:
    """Returns the keys for one place of the answers, counted from 0."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, place)
