"""Each rule sees the failure that it is named after and not its harmless neighbour, and says it once, with figures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jax_simpo.config import TrainConfig, builtin_configs, load_config
from jax_simpo.data.token_signs import TokenSigns
from jax_simpo.errors import CheckpointError
from jax_simpo.run.health import OVERFITTING, Finding, HealthWatch, RunTraits, read_findings, write_findings
from jax_simpo.run.health.published import Trainee
from jax_simpo.run.health.rules import AT_START, DURING

EIGHT_BILLION = Trainee(parameters=8_030_261_248)
TRAITS = RunTraits(total_steps=100, learning_rate=1e-6, trainee=EIGHT_BILLION, chosen_tokens=10.0)


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A training record of a run that goes well."""
    done = 1 - math.exp(-number / 20)
    record = {
        "step": number,
        "pairs": 128,
        "loss": 0.9 - 0.5 * done,
        "grad_norm": 2.0 + 0.5 * math.sin(number),
        "rewards/accuracies": 0.5 + 0.3 * done,
        "logps/chosen": -1.0 - 0.2 * done,
        "logps/rejected": -1.0 - 0.8 * done,
    }
    return {**record, **changes}


def evaluation(number: int, **changes: Any) -> dict[str, Any]:
    """An evaluation record of a run that goes well."""
    done = 1 - math.exp(-number / 20)
    record = {
        "eval_step": number,
        "eval_pairs": 500,
        "eval_loss": 0.9 - 0.4 * done,
        "eval_rewards/accuracies": 0.5 + 0.25 * done,
        "eval_answers/length": 11.0,
        "eval_answers/ended": 1.0,
    }
    return {**record, **{f"eval_{key}": value for key, value in changes.items()}}


def healthy(steps: int = 100) -> list[dict[str, Any]]:
    """All records of a run that goes well, evaluated every ten steps."""
    records: list[dict[str, Any]] = [evaluation(0)]
    for number in range(1, steps + 1):
        records += [step(number), *([evaluation(number)] if number % 10 == 0 else [])]
    return records


def judged(records: list[dict[str, Any]], traits: RunTraits = TRAITS) -> list[Finding]:
    watch = HealthWatch(traits)
    for record in records:
        watch.observe(record)
    return watch.findings


