"""Shows the model's input without loading weights: rows as tokens and mask, and the savings of sharing and packing.

All pictures follow from the arrays of a row alone, as the model gets them: a token belongs to a response if the
response's last hidden state may attend to it. So a mistake in the layout would show here.
"""

from __future__ import annotations

import json
from collections import Counter
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

from jax_simpo.config.help import default_of
from jax_simpo.config.objectives import ALL_KEYS, GROUP_KEYS, described
from jax_simpo.data.loader import build_step
from jax_simpo.data.packing import PackingReport, StepPlan, measure, micro_batch_line
from jax_simpo.data.rows import RowBatch
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.data.tree import lay_out
from jax_simpo.terminal import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jax_simpo.training.setup import Setup

MASK_COLUMNS = 64
_SHOWN_HEAD, _SHOWN_TAIL = 120, 60  # tokens of a long segment that are printed

# Two shades each, so that you can tell neighbouring tokens apart. White text is readable on all of them.
_SHARED_SHADES = ("#1d4e89", "#2a66ab")  # of what all responses share; of what some share, those after it
_SOME_SHADES = (("#5b3a8c", "#7049a8"), ("#1f6470", "#287d8c"), ("#6b4a1e", "#856029"))
_OWN_SHADES = (
    ("#1e6b3a", "#2b8549"),
    ("#8f2f2a", "#ab4039"),
    ("#7a5a00", "#947016"),
    ("#86306e", "#a03f85"),
    ("#3f5f1a", "#527a25"),
    ("#7d3c14", "#984e1f"),
)


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
    pairs = read_groups(setup, split)
    plan = setup.step_plan(pairs, batch=setup.global_batch_size(), seed=config.seed if training else None)
    for number, row in enumerate(_first_rows(plan, pairs, rows)):
        _print_row(console, number, row, pairs, setup.tokenizer)
    facts = _training_facts(setup, pairs.weights if training and config.weight_column else None)
    report = measure(plan)
    micro_batches = micro_batch_line(plan, report, setup.data_parallel, setup.most_rows(plan))
    _print_split(console, split or " + ".join(config.train_splits), pairs, plan, report, micro_batches, facts)


def write_json(setup: Setup, split: str | None, file: IO[str]) -> None:
    """Writes one JSON object per pair of a split, in input order: texts, token ids and response lengths.

    Args:
        setup: the config's setup.
        split: a whole split; None is the training pairs, each source cut to its fraction.
        file: the file to write to.
    """
    for pair in read_groups(setup, split).inspect_objects():
        file.write(json.dumps(pair, ensure_ascii=False) + "\n")


def read_groups(setup: Setup, split: str | None) -> GroupDataset:
    """Reads the groups of a split, or those of training if it is None."""
    return setup.train_pairs() if split is None else setup.split_pairs(split)


# --- rows and their segments


@dataclass(frozen=True)
class PlacedRow:
    """One row of a step.

    Attributes:
        step: the step's number, from 0.
        arrays: the row as a batch of one.
        groups: the index in the split of each group of the step.
    """

    step: int
    arrays: RowBatch
    groups: Int[np.ndarray, " G"]

    @property
    def length(self) -> int:
        """Tokens of the row, padding included."""
        return self.arrays.tokens.shape[1]


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a row that are visible to the same responses and belong to the same part of a group.

    Attributes:
        group: the group's number in the step.
        responses: the places in the group, best first, of the responses that see the tokens.
        size: the number of responses of the group.
        part: `prompt`, `response` where they are scored, or `between` where they are in a response but not scored.
        start: the first token's index in the row.
        stop: the index after the last token.
        ends: last tokens of the responses that end with this segment. They are targets and never inputs.
    """

    group: int
    responses: tuple[int, ...]
    size: int
    part: str
    start: int
    stop: int
    ends: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Who sees the tokens: `shared` by all responses, or some of them, or one: of a pair `chosen`, `rejected`."""
        if len(self.responses) == self.size > 1:
            return "shared"
        numbers = ", ".join(str(place + 1) for place in self.responses)
        if len(self.responses) > 1:
            return f"shared by {numbers}"
        return ("chosen", "rejected")[self.responses[0]] if self.size == 2 else f"response {numbers}"

    @property
    def name(self) -> str:
        """Kind and part, such as "shared prompt"."""
        return f"{self.kind}: {self.part}" if self.size > 2 else f"{self.kind} {self.part}"

    @property
    def shades(self) -> tuple[str, str]:
        """The colours of the tokens, alternating."""
        first = self.responses[0]
        if len(self.responses) == self.size > 1:
            return _SHARED_SHADES
        shades = _SOME_SHADES if len(self.responses) > 1 else _OWN_SHADES
        return shades[first % len(shades)]


