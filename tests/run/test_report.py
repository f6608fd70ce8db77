"""The report says what the files of a run say, and lets nothing of the data become markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from jax_simpo.errors import CheckpointError
from jax_simpo.pages import page_url
from jax_simpo.run import curves, report
from jax_simpo.run.facts import write_facts
from jax_simpo.run.health import Finding, write_findings
from jax_simpo.run.samples import Sample, read_samples, write_samples
from jax_simpo.terminal import visible

CONFIG = """\
model_name_or_path: someone/some-model
dataset_splits: [train, test]
beta: 2.0
gamma_beta_ratio: 0.25
run_name: café & <b>co</b>
"""
STEERING = "\x1b[31m\x07\r\x7f\x9b\u202e\u2066"
SAMPLE = Sample(
    prompt="<script>alert(1)</script>\nA tea, please.",
    chosen="[bold]One tea[/bold] & milk.",
    rejected="One </p> coffee.",
    before="x x x",
    after="One tea.",
)


def training_record(step: int, **changes: Any) -> dict[str, Any]:
    done = 1 - math.exp(-step / 20)
    return {
        "step": step,
        "loss": 1.0 - 0.8 * done + 0.05 * math.sin(7 * step),
        "rewards/chosen": -2.0,
        "rewards/rejected": -2.0 - 3 * done,
        "rewards/accuracies": 0.5 + 0.47 * done + 0.02 * math.sin(9 * step),
        "rewards/margins": 3 * done + 0.1 * math.sin(5 * step),
        "logps/chosen": -1.0,
        "logps/rejected": -1.0 - done,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "epoch": step / 32,
        "pairs": 128,
        "tokens": 10_000,
        "tokens_per_second": 5_000.0,
        "pairs_per_second": 64.0,
        "packing_fill": 0.9,
        "total_pairs": 128 * step,
        "total_tokens": 10_000 * step,
        "total_seconds": 2.0 * step,
        **changes,
    }


def evaluation_record(step: int, accuracy: float) -> dict[str, Any]:
    record = {f"eval_{key}": value for key, value in training_record(step).items() if "/" in key or key == "loss"}
    record |= {"eval_step": step, "eval_epoch": step / 32, "eval_pairs": 1200, "eval_runtime": 1.5}
    return record | {"eval_rewards/accuracies": accuracy}


def make_run(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    steps = [training_record(step) for step in range(1, 65)]
    folder = make_run(tmp_path, evaluation_record(0, 0.507), *steps, evaluation_record(64, 0.973))
    write_samples(folder, [SAMPLE])
    return folder


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures, which takes a second each, but in the tests that ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(curves, "draw_curves", lambda *_, **__: b"\x89PNG")


@pytest.fixture
def pictures() -> None:
    """Lets a test draw pictures."""


class Page(HTMLParser):
    """Elements, texts and addresses of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    @property
    def data(self) -> Any:
        """What the script of the charts reads."""
        return json.loads(self.text[self.text.index('{"runs"') :].partition("\n")[0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def two_splits(folder: Path) -> Path:
    """A run that evaluated the splits `helpful` and `harmless`."""
    record = evaluation_record(64, 0.9)
    for split, accuracy in (("helpful", 0.95), ("harmless", 0.8)):
        own = {key.replace("eval_", f"eval_{split}_"): value for key, value in record.items() if "step" not in key}
        record |= {**own, f"eval_{split}_rewards/accuracies": accuracy, f"eval_{split}_pairs": 600}
    make_run(folder, *[training_record(step) for step in range(1, 65)], record)
    (folder / "config.yaml").write_text(CONFIG.replace("[train, test]", "[train, helpful, harmless]"))
    return folder


def test_figures_over_all_pairs_name_all_splits_and_each_split_has_its_own(tmp_path: Path) -> None:
    run = report.read_run(two_splits(tmp_path))
    assert run.eval_name == "evaluation (helpful, harmless)"
    assert {split: figures["rewards/accuracies"] for split, figures in run.last_by_split.items()} == {
        "helpful": 0.95,
        "harmless": 0.8,
    }
    text = " ".join(Page(report.write_report(tmp_path)).text.split())
    assert "Evaluation by split, step 64" in text
    assert "helpful 600" in text and "95.0%" in text and "80.0%" in text
    out = io.StringIO()
    report.print_summary(Console(file=out, width=110), tmp_path)
    assert "evaluation (helpful, harmless)" in out.getvalue()
    assert re.search(r"harmless +0\.\d{4} +80\.0% +\d", out.getvalue())


@pytest.mark.usefixtures("pictures")
def test_text_of_the_data_stays_text_on_the_page(tmp_path: Path) -> None:
    plain = Page(report.write_report(two_splits(tmp_path)))
    write_samples(tmp_path, [Sample(*[text := f"</p>\" onload='x' {{{{ 1 }}}} --> </title>{STEERING}"] * 5)])
    write_facts(
        tmp_path,
        mesh={"data": 1},
        device=text,
        parameters=1,
        training_pairs=1,
        noun="pairs",
        total_steps=64,
        tokens_saved=0,
        remarks=[text],
    )
    name = "</h2><script>x</script>\x9b\u202e $\\frac$"  # would be a formula with a mistake in the picture
    metrics = (tmp_path / "metrics.jsonl").read_text().replace("helpful", json.dumps(name)[1:-1])
    (tmp_path / "metrics.jsonl").write_text(metrics)
    words = {**yaml.safe_load(CONFIG), "run_name": text, "dataset_splits": ["train", name, "harmless"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(words))
    page = Page(report.write_report(tmp_path))
    assert set(page.tags) == {*plain.tags, "article", "p", "h3"} and page.tags.count("script") == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.text.count(visible(text)) >= 7 and page.text.count(visible(name)) >= 2
    assert visible(page.text) == page.text


def test_the_page_may_load_nothing_and_run_its_own_script_alone(run_folder: Path) -> None:
    page = report.write_report(run_folder).read_text(encoding="utf-8")
    script = page.partition("\n<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page.partition("<title>")[0]


def test_without_javascript_the_page_shows_the_curves_as_a_picture_and_all_figures(run_folder: Path) -> None:
    page = Page(report.write_report(run_folder))
    assert "picture" in page.tags and len(page.addresses) == 2  # for light and for dark
    shown = re.sub(r"\s+", " ", page.text.partition('{"runs"')[0])  # what comes before the data of the script
    for figure in ("97.3%", "8,192", "2 min 8 s", "Evaluation (test)"):
        assert figure in shown


def test_the_charts_get_the_numbers_of_the_records(run_folder: Path) -> None:
    (run,) = Page(report.write_report(run_folder)).data["runs"]
    assert run["train"]["step"] == list(range(1, 65)) and run["eval"]["step"] == [0, 64]
    assert run["eval"]["rewards/accuracies"] == [0.507, 0.973] and run["target_margin"] == 0.5
    assert run["train"]["learning_rate"] == [1e-3] * 64 and run["train"]["grad_norm"] == [1.0] * 64
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= run["train"].keys()


def test_numbers_that_are_not_finite_leave_a_gap_in_the_charts(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1, loss=math.nan), training_record(2, grad_norm=math.inf))
    train = Page(report.write_report(tmp_path)).data["runs"][0]["train"]
    assert train["loss"][0] is None and train["grad_norm"] == [1.0, None]


def test_findings_stand_on_the_page_and_in_the_summary_and_the_best_step_of_an_overfitted_run(
    run_folder: Path,
) -> None:
    rising = [evaluation_record(step, 0.9) | {"eval_loss": loss} for step, loss in ((20, 0.4), (40, 0.5), (64, 0.6))]
    steps = [training_record(step) for step in range(1, 65)]
    make_run(run_folder, *steps[:20], rising[0], *steps[20:40], rising[1], *steps[40:], rising[2])
    findings = [Finding("overfitting", 60, "It rises", "Stop.", 1.1), Finding("gamma", 0, "Large", "Less.")]
    write_findings(run_folder, [*findings, Finding("overfitting", 64, "It <i>rises</i> more", "Stop.", 2.2)])
    page = Page(report.write_report(run_folder))
    assert "i" not in page.tags and "It rises" not in page.text  # the later one stands for both
    out = io.StringIO()
    report.print_summary(Console(file=out, width=2000), run_folder)
    address = page_url("healthy-runs", "overfitting")
    assert address in page.addresses
    for shown, link in ((page.text, "healthy-runs#overfitting"), (out.getvalue(), address)):
        assert f"It <i>rises</i> more. Stop. ({link})" in shown and "Large. Less." in shown
        assert "The best evaluation was that of step 20: its loss was 0.4000, and 90.0% were right" in shown
    assert "; load_best_model_at_end: true would export it." in page.text and "code" in page.tags


def test_a_single_split_has_no_table_of_splits(run_folder: Path) -> None:
    assert report.read_run(run_folder).last_by_split == {}
    assert "by split" not in Page(report.write_report(run_folder)).text


def test_a_report_of_the_users_is_not_replaced(run_folder: Path) -> None:
    (run_folder / "report.html").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds `report.html`, which no run of jax-simpo wrote"):
        report.write_report(run_folder)
    assert (run_folder / "report.html").read_text() == "mine"


def test_the_outcome_names_evaluation_accuracy_before_and_after(run_folder: Path) -> None:
    assert report.read_run(run_folder).outcome() == (
        "The model prefers the chosen answer in 97.3% of the 1,200 evaluation pairs, up from 50.7% before training. "
        "The 95% confidence interval is 96.2% to 98.1%."
    )


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        ([0.6, 0.4], "prefers the chosen answer in 40.0% of the 1,200 evaluation pairs, down from 60.0% before"),
        ([0.5, 0.5], "the same as before training"),
        ([], "In the last training step the model preferred the chosen answer in 7"),
    ],
)
def test_the_outcome_does_not_embellish(tmp_path: Path, accuracies: list[float], sentence: str) -> None:
    evaluations = [evaluation_record(8 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    make_run(tmp_path, *[training_record(step) for step in range(1, 17)], *evaluations)
    assert sentence in report.read_run(tmp_path).outcome()


def test_key_figures_add_up_over_the_records(run_folder: Path) -> None:
    figures = {name: value for name, value, _ in report.read_run(run_folder).figures()}
    assert figures["pairs trained on"] == "8,192"
    assert figures["steps"] == "64"
    assert figures["tokens computed"] == "640 k"
    assert figures["packing fill"] == "90.0%"
    assert figures["pairs per second"] == "64"
    assert figures["training time"] == "2 min 8 s"
    assert figures["evaluation time"] == "3.0 s"
    assert "saved by sharing" not in figures


def test_all_pairs_are_counted_where_only_some_steps_are_logged_and_one_is_short(tmp_path: Path) -> None:
    # 1300 pairs in steps of 64: the last of the 21 takes 20. Records: the 7th, the 14th and the 21st step.
    records = [training_record(step, pairs=64, total_pairs=64 * step) for step in (7, 14)]
    last = training_record(21, pairs=20, total_pairs=1300, total_tokens=130_000, total_seconds=41.5)
    run = report.read_run(make_run(tmp_path, *records, last))
    assert (run.pairs_seen, run.tokens_computed, run.training_seconds) == (1300, 130_000, 41.5)


def test_what_the_program_noted_of_the_run_is_shown(run_folder: Path) -> None:
    write_facts(
        run_folder,
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        device="cpu",
        parameters=1_234_567,
        training_pairs=4096,
        noun="pairs",
        total_steps=96,
        tokens_saved=0.312,
        remarks=["`max_length: 64` cuts 9 of 9 pairs"],
    )
    figures = {name: (value, note) for name, value, note in report.read_run(run_folder).figures()}
    assert figures["saved by sharing"][0] == "31.2%"
    assert figures["steps"] == ("64", "of 96")
    text = Page(report.write_report(run_folder)).text
    assert "1,234,567" in text
    assert "data=1, fsdp=8, tensor=1" in text
    assert re.search(r"jax +0\.", text)
    assert "max_length: 64 cuts 9 of 9 pairs." in text


def test_groups_of_more_answers_are_called_so(run_folder: Path) -> None:
    facts = {"mesh": {}, "device": "cpu", "parameters": 1, "training_pairs": 9, "total_steps": 64, "tokens_saved": 0.0}
    write_facts(run_folder, **facts, noun="groups")
    text = Page(report.write_report(run_folder)).text
    assert re.search(
        r"The model prefers the better answer in \S+ of the comparisons of the [\d,]+ evaluation groups", text
    )
    assert "groups trained on" in text and "9 groups" in text and "groups per second" in text
    assert "the share of comparisons whose better response has the higher one" in text
    assert "pairs" not in text.partition("Resolved config")[0]
    assert "confidence interval" not in text  # the comparisons of a group are not independent


def test_the_page_needs_nothing_outside_itself(run_folder: Path) -> None:
    page = Page(report.write_report(run_folder))
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.tags.count("script") == 2  # the data, and the script that draws them
    assert "link" not in page.tags


def test_text_of_the_data_and_the_config_stays_text(run_folder: Path) -> None:
    page = Page(report.write_report(run_folder))
    for text in (SAMPLE.prompt, SAMPLE.chosen, SAMPLE.rejected, SAMPLE.before, SAMPLE.after, "café & <b>co</b>"):
        assert text is not None
        assert text in page.text
    assert "b" not in page.tags


@pytest.mark.usefixtures("pictures")
def test_the_report_is_made_again_from_the_files_alone(run_folder: Path) -> None:
    first = report.write_report(run_folder).read_bytes()
    (run_folder / "report.html").unlink()
    (run_folder / "curves.png").unlink()
    assert report.write_report(run_folder).read_bytes() == first
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("pictures")
def test_one_step_and_no_evaluation_make_a_report(tmp_path: Path) -> None:
    path = report.write_report(make_run(tmp_path, training_record(1)))
    assert "The run was not evaluated." in Page(path).text


def test_samples_survive_the_file(tmp_path: Path) -> None:
    samples = [SAMPLE, Sample("two\u2028lines", "a", "b", before="")]
    write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no training step"):
        report.write_report(tmp_path)


def test_the_summary_stays_inside_its_frame_on_a_console_that_wraps_nothing(run_folder: Path) -> None:
    out = io.StringIO()
    report.print_summary(Console(file=out, width=80, markup=False, highlight=False, soft_wrap=True), run_folder)
    assert {len(line) for line in out.getvalue().splitlines()} == {80}


def test_the_summary_shows_first_and_last_figures_samples_and_files(run_folder: Path) -> None:
    report.write_report(run_folder)
    out = io.StringIO()
    report.print_summary(Console(file=out, width=110), run_folder)
    text = out.getvalue()
    for part in ("97.3%", "50.7%", "step 64", "reward margin", "[bold]One tea[/bold] & milk.", "report.html"):
        assert part in text
    assert "│" in text


def test_a_run_of_one_step_shows_its_figures_once(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1))
    out = io.StringIO()
    report.print_summary(Console(file=out, width=110), tmp_path)
    assert out.getvalue().count("step 1") == 1


@pytest.mark.parametrize(
    ("objective", "title", "reward"),
    [
        ("simpo", "SimPO training run", "beta times the mean log-probability"),
        ("{dpo: 1.0, ipo: 0.5}", "DPO + IPO training run", "the log-ratio of a response to the reference"),
        ("mine.py:Mine", "the objective `mine.py:Mine` training run", "what that objective defines"),
        ("mine.Mine(beta=2.0)", "the objective `mine.Mine(beta=2.0)` training run", "what that objective defines"),
    ],
)
def test_the_report_names_the_objective_and_its_reward(objective: str, title: str, reward: str, tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1), evaluation_record(1, 0.6))
    (tmp_path / "config.yaml").write_text(f"{CONFIG}objective: {objective}\n")
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert title in page and reward in page


def test_before_training_the_rewards_of_a_run_that_starts_as_the_reference_mean_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1), evaluation_record(0, 0.0), evaluation_record(8, 0.6))
    (tmp_path / "config.yaml").write_text(f"{CONFIG}objective: dpo\n")
    assert "because the model is the reference" in report.read_run(tmp_path).outcome()
    (tmp_path / "config.yaml").write_text(f"{CONFIG}objective: dpo\nref_model_name_or_path: other\n")
    assert "up from 0.0% before training" in report.read_run(tmp_path).outcome()


def test_the_accuracy_of_a_run_that_starts_as_the_reference_is_left_out_before_its_first_update(tmp_path: Path) -> None:
    records = [training_record(1), training_record(8), evaluation_record(0, 0.0), evaluation_record(8, 0.6)]
    make_run(tmp_path, *records)
    (tmp_path / "config.yaml").write_text(f"{CONFIG}objective: dpo\n")
    run = report.read_run(tmp_path)
    assert [run.accuracy(record) for record in run.evals] == ["-", "60.0%"]
    assert run.accuracy(run.train[0]) == "-" != run.accuracy(run.train[1])
    console = Console(record=True, width=100, file=io.StringIO())
    report.print_summary(console, tmp_path)
    report.write_report(tmp_path)
    for shown in (console.export_text(), (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "60.0%" in shown and " 0.0%" not in shown and ">0.0%" not in shown
    # The picture is the same as that of a run whose start says something else.
    (tmp_path / "other").mkdir()
    other = make_run(tmp_path / "other", *records[:2], evaluation_record(0, 0.9), evaluation_record(8, 0.6))
    (other / "config.yaml").write_text(f"{CONFIG}objective: dpo\n")
    assert report.read_run(other).draw() == run.draw()
