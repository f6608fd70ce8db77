"""The report of a run, for people: `report.html`, `curves.png` and the summary at the end of training.

Everything is read from the files of the output directory, so a report can be made again at any time: from
`metrics.jsonl`, which must be there, and from `config.yaml`, `samples.jsonl`, `findings.jsonl` and `run.json` where
they are.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jax_simpo.config import objective_weights, yaml_files
from jax_simpo.config.objectives import WITH_REFERENCE
from jax_simpo.data.selection import HELD_OUT
from jax_simpo.errors import CheckpointError
from jax_simpo.run import charts, files
from jax_simpo.run.bad_steps import read_bad_steps
from jax_simpo.run.facts import read_facts
from jax_simpo.run.health import OVERFITTING, Finding, read_findings
from jax_simpo.run.manifest import check_unchanged, write_file
from jax_simpo.run.metrics import ANSWERS, read_metrics, share_interval
from jax_simpo.run.objective_texts import ObjectiveText, texts_of
from jax_simpo.run.samples import Sample, read_samples
from jax_simpo.terminal import visible

MEASURES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
NO_ACCURACY = "-"  # stands for an accuracy that says nothing yet
_SHORT = 240  # characters of a text on the console
_SUMMARY_SAMPLES = 2


# --- the files of a run


@dataclass(frozen=True)
class Run:
    """The contents of an output directory.

    `findings` is what the program found wrong with the run; `left_out` counts the steps whose update was not applied.
    """

    output: Path
    config: Mapping[str, Any]
    config_text: str
    train: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    samples: Sequence[Sample]
    findings: Sequence[Finding]
    facts: Mapping[str, Any]
    left_out: int

    @property
    def name(self) -> str:
        return str(self.config.get("run_name") or self.output.resolve().name)

    @property
    def eval_splits(self) -> list[str]:
        """Names of the evaluated splits, as far as the config tells them."""
        if self.config.get("test_size") is not None:
            return [HELD_OUT]
        return [split for split in self.config.get("dataset_splits") or [] if "train" not in split]

    @property
    def eval_name(self) -> str:
        """The label of figures over all evaluated pairs: "evaluation" and the names of their splits."""
        return f"evaluation ({', '.join(self.eval_splits)})" if self.eval_splits else "evaluation"

    @property
    def last_by_split(self) -> dict[str, dict[str, float]]:
        """Figures of each split in the last evaluation, without the prefix of their keys; empty for a single split."""
        last = self.evals[-1] if self.evals else {}
        prefixes = {split: f"eval_{split}_" for split in self.eval_splits}
        figures = {
            split: {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
            for split, prefix in prefixes.items()
        }
        return {split: values for split, values in figures.items() if "loss" in values}

    @property
    def answer_figures(self) -> dict[int, dict[str, float]]:
        """Figures of the answers at evaluations by step, without the prefix of their keys; empty without any."""
        return {
            record["eval_step"]: figures
            for record in self.evals
            if (figures := {k.removeprefix(ANSWERS): v for k, v in record.items() if k.startswith(ANSWERS)})
        }

    @property
    def objective_texts(self) -> list[ObjectiveText]:
        """The words for the run's objectives."""
        return texts_of(self.config.get("objective", "simpo"))

    @property
    def objective_title(self) -> str:
        """The names of the run's objectives, as their papers write them."""
        return " + ".join(text.title.partition(" (")[0] for text in self.objective_texts)

    @property
    def starts_as_reference(self) -> bool:
        """True if the run starts from the reference of its objective, so that all rewards are 0 before it."""
        objective = self.config.get("objective", "simpo")
        named = objective_weights(objective) if isinstance(objective, str | dict) else {}
        return not self.config.get("ref_model_name_or_path") and not WITH_REFERENCE.keys().isdisjoint(named)

    def accuracy(self, record: Mapping[str, Any]) -> str:
        """Writes the accuracy of a record, or a dash where all rewards are 0 because nothing has been trained yet."""
        if self.starts_as_reference and (record.get("eval_step") == 0 or record.get("step") == 1):
            return NO_ACCURACY
        prefix = "eval_" if "eval_step" in record else ""
        return f"{record[f'{prefix}rewards/accuracies']:.1%}"

    @property
    def noun(self) -> str:
        """Names what was trained on: "pairs", or "groups" of more answers."""
        return str(self.facts.get("noun", "pairs"))

    @property
    def accuracy_text(self) -> str:
        """Says what the accuracy is, after "accuracy is"."""
        compared, better = ("pairs", "chosen") if self.noun == "pairs" else ("comparisons", "better")
        return f"the share of {compared} whose {better} response has the higher one"

    @property
    def pairs_seen(self) -> int:
        """Pairs, or groups, trained on."""
        return int(self.train[-1]["total_pairs"])

    @property
    def tokens_computed(self) -> int:
        """Input tokens computed, padding apart."""
        return int(self.train[-1]["total_tokens"])

    @property
    def training_seconds(self) -> float:
        """Time in training steps, compilation included, evaluation and saving not."""
        return float(self.train[-1]["total_seconds"])

    @property
    def exported_eval(self) -> Mapping[str, Any]:
        """The evaluation of the exported model: the last one, unless an earlier step was the best."""
        step = self.facts.get("model_step")
        return next((record for record in self.evals if record["eval_step"] == step), self.evals[-1])

    @property
    def choice(self) -> str:
        """Says which step's model was exported, if it is not the last one's; otherwise an empty text."""
        step, steps = self.facts.get("model_step"), self.facts.get("exported_step")
        if step is None or step == steps:
            return ""
        metric = self.config.get("metric_for_best_model")
        return f" The exported model is that of step {step:,} of {steps:,}, the best by {metric}."

    @property
    def latest_findings(self) -> list[Finding]:
        """The findings by step; of those that were repeated only the last."""
        last = {finding.name: finding for finding in self.findings}
        return sorted(last.values(), key=lambda finding: finding.step)

    @property
    def better_step(self) -> str:
        """Names the best evaluation of a run that was seen to get worse after it; otherwise an empty text."""
        evals = [record for record in self.evals if record["eval_step"]]
        if self.choice or not evals or all(finding.name != OVERFITTING for finding in self.findings):
            return ""
        best = min(evals, key=lambda record: record["eval_loss"])
        if best is evals[-1]:
            return ""
        return (
            f" The best evaluation was that of step {best['eval_step']:,}: its loss was {best['eval_loss']:.4f}, and "
            f"{best['eval_rewards/accuracies']:.1%} were right; `load_best_model_at_end: true` would export it."
        )

    def outcome(self) -> str:
        """Sums up how often the model prefers the chosen answer, how sure that is, and which model it is."""
        return self._outcome() + self.interval + self.choice + self.better_step

    @property
    def interval(self) -> str:
        """Says how far the evaluation's accuracy may be off by chance; an empty text where that cannot be said.

        Pairs are drawn one by one, so it is the interval of a share. The comparisons of a group depend on one another.
        """
        if not self.evals or self.noun != "pairs" or self.accuracy(last := self.exported_eval) == NO_ACCURACY:
            return ""
        low, high = share_interval(last["eval_rewards/accuracies"], last["eval_pairs"])
        return f" The 95% confidence interval is {low:.1%} to {high:.1%}."

    def _outcome(self) -> str:
        key = "rewards/accuracies"
        answer, of = ("chosen", "") if self.noun == "pairs" else ("better", "comparisons of the ")
        if not self.evals:
            start, end = (self.accuracy(self.train[i]) for i in (0, -1))
            at_first = "" if start == NO_ACCURACY else f"; in the first it was {start}"
            return (
                f"In the last training step the model preferred the {answer} answer in {end} of the {of}{self.noun}"
                f"{at_first}. The run was not evaluated."
            )
        first, last = self.evals[0], self.exported_eval
        before, after = first[f"eval_{key}"], last[f"eval_{key}"]
        evaluated = f"{of}{last['eval_pairs']:,} evaluation {self.noun}"
        sentence = f"The model prefers the {answer} answer in {after:.1%} of the {evaluated}"
        if len(self.evals) == 1:
            return f"{sentence} (at step {last['eval_step']})."
        if first["eval_step"] == 0 and self.starts_as_reference:
            return f"{sentence}. Before training every reward is 0, because the model is the reference."
        when = "before training" if first["eval_step"] == 0 else f"at step {first['eval_step']}"
        if f"{before:.1%}" == f"{after:.1%}":
            return f"{sentence}, the same as {when}."
        return f"{sentence}, {'up' if after > before else 'down'} from {before:.1%} {when}."

    @property
    def remarks(self) -> list[str]:
        """Sentences on the data: what was cut of it, and how it was rendered."""
        return list(self.facts.get("remarks", []))

    def figures(self) -> list[tuple[str, str, str]]:
        """Returns the key figures: name, value and a remark each."""
        last, facts = self.train[-1], self.facts
        of_steps = f"of {facts['total_steps']:,}" if facts.get("total_steps", last["step"]) != last["step"] else ""
        of_pairs = f"{facts['training_pairs']:,} {self.noun}, " if "training_pairs" in facts else ""
        fills = [record["packing_fill"] for record in self.train]
        speed = statistics.median(record["pairs_per_second"] for record in self.train)
        token_speed = statistics.median(record["tokens_per_second"] for record in self.train)
        figures = [
            (f"{self.noun} trained on", f"{self.pairs_seen:,}", of_pairs + epochs(last["epoch"])),
            ("steps", f"{last['step']:,}", of_steps),
            *([("steps left out", f"{self.left_out:,}", f"see {files.BAD_STEPS}")] if self.left_out else []),
            ("tokens computed", _large(self.tokens_computed), "padding not counted"),
        ]
        if facts.get("tokens_saved"):
            figures.append(("saved by sharing", f"{facts['tokens_saved']:.1%}", "of all tokens"))
        figures += [
            ("packing fill", f"{statistics.fmean(fills):.1%}", "the rest is padding"),
            (f"{self.noun} per second", f"{speed:.3g}", f"median; {_large(token_speed)} tokens/s"),
            ("training time", duration(self.training_seconds), "compilation included"),
        ]
        if self.evals:
            seconds = sum(record["eval_runtime"] for record in self.evals)
            figures.append(("evaluation time", duration(seconds), f"{len(self.evals)} evaluations"))
        return figures

    @property
    def target_margin(self) -> float | None:
        """Gamma, for objectives that have a target margin."""
        beta, ratio = (self.config.get(key) for key in ("beta", "gamma_beta_ratio"))
        return beta * ratio if isinstance(beta, int | float) and isinstance(ratio, int | float) else None

    def chart_data(self) -> dict[str, Any]:
        """Returns what the charts of a page read of the run."""
        first = {"starts_as_reference": self.starts_as_reference}
        return {
            "name": visible(self.name),
            "target_margin": self.target_margin,
            "train": charts.train_columns(self.train, **first),
            "eval": charts.eval_columns(self.evals, **first),
        }

    def draw(self, theme: Literal["light", "dark"] = "light") -> bytes:
        """Draws the curves, as the bytes of a PNG."""
        from jax_simpo.run import curves  # matplotlib takes a sixth of the start of a run, which needs no picture yet

        return curves.draw_curves(
            self.train,
            self.evals,
            eval_name=visible(self.eval_name),
            target_margin=self.target_margin,
            starts_as_reference=self.starts_as_reference,
            theme=theme,
        )


