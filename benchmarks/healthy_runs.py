"""How often does a run that was spoilt on purpose get a warning in its first half, and how often does a good one?

Trains tiny models, through the trainer that users run, on made-up pairs: an order in a café, and a polite and a curt
reply to it; in one pair in ten the two are the wrong way round. Thirty runs are good: SimPO, DPO, ORPO, SimPO with a
cross-entropy term on a new model, and SimPO on a model that has been fine-tuned on the chosen replies. Thirty are
spoilt: learning rate, gamma, a double BOS, swapped labels, and answers that lost their EOS. Each seed draws its own
pairs, their order and new weights.

The thresholds of `jax_simpo/run/health` were chosen on trial runs and those of `--which tuning`; the figures to believe
are those of `--which test`, whose seeds are others.

Expected: all thirty spoilt runs get a warning in the first half of their steps, and none of the good ones gets any.

Takes half an hour on two busy CPU cores (`--quick`: five minutes).
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from benchmarks.options import Option, run
from jax_simpo.config import TrainConfig
from jax_simpo.data import synthetic
from jax_simpo.data.selection import Selection
from jax_simpo.data.sources import from_memory
from jax_simpo.data.token_signs import TokenSigns
from jax_simpo.run.health import Finding, HealthWatch, RunTraits
from jax_simpo.run.health.published import Trainee
from jax_simpo.run.metrics import ANSWERS
from jax_simpo.training import trainer
from jax_simpo.training.health import traits_of
from jax_simpo.training.setup import Setup

SEEDS = {"tuning": range(100, 106), "test": range(200, 206)}
GOOD = "good"

_TRAINED, _EVALUATED = 1536, 256  # pairs
_MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_SETTINGS: dict[str, Any] = {
    "tokenizer_name_or_path": "builtin:cafe",
    "dtype": "float32",
    "remat": "none",
    "max_length": 128,
    "max_prompt_length": 64,
    "row_length": 1024,
    "global_batch_size": 32,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "dataset_splits": ["train", "eval_pairs"],
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_strategy": "no",
    "sample_prompts": 4,
    "sample_tokens": 32,
    "generate_during_eval": True,
}
_SIMPO: dict[str, Any] = {"objective": "simpo", "learning_rate": 5e-4}
_DPO: dict[str, Any] = {"objective": "dpo", "learning_rate": 3e-4}
_NEW: dict[str, Any] = {"objective": "simpo", "sft_weight": 1.0, "learning_rate": 5e-3, "model_config": _MODEL}
_START: dict[str, Any] = {
    "objective": {"simpo": 1e-4, "sft": 1.0},
    "learning_rate": 5e-3,
    "model_config": _MODEL,
    "num_train_epochs": 2,
    "global_batch_size": 64,
    "do_eval": False,
    "eval_strategy": "no",
    "generate_during_eval": False,
    "sample_prompts": 0,
}

_READ = ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


# --- the cases


@dataclass(frozen=True)
class Case:
    """A run to make.

    Attributes:
        kind: "good", or what was done to it.
        name: names the run among those of its seed.
        settings: of the config; the start model comes besides.
        start: "fluent" has learned to write polite and curt replies, "polite" mostly polite ones; None for a new model.
        swapped: chosen and rejected are swapped in the training pairs, and in the evaluation pairs.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    start: str | None = "fluent"
    swapped: tuple[bool, bool] = (False, False)


