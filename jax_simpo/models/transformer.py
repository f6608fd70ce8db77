"""The decoder: computes hidden states from tokens, positions and a mask.

Read from the top: the parts of a layer, the layer, the stack of layers, and `Model`, which the rest of the program
uses. Parameters are float32 (the frozen ones beside adapters are in `dtype`) and are kept outside, in a nested dict.
The modules below define which parameters there are, how they are split over the mesh (logical axis names) and what is
computed with them, in `dtype`.

The layers are stacked: each of their parameters has a leading `layers` axis, and one compiled layer runs over it. So
compile time does not grow with depth, and only one layer's parameters are gathered at a time. If layers differ in
their sliding windows, one period of the pattern is compiled instead of one layer (two layers in Gemma 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jax_simpo.errors import MeshError
from jax_simpo.models.config import Activation, ModelConfig
from jax_simpo.models.embedding import lookup
from jax_simpo.models.lora import Adapter, Lora, join, split
from jax_simpo.models.rope import rope_tables, rotate
from jax_simpo.ops.attention import Mask, attention
from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.bits import slice_in_loop, sliced_as_bits, without_gradient
from jax_simpo.ops.linear import linear
from jax_simpo.ops.numerics import SAVED_ATTENTION, SAVED_PRODUCT
from jax_simpo.sharding import RULES, constrain, gather_parameter, named

Params = dict[str, Any]  # nested, leaves are arrays
Remat = Literal["none", "dots", "attention", "full"]


class KeysAndValues(NamedTuple):
    """Holds what attention reads of some tokens in one layer, or with a leading axis in all layers.

    Attributes:
        k: rotated keys.
        v: values.
    """

    k: Float[Array, "*N B L K Dh"]
    v: Float[Array, "*N B L K Dh"]


# `attend(q, own, rule, stored)` computes a layer's attention of queries [B, L, H, Dh], given the keys and values of the
# same tokens and what is stored for this layer of earlier ones. It returns the result, in the queries' shape and dtype,
# and what of this layer is to be kept.
Attend = Callable[[Array, KeysAndValues, ScoreRule, Any], tuple[Array, Any]]


def attend_under(mask: Mask, *, keep: bool = False) -> Attend:
    """Returns the attention of rows under a mask, with nothing stored; it keeps keys and values if asked."""

    def attend(q: Array, own: KeysAndValues, rule: ScoreRule, _: None) -> tuple[Array, KeysAndValues | None]:
        return attention(q, *own, mask, **rule._asdict()), own if keep else None

    return attend


class Linear(nnx.Module):
    """Computes `x @ kernel + bias`, plus the term of its adapter if it has one."""

    def __init__(
        self,
        axes: tuple[str, str],
        sizes: tuple[int, int],
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
        lora: Lora | None = None,
    ) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), sizes), axes=axes)
        self.bias = nnx.Param(jnp.zeros(sizes[1]), axes=axes[1:]) if bias else None
        self.adapter = None if lora is None else Adapter(lora, axes, sizes, rngs)

    def __call__(self, x: Float[Array, "B L In"]) -> Float[Array, "B L Out"]:
        y = linear(x, _gathered_weight(self.kernel, x.dtype))
        y = y if self.bias is None else y + _broadcast(_gathered_weight(self.bias, x.dtype), y.shape)
        return y if self.adapter is None else y + self.adapter(x)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32.

    Llama rounds to the input's dtype and then multiplies by `scale`; Gemma multiplies by `1 + scale` before it rounds.
    """

    def __init__(self, config: ModelConfig, size: int, axis: str | None = "embed") -> None:
        self.scale = nnx.Param(jnp.zeros(size) if config.norm_offset else jnp.ones(size), axes=(axis,))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (normed * _broadcast(1.0 + _gathered_weight(self.scale, jnp.float32), x.shape)).astype(x.dtype)
        return _broadcast(_gathered_weight(self.scale, x.dtype), x.shape) * normed.astype(x.dtype)


