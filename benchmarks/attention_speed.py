"""How fast is attention itself, forward and backward, beside FlexAttention, SDPA, cuDNN and FlashAttention?

Times our backends and PyTorch's on the same rows: one causal sequence, packed pairs with each prompt once and twice,
and one pair with a long prompt. Masks are prepared before, on both sides. Each shape has a process for JAX and one for
PyTorch; each measurement dispatches many calls and waits at the end. Contenders do not take turns: each is measured on
its own, one after another, and after a resume the figures of one table may come from several calls. `forward` computes
the result alone, `backward` the three gradients from what the forward pass left, `both` goes through the two in one
call. The first call, which compiles, has a time of its own.

Operations are counted over the live area, the pairs of a query and a key that it sees: for each head of size D, 4 D a
pair forward and 10 D backward, where the scores are computed a second time. They are compared with a matrix product of
the same side and shape.

Expected on an H100: our kernels reach 60 to 70 % of the matrix product forward and 40 to 48 % backward on long rows.
Not measured yet.

Takes about two minutes a head size on two CPU cores with `--quick`. On a GPU it has not run yet.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.cells import CELLS_HELP, Cells, failed, first_line
from benchmarks.facts import machine_facts
from benchmarks.lengths import PROFILES, draw_lengths
from benchmarks.masks import fill_row, live_area
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, percent
from benchmarks.timing import sampled
from benchmarks.workers import Requests, RestartedWorker, WorkerFailed

LAYOUTS = ("causal", "separate", "shared", "long prompt")
PASSES = {"forward": 4, "backward": 10, "both": 14}  # operations a visible pair and feature of a head
PROFILE = PROFILES["capybara"]
CELL_LIMIT = 120.0  # seconds of a contender, compilation included
QUICK = {"rows": 1, "length": 256, "heads": 4, "kv_heads": 2}
PRODUCT, CONTENDERS = "matrix product", "names of contenders"  # requests beside the contenders themselves
QUICK_SCALE = 16  # the pairs are so many times shorter


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
        scale: the pairs are so many times shorter than those of `PROFILE`.
        dtype: of all arrays.
    """

    layout: str
    width: int
    rows: int = 2
    length: int = 8192
    heads: int = 32
    kv_heads: int = 8
    scale: int = 1
    dtype: str = "bfloat16"

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `key_end` and positions, [B, L]."""
        pairs = np.maximum(1, draw_lengths(PROFILE, 64 * self.rows) // self.scale).tolist()
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


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "attention_speed",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    width: Annotated[list[int] | None, Option("Features of a head (repeatable). Default: 128 and 64.")] = None,
    layout: Annotated[list[str] | None, Option("Layouts (repeatable). Default: all.", LAYOUTS)] = None,
    dtype: Annotated[str, Option("Of all arrays.")] = "bfloat16",
    quick: Annotated[bool, Option("Short rows, to see that it runs.")] = False,
) -> None:
    """Times every contender on every shape."""
    extra: dict[str, Any] = {**QUICK, "scale": QUICK_SCALE} if quick else {}
    store = Cells(cells)
    measured = []
    for features in width or (128, 64):
        for own_layout in layout or LAYOUTS:
            shape = Shape(own_layout, features, dtype=dtype, **extra)
            for side in SIDES:
                measured += _measure(store, shape, side)
    device = next((m["device"] for m in measured if "device" in m), "none that could be used")
    about = f"{dtype}; pairs of {PROFILE.name}'s lengths. " + __doc__.split("\n\n")[1].replace("\n", " ")
    tables = [_speeds(measured), _sides(measured)]
    Result(name, "Attention alone", about, machine_facts(device), tables, {"cells": measured}).write(output)
    unable = [f"{m['attention']}: {m['failed']}" for m in measured if m["contender"] == PRODUCT and failed(m)]
    if unable:
        sys.exit(f"not even a matrix product runs, so nothing is measured: {'; '.join(unable)}")
    if not any("seconds" in data for m in measured if "passes" in m for data in _passes(m).values()):
        sys.exit("no contender could be measured")


def _measure(cells: Cells, shape: Shape, side: str) -> list[dict[str, Any]]:
    """Measures all contenders of a side on a shape, in a process that is started if a cell is missing."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    arguments = ["benchmarks.attention_speed", "--worker", side, json.dumps(asdict(shape))]
    settings = {"attention": side, **asdict(shape)}
    with tempfile.TemporaryDirectory() as logs, RestartedWorker(arguments, Path(logs) / "log", environment) as worker:
        product = {**settings, "contender": PRODUCT}
        facts = cells.measure(product, partial(worker.ask, CELL_LIMIT, contender=PRODUCT), always=True)
        results = [{**product, **facts}]
        if failed(facts):
            return results
        # Asked anew each time and not kept, so that a package that is installed later is timed too.
        try:
            there = worker.ask(CELL_LIMIT, contender=CONTENDERS)
        except WorkerFailed as error:
            there = {"failed": first_line(error)}
        results[0] |= there
        for contender in there.get("contenders", ()):
            own = {**settings, "contender": contender}
            data = cells.measure(own, partial(worker.ask, CELL_LIMIT, contender=contender))
            results.append({**own, "peak": facts["flops_per_second"], "passes": data})
            print(_line(shape, results[-1]), flush=True)
            if any(failed(of_pass) for of_pass in _passes(results[-1]).values()):
                worker.close()  # the next contender gets a new process: after an error a GPU may refuse this one
    return results