def names(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def test_nothing_is_found_in_a_run_that_goes_well() -> None:
    assert judged(healthy()) == []


# --- before training


@pytest.mark.parametrize("name", sorted(set(builtin_configs()) - {"quickstart"}))
def test_no_published_config_gets_a_remark(name: str) -> None:
    config = load_config(f"builtin:{name}", [])
    trainee = replace(EIGHT_BILLION, parameters=134_515_008) if name == "quickstart-real" else EIGHT_BILLION
    settings = {"learning_rate": config.learning_rate, "gamma_beta_ratio": config.gamma_beta_ratio}
    traits = replace(TRAITS, trainee=trainee, **settings)
    assert names(judged([], traits)) == []


@pytest.mark.parametrize(
    ("rate", "trainee", "found"),
    [
        (1e-5, EIGHT_BILLION, True),  # SimPO's README: "a large learning rate (e.g., 1e-5)" spoils the model
        (5e-5, EIGHT_BILLION, True),  # the Hugging Face trainer's default
        (1e-9, EIGHT_BILLION, True),
        (1e-5, replace(EIGHT_BILLION, adapter=True), False),
        (5e-4, replace(EIGHT_BILLION, adapter=True), True),
        (8e-6, replace(EIGHT_BILLION, with_sft=True), False),  # the ORPO paper's
        (3e-7, replace(EIGHT_BILLION, optim="lion"), False),
        (1e-5, replace(EIGHT_BILLION, optim="lion"), True),
        (2e-5, Trainee(134_500_000), False),  # docs/real-runs.md
        (2e-3, Trainee(134_500_000), True),
        (3e-3, Trainee(438_656, new_model=True, with_sft=True), False),  # the quickstart
        (1e-6, Trainee(438_656, new_model=True, with_sft=True), True),
        (1e-1, Trainee(438_656, new_model=True, with_sft=True), True),
        (6e-5, Trainee(175_000_000_000, new_model=True), False),  # GPT-3's
    ],
)
def test_a_learning_rate_is_judged_by_what_is_trained(rate: float, trainee: Trainee, found: bool) -> None:
    findings = judged([], replace(TRAITS, learning_rate=rate, trainee=trainee))
    assert names(findings) == ["learning-rate"] * found
    if found:
        assert re.search(r"`learning_rate: [\d.]+e-\d+`", findings[0].text) and "`learning_rate`" in findings[0].advice


def test_a_target_margin_beyond_all_published_ones_is_found() -> None:
    (finding,) = judged([], replace(TRAITS, gamma_beta_ratio=20.0))
    assert finding.name == "gamma" and "`gamma_beta_ratio: 20`" in finding.text
    assert judged([], replace(TRAITS, gamma_beta_ratio=1.0)) == []


def test_tokens_that_show_two_bos_or_no_eos_are_found_and_a_few_cut_answers_are_not() -> None:
    signs = TokenSigns(responses=1000, double_bos=990, without_eos=400)
    found = judged([], replace(TRAITS, signs=signs))
    assert names(found) == ["double-bos", "missing-eos"]
    assert "990 of 1,000" in found[0].text and "400 of 1,000" in found[1].text and "`max_length`" in found[1].advice
    assert judged([], replace(TRAITS, signs=TokenSigns(responses=1000, without_eos=50))) == []


# --- during training


def test_a_start_model_that_prefers_the_rejected_answers_shows_swapped_labels() -> None:
    swapped = {"rewards/accuracies": 0.1}
    (finding,) = judged([evaluation(0, **swapped), *healthy()[1:]])
    assert (finding.name, finding.step) == ("swapped-labels", 0) and "90% of 500 pairs" in finding.text
    assert "`dataset_columns`" in finding.advice
    assert names(judged([step(1, **swapped)])) == ["swapped-labels"]  # without an evaluation
    # No sign: rewards that are all 0, random weights, too few pairs to tell, a start model without a clear preference.
    for traits in (
        replace(TRAITS, starts_as_reference=True),
        replace(TRAITS, trainee=Trainee(10**8, new_model=True), learning_rate=1e-3),
    ):
        assert judged([evaluation(0, **swapped)], traits) == []
    assert judged([evaluation(0, **swapped, pairs=12)]) == []
    assert judged([evaluation(0, **{"rewards/accuracies": 0.4})]) == []


def test_training_and_evaluation_that_learn_opposite_things_show_swapped_labels() -> None:
    records = [step(number, **{"rewards/accuracies": 0.9}) for number in range(1, 20)]
    (finding,) = judged([*records, evaluation(20, **{"rewards/accuracies": 0.2})])
    assert finding.name == "swapped-labels" and "`jax-simpo inspect --split`" in finding.advice
    assert judged([*records, evaluation(20, **{"rewards/accuracies": 0.47})]) == []


@pytest.mark.parametrize("sums", [False, True])
def test_chosen_answers_that_become_unlikely_with_the_rejected_ones_are_found(sums: bool) -> None:
    scale = 10.0 if sums else 1.0
    traits = replace(TRAITS, logps_are_sums=sums)

    def fall(chosen: float, rejected: float) -> list[dict[str, Any]]:
        return [
            step(n, **{"logps/chosen": scale * (-1 - chosen * n), "logps/rejected": scale * (-1 - rejected * n)})
            for n in range(1, 40)
        ]

    found = judged(fall(0.1, 0.2), traits)
    # Said at a fall of 1, and again at falls of 2 and more than 2.
    assert names(found) == ["chosen-falls"] * 2 and found[1].level >= 2 * found[0].level >= 2
    assert "from -1.15 to" in found[0].text and "`sft_weight`" in found[0].advice
    assert judged(fall(0.005, 0.2), traits) == []  # the usual course: the rejected ones fall, the chosen ones a little
    assert judged(fall(-0.01, 0.2), traits) == []


def test_a_loss_above_that_of_the_start_is_found() -> None:
    (finding,) = judged([step(number, loss=0.7 + 0.02 * number) for number in range(1, 40)])
    assert finding.name == "loss-rises"
    assert judged([step(number, loss=0.7 + 0.1 * math.sin(number)) for number in range(1, 40)]) == []


def test_a_gradient_that_stands_out_is_found_and_a_lively_one_is_not() -> None:
    (found,) = judged([step(n, **({"grad_norm": 60.0} if n == 57 else {})) for n in range(1, 101)])
    assert found.name == "gradient-spikes" and "step 57 is 60" in found.text and "`warmup_ratio`" in found.advice
    # Gradients that have become tiny at the end of a run, and one among them as large as those of the start.
    small = [step(n, grad_norm=2.0 if n < 20 or n == 80 else 0.01) for n in range(1, 101)]
    assert judged(small) == []


def test_an_accuracy_that_stays_at_that_of_a_coin_is_found_in_the_first_half() -> None:
    def coin(number: int) -> dict[str, Any]:
        return step(number, **{"rewards/accuracies": 0.5 + 0.02 * (-1) ** number})

    (finding,) = judged([coin(number) for number in range(1, 101)])
    assert finding.name == "no-learning" and finding.step <= 50
    # 8 pairs a step are too few to tell a coin from a slow learner.
    assert judged([{**coin(number), "pairs": 8} for number in range(1, 101)]) == []
    # A model that starts to learn late, but in the first third.
    late = [step(n, **{"rewards/accuracies": 0.5 if n < 25 else 0.7}) for n in range(1, 101)]
    assert judged(late) == []


def test_overfitting_names_the_best_step() -> None:
    losses = {10: 0.6, 20: 0.5, 30: 0.55, 40: 0.6, 50: 0.7}

    def records(trained: float) -> list[dict[str, Any]]:
        evals = {n: evaluation(n, loss=loss, **{"rewards/accuracies": 0.8 - n / 1000}) for n, loss in losses.items()}
        training = {n: step(n, **{"rewards/accuracies": trained}) for n in range(1, 51)}
        return [record for n in training for record in (training[n], evals.get(n)) if record]

    (finding,) = judged(records(trained=1.0))
    assert finding.name == "overfitting" and finding.step == 40
    assert "0.500 at step 20" in finding.text and "`load_best_model_at_end: true`" in finding.advice
    assert judged(records(trained=0.9)) == []


def test_answers_that_grow_are_found() -> None:
    def grown(lengths: list[float]) -> list[dict[str, Any]]:
        return [
            record | ({"eval_answers/length": lengths[record["eval_step"] // 10]} if "eval_step" in record else {})
            for record in healthy(50)
        ]

    (finding,) = judged(grown([11, 12, 13, 25, 40, 40]))
    assert finding.name == "long-answers" and finding.step == 40 and "from 11 to 40 tokens" in finding.text
    assert judged(grown([40, 40, 11, 12, 11, 11])) == []  # the model learns to end its answers
    assert judged(grown([11, 11, 30, 11, 11, 30])) == []  # of a few answers one is long


# --- what is said, and how often


def test_a_finding_is_said_once_unless_it_becomes_much_worse() -> None:
    watch = HealthWatch(TRAITS)
    said = [watch.observe(step(number, loss=0.7 + 0.01 * number)) for number in range(1, 200)]
    found = [finding for news in said for finding in news]
    assert [finding.name for finding in found] == ["loss-rises", "loss-rises"] and found == watch.findings
    assert found[1].level >= 2 * found[0].level


def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted() -> None:
    records = [step(number, loss=0.7 + 0.02 * number) for number in range(1, 100)]
    resumed = HealthWatch(TRAITS)
    for record in records[:30]:
        resumed.observe(record)
    again = [finding for record in records[30:] for finding in resumed.observe(record)]
    assert judged(records[:30]) + again == judged(records)


def test_every_finding_is_explained_under_its_name_and_names_keys_that_there_are() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "healthy-runs.md").read_text(encoding="utf-8")
    source = (root / "jax_simpo" / "run" / "health" / "rules.py").read_text(encoding="utf-8")
    known = {*re.findall(r'Finding\("([a-z-]+)"', source), OVERFITTING}
    assert len(known) == len(AT_START) + len(DURING)
    for name in known:
        assert f"\n## {name}\n" in page, name
    keys = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)\b", source.partition("# --- before")[2])) - {"sigmoid_norm"}
    assert keys and keys <= TrainConfig.model_fields.keys()


def test_findings_survive_the_file(tmp_path: Path) -> None:
    write_findings(tmp_path, [])
    assert not (tmp_path / "findings.jsonl").exists() and read_findings(tmp_path) == []
    findings = [Finding("gamma", 0, "<b>", "…"), Finding("loss-rises", 3, "a", "b", 2.5)]
    write_findings(tmp_path, findings)
    assert read_findings(tmp_path) == findings
    write_findings(tmp_path, [])  # a new start in the same folder
    assert read_findings(tmp_path) == []
    (tmp_path / "findings.jsonl").write_text(json.dumps({"name": "x"}) + "\n")
    with pytest.raises(CheckpointError, match=r"findings\.jsonl: is damaged"):
        read_findings(tmp_path)


def test_a_file_of_the_users_is_no_file_of_findings(tmp_path: Path) -> None:
    (tmp_path / "findings.jsonl").write_text("mine")
    assert read_findings(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"findings\.jsonl"):
        write_findings(tmp_path, [Finding("gamma", 0, "a", "b")])
