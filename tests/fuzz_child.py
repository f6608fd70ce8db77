"""Feeds a part of the program with texts that coverage guides: `python -m tests.fuzz_child TARGET CORPUS FLAGS...`.

The corpus is a folder of texts to begin with; flags are those of libFuzzer. It ends with a status other than 0, and
writes the text to `crash-...`, as soon as the program answers with anything but a result or a `UserError`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["jax_simpo.config", "jax_simpo.data", "yaml"]):
    from jax_simpo.config import load_config
    from jax_simpo.data import chat
    from jax_simpo.data.sources import load_split
    from jax_simpo.data.tokenize import tokenize_split
from jax_simpo.errors import UserError

COLUMNS = [
    *("prompt", "chosen", "rejected", "responses", "scores", "ranks", "score", "tools", "weight", "id"),
    *("instruction", "completions", "response", "overall_score", "answers", "answer", "rank", "tool_calls", "content"),
]
ROLES = ["user", "assistant", "system", "tool", "", None]
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def config(data: bytes) -> None:
    """A config file."""
    file = FOLDER / "config.yaml"
    file.write_bytes(data)
    load_config(file)


def override(data: bytes) -> None:
    """An option of the command line, over a config that is right."""
    file = FOLDER / "config.yaml"
    file.write_text("model_name_or_path: m\ndataset_mixer: {builtin:cafe: 1}\n")
    load_config(file, [f"--{data.decode(errors='surrogateescape')}"])


def rows(data: bytes) -> None:
    """A file of groups, to their tokens. No row is dropped in silence."""
    _tokenized(data, "jsonl")


def table(data: bytes) -> None:
    """The same as one JSON text."""
    _tokenized(data, "json")


def values(data: bytes) -> None:
    """Rows with the columns that are known, and whatever values under them."""
    drawn = atheris.FuzzedDataProvider(data)
    made = [
        {drawn.PickValueInList(COLUMNS): _value(drawn, 4) for _ in range(4)}
        for _ in range(drawn.ConsumeIntInRange(1, 3))
    ]
    _tokenized("\n".join(map(json.dumps, made)).encode(), "jsonl")


def _value(drawn: atheris.FuzzedDataProvider, depth: int) -> Any:
    kind = drawn.ConsumeIntInRange(0, 9)
    if kind < 3 or not depth:
        return drawn.PickValueInList(["Tea?", "Yes.", "No.", "", " ", "</s>", "\ud83d"]) + drawn.ConsumeUnicode(4)
    if kind == 3:
        return drawn.PickValueInList([0, 1, -1, 10**400, 0.5, math.nan, math.inf, True, None])
    if kind < 6:
        return [_value(drawn, depth - 1) for _ in range(drawn.ConsumeIntInRange(0, 4))]
    if kind < 9:
        return {"role": drawn.PickValueInList(ROLES), "content": _value(drawn, depth - 1)}
    return {drawn.PickValueInList(COLUMNS): _value(drawn, depth - 1) for _ in range(3)}


def _tokenized(data: bytes, suffix: str) -> None:
    file, cache = FOLDER / f"pairs.{suffix}", FOLDER / "cache"
    file.write_bytes(data)
    raw = load_split({str(file): 1.0}, "train")
    try:
        found = tokenize_split(
            raw,
            tokenizer,
            max_length=64,
            max_prompt_length=32,
            on_bad_row="skip",
            num_proc=1,
            cache_dir=cache,
            progress=False,
        )
        assert len(found) + len(found.skipped) == len(raw)
        for group in found.groups(range(len(found))):
            assert len(group.responses) > 1 and all(0 < len(r.ids) <= 64 and r.length for r in group.responses)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


TARGETS = {target.__name__: target for target in (config, override, rows, table, values)}


def main() -> None:
    global tokenizer
    target = TARGETS[sys.argv.pop(1)]
    logging.disable()
    tokenizer = chat.load_tokenizer("builtin:cafe")

    def once(data: bytes) -> None:
        try:
            target(data)
        except UserError:
            pass

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