def read_run(output: Path) -> Run:
    """Reads the files of an output directory.

    Raises:
        CheckpointError: no training step was logged in it, or a file has changed since the run wrote it.
    """
    check_unchanged(output, (files.CONFIG, files.FACTS, files.SAMPLES))
    records = read_metrics(output)
    train = [record for record in records if "step" in record]
    if not train:
        raise CheckpointError(
            f"{output / files.METRICS} holds no training step: nothing to report. Give the `output_dir` of a run"
        )
    config = output / files.CONFIG
    return Run(
        output=output,
        config=yaml_files.read_file(config)[0] if config.exists() else {},
        config_text=config.read_text(encoding="utf-8") if config.exists() else "",
        train=train,
        evals=[record for record in records if "eval_step" in record],
        samples=read_samples(output),
        findings=read_findings(output),
        facts=read_facts(output),
        left_out=sum(record["left_out"] for record in read_bad_steps(output)),
    )


# --- the page


def write_report(output: Path) -> Path:
    """Writes `curves.png` and `report.html` of a run, finished or not, and returns the path of the page.

    Raises:
        CheckpointError: no training step was logged there, or a file of that name is there that no run wrote.
    """
    run = read_run(output)
    light = run.draw("light")
    write_file(output, files.CURVES, light)
    facts = {key: run.facts[key] for key in ("device", "mesh", "parameters") if key in run.facts}
    if "mesh" in facts:
        facts["mesh"] = ", ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    if "parameters" in facts:
        facts["parameters"] = f"{facts['parameters']:,}"
    page = charts.render(
        "report.html.jinja",
        {"runs": [run.chart_data()]},
        run=run,
        light=base64.b64encode(light).decode(),
        dark=base64.b64encode(run.draw("dark")).decode(),
        measures=MEASURES,
        facts={**facts, **run.facts.get("versions", {})},
    )
    return write_file(output, files.REPORT, page)


