"""Shows the model's input without loading weights: rows as tokens and mask, and the savings of sharing and packing.

All pictures follow from the arrays of a row alone, as the model gets them: a token belongs to a response if the
response's last hidden state may attend to it. So a mistake in the layout would show here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from jax_simpo.config.objectives import ALL_KEYS, described
from jax_simpo.data.loader import build_step
from jax_simpo.data.packing import StepPlan, measure
from jax_simpo.data.rows import RowBatch
from jax_simpo.data.tokenize import PairDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jax_simpo.training.setup import Setup

MASK_COLUMNS = 64
_SAMPLED = 8  # positions that are sampled in each direction of a cell of the mask picture
_SHOWN_HEAD, _SHOWN_TAIL = 120, 60  # tokens of a long segment that are printed

# Two shades each, so that you can tell neighbouring tokens apart. White text is readable on all of them.
_SHADES = {"shared": ("#1d4e89", "#2a66ab"), "chosen": ("#1e6b3a", "#2b8549"), "rejected": ("#8f2f2a", "#ab4039")}
_NAMES = ("chosen", "rejected")


def show(setup: Setup, split: str | None, rows: int, console: Console) -> None:
    """Prints the first rows of a split, then figures of the whole split.

    Args:
        setup: the config's setup.
        split: a whole split; None is the training pairs, mixed as in training. Rows of training splits have the order
            and batch of training; rows of other splits are in file order, as in evaluation.
        rows: number of rows to draw.
        console: the console to print to.
    """
    config = setup.config
    training = split is None or split in config.train_splits
    pairs = read_pairs(setup, split)
    plan = setup.step_plan(pairs, batch=setup.global_batch_size(), seed=config.seed if training else None)
    for number, row in enumerate(_first_rows(plan, pairs, rows)):
        _print_row(console, number, row, pairs, setup.tokenizer)
    facts = _training_facts(setup, pairs.weights if training and config.weight_column else None)
    _print_split(console, split or " + ".join(config.train_splits), pairs, plan, facts)


def write_json(setup: Setup, split: str | None, file: IO[str]) -> None:
    """Writes one JSON object per pair of a split, in input order: texts, token ids and response lengths.

    Args:
        setup: the config's setup.
        split: a whole split; None is the training pairs, each source cut to its fraction.
        file: the file to write to.
    """
    for pair in read_pairs(setup, split).inspect_objects():
        file.write(json.dumps(pair, ensure_ascii=False) + "\n")


def read_pairs(setup: Setup, split: str | None) -> PairDataset:
    """Reads the pairs of a split, or the training pairs if it is None."""
    return setup.train_pairs() if split is None else setup.split_pairs(split)


# --- rows and their segments


@dataclass(frozen=True)
class PlacedRow:
    """One row of a step.

    Attributes:
        step: the step's number, from 0.
        arrays: the row as a batch of one.
        pairs: the index in the split of each pair of the step.
    """

    step: int
    arrays: RowBatch
    pairs: Int[np.ndarray, " P"]

    @property
    def length(self) -> int:
        """Tokens of the row, padding included."""
        return self.arrays.tokens.shape[1]


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a row that are visible to the same responses and belong to the same part of a pair.

    Attributes:
        pair: the pair's number in the step.
        kind: `shared`, `chosen` or `rejected`: the responses that see the tokens.
        part: `prompt` or `response`.
        start: the first token's index in the row.
        stop: the index after the last token.
        ends: last tokens of the responses that end with this segment. They are targets and never inputs.
    """

    pair: int
    kind: str
    part: str
    start: int
    stop: int
    ends: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Kind and part, such as "shared prompt"."""
        return f"{self.kind} {self.part}"


def _first_rows(plan: StepPlan, pairs: PairDataset, count: int) -> Iterator[PlacedRow]:
    """Yields the first `count` rows that are not empty."""
    for step in range(plan.steps_per_epoch):
        built = build_step(plan, pairs, step)
        for micro_batch in built.micro_batches:
            for i in range(len(micro_batch.tokens)):
                row = micro_batch.rows(i, i + 1)
                if count <= 0:
                    return
                if row.input_tokens:
                    yield PlacedRow(step, row, built.pairs)
                    count -= 1


def find_segments(row: RowBatch) -> list[Segment]:
    """Returns the segments of a row (a batch of one) from left to right. Padding belongs to no segment."""
    positions, key_end = row.positions[0], row.key_end[0]
    index = np.arange(len(key_end))
    slots = np.flatnonzero(row.response_pair[0] >= 0)
    sees = np.zeros((len(slots), len(key_end)), bool)
    answers = np.zeros_like(sees)
    ends: dict[int, list[int]] = {}  # index of a response's last hidden state -> tokens that it predicts
    for i, slot in enumerate(slots):
        targets = row.target_response[0] == slot
        predictors = row.target_index[0][targets]
        last = int(predictors[-1])
        sees[i] = (index <= last) & (last < key_end)
        # The first target is predicted by the last token of the prompt.
        answers[i] = sees[i] & (positions > positions[predictors[0]])
        ends.setdefault(last, []).append(int(row.target_token[0][targets][-1]))

    segments: list[Segment] = []
    for token_index in np.flatnonzero(sees.any(0)).tolist():
        seeing = slots[sees[:, token_index]]
        kind = "shared" if len(seeing) > 1 else _NAMES[int(row.response_rank[0, seeing[0]])]
        part = "response" if answers[:, token_index].any() else "prompt"
        pair = int(row.response_pair[0, seeing[0]])
        segment = Segment(pair, kind, part, token_index, token_index + 1, tuple(ends.get(token_index, ())))
        # It extends the last segment unless that belongs to another pair or part, or a response ends with it.
        last_segment = segments[-1] if segments else None
        if last_segment and not last_segment.ends and (last_segment.pair, last_segment.name) == (pair, segment.name):
            segments[-1] = replace(segment, start=last_segment.start)
        else:
            segments.append(segment)
    return segments


# --- tokens


def _print_row(
    console: Console, number: int, row: PlacedRow, pairs: PairDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    segments = find_segments(row.arrays)
    used = row.arrays.input_tokens
    pair_numbers = list(dict.fromkeys(segment.pair for segment in segments))
    title = f"row {number} (step {row.step + 1}): {_count(len(pair_numbers), 'pair')}, {used} of {row.length} tokens"
    console.print(Rule(Text(title, style="bold"), align="left", style="dim"))
    table = _table("pair", "from", "row", "prompt", "shared", "chosen", "rejected", "in the row", "separate")
    for pair in pair_numbers:
        index = int(row.pairs[pair])
        file, line = pairs.origin(index)
        lengths = pairs.lengths
        shared = [s.stop - s.start for s in segments if s.pair == pair and s.kind == "shared"]
        in_row = [s.stop - s.start for s in segments if s.pair == pair]
        separate = int(lengths.chosen_inputs[index] + lengths.rejected_inputs[index])
        prompt = int(lengths.chosen_inputs[index] + 1 - lengths.chosen_targets[index])
        responses = (int(lengths.chosen_targets[index]), int(lengths.rejected_targets[index]))
        cells = (pair, Path(file).name, line, prompt, sum(shared), *responses, sum(in_row), separate)
        table.add_row(*(Text(str(cell)) for cell in cells))
    console.print(table)
    for pair in pair_numbers:
        for segment in (s for s in segments if s.pair == pair):
            console.print(_segment_text(segment, row.arrays.tokens[0], tokenizer), soft_wrap=False)
        console.print()
    if used < row.length:
        console.print(Text(f"padding: {row.length - used} tokens\n", style="dim"))
    _print_mask(console, row.arrays.key_end[0], segments)


def _segment_text(segment: Segment, tokens: Int[np.ndarray, " L"], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Returns the text of a segment: its name, the number of its tokens, and the tokens."""
    count = segment.stop - segment.start
    head = f"pair {segment.pair} {segment.name} [{count}] "
    ids = tokens[segment.start : segment.stop].tolist()
    text = Text(head, style="bold", overflow="fold")
    if count > _SHOWN_HEAD + _SHOWN_TAIL + 20:
        _add_tokens(text, ids[:_SHOWN_HEAD], segment, tokenizer)
        text.append(f" ... {count - _SHOWN_HEAD - _SHOWN_TAIL} tokens ... ", style=Style(bold=False, dim=True))
        ids = ids[-_SHOWN_TAIL:]
    _add_tokens(text, ids, segment, tokenizer)
    for end in segment.ends:
        text.append(f" -> {printable(str(tokenizer.decode([end])))}", style=Style(bold=False, italic=True))
    return text


