"""Runs the sides of `benchmarks.layers`, each in a process of its own: `python -m benchmarks.layers_sides jax|torch`.

A request names a cell (prefix and response lengths). The answer has the seconds of forward plus backward of every part
and implementation that runs on the device, separate and shared, in turns. Short runs are started many times before the
process waits for them. If a run raises, the answer says which one and why, and the process is of no more use: a GPU may
refuse whatever it asks for next. The request to a new process then names that run in `without`. Each run is named when
it begins, so that one that hangs or ends the process is known too. Masks and rotary tables, which a model makes once
for all layers, are made before.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.cells import first_line
from benchmarks.timing import calls_a_window, in_turns, window_seconds
from benchmarks.workers import Requests

# Implementations by platform. On other platforms they are missing, or interpreted and too slow to measure.
RUNS_ON = {
    "cpu": ("dense", "blockwise", "banded"),
    "gpu": ("dense", "blockwise", "banded", "pallas", "triton", "cudnn"),
    "tpu": ("dense", "blockwise", "banded", "splash"),
}
# The most scores of all heads. A device holds some eight copies of them in the backward pass.
DENSE_LIMIT = {"cpu": 2**28, "gpu": 2**30, "tpu": 2**28}


Handle = Callable[[dict[str, Any]], dict[str, Any]]


def layouts(prefix: int, response: int) -> dict[str, list[np.ndarray]]:
    """Returns `key_end` and positions [1, L] of one pair as two sequences in a row, and with its prefix shared."""
    length = prefix + response
    separate = np.repeat([length, 2 * length], length), np.tile(np.arange(length), 2)
    ends = np.repeat([length + response, length, length + response], [prefix, response, response])
    shared = ends, np.concatenate([np.arange(length), np.arange(prefix, length)])
    rows = {"separate": separate, "shared": shared}
    return {name: [array.astype(np.int32)[None] for array in row] for name, row in rows.items()}


def time_all(
    runs: Mapping[str, Callable[[], Any]],
    wait: Callable[[Any], object],
    request: Mapping[str, Any],
    begin: Callable[[str], None],
) -> dict[str, Any]:
    """Times each run after one that compiles.

    Args:
        runs: functions that start a computation.
        wait: waits for what such a function returns.
        request: has `rounds`, the number of windows of each run, in turns, and `without`, the runs to leave out.
        begin: is told the name of each run that begins (`Requests.begin`).

    Returns:
        `first_seconds`, `calls` and `seconds` of each run; if one raises, its name (`run`) and why (`failed`).
    """
    working: dict[str, Callable[[int], float]] = {}
    timings: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if name in request["without"]:
            continue
        begin(name)
        try:
            first = window_seconds(run, wait, 1)
            calls = calls_a_window(run, wait)
        except Exception as error:  # out of memory, or no kernel for this device
            traceback.print_exc()
            return {"run": name, "failed": first_line(error)}
        timings[name] = {"first_seconds": first, "calls": calls}
        working[name] = partial(_window, partial(begin, name), run, wait, calls)
    if working:
        for name, seconds in in_turns(working, request["rounds"]).items():
            timings[name]["seconds"] = seconds
    return timings


def _window(
    begin: Callable[[], None], run: Callable[[], Any], wait: Callable[[Any], object], calls: int, _: int
) -> float:
    begin()
    return window_seconds(run, wait, calls)


def jax_side(mapping: dict[str, Any], dtype: str, begin: Callable[[str], None]) -> Handle:
    """Times our MLP, our attention implementations, and a layer's attention with its projections around each."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks.masks import prepared
    from benchmarks.steps import device_name, matmul_peak
    from jax_simpo.hf.config import read_model_config
    from jax_simpo.models.rope import rope_tables
    from jax_simpo.models.transformer import MLP, Attention, attend_under
    from jax_simpo.ops.attention import BACKENDS, attention, place_of

    platform = place_of().platform
    config = read_model_config(mapping)
    mlp, mlp_params = nnx.split(MLP(config, nnx.Rngs(0)))
    layer, layer_params = nnx.split(Attention(config, nnx.Rngs(0)))
    implementations = [name for name in BACKENDS if name in RUNS_ON[platform]]

    def random(*shape: int) -> Any:
        return jax.random.normal(jax.random.key(len(shape)), shape, jnp.dtype(dtype))

    def gradient(forward: Callable[..., Any], prepared: Any, *arguments: Any) -> Callable[[], Any]:
        # With the gradient of a sum, XLA would drop the last product of the forward pass, whose result nothing reads.
        @jax.jit
        def run(cotangent: Any, prepared: Any, *arguments: Any) -> Any:
            out, pull = jax.vjp(partial(forward, prepared), *arguments)
            return out, pull(cotangent)

        out = jax.eval_shape(forward, prepared, *arguments)
        cotangent = jax.random.normal(jax.random.key(7), out.shape, out.dtype)
        return partial(run, cotangent, prepared, *arguments)

    def apply_mlp(_: None, x: Any, params: Any) -> Any:
        return nnx.merge(mlp, params)(x)

    def attend(mask: Any, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, mask, scale=config.head_dim**-0.5)

    def attention_layer(mask_and_rope: Any, x: Any, params: Any) -> Any:
        mask, rope = mask_and_rope
        return nnx.merge(layer, params)(x, rope, None, attend_under(mask), None)[0]

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "facts":
            peak = matmul_peak(dtype)
            return {"device": device_name(), "implementations": implementations, "matmul_flops_per_second": peak}
        runs: dict[str, Callable[[], Any]] = {}
        for name, row in layouts(request["prefix"], request["response"]).items():
            key_end, positions = row
            length = key_end.shape[1]
            x = random(1, length, config.hidden_size)
            q = random(1, length, config.num_heads, config.head_dim)
            k, v = (random(1, length, config.num_kv_heads, config.head_dim) for _ in range(2))
            rope = rope_tables(config.rope, config.head_dim, jnp.asarray(positions), x.dtype)
            runs[f"mlp/jax-simpo/{name}"] = gradient(apply_mlp, None, x, mlp_params)
            for which in request["implementations"]:
                if which == "dense" and config.num_heads * length**2 > DENSE_LIMIT[platform]:
                    continue
                mask = prepared(key_end, positions, which)
                runs[f"attention/{which}/{name}"] = gradient(attend, mask, q, k, v)
                runs[f"attention layer/{which}/{name}"] = gradient(attention_layer, (mask, rope), x, layer_params)
        return time_all(runs, jax.block_until_ready, request, begin)

    return handle


