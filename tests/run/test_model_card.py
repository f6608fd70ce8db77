"""The model card is valid for the hub, tells what was measured, and gives no local path away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from jax_simpo.config import TrainConfig
from jax_simpo.run import model_card


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    rates = {"tokens_per_second": 100.0, "pairs_per_second": 10.0, "packing_fill": 0.9}
    measured = {"loss": 0.4, "rewards/accuracies": 0.8, "rewards/margins": 1.25}
    totals = {"total_pairs": 1024, "total_tokens": 10_240, "total_seconds": 102.4}
    step = {"step": 16, "epoch": 1.0, "pairs": 64, "tokens": 640, **measured, **rates, **totals}
    evaluation: dict[str, Any] = {f"eval_{key}": value for key, value in measured.items()}
    evaluation |= {"eval_step": 16, "eval_pairs": 200, "eval_runtime": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(evaluation) + "\n")
    return folder


def config(model: str, *sources: str, **changes: Any) -> TrainConfig:
    mixer = dict.fromkeys(sources, 1.0)
    return TrainConfig(model_name_or_path=model, dataset_mixer=mixer, run_name="my-run", **changes)


def test_hub_ids_are_linked_and_local_paths_are_not_given_away(output: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "secret-project" / "pairs.jsonl"
    settings = config("meta-llama/Llama-3.1-8B", "HuggingFaceH4/ultrafeedback_binarized", str(pairs), "data/mine.jsonl")
    card = ModelCard.load(model_card.write(output, settings))
    assert card.data.base_model == "meta-llama/Llama-3.1-8B"
    assert card.data.datasets == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert card.data.to_dict()["library_name"] == "transformers"
    assert {"simpo", "jax"} <= set(card.data.tags)
    assert "`pairs.jsonl`" in card.text
    assert "secret-project" not in card.text


def test_a_local_model_is_no_base_model_of_the_hub(output: Path, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    card = ModelCard.load(model_card.write(output, config(str(tmp_path / "start"), "builtin:cafe")))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "`start`" in card.text
    assert str(tmp_path) not in card.text


def test_the_card_tells_settings_results_and_the_citation(output: Path) -> None:
    path = model_card.write(output, config("a/b", "c/d"), global_batch_size=128)
    card = ModelCard.load(path)
    assert "| `global_batch_size` | 128 |" in card.text
    assert "| `beta` | 2.0 |" in card.text
    assert "| 16 | 0.4000 | 0.8000 | 1.2500 |" in card.text
    assert "on the 200 pairs of the split `test`" in card.text.replace("On", "on")
    assert "Meng, Yu and Xia, Mengzhou and Chen, Danqi" in card.text
    assert (output / "model" / "README.md").read_text() == path.read_text()


def test_figures_over_all_pairs_name_all_splits_and_each_split_has_its_own(output: Path) -> None:
    splits = ["train", "helpful", "harmless"]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    overall = json.loads(lines[-1])
    record = dict(overall)
    for split in splits[1:]:
        record |= {key.replace("eval_", f"eval_{split}_"): value for key, value in overall.items() if "step" not in key}
    (output / "config.yaml").write_text("dataset_splits: [train, helpful, harmless]\n")
    (output / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    text = ModelCard.load(model_card.write(output, config("a/b", "c/d", dataset_splits=splits))).text
    assert "On the 200 pairs of the splits `helpful` and `harmless`" in text
    assert "By split, at step 16:" in text
    assert "| `harmless` | 200 | 0.4000 | 0.8000 | 1.2500 |" in text