def _first_rows(plan: StepPlan, pairs: GroupDataset, count: int) -> Iterator[PlacedRow]:
    """Yields the first `count` rows that are not empty."""
    for step in range(plan.steps_per_epoch):
        built = build_step(plan, pairs, step)
        for micro_batch in built.micro_batches:
            for i in range(len(micro_batch.tokens)):
                row = micro_batch.rows(i, i + 1)
                if count <= 0:
                    return
                if row.input_tokens:
                    yield PlacedRow(step, row, built.groups)
                    count -= 1


def find_segments(row: RowBatch) -> list[Segment]:
    """Returns the segments of a row (a batch of one) from left to right. Padding belongs to no segment."""
    positions, key_end = row.positions[0], row.key_end[0]
    index = np.arange(len(key_end))
    slots = np.flatnonzero(row.response_group[0] >= 0)
    sees = np.zeros((len(slots), len(key_end)), bool)
    part = np.zeros_like(sees, np.int8)  # of each token, as a response sees it: prompt, between, response
    ends: dict[int, list[int]] = {}  # index of a response's last hidden state -> tokens that it predicts
    for i, slot in enumerate(slots):
        targets = row.target_response[0] == slot
        predictors = row.target_index[0][targets]
        last = int(predictors[-1])
        sees[i] = (index <= last) & (last < key_end)
        # The first target is predicted by the last token of the prompt, and each other by the one before it.
        part[i] = sees[i] & (positions > positions[predictors[0]])
        scored = sees[i] & np.isin(positions, positions[predictors] + 1)
        part[i][scored] = 2
        ends.setdefault(last, []).append(int(row.target_token[0][targets][-1]))

    sizes = np.bincount(row.response_group[0][slots])
    segments: list[Segment] = []
    for token_index in np.flatnonzero(sees.any(0)).tolist():
        seeing = sees[:, token_index]
        group = int(row.response_group[0, slots[seeing][0]])
        segment = Segment(
            group,
            tuple(row.response_place[0, slots[seeing]].tolist()),
            int(sizes[group]),
            ("prompt", "between", "response")[part[:, token_index].max()],
            token_index,
            token_index + 1,
            tuple(ends.get(token_index, ())),
        )
        # It extends the last segment unless that belongs to another group or part, or a response ends with it.
        last_segment = segments[-1] if segments else None
        if last_segment and not last_segment.ends and (last_segment.group, last_segment.name) == (group, segment.name):
            segments[-1] = replace(segment, start=last_segment.start)
        else:
            segments.append(segment)
    return segments


# --- tokens