def cases(seed: int) -> list[Case]:
    """Lists the five good runs of a seed and the five spoilt ones."""
    # `chat_rendering: auto` takes the second BOS away.
    twice = "{{ bos_token }}" + str(synthetic.make_tokenizer("cafe").chat_template)
    # Swapped in both splits, which only a start model that knows good replies gives away; or swapped in training alone.
    if seed % 2:
        swapped = Case("swapped labels", "swapped-in-both", _SIMPO, "polite", (True, True))
    else:
        swapped = Case("swapped labels", "swapped-in-training", _DPO, swapped=(True, False))
    rate = {"learning_rate": 3e-2} if seed % 3 else {"learning_rate": 1e-7}
    return [
        Case(GOOD, "simpo", _SIMPO),
        Case(GOOD, "dpo", _DPO),
        Case(GOOD, "orpo", {"objective": "orpo", "learning_rate": 1e-3}),
        Case(GOOD, "new-model", _NEW, None),
        Case(GOOD, "simpo-polite", {**_SIMPO, "learning_rate": 2e-4}, "polite"),
        Case("learning rate", f"learning-rate-{rate['learning_rate']:g}", {**(_DPO if seed % 2 else _SIMPO), **rate}),
        Case("gamma", "gamma", {**_SIMPO, "gamma_beta_ratio": 20.0}),
        Case("double BOS", "double-bos", {**_SIMPO, "chat_template": twice, "chat_rendering": "original"}),
        swapped,
        Case("missing EOS", "missing-eos", {**_DPO, "max_length": 30, "max_prompt_length": 20}),
    ]


# --- the pairs

_ORDERS = ("Could I have a {size} {drink} with {extra}? The name is {name}.", "Hi, {name} here. One {drink}, please.")
_POLITE, _CURT = ("Thank you, {name}.", "Of course, {name}!"), ("Hello, {name}.", "Hi, {name}!")
_BODIES = (" Here is your {size} {drink} with {extra}.", " One {size} {drink} with {extra}, coming up.")


def _order(chance: random.Random) -> dict[str, str]:
    words = {
        "size": synthetic.SIZES,
        "drink": synthetic.DRINKS,
        "extra": synthetic.EXTRAS,
        "name": synthetic.NAMES,
    }
    return {name: chance.choice(choices) for name, choices in words.items()}


def _pair(chance: random.Random, *, swapped: bool, noise: float) -> dict[str, Any]:
    order = _order(chance)
    prompt = {"role": "user", "content": chance.choice(_ORDERS).format(**order)}

    def reply(openings: Sequence[str]) -> list[dict[str, str]]:
        words = order if chance.random() < 0.7 else {**_order(chance), "name": order["name"]}
        text = (chance.choice(openings) + chance.choice(_BODIES)).format(**words)
        return [prompt, {"role": "assistant", "content": text}]

    polite, curt = reply(_POLITE), reply(_CURT)
    wrong = (chance.random() < noise) != swapped
    return {"chosen": curt if wrong else polite, "rejected": polite if wrong else curt}


def _pairs(count: int, seed: str, *, swapped: bool = False, noise: float = 0.1) -> list[dict[str, Any]]:
    """Makes pairs; `noise` is the share of them in which the polite reply is the rejected one."""
    return [_pair(chance, swapped=swapped, noise=noise) for chance in [random.Random(seed)] for _ in range(count)]


# --- the runs


@dataclass(frozen=True)
class Recorded:
    """Holds all that the rules read of a run, so that recorded runs can be judged anew.

    Attributes:
        kind: "good", or what was done to the run.
        name: its name.
        seed: its seed.
        traits: what was known of it before its first step.
        records: its records, with the keys that the rules read.
    """

    kind: str
    name: str
    seed: int
    traits: RunTraits
    records: list[dict[str, Any]]

    def findings(self) -> list[Finding]:
        """Judges the run anew."""
        watch = HealthWatch(self.traits)
        for record in self.records:
            watch.observe(record)
        return watch.findings

    def early(self) -> list[Finding]:
        """Returns the findings of its first half."""
        return [finding for finding in self.findings() if finding.step <= self.traits.total_steps / 2]


def train_case(case: Case, seed: int, work: Path) -> Recorded:
    """Trains the run of a case; `work` keeps the start models."""
    training = _pairs(_TRAINED, f"train {seed}", swapped=case.swapped[0])
    evaluated = _pairs(_EVALUATED, f"test {seed}", swapped=case.swapped[1])
    start = {} if case.start is None else {"model_name_or_path": str(_start_model(case.start, seed, work))}
    config = _config(work / "run", {**case.settings, **start, "seed": seed})
    splits = [from_memory(name, rows, None, Selection()) for name, rows in (("pairs", training), ("test", evaluated))]
    ended = trainer.train(config, Console(quiet=True), pairs=splits[0], eval_pairs=splits[1])
    setup = Setup(config, memory_pairs=splits[0])
    traits = traits_of(setup, setup.train_pairs(), ended.steps)
    return Recorded(case.kind, case.name, seed, traits, [_reduced(record) for record in ended.metrics])