# --- the console


def print_summary(console: Console, output: Path) -> None:
    """Prints the outcome, the first and last figures, some samples and the places of the files."""
    run = read_run(output)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = [("training", run.train, "", "step"), (run.eval_name, run.evals, "eval_", "eval_step")]
    columns = [column for column in columns if column[1]]
    cells = []
    for name, records, prefix, step in columns:
        shown = records if len(records) == 1 else (records[0], records[-1])
        for record in shown:
            head = visible(name) if record is shown[0] else ""
            last = record is shown[-1]
            table.add_column(Text(f"{head}\nstep {record[step]}"), justify="right", style="bold" if last else "")
        cells += [(record, prefix) for record in shown]
    for key, label in MEASURES.items():
        if key == "rewards/accuracies":
            table.add_row(label, *(run.accuracy(record) for record, _ in cells))
        else:
            table.add_row(label, *(f"{record[prefix + key]:.4f}" for record, prefix in cells))
    parts: list[Any] = [Text(run.outcome(), style="bold"), table]
    if run.last_by_split:
        parts.append(_splits_on_console(run))
    for finding in run.latest_findings:
        parts += [Text(f"step {finding.step}: {visible(finding.sentence)}", style="yellow"), Text()]
    for sample in run.samples[:_SUMMARY_SAMPLES]:
        parts += [_sample_on_console(sample), Text()]
    parts += [
        Text.assemble((f"{name:>13}  ", "dim"), visible(str(output / name)))
        for name in (files.REPORT, files.CURVES, files.METRICS, files.MODEL)
        if (output / name).exists()
    ]
    panel = Panel(Group(*parts), title=Text(visible(run.name)), title_align="left", box=box.ROUNDED, padding=(1, 2))
    console.print(panel, soft_wrap=False)  # the console leaves lines as they are; inside the frame they must wrap