def _print_row(
    console: Console, number: int, row: PlacedRow, pairs: GroupDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    segments = find_segments(row.arrays)
    used = row.arrays.input_tokens
    groups = list(dict.fromkeys(segment.group for segment in segments))
    lengths = pairs.lengths.of_groups(row.groups)
    noun = _noun(lengths.sizes[groups])
    title = f"row {number} (step {row.step + 1}): {_count(len(groups), noun)}, {used} of {row.length} tokens"
    console.print(Rule(Text(title, style="bold"), align="left", style="dim"))
    of_responses = ("chosen", "rejected") if noun == "pair" else ("responses",)
    table = _table(noun, "from", "row", "prompt", "shared", *of_responses, "in the row", "separate")
    for group in groups:
        file, line = pairs.origin(int(row.groups[group]))
        own = slice(lengths.starts[group], lengths.starts[group] + lengths.sizes[group])
        shared = sum(s.stop - s.start for s in segments if s.group == group and len(s.responses) > 1)
        in_row = sum(s.stop - s.start for s in segments if s.group == group)
        scored = lengths.targets[own].tolist()
        responses = scored if noun == "pair" else [", ".join(map(str, scored))]
        prompt, separate = int(lengths.prompts[own][0]), int(lengths.inputs[own].sum())
        cells = (group, Path(file).name, line, prompt, shared, *responses, in_row, separate)
        table.add_row(*(Text(visible(str(cell))) for cell in cells))
    console.print(table)
    for group in groups:
        for segment in (s for s in segments if s.group == group):
            console.print(_segment_text(segment, row.arrays.tokens[0], tokenizer), soft_wrap=False)
        console.print()
    if used < row.length:
        console.print(Text(f"padding: {row.length - used} tokens\n", style="dim"))
    _print_mask(console, row.arrays.key_end[0], segments)


def _segment_text(segment: Segment, tokens: Int[np.ndarray, " L"], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Returns the text of a segment: its name, the number of its tokens, and the tokens."""
    count = segment.stop - segment.start
    head = f"{_noun(segment.size)} {segment.group} {segment.name} [{count}] "
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
        shade = segment.shades[i % 2]
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
    """Prints the mask as a picture: a cell is filled where a query sees a key; a line of text is two lines of cells."""
    picture = mask_cells(key_end, MASK_COLUMNS)
    cell = -(-len(key_end) // MASK_COLUMNS)
    # The segment at the middle of each line of cells gives its colour and label.
    middles = [min(i * cell + cell // 2, len(key_end) - 1) for i in range(len(picture))]
    owners = [next((s for s in segments if s.start <= middle < s.stop), None) for middle in middles]
    labels = ["" if s is None else f"{_noun(s.size)} {s.group} {s.kind}" for s in owners]
    width = max(map(len, labels), default=0)
    colorless = console.color_system is None
    size = "a cell is a token" if cell == 1 else f"a cell of {cell} x {cell} tokens is filled if any is seen"
    console.print(Text(f"mask: queries down, keys right; {size}", style="dim"))
    previous = ""
    for top in range(0, len(picture), 2):
        upper, lower = picture[top], picture[top + 1] if top + 1 < len(picture) else np.zeros_like(picture[top])
        new_labels = [label for label in labels[top : top + 2] if label and label != previous]
        previous = labels[min(top + 1, len(labels) - 1)] or previous
        line = Text(f"{new_labels[0] if new_labels else '':>{width}} │", style="dim")
        colors = [s.shades[1] if s is not None else "default" for s in (*owners[top : top + 2], None)[:2]]
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
    """Returns the mask `k <= q < key_end[k]` as at most `columns` x `columns` cells, True where any is visible."""
    length = len(key_end)
    cell = -(-length // columns)
    cells = -(-length // cell)
    keys = np.flatnonzero(key_end > np.arange(length))  # a padding token is visible to none
    # A key is visible to the queries from itself to its end: it begins a run of cells in its column, and ends it.
    changes = np.zeros((cells + 1, cells), int)
    np.add.at(changes, (keys // cell, keys // cell), 1)
    np.add.at(changes, ((key_end[keys] - 1) // cell + 1, keys // cell), -1)
    return changes.cumsum(0)[:-1] > 0


# --- the whole split


def _print_split(
    console: Console,
    name: str,
    pairs: GroupDataset,
    plan: StepPlan,
    report: PackingReport,
    micro_batches: str,
    training_facts: Mapping[str, str],
) -> None:
    lengths = pairs.lengths
    noun = _noun(lengths.sizes)
    console.print(Rule(Text(f"{visible(name)}: {_count(len(pairs), noun)}", style="bold"), align="left", style="dim"))
    table = _table("tokens", "min", "median", "mean", "95 %", "max", "sum")
    is_best = np.zeros(len(lengths.inputs), bool)
    is_best[lengths.starts] = True
    names = ("chosen", "rejected") if noun == "pair" else ("best", "other")
    rows = {
        f"prompt (of {names[0]})": lengths.prompts[is_best],
        f"{names[0]} response": lengths.targets[is_best],
        f"{names[1]} response{'' if noun == 'pair' else 's'}": lengths.targets[~is_best],
        **({} if noun == "pair" else {"responses of a group": lengths.sizes}),
        "saved by sharing": lengths.row_tokens(False) - lengths.row_tokens(True),
        f"{noun}, shared": lengths.row_tokens(True),
        f"{noun}, separate": lengths.row_tokens(False),
    }
    for label, values in rows.items():
        middle, high = np.quantile(values, (0.5, 0.95))
        cells = (values.min(), middle, values.mean(), high, values.max(), values.sum())
        table.add_row(label, *(f"{cell:,.0f}" for cell in cells))
    console.print(table)

    saved = 1 - lengths.row_tokens(True).sum() / lengths.row_tokens(False).sum()
    shape = plan.shape
    sharing_note = "" if plan.prefix_sharing else " (off in this config)"
    remarks = {
        "rendering": pairs.rendering_summary(),
        "left out": pairs.left_out_summary(),
        "special tokens": pairs.special_summary(),
    }
    facts = {
        **{f"read {number}" if number > 1 else "read": layout.line for number, layout in enumerate(pairs.layouts, 1)},
        "row shape": f"{shape.length} tokens, {shape.targets} targets, {shape.responses} responses",
        "micro-batch": f"{_count(plan.rows_per_micro_batch, 'row')}; {micro_batches}",
        "step": f"{_count(round(report.groups), noun)} in {report.computed_tokens / shape.length:.3g} rows, "
        f"{report.empty_rows:.1%} of them empty; {_count(plan.steps_per_epoch, 'step')} an epoch",
        "packing fill": f"{report.fill:.1%}{'' if plan.packing else ' (packing is off in this config)'}",
        "padding": f"{1 - report.fill:.1%} of the computed tokens",
        "saved by prefix sharing": f"{saved:.1%} of the tokens{_by_level(pairs)}{sharing_note}",
        "skipped rows": pairs.skipped_summary() or "none",
        "cut": pairs.cuts_summary() or "nothing",
        **{name: text for name, text in remarks.items() if text},
        **training_facts,
    }
    grid = Table.grid(padding=(0, 2))
    for label, value in facts.items():
        grid.add_row(Text(label, style="dim"), Text(visible(value)))
    console.print(grid)


def _by_level(pairs: GroupDataset) -> str:
    """Says what each level of the trees saves, where trees have more than one that is shared."""
    separate = int(pairs.lengths.row_tokens(False).sum())
    saved: Counter[int] = Counter()
    for group in pairs.groups(np.flatnonzero(pairs.lengths.sizes > 2)):
        saved.update(dict(enumerate(lay_out([r.inputs for r in group.responses]).savings())))
    shares = [f"{saved[level] / separate:.1%} at level {level + 1}" for level in sorted(saved) if saved[level]]
    return f" ({', '.join(shares)} of the trees)" if len(shares) > 1 else ""


def _noun(sizes: int | Int[np.ndarray, " G"]) -> str:
    """Returns what groups of these sizes are called."""
    return "pair" if np.all(np.asarray(sizes) == 2) else "group"


def _training_facts(setup: Setup, weights: Float[np.ndarray, " P"] | None) -> dict[str, str]:
    """Returns what training makes of the pairs: its objective with its keys, the reference, and the pairs' weights."""
    config = setup.config
    keys = {key: value for key in ALL_KEYS if (value := getattr(config, key)) is not None}
    keys |= {key: value for key in GROUP_KEYS if (value := getattr(config, key)) != default_of(type(config), key)}
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