class Embedding(nnx.Module):
    """One vector per token of the vocabulary. The LM head's weights are stored as an `Embedding` too."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        sizes = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            config.initializer_range * jax.random.normal(rngs.params(), sizes), axes=("vocab", "embed")
        )

    def __call__(self, tokens: Int[Array, "B L"], dtype: Any) -> Float[Array, "B L D"]:
        return lookup(self.embedding[...], tokens, dtype)


class Attention(nnx.Module):
    """Self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
        self.config = config
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim

        def make(name: str, axes: tuple[str, str], sizes: tuple[int, int], bias: bool) -> Linear:
            return Linear(axes, sizes, bias, config.initializer_range, rngs, _adapter_of(f"attention/{name}", lora))

        self.q = make("q", ("embed", "heads"), (width, queries), config.qkv_bias)
        self.k = make("k", ("embed", "heads"), (width, keys), config.qkv_bias)
        self.v = make("v", ("embed", "heads"), (width, keys), config.qkv_bias)
        self.o = make("o", ("heads", "embed"), (queries, width), config.output_bias)
        # All heads share one scale, so every device has all of it.
        self.q_norm = RMSNorm(config, config.head_dim, None) if config.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_dim, None) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "B L D"], rope: tuple[Array, Array], window: int | None, attend: Attend, stored: Any
    ) -> tuple[Float[Array, "B L D"], Any]:
        config = self.config
        q, k = _split_heads(self.q(x), config.num_heads), _split_heads(self.k(x), config.num_kv_heads)
        v = _split_heads(self.v(x), config.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rule = ScoreRule(config.query_pre_attn_scalar**-0.5, window, config.attention_softcap)
        out, kept = attend(rotate(q, *rope), KeysAndValues(rotate(k, *rope), v), rule, stored)
        return self.o(out.reshape(*x.shape[:2], -1)), kept


class MLP(nnx.Module):
    """The gated feed-forward part: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
        width, inner = config.hidden_size, config.intermediate_size

        def make(name: str, axes: tuple[str, str], sizes: tuple[int, int]) -> Linear:
            adapter = _adapter_of(f"mlp/{name}", lora)
            return Linear(axes, sizes, config.mlp_bias, config.initializer_range, rngs, adapter)

        self.gate = make("gate", ("embed", "mlp"), (width, inner))
        self.up = make("up", ("embed", "mlp"), (width, inner))
        self.down = make("down", ("mlp", "embed"), (inner, width))
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        # As in PyTorch: in float32 and rounded once, because in bfloat16 each step of an activation would round.
        gate = _ACTIVATIONS[self.activation](self.gate(x).astype(jnp.float32)).astype(x.dtype)
        return self.down(constrain(gate * self.up(x), "batch", None, "mlp"))


_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Layer(nnx.Module):
    """One decoder layer: adds attention and then feed-forward to the stream, each computed from the stream's norm."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
        norm = partial(RMSNorm, config, config.hidden_size)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs, lora)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = MLP(config, rngs, lora)
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x: Float[Array, "B L D"], rope: tuple[Array, Array], window: int | None, attend: Attend, stored: Any
    ) -> tuple[Float[Array, "B L D"], Any]:
        y, kept = self.attention(self.attention_norm(x), rope, window, attend, stored)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(self.mlp_norm(x))
        x = x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))
        return constrain(x, "batch", None, None), kept