def _add_tokens(text: Text, ids: list[int], segment: Segment, tokenizer: PreTrainedTokenizerBase) -> None:
    for i, piece in enumerate(token_texts(ids, tokenizer)):
        shade = _SHADES[segment.kind][i % 2]
        text.append(piece, Style(color="#ffffff", bgcolor=shade, bold=segment.part == "response"))


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields the printable text of each token. Tokens that are parts of one character are yielded together."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = str(tokenizer.decode(pending))
        # Byte-level tokens may hold a part of a character, which decodes to U+FFFD; four bytes are the longest.
        if text.endswith("\ufffd") and len(pending) < 4:
            continue
        yield printable(text)
        pending = []
    if pending:
        yield printable(str(tokenizer.decode(pending)))


def printable(text: str) -> str:
    """Makes line ends visible and writes control characters as codes, so that data cannot steer your terminal."""
    text = text.replace("\n", "\u23ce")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- mask


def _print_mask(console: Console, key_end: Int[np.ndarray, " L"], segments: list[Segment]) -> None:
    """Prints the mask as a picture: a cell is filled where queries see keys; a line of text is two lines of cells."""
    picture = mask_cells(key_end, MASK_COLUMNS)
    cell = -(-len(key_end) // MASK_COLUMNS)
    # The segment at the middle of each line of cells gives its colour and label.
    middles = [min(i * cell + cell // 2, len(key_end) - 1) for i in range(len(picture))]
    owners = [next((s for s in segments if s.start <= middle < s.stop), None) for middle in middles]
    labels = ["" if s is None else f"pair {s.pair} {s.kind}" for s in owners]
    width = max(map(len, labels), default=0)
    colorless = console.color_system is None
    console.print(Text(f"mask: queries down, keys to the right; a cell is {cell} x {cell} tokens", style="dim"))
    previous = ""
    for top in range(0, len(picture), 2):
        upper, lower = picture[top], picture[top + 1] if top + 1 < len(picture) else np.zeros_like(picture[top])
        new_labels = [label for label in labels[top : top + 2] if label and label != previous]
        previous = labels[min(top + 1, len(labels) - 1)] or previous
        line = Text(f"{new_labels[0] if new_labels else '':>{width}} │", style="dim")
        colors = [_SHADES[s.kind][1] if s is not None else "default" for s in (*owners[top : top + 2], None)[:2]]
        for above, below in zip(upper, lower, strict=True):
            if above and below:
                same = colorless or colors[0] == colors[1]
                style = Style(color=colors[0]) if same else Style(color=colors[0], bgcolor=colors[1])
                line.append("█" if same else "▀", style=style + Style(dim=False))
            elif above or below:
                line.append("▀" if above else "▄", style=Style(color=colors[0 if above else 1], dim=False))
            else:
                line.append(" ")
        console.print(Text.assemble(line, ("│", "dim")), no_wrap=True, overflow="crop")
    console.print()


def mask_cells(key_end: Int[np.ndarray, " L"], columns: int) -> Bool[np.ndarray, "C C"]:
    """Returns the mask `k <= q < key_end[k]` as at most `columns` x `columns` cells, True where half is visible."""
    length = len(key_end)
    cell = -(-length // columns)
    cells = -(-length // cell)
    # A sample of positions in each cell is enough: a row of 32768 tokens has a billion pairs of query and key.
    offsets = np.unique(np.linspace(0, cell - 1, min(cell, _SAMPLED), dtype=int))
    sampled = np.arange(cells)[:, None] * cell + offsets
    ends = np.where(sampled < length, key_end[np.minimum(sampled, length - 1)], 0)
    queries, keys = sampled.reshape(-1, 1), sampled.reshape(1, -1)
    sees = (keys <= queries) & (queries < ends.reshape(1, -1))
    share = sees.reshape(cells, len(offsets), cells, len(offsets)).mean((1, 3))
    return share >= 0.5


# --- the whole split


def _print_split(
    console: Console, name: str, pairs: PairDataset, plan: StepPlan, training_facts: Mapping[str, str]
) -> None:
    lengths = pairs.lengths
    console.print(Rule(Text(f"{name}: {_count(len(pairs), 'pair')}", style="bold"), align="left", style="dim"))
    table = _table("tokens", "min", "median", "mean", "95 %", "max", "sum")
    rows = {
        "prompt (of chosen)": lengths.chosen_inputs + 1 - lengths.chosen_targets,
        "chosen response": lengths.chosen_targets,
        "rejected response": lengths.rejected_targets,
        "common prefix": lengths.shared_inputs,
        "pair, shared": lengths.row_tokens(True),
        "pair, separate": lengths.row_tokens(False),
    }
    for label, values in rows.items():
        middle, high = np.quantile(values, (0.5, 0.95))
        cells = (values.min(), middle, values.mean(), high, values.max(), values.sum())
        table.add_row(label, *(f"{cell:,.0f}" for cell in cells))
    console.print(table)

    report = measure(plan)
    saved = 1 - lengths.row_tokens(True).sum() / lengths.row_tokens(False).sum()
    shape = plan.shape
    sharing_note = "" if plan.prefix_sharing else " (off in this config)"
    facts = {
        "row shape": f"{shape.length} tokens, {shape.targets} targets, {shape.responses} responses",
        "micro-batch": _count(plan.rows_per_micro_batch, "row"),
        "step": f"{_count(round(report.pairs), 'pair')} in {report.computed_tokens / shape.length:.3g} rows, "
        f"{report.empty_rows:.1%} of them empty; {_count(plan.steps_per_epoch, 'step')} an epoch",
        "packing fill": f"{report.fill:.1%}{'' if plan.packing else ' (packing is off in this config)'}",
        "padding": f"{1 - report.fill:.1%} of the computed tokens",
        "saved by prefix sharing": f"{saved:.1%} of the tokens{sharing_note}",
        "skipped rows": pairs.skipped_summary() or "none",
        **training_facts,
    }
    grid = Table.grid(padding=(0, 2))
    for label, value in facts.items():
        grid.add_row(Text(label, style="dim"), Text(value))
    console.print(grid)


def _training_facts(setup: Setup, weights: Float[np.ndarray, " P"] | None) -> dict[str, str]:
    """Returns what training makes of the pairs: its objective with its keys, the reference, and the pairs' weights."""
    config = setup.config
    keys = {key: value for key in ALL_KEYS if (value := getattr(config, key)) is not None}
    shown = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in keys.items()
    )
    objective = described(config.objective)
    facts = {"objective": f"{objective} ({shown})" if shown else objective}
    if setup.objective.needs_reference:
        facts["reference"] = config.ref_model_name_or_path or "the model that the run starts from"
    if weights is not None:
        low, middle, high = np.quantile(weights, (0, 0.5, 1))
        facts["weights"] = (
            f"{low:g} to {high:g}, median {middle:g}, mean {weights.mean():.3g} (`{config.weight_column}`)"
        )
    return facts


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column == "from" else "right")
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
