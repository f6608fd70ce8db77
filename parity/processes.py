"""Runs the two sides one after the other, each in processes of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from jax_simpo.config import jax_only, load_config
from jax_simpo.data import chat, synthetic
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.messages import BadRow
from jax_simpo.data.rendering import Rendering, choose_rendering
from jax_simpo.data.tokenize import tokenize_group
from jax_simpo.errors import UserError
from parity.cases import (
    ADAPTED,
    FAMILIES,
    GPU_BACKENDS,
    GROUPS,
    JAX_GPU,
    MESHES,
    OBJECTIVES,
    TORCH,
    TORCH_GPU,
    USER_FAMILY,
    ZERO3,
    Job,
    matrix,
    write_config,
)
from parity.results import was_run

ROOT = Path(__file__).parents[1]
ROW_TOKENS = 256  # the longest row of the tiny models
QUICK_ROW_TOKENS = 128  # the same in the quick matrix, whose steps take half the time for it
CPU_DEVICES = 8  # JAX splits the CPU into as many devices
_SECONDS_BETWEEN_LINES = 10.0
# With 13 pairs a step, packed rows cannot all hold the same number of pairs, and the last step of an epoch has only 4.
PAIRS, BATCH, STEPS = 30, 13, 20
# These settings switch on everything that a side could divide or scale wrongly.
SETTINGS: dict[str, Any] = {
    "beta": 2.5,
    "gamma_beta_ratio": 0.55,
    "sft_weight": 0.1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "auto_insert_empty_system_msg": False,
    "remat": "full",
}


class SideFailed(UserError):
    """A side's process ended with an error."""


def built_in_job(work: Path, variants: Sequence[str], inject: str | None = None, *, quick: bool = False) -> Job:
    """Makes the job of the tiny random models, on the real pairs of the folder `SIMPO_SHARED` or on built-in ones."""
    shared = os.environ.get("SIMPO_SHARED")
    tokenizer = f"{shared}/tokenizers/bpe4k" if shared else "builtin:cafe"
    data = work / "pairs.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    row_tokens = QUICK_ROW_TOKENS if quick else ROW_TOKENS
    rows = _short_pairs(shared, tokenizer, row_tokens)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    groups = data.with_name("groups.jsonl")
    groups.write_text("".join(json.dumps(row) + "\n" for row in _short_groups(rows)), encoding="utf-8")
    cells = matrix([*FAMILIES, *ADAPTED, *OBJECTIVES, *GROUPS], [*backends(), *gpu_backends()], quick=quick)
    run = {cell.family for cell in cells}
    configs = {}
    plain: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES}
    others = {
        name: (model, {**keys, **({"ref_model_name_or_path": str(work / of / "start")} if of else {})})
        for name, (model, of, keys) in OBJECTIVES.items()
    }
    of_groups = {name: (model, {**keys, "dataset_mixer": {str(groups): 1.0}}) for name, (model, keys) in GROUPS.items()}
    everything = {**plain, **ADAPTED, **others, **of_groups}
    for family, (model, extra_keys) in ((name, found) for name, found in everything.items() if name in run):
        file = work / family / "config.yaml"
        values = {
            "model_name_or_path": str(work / model / "start"),
            "tokenizer_name_or_path": tokenizer,
            "dataset_mixer": {str(data): 1.0},
            "data_cache_dir": str(work / "cache"),
            "max_length": row_tokens,
            **SETTINGS,
            **extra_keys,
        }
        write_config(file, values)
        configs[family] = str(file)
    return Job(
        work=str(work),
        configs=configs,
        new_models=FAMILIES,
        cells=cells,
        variants=list(variants),
        pairs=len(rows),
        batch=BATCH,
        rows=CPU_DEVICES,
        steps=STEPS,
        inject=inject,
        adapters={family: str(work / family / "start") for family in ADAPTED if family in run},
    )


