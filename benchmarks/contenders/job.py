"""The job that all contenders run: a start model, pairs, a batch. Imports neither jax nor torch."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.lengths import Profile, draw_lengths
from jax_simpo.data import chat, synthetic
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.rendering import choose_rendering

# The objectives that are compared, with their config keys: those of a published SimPO run, and the default of DPO.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.55},
    "dpo": {"beta": 0.1},
}
LEARNING_RATE = 1e-6
MAX_LENGTH = 8192  # so long that no pair is cut


@dataclass(frozen=True)
class Job:
    """A comparison, as its workers read it.

    Attributes:
        work: the folder for all files.
        model: the start model's Hugging Face configuration.
        tokenizer: a folder, hub id or `builtin:NAME`.
        pairs: number of pairs; every step takes all of them.
        device: `cpu` or `gpu`.
        objective: one of `OBJECTIVES`.
        stacked_batch: pairs a micro-batch of the contenders that stack chosen and rejected along the batch.
        remat: `none` or `full`. With `none` jax-simpo takes `dots`, its fastest setting.
    """

    work: str
    model: dict[str, Any]
    tokenizer: str
    pairs: int
    device: str
    objective: str = "simpo"
    stacked_batch: int = 8
    remat: str = "none"

    @property
    def start(self) -> Path:
        """The folder of the start model."""
        return Path(self.work) / "start"

    @property
    def reference(self) -> Path | None:
        """The folder of the reference model, if the objective needs one.

        It is not the start model, under which every loss of a first step would be log 2.
        """
        return Path(self.work) / "reference" if self.objective == "dpo" else None

    @property
    def rows(self) -> Path:
        """The file of the pairs."""
        return Path(self.work) / "pairs.jsonl"

    @property
    def file(self) -> Path:
        return Path(self.work) / "job.json"

    def save(self) -> None:
        self.file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(file: str) -> Job:
        return Job(**json.loads(Path(file).read_text(encoding="utf-8")))

    def texts(self) -> list[chat.GroupText]:
        """Returns the pairs after the chat template."""
        tokenizer = chat.load_tokenizer(self.tokenizer)
        rendering = choose_rendering(tokenizer, "auto", False)
        rows = [read_conversation(json.loads(line)) for line in self.rows.read_text(encoding="utf-8").splitlines()]
        return [chat.render_group(row, tokenizer, False, rendering=rendering) for row in rows]


def as_pair(text: chat.GroupText) -> dict[str, str]:
    """Returns a pair of texts by the names that TRL gives them."""
    chosen, rejected = text.responses
    return {"prompt": text.prompt, "chosen": chosen, "rejected": rejected}


def first_pairs(file: Path, count: int) -> list[dict[str, Any]]:
    """Reads the first pairs of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]


def spoken_pairs(profile: Profile, count: int) -> list[dict[str, Any]]:
    """Makes pairs of text in a profile's lengths, of words that `builtin:cafe` has as single tokens."""
    chance = random.Random(0)
    words = [*synthetic.SIZES, *synthetic.DRINKS, *synthetic.EXTRAS]

    def say(tokens: int) -> str:
        # Every word is one token, and the template adds at least two.
        return " ".join(chance.choice(words) for _ in range(max(1, tokens - 2)))

    pairs = []
    for prompt, chosen, rejected in draw_lengths(profile, count).tolist():
        question = {"role": "user", "content": say(prompt)}
        answers = ({"role": "assistant", "content": say(n)} for n in (chosen, rejected))
        pairs.append(dict(zip(("chosen", "rejected"), ([question, answer] for answer in answers), strict=True)))
    return pairs
