"""The decoder: tokens, positions and a mask in, hidden states out.

Read from the top: the parts of a layer, the layer, the stack of layers, and `Model`, the handle that the rest of the
program uses. Parameters are float32 and live in a nested dict outside; the modules below say which there are, how they
are split over the mesh (logical axis names) and what is computed with them, in `dtype`.

The layers are stacked: each of their parameters has a leading `layers` axis, and one compiled layer runs over it. So
compile time does not grow with depth, and only one layer's parameters are gathered at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jax_simpo.errors import MeshError
from jax_simpo.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope
from jax_simpo.models.embedding import lookup
from jax_simpo.ops.attention import Mask, attention
from jax_simpo.ops.blockwise import SAVED, matmul_precision
from jax_simpo.sharding import RULES, constrain, gather, named

Params = dict[str, Any]  # nested, leaves are arrays
Remat = Literal["none", "dots", "full"]


class Linear(nnx.Module):
    """`x @ kernel + bias`."""

    def __init__(self, axes: tuple[str, str], sizes: tuple[int, int], bias: bool, std: float, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), sizes), axes=axes)
        self.bias = nnx.Param(jnp.zeros(sizes[1]), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "B L In"]) -> Float[Array, "B L Out"]:
        y = jnp.matmul(x, _use(self.kernel, x.dtype), precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + _use(self.bias, x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm as Llama has it: float32 inside, back to the input's dtype, then the scale."""

    def __init__(self, config: ModelConfig) -> None:
        self.scale = nnx.Param(jnp.ones(config.hidden_size), axes=("embed",))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return _use(self.scale, x.dtype) * normed.astype(x.dtype)


class Embedding(nnx.Module):
    """One vector per token of the vocabulary; also the shape of an LM head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        sizes = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            config.initializer_range * jax.random.normal(rngs.params(), sizes), axes=("vocab", "embed")
        )

    def __call__(self, tokens: Int[Array, "B L"], dtype: Any) -> Float[Array, "B L D"]:
        return lookup(self.embedding[...], tokens, dtype)


class Attention(nnx.Module):
    """Self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        linear = partial(Linear, bias=config.attention_bias, std=config.initializer_range, rngs=rngs)
        self.q = linear(("embed", "heads"), (width, queries))
        self.k = linear(("embed", "heads"), (width, keys))
        self.v = linear(("embed", "heads"), (width, keys))
        self.o = linear(("heads", "embed"), (queries, width))

    def __call__(self, x: Float[Array, "B L D"], rope: tuple[Array, Array], mask: Mask) -> Float[Array, "B L D"]:
        q = rotate(_split_heads(self.q(x), self.config.num_heads), *rope)
        k = rotate(_split_heads(self.k(x), self.config.num_kv_heads), *rope)
        v = _split_heads(self.v(x), self.config.num_kv_heads)
        out = attention(q, k, v, mask, scale=self.config.head_dim**-0.5)
        return self.o(out.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """The gated feed-forward part (SwiGLU)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        linear = partial(Linear, bias=config.mlp_bias, std=config.initializer_range, rngs=rngs)
        self.gate = linear(("embed", "mlp"), (width, inner))
        self.up = linear(("embed", "mlp"), (width, inner))
        self.down = linear(("mlp", "embed"), (inner, width))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(constrain(jax.nn.silu(self.gate(x)) * self.up(x), "batch", None, "mlp"))


class Layer(nnx.Module):
    """One decoder layer: attention, then feed-forward, each on the norm of the stream and added to it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "B L D"], rope: tuple[Array, Array], mask: Mask) -> Float[Array, "B L D"]:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None)