@contextmanager
def _shared_programs() -> Iterator[None]:
    """Lets runs of the same shapes and settings share what they trace and compile, which is most of their time."""
    names = ("run_optimizer", "make_train_functions", "make_score_function")
    own = {name: getattr(trainer, name) for name in names}
    optimizers: dict[tuple[float, int], Any] = {}

    def run_optimizer(config: TrainConfig, total_steps: int) -> Any:
        """Finds the optimizer of the same settings: the runs differ in rate and length alone."""
        key = config.learning_rate, total_steps
        return optimizers.setdefault(key, own["run_optimizer"](config, total_steps))

    shared = {"run_optimizer": run_optimizer, **{name: lru_cache(own[name]) for name in names[1:]}}
    for name, function in shared.items():
        setattr(trainer, name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(trainer, name, function)


def _config(output: Path, settings: Mapping[str, Any]) -> TrainConfig:
    shutil.rmtree(output, ignore_errors=True)
    return TrainConfig(
        **{**_SETTINGS, "data_cache_dir": str(output.parent / "tokens"), **settings}, output_dir=str(output)
    )


def _start_model(manner: str, seed: int, work: Path) -> Path:
    """Trains a start model on replies alone, once for all seeds of a set, and returns its folder."""
    output = work / f"start-{manner}"
    if not (output / "model").exists():
        # Of the "fluent" one, as many replies are curt as polite.
        rows = _pairs(2048, f"start {manner} {seed}", noise=0.5 if manner == "fluent" else 0.1)
        config = _config(output, {**_START, "seed": seed})
        trainer.train(config, Console(quiet=True), pairs=from_memory("pairs", rows, None, Selection()))
    return output / "model"


def _reduced(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps what the rules and the pictures read, with five digits."""
    evaluated = "eval_step" in record
    keys = [f"eval_{key}" for key in _READ if key != "grad_norm"] if evaluated else list(_READ)
    keys += ["eval_step", "eval_pairs", f"{ANSWERS}length", f"{ANSWERS}ended"] if evaluated else ["step", "pairs"]
    return {key: float(f"{value:.5g}") if isinstance(value := record[key], float) else value for key in keys}


# --- the files of recorded runs


def write_recorded(path: Path, runs: Sequence[Recorded], how: str) -> None:
    """Writes runs as gzipped JSON; `how` says how the file was made. The same runs give the same bytes."""
    content = json.dumps({"how": how, "runs": [asdict(one) for one in runs]}, separators=(",", ":"))
    path.write_bytes(gzip.compress(content.encode(), mtime=0))


def read_recorded(path: Path) -> list[Recorded]:
    """Reads what `write_recorded` has written."""
    return [_recorded(one) for one in json.loads(gzip.decompress(path.read_bytes()))["runs"]]


def _recorded(values: Mapping[str, Any]) -> Recorded:
    traits = values["traits"]
    own = {"trainee": Trainee(**traits["trainee"]), "signs": TokenSigns(**traits["signs"])}
    return Recorded(**{**values, "traits": RunTraits(**{**traits, **own})})


# --- the figures

_AT_START = {"learning-rate", "gamma", "double-bos", "missing-eos"}


def table(runs: Sequence[Recorded]) -> list[str]:
    """Returns the lines of a table: of each kind the runs, and those with a finding in their first half.

    "by records" leaves out what is found before training, in the settings and the tokens.
    """
    lines = ["| runs | how many | flagged in the first half | by records | findings (runs) |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(one.kind for one in runs):
        found = [{finding.name for finding in one.early()} for one in runs if one.kind == kind]
        names = sorted(set().union(*found))
        which = ", ".join(f"`{name}` ({sum(name in of_run for of_run in found)})" for name in names) or "none"
        by_records = sum(bool(of_run - _AT_START) for of_run in found)
        lines.append(f"| {kind} | {len(found)} | {sum(map(bool, found))} | {by_records} | {which} |")
    return lines


@dataclass(frozen=True)
class _Panel:
    """Good runs beside spoilt ones, by the figure that shows the difference: of evaluations, or of training."""

    title: str
    good: str
    spoilt: str
    key: str
    evaluated: bool
    label: str


_PANELS = (
    _Panel(
        "learning rate far too high", "simpo", "learning-rate-0.03", "logps/chosen", False, "log-prob, chosen token"
    ),
    _Panel("gamma_beta_ratio: 20", "simpo", "gamma", "grad_norm", False, "gradient norm"),
    _Panel("labels swapped in both splits", "simpo-polite", "swapped-in-both", "rewards/accuracies", True, "accuracy"),
    _Panel("labels swapped in training", "dpo", "swapped-in-training", "rewards/accuracies", True, "accuracy"),
    _Panel("answers lost their EOS", "dpo", "missing-eos", "answers/length", True, "tokens of an answer"),
    _Panel("a double BOS", "simpo", "double-bos", "rewards/accuracies", True, "accuracy"),
)


def _curve(one: Recorded, panel: _Panel) -> tuple[list[int], list[float]]:
    """Returns the steps and the values of a curve, without accuracies of rewards that are all 0."""
    prefix, step = ("eval_", "eval_step") if panel.evaluated else ("", "step")
    scale = one.traits.tokens_per_logp if panel.key.startswith("logps") else 1.0
    first = 1 if one.traits.starts_as_reference and panel.key == "rewards/accuracies" else 0
    shown = [record for record in one.records if record.get(step, -1) >= first]
    return [record[step] for record in shown], [record[prefix + panel.key] / scale for record in shown]


def draw(runs: Sequence[Recorded], path: Path) -> None:
    """Draws good runs and spoilt ones, and the step at which each spoilt one was told of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), dpi=80, layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for name, color, word in ((panel.good, "#2f6fde", "good"), (panel.spoilt, "#d9480f", "spoilt")):
            for one in (one for one in runs if one.name == name):
                (line,) = axes.plot(*_curve(one, panel), color=color, alpha=0.6, linewidth=1.3)
                if one.kind != GOOD and (early := one.early()):
                    axes.axvline(early[0].step, color=color, linestyle=":", linewidth=1.5)
            line.set_label(word)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_ylabel(panel.label)
        axes.set_xlabel("step")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def main(
    which: Annotated[str, Option("Seeds: tuning or test.")] = "test",
    output: Annotated[Path, Option("Folder for the recorded runs.")] = Path("docs/benchmarks"),
    picture: Annotated[Path, Option("The picture of the test runs.")] = Path("docs/healthy-runs.png"),
    work: Annotated[Path, Option("Folder for start models and runs, which may be removed afterwards.")] = Path(
        "outputs/healthy-runs"
    ),
    recorded: Annotated[bool, Option("Judge the recorded runs anew, and train none.")] = False,
    quick: Annotated[bool, Option("The runs of one seed, not written down.")] = False,
) -> None:
    """Makes the runs, judges them, and prints how many were flagged."""
    path = output / f"healthy_runs-{which}.json.gz"
    runs = read_recorded(path) if recorded else []
    with _shared_programs():
        for seed in () if recorded else SEEDS[which][:1] if quick else SEEDS[which]:
            for case in cases(seed):
                runs.append(one := train_case(case, seed, work / which))
                print(f"{seed} {one.name}: {', '.join(f'{f.name} at {f.step}' for f in one.findings()) or 'nothing'}")
                sys.stdout.flush()
    print("\n".join(table(runs)))
    if quick:
        return
    if not recorded:
        how = f"python -m benchmarks.healthy_runs --which={which}: records of real runs, the keys that the rules read"
        write_recorded(path, runs, how)
    if which == "test":
        draw(runs, picture)


if __name__ == "__main__":
    run(main)