class Decoder(nnx.Module):
    """Embedding, stack of layers and final norm. It also has the LM head's weights, unless they are the embedding's."""

    def __init__(self, config: ModelConfig, dtype: Any, remat: Remat, lora: Lora | None, rngs: nnx.Rngs) -> None:
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embed = Embedding(config, rngs)
        stacked = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(partial(Layer, config, lora=lora)))
        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(config, config.hidden_size)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config, rngs)

    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], attend: Attend, stored: Any
    ) -> tuple[Float[Array, "B L D"], Any]:
        x = self.embed(tokens, self.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        x = constrain(x, "batch", None, None)
        rope = rope_tables(self.config.rope, self.config.head_dim, positions, self.dtype)
        x, kept = self._run_layers(x, rope, attend, stored)
        return self.final_norm(x), kept

    def _run_layers(
        self, x: Float[Array, "B L D"], rope: tuple[Array, Array], attend: Attend, stored: Any
    ) -> tuple[Float[Array, "B L D"], Any]:
        layer, stacked = nnx.split(self.layers)
        windows = _shortest_period(self.config.layer_windows)
        count, periods = len(windows), self.config.num_layers // len(windows)
        # The loop slices a period from each stack of parameters, except from stacks that XLA would copy to slice them.
        leaves, structure = jax.tree.flatten(stacked)
        looped = [None if sliced_as_bits(leaf) else leaf for leaf in leaves]
        unsliced = [without_gradient(leaf) if sliced_as_bits(leaf) else None for leaf in leaves]
        if count > 1:
            looped = jax.tree.map(lambda leaf: leaf.reshape(periods, count, *leaf.shape[1:]), looped)

        def run_layer(
            number: int, x: Array, params: Any, unsliced: Any, stored: Any, period: Array
        ) -> tuple[Array, Any]:
            # The layer is sliced out of its period inside the rematerialised function. So the backward pass keeps the
            # stack of parameters itself, not a copy of it.
            if count > 1:
                params = jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, number, keepdims=False), params)
            sliced, stored = jax.tree.map(
                lambda leaf: slice_in_loop(leaf, period * count + number, 1).squeeze(0), (unsliced, stored)
            )
            params = [a if b is None else b for a, b in zip(params, sliced, strict=True)]
            merged = nnx.merge(layer, jax.tree.unflatten(structure, params))
            return merged(x, rope, windows[number], attend, stored)

        def run_period(x: Array, params_and_period: tuple[Any, Array]) -> tuple[Array, Any]:
            params, period = params_and_period
            kept = []
            for number in range(count):
                # prevent_cse stops the compiler from undoing the rematerialisation, which it cannot do inside a loop.
                run = jax.checkpoint(partial(run_layer, number), policy=_REMAT[self.remat], prevent_cse=periods == 1)
                x, of_layer = run(x, params, unsliced, stored, period)
                kept.append(of_layer)
            return x, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *kept)

        x, kept = jax.lax.scan(run_period, x, (looped, jnp.arange(periods)))
        return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept)


