"""Runs all GPU measurements in calls of nine minutes; `benchmarks/gpu.sh` sets up its environment and starts it.

A part is one script with a time limit that is kept. Every part writes each of its cells when it is measured
(`benchmarks/cells.py`), so a part or a call that is killed leaves what it had, and `--resume` goes on from there. How
the parts ended is in `summary.txt`, and everything together in an archive beside the folder.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.cells import NOT_AGAIN_YET, SHORT_OF_TIME, WRONG, Cells
from benchmarks.facts import ROOT, accelerator, commit
from benchmarks.lengths import PROFILES

CALL_MINUTES = 9.0
ENDING = 15.0  # seconds of a call that are kept for ending it
LEAST = 45.0  # seconds that are enough for one measurement of most parts
MEASURED_WRONG = "done, and something is WRONG"  # how a part ended that exits with WRONG
STOPPED = "stopped"  # how a part ended that was not done in its time
TORCH_REF = ("pydantic", "pyarrow")
PARITY = (*TORCH_REF, "matplotlib")


@dataclass(frozen=True)
class Part:
    """A part of the measurements.

    Attributes:
        about: what it measures.
        limit: the most seconds it takes on a GPU, compilation included. What is not done then is left to the next call.
        module: the script.
        arguments: its arguments, beside where it writes.
        needs: packages that it needs beside jax, flax, optax, torch and transformers.
        least: seconds; the part is not begun with fewer, which would hardly be enough for its longest measurement.
    """

    about: str
    limit: float
    module: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    least: float = LEAST


def _throughput(*arguments: str) -> tuple[str, ...]:
    return "--dtype", "bfloat16", "--unpacked-batch", "0", "--dpo-rounds", "0", *arguments


def _peers(profile: str) -> tuple[str, ...]:
    chosen = "--only", "shared+packed, bfloat16", "--only", "jax-simpo, bfloat16"
    return "--model", "llama-3.2-1b", "--profile", profile, "--remat", "full", "--batch", "64", "--rounds", "3", *chosen


_LAYERS = (
    *("--model", "llama-3-8b", "--rounds", "3"),
    *("--prefix", "512", "--prefix", "2048", "--prefix", "8192", "--response", "128", "--response", "1024"),
)
_8B = _throughput("--model", "llama-3-8b", "--layers", "4", "--profiles", "capybara", "--rounds", "2")
_1B = _throughput("--model", "llama-3.2-1b", "--remat", "full", "--rounds", "3")
_SPEED = "benchmarks.attention_speed"
_SIX = "--layout", "shared", *(word for name in PROFILES for word in ("--profile", name))
# A measurement of steps has all layouts of some pairs and their compilation; one of the peers a start, and the trials
# of the backends or the compilation of FlexAttention.
_STEPS, _STARTS = 150.0, 240.0
# In the order of what matters.
PARTS = {
    "facts": Part("the machine, and the peaks of its matrix products and its memory", 60, "benchmarks.peaks"),
    "correct": Part("bfloat16 with heads of 128 and 64", 120, "benchmarks.attention_check", ("--first",)),
    "speed_128": Part("attention alone, heads of 128", 420, _SPEED, ("--width", "128")),
    "speed_profiles": Part("attention alone on packed pairs of six profiles", 420, _SPEED, ("--width", "128", *_SIX)),
    "speed_64": Part("attention alone, heads of 64", 420, _SPEED, ("--width", "64")),
    "layers": Part("the parts of a layer with the shapes of 8B", 420, "benchmarks.layers", _LAYERS, least=120),
    "layers_dots": Part(
        "steps of 4 layers of 8B, remat dots", 300, "benchmarks.throughput", (*_8B, "--remat", "dots"), least=_STEPS
    ),
    "layers_full": Part(
        "the same with remat full", 300, "benchmarks.throughput", (*_8B, "--remat", "full"), least=_STEPS
    ),
    "step_1b": Part(
        "steps of 1B on one profile", 300, "benchmarks.throughput", (*_1B, "--profiles", "capybara"), least=_STEPS
    ),
    "peers_1b": Part("a step of 1B beside torch_ref", 480, "benchmarks.peers", _peers("tldr"), TORCH_REF, _STARTS),
    "loss_head": Part(
        "the loss head with vocabularies of 32k to 256k",
        420,
        "benchmarks.loss_head",
        ("--width", "2048", "--targets", "8192", "--dtype", "bfloat16"),
    ),
    "parity": Part("both sides' numbers, trained on the GPU", 480, "benchmarks.parity_gpu", (), PARITY, 300),
    "correct_rest": Part("windows, caps, heads of 256, float32", 420, "benchmarks.attention_check", ("--no-first",)),
    "profiles_1b": Part("steps of 1B on all six profiles", 480, "benchmarks.throughput", _1B, least=_STEPS),
    **{
        f"peers_{profile}": Part(
            f"1B beside torch_ref, {profile}", 480, "benchmarks.peers", _peers(profile), TORCH_REF, _STARTS
        )
        for profile in ("capybara", "hh-rlhf", "metamath-dpo", "tulu-helpsteer", "ultrafeedback")
    },
}


@dataclass(frozen=True)
class Folder:
    """The files of the measurements."""

    path: Path

    @property
    def state_file(self) -> Path:
        """The file of the cells that say how parts ended."""
        return self.path / "state.jsonl"

    def state(self, part: str) -> Cells:
        """Opens the cells that say how a part ended. Like its measurements they hold for its own code."""
        return Cells(self.state_file, PARTS[part].module)

    def cells_file(self, part: str) -> Path:
        return self.path / "cells" / f"{part}.jsonl"

    def cells(self, part: str) -> Cells:
        """Opens a part's measurements."""
        return Cells(self.cells_file(part), PARTS[part].module)

    def log(self, part: str) -> Path:
        return self.path / "logs" / f"{part}.log"

    @property
    def summary(self) -> Path:
        return self.path / "summary.txt"

    @property
    def archive(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tar.gz")


def main(arguments: list[str] | None = None) -> int:
    """Measures until all parts are done or the call's time is over. Returns 0 if all parts that can run are done."""
    options = _options(arguments)
    if options.list:
        for name, part in PARTS.items():
            needs = f"; needs {', '.join(part.needs)}" if part.needs else ""
            print(f"{name:22} at most {part.limit:.0f} s: {part.about}{needs}")
        return 0
    ends = time.monotonic() + 60 * options.minutes - ENDING
    if options.device == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    elif not any(Path("/dev").glob("nvidia[0-9]*")):
        print("there is no GPU here (no /dev/nvidia0); --device cpu rehearses on the processor")
        return 2
    else:  # without its CUDA plugin jax must fail, and not compute for hours on the processor
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    folder = Folder(options.folder.resolve())
    if folder.state_file.exists() and not options.resume:
        print(f"{folder.path} has measurements already: give --resume to go on with them, or another folder")
        return 2
    folder.path.mkdir(parents=True, exist_ok=True)
    parts = {name: PARTS[name] for name in options.part or PARTS}
    print(f"{accelerator()}, commit {commit()}, at most {options.minutes:g} minutes")
    if elsewhere := [name for name in parts if folder.cells(name).elsewhere]:
        print(
            f"{folder.path} has measurements of other code or another machine: they are kept, and made again here. "
            f"They are of {', '.join(elsewhere)}"
        )
    _tell_what_is_missing(parts)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` is reached
    try:
        _run_parts(parts, folder, options, ends)
    finally:
        print(write_summary(folder, options.device), end="")
        write_archive(folder)
        print(f"everything is in {folder.archive}")
        signal.signal(signal.SIGTERM, before)
    left = [name for name, part in parts.items() if not _missing(part) and not _nothing_left(folder, name, options)]
    if left:
        print(f"not done: {', '.join(left)}; go on with: {_go_on(options)}")
        if too_long := [name for name in left if PARTS[name].least > 60 * options.minutes - ENDING]:
            print(f"{', '.join(too_long)} cannot begin in {options.minutes:g} minutes: give more with --minutes")
        return 1
    cannot = [name for name, part in parts.items() if _missing(part)]
    print("nothing is left" + (f", but {', '.join(cannot)} cannot run here" if cannot else ""))
    return 0


def _go_on(options: argparse.Namespace) -> str:
    """Returns the command that goes on with what is left of a call."""
    words = ["benchmarks/gpu.sh", str(options.folder), "--resume"]
    words += ["--device", options.device] if options.device != "gpu" else []
    words += [word for part in options.part or () for word in ("--part", part)]
    return shlex.join(words)


def _status(folder: Folder, name: str, device: str) -> dict[str, Any] | None:
    """Returns how a part ended last, or None."""
    ended: dict[str, Any] | None = folder.state(name).measured(_settings(name, PARTS[name], device))
    return ended


def _nothing_left(folder: Folder, name: str, options: argparse.Namespace) -> bool:
    """Returns True if a part has ended, and none of its measurements is to be tried again."""
    return is_done(_status(folder, name, options.device)) and not folder.cells(name).to_try_again()


def _run_parts(parts: dict[str, Part], folder: Folder, options: argparse.Namespace, ends: float) -> None:
    """Runs the parts that are not done, one after another, until the call's time is over.

    Those that have ended, and of which something failed, come last: what failed is tried again when all else is
    measured.
    """
    ended = {name: is_done(_status(folder, name, options.device)) for name in parts}
    for name in sorted(parts, key=lambda name: ended[name]):
        part = parts[name]
        if _nothing_left(folder, name, options):
            continue
        settings, state = _settings(name, part, options.device), folder.state(name)
        if missing := _missing(part):
            state.put(settings, {"status": f"not run: {', '.join(missing)} missing", "seconds": 0.0})
            continue
        left = ends - time.monotonic()
        if left < part.least:
            continue  # a later part may need less
        limit = part.limit * options.slower
        environment = {SHORT_OF_TIME: "1"} if left < limit else {}
        former = _status(folder, name, options.device)
        if former is None or former["status"].startswith(STOPPED):
            environment[NOT_AGAIN_YET] = "1"
        print(f"== {name}: {part.about}", flush=True)
        started = time.monotonic()
        command = _command(name, part, folder, options.device)
        status = run_part(command, folder.log(name), min(limit, left), environment)
        state.put(settings, {"status": status, "seconds": time.monotonic() - started})
        print(f"== {name}: {status}, {time.monotonic() - started:.0f} s", flush=True)
        write_summary(folder, options.device)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs/benchmarks/gpu", help="for the results")
    parser.add_argument("--resume", action="store_true", help="go on with the measurements in the folder")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (repeatable)")
    parser.add_argument("--minutes", type=float, default=CALL_MINUTES, help="the most minutes this call may take")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu rehearses with tiny shapes")
    parser.add_argument("--slower", type=float, default=1.0, help="factor on the limits of the parts")
    parser.add_argument("--list", action="store_true", help="name the parts and their limits, and end")
    return parser.parse_args(arguments)


def _settings(name: str, part: Part, device: str) -> dict[str, Any]:
    return {"part": name, "command": [part.module, *part.arguments], "device": device}


def _missing(part: Part) -> list[str]:
    return [package for package in part.needs if find_spec(package) is None]


def _tell_what_is_missing(parts: dict[str, Part]) -> None:
    """Says before anything runs which parts cannot, and how to get what they need."""
    missing = {name: _missing(part) for name, part in parts.items() if _missing(part)}
    packages = sorted({package for names in missing.values() for package in names})
    if packages:
        names = " ".join(packages)
        print(
            f"{', '.join(missing)} cannot run: {', '.join(packages)} missing. The rest runs. Install with "
            f"`pip install {names}` and call again with --resume. For a machine without a network: "
            f"`pip download --only-binary :all: -d WHEELS {names}` elsewhere with the same Python, and "
            f"`pip install --no-index --find-links WHEELS {names}` there."
        )
    if any("stand_ins" in folder for folder in sys.path):
        print("jaxtyping or xxhash is missing; benchmarks/stand_ins has all of them that is needed here")


def _command(name: str, part: Part, folder: Folder, device: str) -> list[str]:
    written = ["--output", str(folder.path), "--name", name, "--cells", str(folder.cells_file(name))]
    on_device = ["--device", device] if part.module == "benchmarks.peers" else []
    quick = ["--quick"] if device == "cpu" else []
    script = [part.module, *part.arguments, *on_device, *written, *quick]
    return [sys.executable, "-m", "benchmarks.child", str(os.getpid()), *script]


def run_part(command: list[str], log: Path, limit: float, environment: Mapping[str, str]) -> str:
    """Runs a part in a process group of its own, shows and keeps its output, and ends all of it at its limit.

    Returns:
        `ok`, or how it ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + limit
    with log.open("ab") as kept:
        kept.write(f"$ {' '.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            in_time = _show(process.stdout, kept, ends)
            if in_time:
                process.wait(timeout=ENDING)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            # Its workers too, which may outlive it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            process.stdout.close()
    if not in_time:
        return f"{STOPPED} after {limit:.0f} s"
    if code == 0:
        return "ok"
    last = _last_line(log)
    if code == WRONG:
        return f"{MEASURED_WRONG}: {last}"
    return f"failed ({f'status {code}' if code > 0 else signal.Signals(-code).name}): {last}"


def _show(output: Any, kept: BinaryIO, ends: float) -> bool:
    """Copies a part's output until it ends. Returns False if the time was over first."""
    sys.stdout.flush()
    while (left := ends - time.monotonic()) > 0:
        if not select.select([output], [], [], left)[0]:
            break
        chunk = os.read(output.fileno(), 65536)
        if not chunk:
            return True
        kept.write(chunk)
        kept.flush()
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def is_done(result: dict[str, Any] | None) -> bool:
    """Returns True if a part has measured everything."""
    return result is not None and result["status"].startswith(("ok", MEASURED_WRONG))


def write_summary(folder: Folder, device: str) -> str:
    """Writes how every part ended, and returns it."""
    lines = [f"{accelerator()}, commit {commit()}"]
    for name in PARTS:
        result = _status(folder, name, device)
        if result is None:
            lines.append(f"{name}: not begun")
            continue
        counts = folder.cells(name).counts()
        cells = f"{counts.cells} cells"
        cells += f", {counts.failed} of them failed" if counts.failed else ""
        cells += f", {counts.partly} with parts that failed" if counts.partly else ""
        lines.append(f"{name}: {result['status']}, {cells}, {result['seconds']:.0f} s in the last call")
    text = "".join(f"{line}\n" for line in lines)
    temporary = folder.summary.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder.summary)
    return text


def write_archive(folder: Folder) -> None:
    """Packs the folder, beside it."""
    temporary = folder.archive.with_suffix(".part")
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(folder.path, arcname=folder.path.name)
    temporary.replace(folder.archive)


if __name__ == "__main__":
    sys.exit(main())
