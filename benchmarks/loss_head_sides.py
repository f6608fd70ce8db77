"""The ways that `loss_head` compares, each in a process of its own: in JAX ours and full logits, in PyTorch Liger.

All get the same random numbers and compute the SimPO loss of the same pairs of responses, from the log-probs of their
targets; Liger's cross-entropy, which has no such loss, computes the mean cross-entropy of the targets. A process
answers three requests:

- `check`: the numbers that show what a way computes (`Numbers`), and the most memory that its process held.
- `memory`: how much more than the inputs a call holds. In JAX this is known only of a process that found the compiled
  program in the cache: the peak cannot be reset, and compiling tries kernels out on the GPU. A process that compiled
  says so instead.
- `time`: the seconds of a call. The first one compiles, and is not timed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.facts import cores, forget_peak, installed, peak_resident_bytes
from benchmarks.timing import seconds_of
from benchmarks.workers import Requests

SEQUENCE = 128  # targets of a response
BETA, GAMMA = 2.5, 1.375  # of a published SimPO run
KERNELS = ("triton", "mosaic")
FULL, TILES, LIGER_SIMPO, LIGER_CROSS_ENTROPY = "full logits", "tiles", "Liger, SimPO", "Liger, cross-entropy"
SIMPO, CROSS_ENTROPY = "SimPO", "cross-entropy"  # the functions
COMPILED_HERE = {"compiled here": True}  # the answer of a process that cannot say how much memory a call holds
_ROWS, _COLUMNS = 4, 32  # of the sketch of a gradient
# The largest error of rounding to the dtype, as a share of the number.
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


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
        """Returns hidden states `[N, D]` and head `[V, D]`, float32, and the targets `[N]`, int32.

        A state's logits have a standard deviation of about `0.02 * sqrt(D)`.
        """
        random = np.random.default_rng(0)

        def uniform(rows: int, deviation: float) -> np.ndarray:  # quicker to draw than normal numbers
            array = random.random((rows, self.width), np.float32)
            array -= 0.5
            array *= deviation * math.sqrt(12)
            return array

        hidden, head = uniform(self.targets, 1.0), uniform(self.vocabulary, 0.02)
        return hidden, head, random.integers(self.vocabulary, size=self.targets, dtype=np.int32)


# --- what a way computes


@dataclass(frozen=True)
class Numbers:
    """Shows what a way computes.

    Attributes:
        values: the mean log-prob of each response, chosen ones first; of cross-entropy the loss.
        dhidden: the sketch of the gradient of the hidden states: the products with random signs from both sides. Its
            size is in expectation that of the gradient, and that of a difference the difference's.
        dhead: the same of the head's gradient.
    """

    values: list[float]
    dhidden: list[list[float]]
    dhead: list[list[float]]

    def faults(self, exact: Numbers, dtype: str) -> list[str]:
        """Returns what is further from the numbers of full logits than rounding to the dtype explains.

        The rounding of a logit, which is of the size of 1, is mostly gone in the mean of `SEQUENCE` of them; half of it
        is allowed, and float32's rounding of the sum of a log-prob. Each side rounds the gradient of a logit and the
        gradients themselves; one wrong target of 8192 moves a gradient by 1.6 % of its size, and 1 % is allowed.
        """
        rounding = _ROUNDING[dtype]
        values = float(np.abs(np.subtract(self.values, exact.values)).max())
        distances = {"a mean log-prob" if len(self.values) > 1 else "the loss": (values, 0.5 * rounding + 2e-5)}
        for name in ("dhidden", "dhead"):
            ours, theirs = np.asarray(getattr(self, name)), np.asarray(getattr(exact, name))
            apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            distances[f"{name}, of its size,"] = apart, 2.5 * rounding + 1e-5
        return [
            f"{name} is {distance:.2g} away, at most {bound:.2g} is allowed"
            for name, (distance, bound) in distances.items()
            if not distance <= bound  # NaN is no distance
        ]


def signs(rows: int, columns: int) -> np.ndarray:
    """Returns random signs, float32, the same for all ways."""
    random = np.random.default_rng([rows, columns])
    return (2 * random.integers(2, size=(rows, columns), dtype=np.int8) - 1).astype(np.float32)


def sketch_sides(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a gradient `[rows, width]` is multiplied with from the left and from the right."""
    return signs(_ROWS, rows) / math.sqrt(_ROWS), signs(width, _COLUMNS) / math.sqrt(_COLUMNS)