def _shortest_period(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Returns the shortest pattern that the layers' windows repeat; all windows if they repeat none."""
    count = len(windows)
    lengths = (n for n in range(1, count + 1) if count % n == 0)
    return next(windows[:n] for n in lengths if windows[:n] * (count // n) == windows)


def _gathered_weight(param: nnx.Param, dtype: Any) -> Array:
    """Returns a parameter in the form that a layer computes with: in the compute dtype and whole along `fsdp`.

    Every weight of a layer's base comes from here. A weight that is stored in another form (quantised, say) is to be
    decoded here.
    """
    return gather_parameter(param[...], dtype, *param.axes)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _broadcast(vector: Float[Array, " N"], shape: tuple[int, ...]) -> Float[Array, "*B N"]:
    """Broadcasts a vector to `*B N`. Its gradient is one sum in float32, rounded once.

    Autodiff would sum a bfloat16 gradient in bfloat16, with the precision of a single term. And broadcasting by `*`
    adds axes of size one, which the gradient keeps: with a batch of one row, that makes XLA's CPU backend fifty times
    slower at this sum.
    """
    return jnp.broadcast_to(vector, shape)


def _broadcast_forward(vector: Array, shape: tuple[int, ...]) -> tuple[Array, None]:
    return _broadcast(vector, shape), None


def _broadcast_backward(_: tuple[int, ...], __: None, g: Array) -> tuple[Array]:
    return (jnp.sum(g, axis=tuple(range(g.ndim - 1)), dtype=jnp.float32).astype(g.dtype),)


_broadcast.defvjp(_broadcast_forward, _broadcast_backward)


def _adapter_of(path: str, lora: Lora | None) -> Lora | None:
    """Returns `lora` if the linear layer at `path` has an adapter, else None."""
    return lora if lora is not None and path in lora.targets else None


def _split_heads(x: Float[Array, "B L HDh"], heads: int) -> Float[Array, "B L H Dh"]:
    return constrain(x.reshape(*x.shape[:2], heads, -1), "batch", None, "heads", None)


def _depends_on_activations(primitive: Any, *inputs: Any, **_: Any) -> bool:
    """Rematerialisation policy: keeps results computed from activations, but nothing computed from parameters alone.

    Activations are [B, L, ...], and one layer's parameters have at most two axes. Without this rule, remat "none" would
    keep every layer's gathered parameters for the backward pass: the whole model on every device. Slices are never
    kept, because they cost nothing to recompute, and some take a layer out of its stack of parameters.
    """
    return primitive.name not in _SLICING_PRIMITIVES and any(len(getattr(x, "shape", ())) >= 3 for x in inputs)


_SLICING_PRIMITIVES = ("slice", "squeeze", "optimization_barrier", "bitcast_convert_type", "dynamic_slice")


_keep_attention = jax.checkpoint_policies.save_only_these_names(SAVED_ATTENTION)
_keep_either = jax.checkpoint_policies.save_from_both_policies

# Policies for what a layer keeps for its backward pass. Everything else is computed again.
_REMAT = {
    "none": _keep_either(_depends_on_activations, _keep_attention),
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED_PRODUCT, SAVED_ATTENTION),
    "attention": _keep_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Model:
    """A decoder without its weights: describes its parameters, places them on a mesh, and computes with them.

    It is hashable, so that a jitted function can take it as a static argument. Parameters are a nested dict of arrays
    (`params["layers"]["attention"]["q"]["kernel"]`). The last key is `kernel` ([in, out]), `bias`, `scale` (of norms)
    or `embedding` ([vocabulary, width], also for the LM head). With `lora`, linear layers have an `adapter` of two
    matrices, `a` ([in, rank]) and `b` ([rank, out]). Only adapters are trained then; the base is frozen, in `dtype`.

    Attributes:
        config: sizes and switches of the decoder.
        dtype: the dtype of activations and of the copies of weights that layers compute with.
        remat: what a layer keeps for its backward pass: everything ("none"), its input with the results of matrix
            products and of attention ("dots"), its input with those of attention ("attention"), or its input ("full").
        lora: the adapters; None trains all parameters.
    """

    config: ModelConfig
    dtype: Any = "bfloat16"
    remat: Remat = "full"
    lora: Lora | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.remat not in _REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {', '.join(_REMAT)}")

    @cached_property
    def _graph_and_state(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._new_decoder(jax.random.key(0))))

    def _new_decoder(self, key: Array) -> Decoder:
        # Adapters have a random stream of their own, so that the base is the same with and without them.
        rngs = nnx.Rngs(params=key, adapters=jax.random.fold_in(key, 1))
        return Decoder(self.config, self.dtype, self.remat, self.lora, rngs)

    @cached_property
    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters: float32 for trained ones, the compute dtype for frozen ones."""
        trained, frozen = self.split(nnx.to_pure_dict(self._graph_and_state[1]))
        frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), frozen)
        return self.join(trained, frozen)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters, or a dict of the same structure, into the trained and the frozen ones."""
        return (params, {}) if self.lora is None else split(params)

    def join(self, trained: Params, frozen: Params) -> Params:
        """Joins the two dicts that `split` returns."""
        return trained if self.lora is None else join(trained, frozen)

    @cached_property
    def logical_axes(self) -> Params:
        """The logical axis names of each parameter; those of stacked parameters start with `layers`."""

        def axes(path: tuple[Any, ...], param: nnx.Param) -> tuple[str | None, ...]:
            return ("layers", *param.axes) if path[0].key == "layers" else param.axes

        is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        tree = nnx.to_pure_dict(self._graph_and_state[1], extract_fn=lambda param: param)
        return jax.tree_util.tree_map_with_path(axes, tree, is_leaf=is_param)

    @cached_property
    def parameter_count(self) -> int:
        """Number of scalars in all parameters; a tied head counts once."""
        return _count_scalars(self.abstract)

    @cached_property
    def trained_count(self) -> int:
        """Number of scalars in the trained parameters."""
        return _count_scalars(self.split(self.abstract)[0])

    def shardings(self, mesh: Mesh) -> Params:
        """Returns the sharding of each parameter on the mesh.

        Raises:
            MeshError: an axis of the mesh does not divide the model's width, heads, feed-forward width or vocabulary.
        """
        self._check_mesh(mesh)
        return jax.tree.map(lambda leaf, axes: named(mesh, *axes), self.abstract, self.logical_axes)

    def _check_mesh(self, mesh: Mesh) -> None:
        split = [
            ("embed", "hidden_size", self.config.hidden_size, "every parameter"),
            ("heads", "num_attention_heads", self.config.num_heads, "layers/attention/q and o"),
            ("heads", "num_key_value_heads", self.config.num_kv_heads, "layers/attention/k and v"),
            ("mlp", "intermediate_size", self.config.intermediate_size, "layers/mlp"),
            ("vocab", "vocab_size", self.config.vocab_size, "embed and the LM head"),
        ]
        for logical, field, size, parameters in split:
            axis = str(RULES[logical])
            if size % mesh.shape[axis]:
                fits = ", ".join(str(n) for n in range(1, mesh.shape[axis]) if size % n == 0)
                raise MeshError(
                    f"mesh axis `{axis}` has {mesh.shape[axis]} devices, which do not divide the model's "
                    f"{field}={size} (split in: {parameters}). Set mesh.{axis} to a divisor of {size}, such as {fits}, "
                    "and put the remaining devices on another axis"
                )

    def init(self, seed: int, mesh: Mesh) -> Params:
        """Draws fresh parameters as Hugging Face does: normal with `initializer_range`, biases zero, norms neutral.

        They are split over the mesh from the start. The same seed gives the same numbers on every mesh.
        """

        def fresh(key: Array) -> Params:
            params = nnx.to_pure_dict(nnx.state(self._new_decoder(key)))
            return jax.tree.map(lambda x, like: x.astype(like.dtype), params, self.abstract)

        return jax.jit(fresh, out_shardings=self.shardings(mesh))(jax.random.key(seed))

    def init_trained(self, seed: int, mesh: Mesh) -> Params:
        """Draws only the trained parameters, with the numbers that `init` gives them."""

        def fresh(key: Array) -> Params:
            return self.split(nnx.to_pure_dict(nnx.state(self._new_decoder(key))))[0]

        return jax.jit(fresh, out_shardings=self.split(self.shardings(mesh))[0])(jax.random.key(seed))

    def hidden_states(
        self, params: Params, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], mask: Mask
    ) -> Float[Array, "B L D"]:
        """Computes the hidden states after the final norm, in the compute dtype.

        Args:
            params: parameters as `init` or `hf.load_params` returns them.
            tokens: int32 token ids.
            positions: int32, the RoPE position of each token in its own response's sequence.
            mask: from `jax_simpo.ops.attention.prepare_mask`, made once per batch.
        """
        return self.run(params, tokens, positions, attend_under(mask))[0]

    def run(
        self,
        params: Params,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        attend: Attend,
        stored: Any = None,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Computes hidden states as `hidden_states` does, with an attention of the caller's.

        Args:
            params: parameters as `init` or `hf.load_params` returns them.
            tokens: int32 token ids.
            positions: int32, the RoPE position of each token in its own sequence.
            attend: computes attention in every layer.
            stored: arrays with a leading axis of layers; each layer's part is handed to `attend`.

        Returns:
            The hidden states after the final norm, and what `attend` keeps of each layer, stacked along a leading axis.
        """
        return nnx.merge(self._graph_and_state[0], nnx.State(params))(tokens, positions, attend, stored)

    def compute_copy(self, params: Params) -> Params:
        """Returns the parameters in the dtype that layers compute with, for a program that uses each many times.

        The scales of norms stay as they are: Gemma's are computed with in float32.
        """

        def cast(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf if path[-1].key == "scale" else leaf.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(cast, params)

    def head(self, params: Params) -> Float[Array, "V D"]:
        """Returns the weights of the LM head, which are the embedding's if the two are tied."""
        return params["embed" if self.config.tie_word_embeddings else "lm_head"]["embedding"]


def _count_scalars(tree: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
