"""What do trees of answers gain over sharing one prefix, and over sharing nothing?

Makes optimizer steps on made-up groups in three layouts that take turns: every answer by itself (separate), the prefix
that all answers of a group have in common once (one prefix), and every common prefix once (trees). The shapes are
prompts with 2, 4, 8 and 16 answers, one long prompt with 16 short answers, and agents' trajectories that part late. The
layout of one prefix is that of the same groups with the tokens after it made different, so all three are the program's
own rows and steps. Times include planning, building and sending rows; rows are packed, and as long as the trainer makes
them.

Expected: trees reach at least 95 % of the speed-up that the number of tokens promises, and 3.75 times the speed of
separate answers on the long prompt with 16 answers, in less memory. The number of operations promises less: the tokens
that trees do not repeat are those of prompts, which see few others and of which none goes through the head.

Takes about 20 minutes on two CPU cores (`--quick`: one minute).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from benchmarks.facts import machine_facts
from benchmarks.lengths import CUT, SIGMA, Pairs
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, gib, percent, picture
from benchmarks.steps import Trainee, device_name, matmul_peak, one_device, step_plan, steps_in_turns
from benchmarks.timing import total_speed_up
from jax_simpo.data.groups import Group, Response
from jax_simpo.data.tree import common_prefix_length, lay_out
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model
from jax_simpo.plan.flops import useful_flops, work_of

STEP_TOKENS = 16384  # of a step of trees, at least: enough groups to fill rows, as a real batch has
LAYOUTS = {"separate": "separate+packed", "one prefix": "shared+packed", "trees": "shared+packed"}


@dataclass(frozen=True)
class Shape:
    """Prompts with several answers, in medians of log-normal lengths.

    Attributes:
        prompt: tokens of the prompt.
        answer: tokens of an answer, or of a turn.
        answers: answers of a group.
        turns: turns of an answer, every other one of them scored; 1 for a plain answer. Of several turns, each answer
            leaves an earlier one in its second half.
    """

    prompt: int
    answer: int
    answers: int
    turns: int = 1


SHAPES = {
    "2 answers": Shape(256, 128, 2),
    "4 answers": Shape(256, 128, 4),
    "8 answers": Shape(256, 128, 8),
    "16 answers": Shape(256, 128, 16),
    "long prompt, 16 answers": Shape(1024, 64, 16),
    "8 trajectories": Shape(128, 48, 8, turns=13),
}


def make_group(shape: Shape, vocabulary: int, rng: np.random.Generator) -> Group:
    """Makes a group of random tokens."""

    def draw(median: int) -> np.ndarray:
        length = min(rng.lognormal(np.log(median), SIGMA), CUT * median)
        return rng.integers(1, vocabulary, max(1, round(length)), np.int32)

    prompt = draw(shape.prompt)
    trajectories: list[list[np.ndarray]] = []
    for number in range(shape.answers):
        kept: list[np.ndarray] = []
        if number and shape.turns > 1:
            trunk = trajectories[int(rng.integers(number))]
            kept = trunk[: int(rng.integers(shape.turns // 2, shape.turns))]
        trajectories.append(kept + [draw(shape.answer) for _ in range(shape.turns - len(kept))])
    responses = []
    for turns in trajectories:
        ends = len(prompt) + np.cumsum([len(turn) for turn in turns])
        spans = tuple((int(end) - len(turn), int(end)) for end, turn in list(zip(ends, turns, strict=True))[::2])
        responses.append(Response(np.concatenate([prompt, *turns]), spans))
    return Group(tuple(responses))


def only_one_prefix(group: Group, vocabulary: int) -> Group:
    """Changes tokens so that the answers have their one common prefix in common, and nothing after it."""
    first, *others = (response.ids for response in group.responses)
    shared = min(common_prefix_length(first, other) for other in others)
    changed = []
    for place, response in enumerate(group.responses):
        ids = response.ids.copy()
        if shared < len(ids):
            ids[shared] = 1 + place % (vocabulary - 1)  # different next tokens: nothing after them is common
        changed.append(Response(ids, response.spans))
    return Group(tuple(changed), group.ranks)


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    model: Annotated[str, Option("One of benchmarks/models.py.")] = "small",
    layers: Annotated[int | None, Option("Fewer layers than the model has.")] = None,
    dtype: Annotated[str, Option("Compute dtype.")] = "float32",
    remat: Annotated[str, Option("As the config key; `dots` is the fastest on a CPU.")] = "dots",
    attention: Annotated[str, Option("As the config key.")] = "auto",
    rounds: Annotated[int, Option("Steps of each layout.")] = 3,
    shapes: Annotated[list[str] | None, Option("Shapes (repeatable). Default: all.")] = None,
    name: Annotated[str, Option("Stem of the files.")] = "trees",
    quick: Annotated[bool, Option("A tiny model on two shapes, to see that it runs.")] = False,
) -> None:
    """Times optimizer steps on trees, on one shared prefix and on separate answers."""
    if quick:
        model, rounds, shapes = "tiny", 2, shapes or ["4 answers", "8 trajectories"]
    policy = Model(read_model_config(model_mapping(model, layers)), dtype, remat)  # type: ignore[arg-type]
    mesh = one_device()
    measured = {}
    with jax.set_mesh(mesh):
        peak = matmul_peak(dtype)
        for label in shapes or SHAPES:
            print(label, flush=True)
            measured[label] = measure(policy, SHAPES[label], attention, rounds, 2048 if quick else STEP_TOKENS)
    about = (
        f"The model is {model}{'' if layers is None else f' with {layers} layers'} ({policy.parameter_count / 1e6:.1f} "
        f"M parameters), with {dtype}, remat {remat} and attention {attention}. Matrix products reach "
        f"{peak / 1e12:.3g} TFLOP/s in this run. {(__doc__ or '').split(chr(10) * 2)[1]} Each layout makes {rounds} "
        "steps."
    )
    everything = {"matmul_flops_per_second": peak, "measured": measured}
    pictures = [draw(output, f"{name}.png", measured)] if can_draw() else []
    facts = machine_facts(device_name())
    Result(name, "Trees", about, facts, [table_of(measured)], everything, pictures).write(output)


def measure(model: Model, shape: Shape, attention: str, rounds: int, step_tokens: int) -> dict[str, Any]:
    """Times the layouts in turns on the same groups and weights, after the programs are compiled."""
    rng, vocabulary = np.random.default_rng(0), model.config.vocab_size
    groups: list[Group] = []
    while sum(lay_out([r.inputs for r in group.responses]).length for group in groups) < step_tokens or len(groups) < 2:
        groups.append(make_group(shape, vocabulary, rng))
    batch = len(groups)
    groups += [make_group(shape, vocabulary, rng) for _ in range(batch * (rounds - 1))]
    sources: dict[str, Callable[[Group], Group]] = {"one prefix": lambda group: only_one_prefix(group, vocabulary)}
    trainees = {}
    for layout, variant in LAYOUTS.items():
        own = Pairs([sources.get(layout, lambda group: group)(group) for group in groups])
        trainees[layout] = Trainee(model, step_plan(model, own, variant, batch=batch), own, one_device(), attention)
    weights = next(iter(trainees.values())).fresh_weights()
    compiled = {layout: trainee.compiled_bytes() for layout, trainee in trainees.items()}
    seconds = steps_in_turns(trainees, weights, rounds)
    return {
        layout: {
            "groups": batch * rounds,
            "input_tokens": sum(trainee.build(k).input_tokens for k in range(rounds)),
            "operations": useful_flops(model.config, work_of(trainee.pairs.lengths, trainee.plan.prefix_sharing)),
            "computed_tokens": sum(trainee.build(k).computed_tokens for k in range(rounds)),
            "row": vars(trainee.plan.shape),
            "seconds": seconds[layout],
            "bytes": compiled[layout],
        }
        for layout, trainee in trainees.items()
    }


def gains(layouts: Mapping[str, Any], slow: str) -> tuple[float, float, float, float]:
    """Returns how many times fewer tokens and operations trees have, their speed-up, and their share of the memory."""
    of_slow, of_trees = layouts[slow], layouts["trees"]
    return (
        of_slow["input_tokens"] / of_trees["input_tokens"],
        of_slow["operations"] / of_trees["operations"],
        total_speed_up(of_slow["seconds"], of_trees["seconds"]),
        of_trees["bytes"] / of_slow["bytes"],
    )


def table_of(measured: Mapping[str, Any]) -> Table:
    """Makes the table of what trees gain."""
    rows = []
    for label, layouts in measured.items():
        for slow in ("separate", "one prefix"):
            tokens, operations, speed, memory = gains(layouts, slow)
            trees = layouts["trees"]
            filled = percent(trees["input_tokens"] / trees["computed_tokens"])
            shares = percent(speed / operations), percent(speed / tokens)
            rows.append((label, slow, tokens, operations, speed, *shares, memory, gib(trees["bytes"]), filled))
    note = (
        "Tokens, operations: by how many times fewer input tokens trees have, and by how many times fewer useful "
        "operations they need (no padding, no recomputation), which is what they gain if each takes the same time. "
        "Speed: total time over total time, and the share of the two that it reaches. Memory: that of the compiled "
        "program of a micro-batch (parameters, gradients, temporaries), of trees as a share of the other layout's, "
        "and in full. "
        "Filled: the share of the trees' rows that is not padding."
    )
    columns = (
        *("groups", "trees beside", "tokens", "operations", "speed", "of operations", "of tokens", "memory"),
        *("memory of trees", "filled"),
    )
    return Table("What trees gain", columns, rows, note)


def draw(output: Path, file: str, measured: Mapping[str, Any]) -> str:
    """Draws the speed-ups, and returns the name of the file."""
    with picture(output, file) as axes:
        for x, layouts in enumerate(measured.values()):
            for offset, slow, color in ((-0.2, "separate", "tab:blue"), (0.2, "one prefix", "tab:orange")):
                _, operations, speed, _ = gains(layouts, slow)
                axes.bar(x + offset, speed, width=0.38, color=color, label=None if x else f"over {slow}")
                label = "operations saved" if not x and slow == "separate" else None
                axes.plot([x + offset - 0.19, x + offset + 0.19], [operations] * 2, "k-", label=label)
        axes.set_xticks(range(len(measured)), list(measured), rotation=30, ha="right")
        axes.set_ylabel("speed-up of trees")
        axes.axhline(1.0, color="grey", linewidth=0.5)
        axes.legend(framealpha=1)
    return file


if __name__ == "__main__":
    run(main)
