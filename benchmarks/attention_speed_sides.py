"""The sides that `attention_speed` compares, each in a process of its own: our backends, and PyTorch's kernels.

A process answers requests that name a contender: with the seconds of its passes, or with `turn` those of one window in
which it takes its turn. `PRODUCT` asks for the speed of a matrix product, `CONTENDERS` for the names of those that are
here.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.cells import first_line
from benchmarks.lengths import PROFILES, draw_lengths
from benchmarks.masks import fill_row, live_area
from benchmarks.timing import calls_a_window, sampled, window_seconds
from benchmarks.workers import Requests

LAYOUTS = ("causal", "separate", "shared", "long prompt")
PASSES = {"forward": 4, "backward": 10, "both": 14}  # operations a visible pair and feature of a head
FLEX = "FlexAttention"
PRODUCT, CONTENDERS = "matrix product", "names of contenders"  # requests beside the contenders themselves


@dataclass(frozen=True)
class Shape:
    """The shape of a measurement.

    Attributes:
        layout: one of `LAYOUTS`.
        width: features of a head.
        rows: number of rows; their pairs differ.
        length: tokens of a row.
        heads: query heads.
        kv_heads: key/value heads.
        scale: the pairs are so many times shorter than those of the profile.
        dtype: of all arrays.
        profile: lengths of the pairs; a name of `lengths.PROFILES`.
    """

    layout: str
    width: int
    rows: int = 2
    length: int = 8192
    heads: int = 32
    kv_heads: int = 8
    scale: int = 1
    dtype: str = "bfloat16"
    profile: str = "capybara"

    @property
    def name(self) -> str:
        """The shape in a few words, for a line of output."""
        pairs = f" {self.profile}" if self.layout in ("separate", "shared") else ""
        return f"head {self.width}, {self.layout}{pairs}"

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `key_end` and positions, [B, L]."""
        pairs = np.maximum(1, draw_lengths(PROFILES[self.profile], 64 * self.rows) // self.scale).tolist()
        made = []
        for row in range(self.rows):
            if self.layout == "causal":
                made.append((np.full(self.length, self.length, np.int32), np.arange(self.length, dtype=np.int32)))
            elif self.layout == "long prompt":
                response = self.length // 8
                made.append(fill_row([(self.length - 2 * response, response, response)], self.length))
            else:
                own = pairs[64 * row : 64 * (row + 1)]
                made.append(fill_row(own, self.length, shared=self.layout == "shared"))
        key_end, positions = (np.stack(arrays) for arrays in zip(*made, strict=True))
        return key_end, positions

    def flops(self, of_pass: str) -> float:
        """Returns the operations of a pass over the live area of all rows and heads."""
        return float(PASSES[of_pass]) * self.width * self.heads * live_area(self.masks()[0])


def _sample(passes: dict[str, Callable[[], Callable[[], Any]]], wait: Callable[[Any], object]) -> dict[str, Any]:
    """Times passes, each made by a function. A pass that fails gets the reason instead; the others are timed."""
    data: dict[str, Any] = {}
    for of_pass, make in passes.items():
        try:
            data[of_pass] = sampled(make(), wait)
        except Exception as error:  # no kernel for the backward pass, or no memory for what it needs
            traceback.print_exc()
            data[of_pass] = {"failed": first_line(error)}
    return data


class _Turns:
    """Keeps the calls that take turns, ready to run, and times a window of one."""

    def __init__(self, wait: Callable[[Any], object]) -> None:
        self._wait = wait
        self._ready: dict[str, tuple[Callable[[], Any], int]] = {}

    def take(self, name: str, make: Callable[[], Callable[[], Any]]) -> dict[str, float]:
        """Returns the seconds of a call. The first time it is made and compiled before."""
        if name not in self._ready:
            start = make()
            window_seconds(start, self._wait, 1)
            self._ready[name] = start, calls_a_window(start, self._wait)
        start, calls = self._ready[name]
        return {"seconds": window_seconds(start, self._wait, calls)}


def _jax_side(shape: Shape) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Times our backends that run here."""
    import jax
    import jax.numpy as jnp

    from benchmarks.layers_sides import DENSE_LIMIT, RUNS_ON
    from benchmarks.masks import prepared
    from benchmarks.steps import device_name, matmul_peak
    from jax_simpo.errors import ConfigError
    from jax_simpo.ops.attention import attention, choose, place_of

    key_end, positions = shape.masks()
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (shape.rows, shape.length, heads, shape.width), jnp.dtype(shape.dtype))
        for key, heads in zip(keys, (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads), strict=True)
    )

    def contenders() -> tuple[list[str], list[str]]:
        run, missing = [], []
        platform = place_of().platform
        for name in RUNS_ON[platform]:
            if name == "dense" and shape.rows * shape.heads * shape.length**2 > DENSE_LIMIT[platform]:
                continue
            try:
                choose(name, place_of(dtype=shape.dtype, head_dim=shape.width))
                run.append(name)
            except ConfigError as error:
                missing.append(str(error))
        return run, missing

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        name = request["contender"]
        if name == PRODUCT:
            peak = matmul_peak(shape.dtype, 256 if shape.scale > 1 else None)
            return {"device": device_name(), "flops_per_second": peak}
        if name == CONTENDERS:
            names, missing = contenders()
            return {"contenders": names, "missing": "; ".join(missing)}
        if request.get("turn"):
            return turns.take(name, lambda: passes(name)["both"]())
        return _sample(passes(name), jax.block_until_ready)

    @cache  # what a contender has compiled on its own is compiled when it takes turns
    def passes(name: str) -> dict[str, Callable[[], Callable[[], Any]]]:
        mask = prepared(key_end, positions, name)

        @jax.jit
        def forward(mask: Any, q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, mask, scale=shape.width**-0.5)

        with_residuals = jax.jit(lambda mask, *inputs: jax.vjp(partial(forward, mask), *inputs))
        backward = jax.jit(lambda pull, dout: pull(dout))

        @jax.jit
        def both(mask: Any, q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pull = jax.vjp(partial(forward, mask), q, k, v)
            return out, pull(dout)

        return {
            "forward": lambda: partial(forward, mask, q, k, v),
            "backward": lambda: partial(backward, with_residuals(mask, q, k, v)[1], dout),
            "both": lambda: partial(both, mask, q, k, v, dout),
        }

    turns = _Turns(jax.block_until_ready)
    return handle


def _torch_side(shape: Shape) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Times FlexAttention under the same masks, and kernels for causal sequences where the layout is one."""
    import torch
    import torch._functorch.config
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from benchmarks.facts import cores, installed
    from benchmarks.flex import compiled_flex
    from torch_ref.attention import RowMask

    torch.set_num_threads(cores())
    # Without it the compiled backward pass frees what it reads, and could run only once.
    torch._functorch.config.donated_buffer = False
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype, scale = getattr(torch, shape.dtype), shape.width**-0.5
    flex = compiled_flex()
    torch.manual_seed(0)

    def random(heads: int) -> Any:
        return torch.randn(shape.rows, heads, shape.length, shape.width, device=device, dtype=dtype)

    arrays = [random(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    dout = random(shape.heads)

    def wait(_: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    def flex_forward(**options: Any) -> Callable[..., Any]:
        key_end, positions = (torch.from_numpy(a).to(device) for a in shape.masks())
        blocks = RowMask(key_end, positions).block_mask(None)
        return lambda q, k, v: flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True, **options)

    def causal(kernel: SDPBackend | None) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any) -> Any:
            if kernel is None:
                return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            with sdpa_kernel(kernel):
                return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        return attend

    def transposed(module: str) -> Callable[..., Any]:
        from importlib import import_module

        call = import_module(module).flash_attn_func

        def attend(q: Any, k: Any, v: Any) -> Any:
            out = call(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, softmax_scale=scale)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return attend

    # What there may be: name -> (the package that it needs, the function that makes it).
    flash4 = {"kernel_options": {"BACKEND": "FLASH"}}
    known: dict[str, tuple[str, Callable[[], Callable[..., Any]]]] = {FLEX: ("torch", flex_forward)}
    if gpu:
        known["FlexAttention on FlashAttention-4"] = "flash_attn.cute", partial(flex_forward, **flash4)
    if shape.layout == "causal":
        known["SDPA, causal"] = "torch", partial(causal, SDPBackend.FLASH_ATTENTION if gpu else None)
        if gpu:
            known |= {
                "SDPA, causal, cuDNN": ("torch", partial(causal, SDPBackend.CUDNN_ATTENTION)),
                "flash-attn 2, causal": ("flash_attn.flash_attn_interface", partial(transposed, "flash_attn")),
                "flash-attn 3, causal": ("flash_attn_interface", partial(transposed, "flash_attn_interface")),
                "FlashAttention-4, causal": ("flash_attn.cute", partial(transposed, "flash_attn.cute")),
            }

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        name = request["contender"]
        if name == PRODUCT:
            width = 256 if shape.scale > 1 else 8192 if gpu else 2048
            a = torch.randn(width, width, device=device, dtype=dtype)
            return {
                "device": torch.cuda.get_device_name() if gpu else "cpu",
                "flops_per_second": 2.0 * width**3 / min(sampled(partial(torch.mm, a, a), wait)["seconds"]),
            }
        if name == CONTENDERS:
            there = [own for own, (package, _) in known.items() if installed(package)]
            return {"contenders": there, "missing": ", ".join(own for own in known if own not in there)}
        if request.get("turn"):
            return turns.take(name, lambda: passes(name)["both"]())
        if name.startswith(FLEX) and not gpu:
            reason = {"left out": f"{FLEX} has no backward pass on a CPU"}
            return {**_sample({"forward": passes(name)["forward"]}, wait), "backward": reason, "both": reason}
        return _sample(passes(name), wait)

    @cache
    def passes(name: str) -> dict[str, Callable[[], Callable[[], Any]]]:
        attend = known[name][1]()
        inputs = [a.detach().requires_grad_() for a in arrays]

        def forward() -> Any:
            with torch.no_grad():
                return attend(*arrays)

        def backward() -> Callable[[], Any]:
            out = attend(*inputs)
            return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

        def both() -> Any:
            return torch.autograd.grad(attend(*inputs), inputs, dout)

        return {"forward": lambda: forward, "backward": backward, "both": lambda: both}

    turns = _Turns(wait)
    return handle


SIDES = {"jax": _jax_side, "torch": _torch_side}


def _serve(side: str, shape: str) -> None:
    requests = Requests()
    requests.serve(SIDES[side](Shape(**json.loads(shape))), keep_on=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
