"""How fast is attention itself, forward and backward, beside FlexAttention, SDPA, cuDNN and FlashAttention?

Times our backends and PyTorch's on the same rows: one causal sequence, packed pairs with each prompt once and twice,
and one pair with a long prompt. Masks are prepared before, on both sides. Each shape has a process for JAX and one for
PyTorch; each measurement dispatches many calls and waits at the end. `forward` computes the result alone, `backward`
the three gradients from what the forward pass left, `both` goes through the two in one call. The first call, which
compiles, has a time of its own. First each contender is measured on its own, one after another, and after a resume
these figures may come from several calls. Then all that could run `both` take turns in it, in one go; what is said
of our backends beside FlexAttention is the median of the ratios within these rounds.

Operations are counted over the live area, the pairs of a query and a key that it sees: for each head of size D, 4 D a
pair forward and 10 D backward, where the scores are computed a second time. They are compared with a matrix product of
the same side and shape.

Expected on an H100: our kernels reach 60 to 70 % of the matrix product forward and 40 to 48 % backward on long rows;
`pallas` is no slower than FlexAttention in `both` on any layout, and 1.2 times as fast on packed pairs with each prompt
once. Not measured yet.

Takes about two minutes a head size on two CPU cores with `--quick`. On a GPU it has not run yet.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.cells import CELLS_HELP, Cells, failed, failures_in, first_line
from benchmarks.facts import installed_versions, machine_facts
from benchmarks.lengths import PROFILES, draw_lengths
from benchmarks.masks import fill_row, live_area
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, percent
from benchmarks.timing import calls_a_window, in_turns, sampled, speed_up, window_seconds
from benchmarks.workers import Requests, RestartedWorker, WorkerFailed

LAYOUTS = ("causal", "separate", "shared", "long prompt")
PASSES = {"forward": 4, "backward": 10, "both": 14}  # operations a visible pair and feature of a head
CELL_LIMIT = 120.0  # seconds of a contender, compilation included
ROUNDS = 5
FLEX = "FlexAttention"
# How many times as fast as FlexAttention `pallas` is to be in `both`: on packed pairs that share prompts; elsewhere.
BOUND_SHARED, BOUND = 1.2, 1.0
# The packages that add contenders: of FlashAttention 2, 3 and 4.
ADDED = ("flash-attn", "flash-attn-3", "flash-attn-4")
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
        pairs = f" {self.profile}" if self.layout in ("separate", "shared") else ""
        return f"head {self.width}, {self.layout}{pairs}"

    @property
    def bound(self) -> float:
        """How many times as fast as FlexAttention `pallas` is to be."""
        return BOUND_SHARED if self.layout == "shared" else BOUND

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


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "attention_speed",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    width: Annotated[list[int] | None, Option("Features of a head (repeatable). Default: 128 and 64.")] = None,
    layout: Annotated[list[str] | None, Option("Layouts (repeatable). Default: all.", LAYOUTS)] = None,
    profile: Annotated[list[str] | None, Option("Lengths of pairs (repeatable).", list(PROFILES))] = None,
    dtype: Annotated[str, Option("Of all arrays.")] = "bfloat16",
    quick: Annotated[bool, Option("Short rows, to see that it runs.")] = False,
) -> None:
    """Times every contender on every shape."""
    extra: dict[str, Any] = {**QUICK, "scale": QUICK_SCALE} if quick else {}
    store = Cells(cells)
    measured: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for features, own_layout, pairs in product(width or (128, 64), layout or LAYOUTS, profile or ("capybara",)):
        shape = Shape(own_layout, features, dtype=dtype, profile=pairs, **extra)
        with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
            workers = {side: stack.enter_context(_worker(side, shape, Path(logs))) for side in SIDES}
            of_shape = [result for side in SIDES for result in _measure(store, shape, side, workers[side])]
            measured += of_shape
            ours = [m["contender"] for m in of_shape if m["attention"] == "jax" and "passes" in m]
            turns.append({**asdict(shape), "ours": ours, "turns": _take_turns(store, shape, of_shape, workers)})
        for line in _beside_flex(turns[-1]):
            print(*line, sep=", ", flush=True)
    device = next((m["device"] for m in measured if "device" in m), "none that could be used")
    about = f"{dtype}; pairs in the lengths of {', '.join(profile or ['capybara'])}. "
    about += __doc__.split("\n\n")[1].replace("\n", " ")
    tables = [_beside(turns), _speeds(measured), _sides(measured)]
    data = {"cells": measured, "turns": turns}
    Result(name, "Attention alone", about, machine_facts(device), tables, data).write(output)
    unable = [f"{m['attention']}: {m['failed']}" for m in measured if m["contender"] == PRODUCT and failed(m)]
    if unable:
        sys.exit(f"not even a matrix product runs, so nothing is measured: {'; '.join(unable)}")
    if not any("seconds" in data for m in measured if "passes" in m for data in _passes(m).values()):
        sys.exit("no contender could be measured")


def _worker(side: str, shape: Shape, logs: Path) -> RestartedWorker:
    """Returns the process of a side, which is started when a cell is missing."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    arguments = ["benchmarks.attention_speed", "--worker", side, json.dumps(asdict(shape))]
    return RestartedWorker(arguments, logs / side, environment)