Handle = Callable[[dict[str, Any]], dict[str, Any]]


# --- JAX


def jax_functions(way: str, targets: Any) -> dict[str, Callable[..., Any]]:
    """Returns by name of a function `hidden [1, N, D], head [V, D] -> loss, values`, in one of our ways."""
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.logprobs import target_logps
    from jax_simpo.ops.numerics import matmul_precision

    keep = 2**62 if "kept" in way else 0
    token = jnp.asarray(targets)[None]
    index = jnp.arange(len(targets))[None]

    def full(hidden: jax.Array, head: jax.Array) -> jax.Array:
        weights = head.astype(hidden.dtype)
        logits = jnp.einsum("bnd,vd->bnv", hidden, weights, precision=matmul_precision(hidden.dtype))
        logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.take_along_axis(logps, token[..., None], -1)[..., 0]

    def tiled(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, keep_bytes=keep, backend=backend_of(way))

    logps_of = full if way == FULL else tiled

    def simpo(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        means = logps_of(hidden, head).reshape(-1, SEQUENCE).mean(-1)
        chosen, rejected = jnp.split(means, 2)
        return jax.nn.softplus(GAMMA - BETA * (chosen - rejected)).mean(), means

    def cross_entropy(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = -logps_of(hidden, head).mean()
        return loss, loss[None]

    return {SIMPO: simpo, CROSS_ENTROPY: cross_entropy}


def backend_of(way: str) -> str:
    """Returns the backend of the loss head that a way of ours takes."""
    return next((name for name in KERNELS if name in way), "xla")


def jax_numbers(values: Any, gradients: Any) -> Numbers:
    """Returns the numbers of a way in JAX: its values, and the gradients of hidden states `[1, N, D]` and head."""
    import jax.numpy as jnp

    def sketch(array: Any) -> list[list[float]]:
        left, right = sketch_sides(*array.shape)
        product = jnp.matmul(array.astype(jnp.float32), right, precision="highest")
        sketched: list[list[float]] = jnp.matmul(left, product, precision="highest").tolist()
        return sketched

    dhidden, dhead = gradients
    return Numbers(values.tolist(), sketch(dhidden[0]), sketch(dhead))


def _jax_side(way: str, sizes: Sizes) -> Handle:
    """Times ours, with the tiles of a backend, or full logits under autodiff."""
    import jax
    import jax.numpy as jnp
    from jax import monitoring

    from benchmarks.steps import device_name
    from jax_simpo.ops.attention import place_of
    from jax_simpo.ops.loss_head.backends import load_backend

    dtype = jnp.dtype(sizes.dtype)
    if obstacle := load_backend(backend_of(way)).obstacle(place_of(dtype=dtype), sizes.width):
        return lambda _: {"left out": f"{backend_of(way)} {obstacle}"}
    states, weights, targets = sizes.arrays()
    hidden, head = jax.block_until_ready((jnp.asarray(states, dtype)[None], jnp.asarray(weights)))
    del states, weights
    functions = jax_functions(way, targets)
    found: list[str] = []
    monitoring.register_event_listener(lambda event, **_: found.append(event) if "cache_hits" in event else None)

    def compiled(name: str) -> Any:
        program = jax.jit(jax.value_and_grad(functions[name], argnums=(0, 1), has_aux=True))
        return program.lower(hidden, head).compile()

    found.clear()
    simpo = compiled(SIMPO)
    was_found = bool(found)

    def run() -> Any:
        return jax.block_until_ready(simpo(hidden, head))

    def numbers(result: Any) -> dict[str, Any]:
        (_, values), gradients = result
        return asdict(jax_numbers(values, gradients))

    def check() -> dict[str, Any]:
        shown = {SIMPO: numbers(run())}
        if way == FULL:
            shown[CROSS_ENTROPY] = numbers(compiled(CROSS_ENTROPY)(hidden, head))
        on_device = jax.devices()[0].memory_stats()
        memory: Any = simpo.memory_analysis()
        return {
            "device": device_name(),
            "numbers": shown,
            "temporary_bytes": memory.temp_size_in_bytes,
            "need_bytes": max(on_device["peak_bytes_in_use"], on_device.get("peak_pool_bytes", 0))
            if on_device
            else peak_resident_bytes(),
            "device_bytes": on_device["bytes_limit"] if on_device else _host_memory(),
        }

    def held() -> dict[str, Any]:
        on_device = jax.devices()[0].memory_stats()
        if not was_found:
            return COMPILED_HERE
        if on_device is None:
            forget_peak()
        before = on_device["bytes_in_use"] if on_device else peak_resident_bytes()
        run()
        after = jax.devices()[0].memory_stats()
        return {"extra_bytes": (after["peak_bytes_in_use"] if after else peak_resident_bytes()) - before}

    return _handle(check, held, run)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _handle(check: Callable[[], dict[str, Any]], held: Callable[[], dict[str, Any]], run: Callable[[], Any]) -> Handle:
    """Returns what answers the requests of a way. The call must wait for its device."""
    ran: list[bool] = []

    def time() -> dict[str, Any]:
        if not ran:
            run()
            ran.append(True)
        return {"seconds": seconds_of(run)}

    answers = {"check": check, "memory": held, "time": time}
    return lambda request: answers[request["do"]]()


# --- PyTorch


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
    del states, weights
    token = targets.long()

    if way == LIGER_SIMPO:
        make = import_module("liger_kernel.chunked_loss").LigerFusedLinearSimPOLoss
        # On a CPU its chunks are not compiled: nobody trains so there, and compiling needs a C++ compiler.
        simpo = make(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=gpu)

        def loss() -> tuple[Any, Any]:
            responses = hidden.view(-1, SEQUENCE, sizes.width), token.view(-1, SEQUENCE)
            value, (chosen, rejected, *_) = simpo(head.to(dtype), *responses)
            return value, torch.cat([chosen, rejected])
    else:
        module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        cross_entropy = module.LigerFusedLinearCrossEntropyLoss()

        def loss() -> tuple[Any, Any]:
            value = cross_entropy(head.to(dtype), hidden, token)
            return value, value.detach()[None]

    def run() -> Any:
        value, values = loss()
        gradients = torch.autograd.grad(value, (hidden, head))
        if gpu:
            torch.cuda.synchronize()
        return values, gradients

    def sketch(array: Any) -> list[list[float]]:
        left, right = (torch.from_numpy(side).to(device) for side in sketch_sides(*array.shape))
        sketched: list[list[float]] = (left @ (array.float() @ right)).tolist()
        return sketched

    def check() -> dict[str, Any]:
        values, (dhidden, dhead) = run()
        shown = Numbers(values.float().tolist(), sketch(dhidden), sketch(dhead))
        return {
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "numbers": {SIMPO if way == LIGER_SIMPO else CROSS_ENTROPY: asdict(shown)},
            "need_bytes": torch.cuda.max_memory_reserved() if gpu else peak_resident_bytes(),
            "device_bytes": torch.cuda.mem_get_info()[1] if gpu else _host_memory(),
        }

    def held() -> dict[str, Any]:
        run()  # compiles, if `check` has not
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        before = torch.cuda.memory_allocated() if gpu else peak_resident_bytes()
        run()
        return {"extra_bytes": (torch.cuda.max_memory_allocated() if gpu else peak_resident_bytes()) - before}

    return _handle(check, held, run)


_SIDES: Mapping[str, Callable[[str, Sizes], Handle]] = {
    FULL: _jax_side,
    TILES: _jax_side,
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