def _splits_on_console(run: Run) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"step {run.evals[-1]['eval_step']}")
    for label in MEASURES.values():
        table.add_column(label, justify="right")
    for split, figures in run.last_by_split.items():
        table.add_row(Text(visible(split)), *(_value(key, figures[key]) for key in MEASURES))
    return table


def _sample_on_console(sample: Sample) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"prompt": "cyan", "before": "", "after": "bold", "chosen": "green", "rejected": "red"}
    for name, style in styles.items():
        table.add_row(name, Text(_shorten(getattr(sample, name)), style=style))
    return table


def _shorten(text: str | None) -> str:
    if text is None:
        return "(not answered yet)"
    line = visible(" ".join(text.split())) or "(empty)"
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"


def _value(key: str, value: float) -> str:
    return f"{value:.1%}" if key == "rewards/accuracies" else f"{value:.4f}"


def epochs(count: float) -> str:
    """Writes a number of epochs: 0.5 epochs, 1 epoch."""
    shown = f"{count:.3g}"
    return f"{shown} epoch{'' if shown == '1' else 's'}"


def duration(seconds: float) -> str:
    """Writes seconds as people say them: 8.4 s, 2 min 41 s, 3 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _large(number: float) -> str:
    """Writes a count in three digits: 812, 48.3 k, 1.20 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