def _line(shape: Shape, result: dict[str, Any]) -> str:
    """Returns a line about a contender's passes."""
    name = f"head {shape.width}, {shape.layout}, {result['contender']}"
    parts = []
    for of_pass, data in _passes(result).items():
        if failed(data):
            parts.append(f"{of_pass} failed: {data['failed']}")
        else:
            seconds = statistics.median(data["seconds"])
            speed = shape.flops(of_pass) / seconds
            share = percent(speed / result["peak"])
            parts.append(f"{of_pass} {1e3 * seconds:.3g} ms, {speed / 1e12:.3g} TFLOP/s, {share} of a matrix product")
    return f"{name}: {'; '.join(parts)}"


def _passes(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the data of each pass; if the contender failed as a whole, its reason for each."""
    data: dict[str, Any] = result["passes"]
    return dict.fromkeys(PASSES, data) if failed(data) else data


def _speeds(measured: list[dict[str, Any]]) -> Table:
    rows = []
    for result in measured:
        if "passes" not in result:
            continue
        shape = Shape(**{name: result[name] for name in Shape.__dataclass_fields__})
        for of_pass, data in _passes(result).items():
            place = shape.width, shape.layout, result["contender"], of_pass
            if failed(data):
                rows.append((*place, data["failed"], *[""] * 4))
                continue
            seconds = statistics.median(data["seconds"])
            spread = f"{1e3 * min(data['seconds']):.3g} to {1e3 * max(data['seconds']):.3g}"
            speed = shape.flops(of_pass) / seconds
            share = percent(speed / result["peak"])
            rows.append((*place, 1e3 * seconds, spread, speed / 1e12, share, data["first_seconds"]))
    columns = (
        *("head", "layout", "contender", "pass", "ms", "from, to", "TFLOP/s", "of matrix product"),
        "first call, s",
    )
    note = (
        "Milliseconds are medians of five windows. Operations are those of the live area, 4 D a pair forward and 10 D "
        "backward, whatever a contender computes beyond that. `backward` starts from what a forward pass left: a "
        "jitted function of the residuals in JAX, `autograd.grad` with a retained graph in PyTorch."
    )
    return Table("Passes", columns, rows, note)


def _sides(measured: list[dict[str, Any]]) -> Table:
    rows = []
    for result in measured:
        if "passes" not in result:
            speed = result["failed"] if failed(result) else f"{result['flops_per_second'] / 1e12:.4g} TFLOP/s"
            rows.append((result["width"], result["layout"], result["attention"], speed, result.get("missing", "")))
    return Table("Each process", ("head", "layout", "side", "matrix product", "not here"), rows)


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
        for name in RUNS_ON[jax.default_backend()]:
            if name == "dense" and shape.rows * shape.heads * shape.length**2 > DENSE_LIMIT[jax.default_backend()]:
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

        passes: dict[str, Callable[[], Callable[[], Any]]] = {
            "forward": lambda: partial(forward, mask, q, k, v),
            "backward": lambda: partial(backward, with_residuals(mask, q, k, v)[1], dout),
            "both": lambda: partial(both, mask, q, k, v, dout),
        }
        return _sample(passes, jax.block_until_ready)

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
    known: dict[str, tuple[str, Callable[[], Callable[..., Any]]]] = {"FlexAttention": ("torch", flex_forward)}
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

        if name.startswith("FlexAttention") and not gpu:
            reason = {"failed": "FlexAttention has no backward pass on a CPU"}
            return {**_sample({"forward": lambda: forward}, wait), "backward": reason, "both": reason}
        return _sample({"forward": lambda: forward, "backward": backward, "both": lambda: both}, wait)

    return handle


SIDES = {"jax": _jax_side, "torch": _torch_side}


def _serve(side: str, shape: str) -> None:
    requests = Requests()
    requests.serve(SIDES[side](Shape(**json.loads(shape))), keep_on=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _serve(*sys.argv[2:])
    else:
        run(main)