def _measure(cells: Cells, shape: Shape, side: str, worker: RestartedWorker) -> list[dict[str, Any]]:
    """Measures all contenders of a side on a shape, each on its own."""
    settings = {"attention": side, **asdict(shape)}
    product_cell = {**settings, "contender": PRODUCT}
    facts = cells.measure(product_cell, partial(worker.ask, CELL_LIMIT, contender=PRODUCT), always=True)
    results = [{**product_cell, **facts}]
    if failed(facts):
        return results
    # Asked anew when a package is installed that adds a contender. No other measurement depends on it.
    listed = {**settings, "contender": CONTENDERS, "packages": installed_versions(ADDED)}
    there = cells.measure(listed, partial(worker.ask, CELL_LIMIT, contender=CONTENDERS), always=True)
    results[0] |= there
    for contender in there.get("contenders", ()):
        own = {**settings, "contender": contender}
        data = cells.measure(own, partial(_ask, worker, contender))
        results.append({**own, "peak": facts["flops_per_second"], "passes": data})
        print(_line(shape, results[-1]), flush=True)
    return results


def _ask(worker: RestartedWorker, contender: str) -> dict[str, Any]:
    """Returns a contender's passes. After a failure the next one gets a new process: a GPU may refuse this one."""
    data = worker.ask(CELL_LIMIT, contender=contender)
    if failures_in(data):
        worker.close()
    return data


def _take_turns(
    cells: Cells, shape: Shape, measured: list[dict[str, Any]], workers: Mapping[str, RestartedWorker]
) -> dict[str, Any]:
    """Returns, for every contender of both sides that could run `both`, its seconds in turns, or why there are none."""
    sides = {
        result["contender"]: result["attention"]
        for result in measured
        if "passes" in result and "seconds" in _passes(result)["both"]
    }

    def run() -> dict[str, Any]:
        reasons: dict[str, Any] = {}

        def window(contender: str, _: int) -> float:
            if contender in reasons:
                return 0.0
            try:
                answer = workers[sides[contender]].ask(CELL_LIMIT, contender=contender, turn=True)
            except WorkerFailed as error:
                answer = {"failed": first_line(error)}
            if failed(answer):
                reasons[contender] = answer
                return 0.0
            return float(answer["seconds"])

        seconds = in_turns({contender: partial(window, contender) for contender in sides}, ROUNDS)
        return {contender: reasons.get(contender, {"seconds": seconds[contender]}) for contender in sides}

    settings = {"attention": "turns", **asdict(shape), "contenders": sides, "rounds": ROUNDS}
    taken: dict[str, Any] = cells.measure(settings, run) if sides else {}
    return taken