def torch_side(mapping: dict[str, Any], dtype: str, begin: Callable[[str], None]) -> Handle:
    """Times FlexAttention under the same masks, PyTorch's SDPA (flash kernel on a GPU), and flash-attn if installed."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from benchmarks.facts import cores, installed
    from benchmarks.flex import compiled_flex
    from torch_ref.attention import RowMask, sdpa_attention

    torch.set_num_threads(cores())
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    heads, groups = mapping["num_attention_heads"], mapping["num_attention_heads"] // mapping["num_key_value_heads"]
    width = mapping["head_dim"]
    scale = width**-0.5
    # FlashAttention 4 alone brings a package `flash_attn` too, without this module.
    flash = gpu and installed("flash_attn.flash_attn_interface")

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)

    flex = compiled_flex()

    def gradient(forward: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        with torch.no_grad():
            cotangent = torch.randn_like(arguments[0])  # the output has the shape of the queries

        def run() -> Any:
            out = forward(*arguments)
            return out, torch.autograd.grad(out, arguments, cotangent)

        return run

    def wait(_: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        prefix, response = request["prefix"], request["response"]
        runs: dict[str, Callable[[], Any]] = {}
        for name, row in layouts(prefix, response).items():
            key_end, positions = (torch.from_numpy(a).to(device) for a in row)
            length = key_end.shape[1]
            q, k, v = random(1, heads, length, width), *(random(1, heads // groups, length, width) for _ in range(2))
            mask = RowMask(key_end, positions)
            if gpu:
                blocks = mask.block_mask(None)

                def flexed(q: Any, k: Any, v: Any, blocks: Any = blocks) -> Any:
                    return flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True)

                runs[f"attention/flex/{name}"] = gradient(flexed, q, k, v)
            elif heads * length**2 <= DENSE_LIMIT["cpu"]:
                visible = mask.sdpa_mask(None)

                def masked(q: Any, k: Any, v: Any, visible: Any = visible) -> Any:
                    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
                    return sdpa_attention(q, k, v, visible, scale)

                runs[f"attention/torch sdpa, mask/{name}"] = gradient(masked, q, k, v)
        length = prefix + response
        q, k, v = random(2, heads, length, width), *(random(2, heads // groups, length, width) for _ in range(2))
        causal = lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)  # noqa: E731
        runs["attention/torch sdpa, causal/separate"] = gradient(causal, q, k, v)
        if flash:
            from flash_attn import flash_attn_func  # type: ignore[import-not-found]

            transposed = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
            call = lambda q, k, v: flash_attn_func(q, k, v, causal=True, softmax_scale=scale)  # noqa: E731
            runs["attention/flash-attn/separate"] = gradient(call, *transposed)
        return time_all(runs, wait, request, begin)

    return handle


def main() -> None:
    requests = Requests()
    side, model, dtype = sys.argv[1:4]
    from benchmarks.models import model_mapping

    requests.serve({"jax": jax_side, "torch": torch_side}[side](model_mapping(model, 1), dtype, requests.begin))


if __name__ == "__main__":
    main()