class Decoder(nnx.Module):
    """Embedding, the stack of layers, the final norm; and the LM head's weights, unless they are the embedding's."""

    def __init__(self, config: ModelConfig, dtype: Any, remat: Remat, rngs: nnx.Rngs) -> None:
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embed = Embedding(config, rngs)
        stacked = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(partial(Layer, config)))
        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(config)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config, rngs)

    def __call__(self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], mask: Mask) -> Float[Array, "B L D"]:
        x = constrain(self.embed(tokens, self.dtype), "batch", None, None)
        rope = rope_tables(self.config.rope, self.config.head_dim, positions, self.dtype)
        layer, stacked_params = nnx.split(self.layers)

        def run_layer(x: Array, params: Any) -> tuple[Array, None]:
            return nnx.merge(layer, params)(x, rope, mask), None

        # prevent_cse guards against a compiler that undoes the rematerialisation; inside a loop it cannot.
        run_layer = jax.checkpoint(run_layer, policy=_REMAT[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(run_layer, x, stacked_params)
        return self.final_norm(x)


def rope_tables(
    rope: Rope, head_dim: int, positions: Int[Array, "B L"], dtype: Any
) -> tuple[Float[Array, "B L 1 Half"], Float[Array, "B L 1 Half"]]:
    """Cosines and sines of every token's rotary angles: float32 angles, then cast."""
    angles = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B L H Dh"], cos: Array, sin: Array) -> Float[Array, "B L H Dh"]:
    """Turns feature i together with feature i + Dh/2 (the half-split layout of Hugging Face checkpoints)."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " Half"]:
    """Radians per position, float32, one for each pair of features."""
    # Exponents rounded to float32 first, as in PyTorch; its float32 power is the float64 one rounded, nearly always.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    if isinstance(rope.scaling, LinearScaling):
        return frequencies / np.float32(rope.scaling.factor)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3_frequencies(rope.scaling, frequencies)
    return frequencies


def _llama3_frequencies(scaling: Llama3Scaling, frequencies: Float[np.ndarray, " Half"]) -> Float[np.ndarray, " Half"]:
    """Three bands by wavelength, in the order of operations of transformers (float32 throughout)."""
    factor, low, high = (np.float32(x) for x in (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor))
    length = np.float32(scaling.original_max_position_embeddings)
    wavelength = np.float32(2 * math.pi) / frequencies
    ramp = (length / wavelength - low) / (high - low)
    blend = (1 - ramp) * frequencies / factor + ramp * frequencies
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return np.where(between, blend, np.where(wavelength > length / low, frequencies / factor, frequencies))


def _use(param: nnx.Param, dtype: Any) -> Array:
    """A parameter as a layer computes with it: in the compute dtype, whole along `fsdp`."""
    return gather(param[...], dtype, *param.axes)


def _split_heads(x: Float[Array, "B L HDh"], heads: int) -> Float[Array, "B L H Dh"]:
    return constrain(x.reshape(*x.shape[:2], heads, -1), "batch", None, "heads", None)


def _made_of_activations(_: Any, *inputs: Any, **__: Any) -> bool:
    """Activations are [B, L, ...]; what is made of parameters alone has at most two axes.

    Without this rule a "none" policy would keep every layer's gathered parameters for the backward pass, which is the
    whole model on every device.
    """
    return any(len(getattr(x, "shape", ())) >= 3 for x in inputs)


_keep_attention = jax.checkpoint_policies.save_only_these_names(SAVED)
_keep_both = jax.checkpoint_policies.save_from_both_policies

# What the forward pass of a layer keeps for its backward pass; what it does not keep is computed again.
_REMAT = {
    "none": _keep_both(_made_of_activations, _keep_attention),
    "dots": _keep_both(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keep_attention),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Model:
    """A decoder without its weights: what parameters it has, how they lie on a mesh, and what it computes with them.

    Hashable, so that a jitted function can take it as a static argument. Parameters are a plain nested dict of arrays
    (`params["layers"]["attention"]["q"]["kernel"]`); the last key is `kernel` ([in, out]), `bias`, `scale` (norms) or
    `embedding` ([vocabulary, width], the LM head too).
    """

    config: ModelConfig
    dtype: Any = "bfloat16"
    remat: Remat = "full"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.remat not in _REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {', '.join(_REMAT)}")

    @cached_property
    def _split(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._fresh(jax.random.key(0))))

    def _fresh(self, key: Array) -> Decoder:
        return Decoder(self.config, self.dtype, self.remat, nnx.Rngs(params=key))

    @cached_property
    def abstract(self) -> Params:
        """Shapes and dtypes (float32) of the parameters."""
        return nnx.to_pure_dict(self._split[1])

    @cached_property
    def logical_axes(self) -> Params:
        """The logical axis names of the parameters; stacked ones start with `layers`."""

        def axes(path: tuple[Any, ...], param: nnx.Param) -> tuple[str, ...]:
            return ("layers", *param.axes) if path[0].key == "layers" else param.axes

        is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        tree = nnx.to_pure_dict(self._split[1], extract_fn=lambda param: param)
        return jax.tree_util.tree_map_with_path(axes, tree, is_leaf=is_param)

    @cached_property
    def parameter_count(self) -> int:
        """How many numbers the model learns; a tied head counts once."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract))

    def shardings(self, mesh: Mesh) -> Params:
        """Where each parameter lies on the mesh.

        Raises:
            MeshError: an axis of the mesh does not divide the model's width, heads, feed-forward width or vocabulary.
        """
        self._check(mesh)
        return jax.tree.map(lambda leaf, axes: named(mesh, *axes), self.abstract, self.logical_axes)

    def _check(self, mesh: Mesh) -> None:
        split = [
            ("embed", "hidden_size", self.config.hidden_size, "every parameter"),
            ("heads", "num_attention_heads", self.config.num_heads, "layers/attention/q and o"),
            ("heads", "num_key_value_heads", self.config.num_kv_heads, "layers/attention/k and v"),
            ("mlp", "intermediate_size", self.config.intermediate_size, "layers/mlp"),
            ("vocab", "vocab_size", self.config.vocab_size, "embed and the LM head"),
        ]
        for logical, field, size, where in split:
            axis = str(RULES[logical])
            if size % mesh.shape[axis]:
                fits = ", ".join(str(n) for n in range(1, mesh.shape[axis]) if size % n == 0)
                raise MeshError(
                    f"mesh axis `{axis}` has {mesh.shape[axis]} devices, which do not divide the model's "
                    f"{field}={size} (split in: {where}). Set mesh.{axis} to a divisor of {size}, such as {fits}, and "
                    "put the devices that are left on another axis"
                )

    def init(self, seed: int, mesh: Mesh) -> Params:
        """Fresh parameters as Hugging Face draws them: normal with `initializer_range`, biases zero, norms one.

        They are born split over the mesh, and the same seed gives the same numbers on every mesh.
        """

        def fresh(key: Array) -> Params:
            return nnx.to_pure_dict(nnx.state(self._fresh(key)))

        return jax.jit(fresh, out_shardings=self.shardings(mesh))(jax.random.key(seed))

    def hidden_states(
        self, params: Params, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], mask: Mask
    ) -> Float[Array, "B L D"]:
        """The hidden states after the final norm, in the compute dtype.

        Args:
            params: as `init` or `hf.load_params` give them.
            tokens: int32 token ids.
            positions: int32, the RoPE position of each token in its own response's sequence.
            mask: from `jax_simpo.ops.attention.prepare_mask`, made once per batch.
        """
        return nnx.merge(self._split[0], nnx.State(params))(tokens, positions, mask)

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The float32 weights of the LM head; the embedding's when they are tied."""
        return params["embed" if self.config.tie_word_embeddings else "lm_head"]["embedding"]