def users_job(
    work: Path,
    config: Path,
    pairs: int,
    variants: Sequence[str],
    inject: str | None = None,
    *,
    quick: bool = False,
) -> Job:
    """Makes the job of a user's own checkpoint and the first pairs of their data.

    Only steps are compared: evaluation, the choice of the best model and early stopping have no part in it.

    Raises:
        UserError: the config starts from no checkpoint, does not train all of its weights, or has settings that only
            one side can honour.
    """
    settings = load_config(config, torch=True)
    if one_sided := jax_only(settings):
        raise UserError("\n".join(f"{config}: {why}" for why in one_sided.values()))
    if settings.model_name_or_path is None or settings.use_peft or settings.load_in_4bit or settings.load_in_8bit:
        raise UserError(
            f"{config}: both sides must start from the same weights and train all of them. Give "
            "`model_name_or_path`, without `use_peft`, `load_in_4bit` and `load_in_8bit`"
        )
    work.mkdir(parents=True, exist_ok=True)
    return Job(
        work=str(work),
        configs={USER_FAMILY: str(config.resolve())},
        new_models={},
        cells=matrix([USER_FAMILY], backends(count_gpus()), quick=quick),
        variants=list(variants),
        pairs=pairs,
        batch=min(BATCH, max(2, pairs // 2)),
        rows=CPU_DEVICES,
        steps=STEPS,
        inject=inject,
    )


def backends(gpus: int = 0) -> list[str]:
    """Lists the backends that can run on this machine: on its GPUs, or on a CPU that stands for eight devices."""
    zero3 = find_spec("deepspeed") is not None and gpus != 1
    meshes = [name for name, (fsdp, tensor) in MESHES.items() if fsdp * tensor <= (gpus or CPU_DEVICES)]
    return [TORCH, *([ZERO3] if zero3 else []), *meshes]


def gpu_backends() -> list[str]:
    """Lists those of `GPU_BACKENDS` that can run on this machine."""
    if not count_gpus():
        return []
    has_jax = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    installed = {JAX_GPU: has_jax, "flash_attention_2": find_spec("flash_attn") is not None}
    return [name for name in GPU_BACKENDS if installed.get(TORCH_GPU.get(name, name), True)]


def count_gpus() -> int:
    """Counts this machine's NVIDIA GPUs; 0 if `JAX_PLATFORMS` is `cpu`."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return len(listing.stdout.splitlines()) if listing.returncode == 0 else 0


def _short_pairs(shared: str | None, tokenizer_name: str, row_tokens: int) -> list[dict[str, Any]]:
    """Returns the first pairs that fit a row even when nothing is shared, with a weight each."""
    tokenizer = chat.load_tokenizer(tokenizer_name)
    if shared:
        with open(f"{shared}/data/hh_harmless.train.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, 400)]
    else:
        rows = synthetic.make_rows("cafe", "train")
    rendering = choose_rendering(tokenizer, "auto", False)
    short = (row for row in rows if _row_tokens(row, tokenizer, rendering) <= row_tokens)
    # Weights are read only where a config names their column. Some are 0, and they are not 1 on average.
    return [{**row, "weight": number % 4 * 0.7} for number, row in enumerate(islice(short, PAIRS))]


def _short_groups(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Makes as many groups of conversations, of the first words of the pairs' texts.

    Three to five conversations share a question, and some of them a first answer or a second question too. Some scores
    are tied.
    """
    words = [re.findall(r"\w+", json.dumps(pair)) for pair in pairs]

    def turn(role: str, number: int, count: int) -> dict[str, str]:
        own = words[number % len(words)]
        start = 7 * number % max(1, len(own) - count)
        return {"role": role, "content": " ".join(own[start : start + count])}

    groups = []
    for number in range(len(pairs)):
        question = turn("user", number, 5)
        answers = [turn("assistant", number + k, 3) for k in range(2)]
        asked = [turn("user", number + k, 2) for k in range(2)]
        responses = []
        for k in range(3 + number % 3):
            middle = [answers[k % 2], asked[k // 2 % 2]] if k else []
            responses.append([question, *middle, turn("assistant", 2 * number + k, 2 + k)])
        scores = [round(1.5 * k * (number % 4 + 1)) // 2 for k in range(len(responses))]
        groups.append({"responses": responses, "scores": scores})
    return groups


def _row_tokens(row: dict[str, Any], tokenizer: Any, rendering: Rendering) -> int:
    try:
        text = chat.render_group(read_conversation(row), tokenizer, False, rendering=rendering)
        pair = tokenize_group(text, tokenizer, max_length=2048, max_prompt_length=1800, truncation_mode="keep_end")
    except BadRow:
        return 2 * ROW_TOKENS
    # Two tokens more, because the wrong variant with two BOS has to fit too.
    return int(GroupLengths.of([pair]).row_tokens(False)[0]) + 2


def run_sides(job: Job, say: Callable[[str], None] = print) -> None:
    """Runs all cells of a job.

    Raises:
        SideFailed: a process ended with an error. Its output is in the job's folder.
    """
    for folder in ("results", "variants"):
        shutil.rmtree(Path(job.work) / folder, ignore_errors=True)
    job.save()
    file, torch_side = str(job.file), [sys.executable, "-m", "parity.torch_side"]
    if job.new_models:
        run_process(job, "torch-start", [*torch_side, "start", file], say)
    run_process(job, "torch", [*torch_side, "run", file], say)
    if any(cell.backend == ZERO3 for cell in job.cells):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        run_process(job, "zero3", [*launcher, "-m", "parity.torch_side", "run", file], say)
    jax_side = [sys.executable, "-m", "parity.jax_side"]
    run_process(job, "jax", [*jax_side, "run", file], say)
    backends_used = {cell.backend for cell in job.cells}
    if backends_used & set(TORCH_GPU):
        run_process(job, "torch-gpu", [*torch_side, "run-gpu", file], say, on_gpu=True)
    if JAX_GPU in backends_used:
        run_process(job, "jax-gpu", [*jax_side, "run-gpu", file], say, on_gpu=True)
    run_process(job, "torch-crosswise", [*torch_side, "crosswise", file], say)


def run_process(job: Job, name: str, command: list[str], say: Callable[[str], None], *, on_gpu: bool = False) -> None:
    """Runs a command and writes its output to the file `NAME.log` of the job's folder.

    Raises:
        SideFailed: the command ended with an error.
    """
    say(f"running {name}")
    log = Path(job.work) / f"{name}.log"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # Tiny models always run on the CPU, with one thread per process: they gain nothing from more.
    if job.new_models and not on_gpu:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(CPU_DEVICES), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"OMP_NUM_THREADS": "1"}
    else:
        environment.setdefault("JAX_NUM_CPU_DEVICES", str(CPU_DEVICES))
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "parity.leash", *command],
            env=environment,
            stdin=subprocess.PIPE,  # it is never written to; the end of it ends the process and all that it started
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            status = _wait(process, job, name, say)
        except BaseException:  # when interrupted, end the launcher's children too
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SideFailed(f"{name} ended with status {status}; its output is in {log}:\n{tail}")


def _wait(process: subprocess.Popen[bytes], job: Job, name: str, say: Callable[[str], None]) -> int:
    """Waits for a process, and says now and then how many cells have results. Returns its status."""
    started = time.monotonic()
    while True:
        try:
            return process.wait(_SECONDS_BETWEEN_LINES)
        except subprocess.TimeoutExpired:
            done = sum(was_run(job.results_folder(cell)) for cell in job.cells)
            minutes, seconds = divmod(round(time.monotonic() - started), 60)
            cells = f"{done} of {len(job.cells)} cells done, " if job.cells else ""
            say(f"running {name}: {cells}{minutes}:{seconds:02}")
