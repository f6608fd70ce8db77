"""The ways that `loss_head` compares, each in a process of its own: in JAX ours and full logits, in PyTorch Liger.

All get the same random numbers and tell their mean log-prob of a target, so that they are seen to compute the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.facts import cores, forget_peak, installed, peak_resident_bytes
from benchmarks.timing import seconds_of
from benchmarks.workers import Requests

SEQUENCE = 128  # targets of a response, for Liger's SimPO loss, which takes whole responses
KERNELS = ("triton", "mosaic")
FULL, LIGER_SIMPO, LIGER_CROSS_ENTROPY = "full logits", "Liger, SimPO", "Liger, cross-entropy"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a measurement.

    Attributes:
        vocabulary: entries of the head.
        width: features of a hidden state.
        targets: targets of a micro-batch, a multiple of `2 * SEQUENCE`.
        dtype: of the hidden states; the head is float32, as the weights of a model in training are.
    """

    vocabulary: int
    width: int
    targets: int
    dtype: str

    def arguments(self) -> list[str]:
        """Returns what a worker's command line has of the sizes."""
        return [json.dumps(asdict(self))]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns hidden states `[N, D]` and head `[V, D]`, float32, and the targets `[N]`, int32."""
        random = np.random.default_rng(0)
        hidden = random.standard_normal((self.targets, self.width), np.float32)
        head = random.standard_normal((self.vocabulary, self.width), np.float32)
        head *= 0.02
        return hidden, head, random.integers(self.vocabulary, size=self.targets, dtype=np.int32)


Handle = Callable[[dict[str, Any]], dict[str, Any]]


def _jax_side(way: str, sizes: Sizes) -> Handle:
    """Times ours, with the tiles of a backend, or full logits under autodiff."""
    import jax
    import jax.numpy as jnp

    from benchmarks.steps import device_name
    from jax_simpo.ops.attention import place_of
    from jax_simpo.ops.logprobs import target_logps
    from jax_simpo.ops.loss_head.backends import load_backend
    from jax_simpo.ops.numerics import matmul_precision

    dtype = jnp.dtype(sizes.dtype)
    backend = next((name for name in KERNELS if name in way), "xla")
    if obstacle := load_backend(backend).obstacle(place_of(dtype=dtype), sizes.width):
        return lambda _: {"left out": f"{backend} {obstacle}"}
    keep = 2**62 if "kept" in way else 0
    states, weights, targets = sizes.arrays()
    hidden, head, token = jnp.asarray(states, dtype)[None], jnp.asarray(weights), jnp.asarray(targets)[None]
    index = jnp.arange(sizes.targets)[None]

    def full(hidden: jax.Array, head: jax.Array) -> jax.Array:
        weights = head.astype(hidden.dtype)
        logits = jnp.einsum("bnd,vd->bnv", hidden, weights, precision=matmul_precision(hidden.dtype))
        logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.take_along_axis(logps, token[..., None], -1).mean()

    def tiled(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, keep_bytes=keep, backend=backend).mean()

    function = jax.jit(jax.value_and_grad(full if way == FULL else tiled, argnums=(0, 1)))
    compiled = function.lower(hidden, head).compile()
    memory: Any = compiled.memory_analysis()

    def run() -> float:
        value, _ = jax.block_until_ready(compiled(hidden, head))
        return float(value)

    def allocated() -> dict[str, int] | None:
        return jax.devices()[0].memory_stats()

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("do") != "warm":
            return {"seconds": seconds_of(run)}
        jax.block_until_ready((hidden, head))
        on_device = allocated()
        if on_device is None:
            forget_peak()
        before = on_device["bytes_in_use"] if on_device else peak_resident_bytes()
        logp = run()
        after = allocated()
        return {
            "extra_bytes": (after["peak_bytes_in_use"] if after else peak_resident_bytes()) - before,
            "temporary_bytes": memory.temp_size_in_bytes,
            "device": device_name(),
            "logp": logp,
        }

    return handle


def _liger_side(way: str, sizes: Sizes) -> Handle:
    """Times Liger's SimPO loss, which takes one pair of responses after the other, or its cross-entropy in Triton."""
    if not installed("liger_kernel"):
        return lambda _: {"left out": "liger-kernel is not installed"}
    import torch

    gpu = torch.cuda.is_available()
    if way == LIGER_CROSS_ENTROPY and not gpu:
        return lambda _: {"left out": "Liger's cross-entropy needs a GPU"}
    torch.set_num_threads(cores())
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, sizes.dtype)
    states, weights, targets = (torch.from_numpy(array).to(device) for array in sizes.arrays())
    hidden, head = states.to(dtype).requires_grad_(), weights.requires_grad_()
    token = targets.long()

    if way == LIGER_SIMPO:
        make = import_module("liger_kernel.chunked_loss").LigerFusedLinearSimPOLoss
        # On a CPU its chunks are not compiled: nobody trains so there, and compiling needs a C++ compiler.
        simpo = make(beta=2.5, gamma=1.25, compute_nll_loss=False, compiled=gpu)

        def loss() -> tuple[Any, Any]:
            responses = hidden.view(-1, SEQUENCE, sizes.width), token.view(-1, SEQUENCE)
            value, (chosen, rejected, *_) = simpo(head.to(dtype), *responses)
            return value, (chosen.sum() + rejected.sum()) / (len(chosen) + len(rejected))
    else:
        module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        cross_entropy = module.LigerFusedLinearCrossEntropyLoss()

        def loss() -> tuple[Any, Any]:
            value = cross_entropy(head.to(dtype), hidden, token)
            return value, -value.detach()

    def run() -> float:
        value, logp = loss()
        torch.autograd.grad(value, (hidden, head))
        return float(logp)  # waits for the device

    def timed() -> None:
        run()
        if gpu:
            torch.cuda.synchronize()

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("do") != "warm":
            return {"seconds": seconds_of(timed)}
        logp = run()  # compiles
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        before = torch.cuda.memory_allocated() if gpu else peak_resident_bytes()
        run()
        after = torch.cuda.max_memory_allocated() if gpu else peak_resident_bytes()
        name = torch.cuda.get_device_name() if gpu else "cpu"
        return {"extra_bytes": after - before, "device": name, "logp": logp}

    return handle


_SIDES = {
    FULL: _jax_side,
    "tiles": _jax_side,
    "tiles, logits kept": _jax_side,
    **{f"tiles, {kernel}": _jax_side for kernel in KERNELS},
    LIGER_SIMPO: _liger_side,
    LIGER_CROSS_ENTROPY: _liger_side,
}
WAYS = tuple(_SIDES)


def _serve(way: str, sizes: str) -> None:
    requests = Requests()
    requests.serve(_SIDES[way](way, Sizes(**json.loads(sizes))))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