def _beside_flex(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Returns a row for each of our backends: its time and FlexAttention's, the ratio, and if the bound is met."""
    shape = Shape(**{name: result[name] for name in Shape.__dataclass_fields__})
    turns = result["turns"]
    flex = turns.get(FLEX, {"failed": f"{FLEX} did not run `both`"})
    rows: list[tuple[Any, ...]] = []
    for contender in result["ours"]:
        own = turns.get(contender, {"failed": "did not run `both`"})
        place = shape.width, shape.layout, shape.profile, contender
        if "seconds" not in own or "seconds" not in flex:
            reason = own["failed"] if "failed" in own else flex["failed"]
            rows.append((*place, "", "", reason, shape.bound, "not known"))
            continue
        ratio = speed_up(flex["seconds"], own["seconds"])
        times = (1e3 * statistics.median(seconds) for seconds in (own["seconds"], flex["seconds"]))
        rows.append((*place, *times, ratio, shape.bound, "yes" if ratio >= shape.bound else "no"))
    return rows


def _beside(turns: list[dict[str, Any]]) -> Table:
    rows = [row for result in turns for row in _beside_flex(result)]
    columns = ("head", "layout", "pairs", "backend", "ms", "FlexAttention, ms", "times as fast", "bound", "met")
    note = (
        f"Forward and backward in one call. All contenders of a shape, ours and PyTorch's, took turns in {ROUNDS} "
        "rounds; milliseconds are medians, the ratio is the median of those within a round. The bound is what `pallas` "
        f"is to reach: {BOUND_SHARED} on packed pairs that share their prompts, {BOUND} elsewhere."
    )
    return Table("Beside FlexAttention, in turns", columns, rows, note)


def _line(shape: Shape, result: dict[str, Any]) -> str:
    """Returns a line about a contender's passes."""
    name = f"{shape.name}, {result['contender']}"
    parts = []
    for of_pass, data in _passes(result).items():
        if failed(data):
            parts.append(f"{of_pass} failed: {data['failed']}")
        elif "left out" in data:
            parts.append(f"{of_pass} left out: {data['left out']}")
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
            place = shape.width, shape.layout, shape.profile, result["contender"], of_pass
            if reason := data.get("failed") or data.get("left out"):
                rows.append((*place, reason, *[""] * 4))
                continue
            seconds = statistics.median(data["seconds"])
            spread = f"{1e3 * min(data['seconds']):.3g} to {1e3 * max(data['seconds']):.3g}"
            speed = shape.flops(of_pass) / seconds
            share = percent(speed / result["peak"])
            rows.append((*place, 1e3 * seconds, spread, speed / 1e12, share, data["first_seconds"]))
    columns = (
        *("head", "layout", "pairs", "contender", "pass", "ms", "from, to", "TFLOP/s", "of matrix product"),
        "first call, s",
    )
    note = (
        "Each contender on its own, one after another. Milliseconds are medians of five windows. Operations are those "
        "of the live area, 4 D a pair forward and 10 D backward, whatever a contender computes beyond that. `backward` "
        "starts from what a forward pass left: a jitted function of the residuals in JAX, `autograd.grad` with a "
        "retained graph in PyTorch."
    )
    return Table("Passes, not in turns", columns, rows, note)


def _sides(measured: list[dict[str, Any]]) -> Table:
    rows = []
    for result in measured:
        if "passes" not in result:
            speed = result["failed"] if failed(result) else f"{result['flops_per_second'] / 1e12:.4g} TFLOP/s"
            place = result["width"], result["layout"], result["profile"]
            rows.append((*place, result["attention"], speed, result.get("missing", "")))
    return Table("Each process", ("head", "layout", "pairs", "side", "matrix product", "not here"), rows)


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
    if sys.argv[1:2] == ["--worker"]:
        _serve(*sys.argv[2:])
    else:
        run(main)
