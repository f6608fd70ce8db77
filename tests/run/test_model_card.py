"""The model card is valid for the hub, tells what was measured, and gives no local path away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from jax_simpo.config import TrainConfig
from jax_simpo.run import markdown, model_card, whole


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


def test_a_model_of_a_gguf_file_has_the_base_and_the_licence_of_the_model_in_it(output: Path) -> None:
    card = ModelCard.load(model_card.write(output, config("builtin:smollm2", "builtin:manners")))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"


def test_the_card_tells_settings_results_and_the_citation(output: Path) -> None:
    path = model_card.write(output, config("a/b", "c/d"), global_batch_size=128)
    card = ModelCard.load(path)
    assert "| `global_batch_size` | 128 |" in card.text
    assert "| `beta` | 2.0 |" in card.text
    assert "| 16 | 0.4000 | 0.8000 | 1.2500 |" in card.text
    assert "on the 200 pairs of the split `test`" in card.text.replace("On", "on")
    assert "Meng, Yu and Xia, Mengzhou and Chen, Danqi" in card.text
    assert (output / "model" / "README.md").read_text() == path.read_text()


def test_the_card_tells_what_was_cut(output: Path) -> None:
    remark = "`max_length: 64` cuts 9 of 9 pairs"
    (output / "run.json").write_text(json.dumps({"remarks": [remark]}))
    card = ModelCard.load(model_card.write(output, config("a/b", "c/d")))
    assert f"On the training pairs:\n\n- {markdown.escape(remark)}\n" in card.text


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


# --- names and values stay text

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [a](https://evil.example) ![b](https://evil.example/b.png)",
    "https://evil.example www.evil.example <https://evil.example> me@evil.example [x]: https://evil.example",
    "a | b \\| c `d` ``e`` `` f `",
    "`",
    "``` ",
    "*a* __b__ ~~c~~ # $d$ :smile: &lt;e&gt; \\",
    "a\n---\nlicense: mit\n---\n# A title\n\n- a list\n\n<b>\n",
    "a\r\n\r\n> quoted\x85b\u2028c\x1b[31m\u202ed",
    "|",
    "  ",
)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def parsed(text: str) -> list[Token]:
    """The tokens of markdown, with those inside of lines in their order."""
    return [inner for token in PARSER.parse(text) for inner in (token, *(token.children or ()))]


def shape(text: str) -> list[tuple[str, int]]:
    """The kinds of all tokens but texts: what is a heading, a cell or code."""
    return [(token.type, token.level) for token in parsed(text) if token.type not in ("text", "text_special")]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_markdown_is_read_as_it_is(text: str) -> None:
    line = markdown.one_line(text)
    assert "".join(token.content for token in parsed(f"# {markdown.escape(text)}")[2:-1]).strip() == line.strip()
    (span,) = [token for token in parsed(f"x {markdown.code(text)} x") if token.type == "code_inline"]
    assert span.content == line
    page = markdown.table(["a", "b"], [[markdown.code(text), "1"], [markdown.escape(text), "2"]])
    cells = [token.content for token in parsed(page) if token.type == "inline"]
    assert [cells[i] for i in (0, 1, 3, 5)] == ["a", "b", "1", "2"] and len(cells) == 6
    assert [token.content for token in parsed(page) if token.type == "code_inline"] == [line]


def card_of(output: Path, name: str) -> tuple[dict[str, Any], str]:
    """The front matter and the text of the card of a run that has one word everywhere."""
    splits = ["train", f"{name}1", f"{name}2"]
    step, evaluation = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    for split in splits[1:]:
        evaluation |= {f"eval_{split}_{key}": 0.5 for key in ("loss", "pairs", "rewards/accuracies", "rewards/margins")}
    (output / "metrics.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(evaluation) + "\n")
    words = {"run_name": name, "dataset_splits": splits, "metric_for_best_model": name}
    (output / "config.yaml").write_text(yaml.safe_dump(words))
    facts = {"model_step": 8, "exported_step": 16, "versions": {"python": name, "jax": name}}
    (output / "run.json").write_text(json.dumps(facts))
    settings = config(
        f"./{name}",
        f"./{name}.jsonl",
        dataset_splits=splits,
        objective="dpo",
        ref_model_name_or_path=f"./{name}",
        use_peft=True,
        lora_target_modules=[name],
    )
    _, front, text = model_card.write(output, settings).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_with_markup_changes_nothing_of_a_card_but_words(text: str, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "plain")
    (front, card), (hostile_front, hostile_card) = card_of(tmp_path / "plain", "name"), card_of(output, text)
    (index,), (hostile_index,) = front.pop("model-index"), hostile_front.pop("model-index")
    assert hostile_front == front
    assert hostile_index["name"] == markdown.one_line(text)
    (result,), (hostile_result,) = index["results"], hostile_index["results"]
    assert "\n" not in hostile_result["dataset"].pop("name") and result["dataset"].pop("name")
    assert hostile_result == result
    assert shape(hostile_card) == shape(card)
    assert not {kind for kind, _ in shape(card)} & {"html_inline", "html_block", "link_open", "image"}
    assert {"heading_open", "table_open", "td_open", "code_inline"} < {kind for kind, _ in shape(card)}


def test_the_card_has_the_held_out_figures_of_the_exported_model_and_the_picture_of_the_curves(output: Path) -> None:
    (output / "curves.png").write_bytes(b"a picture")
    card = ModelCard.load(model_card.write(output, config("a/b", "c/d")))
    accuracy, loss = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_type) == ("accuracy", 0.8, "c/d")
    assert (loss.metric_type, loss.metric_value, loss.dataset_name) == ("loss", 0.4, "c/d (test)")
    assert "](curves.png)" in card.text
    assert (output / "model" / "curves.png").read_bytes() == b"a picture"  # the card is uploaded with the model
    assert (output / "model" / "README.md").read_text() == (output / "README.md").read_text()
    whole.check_replaceable(output / "model")


def test_the_card_gives_no_path_of_a_reference_or_an_objective_away(output: Path, tmp_path: Path) -> None:
    reference = tmp_path / "secret-project" / "model"
    settings = config("a/b", "c/d", objective="dpo", ref_model_name_or_path=str(reference))
    card = model_card.write(output, settings).read_text()
    assert "| `ref_model_name_or_path` | `model` |" in card and "secret-project" not in card
    card = model_card.write(output, config("a/b", "c/d", objective="secret-project/mine.py:Mine")).read_text()
    assert "with the objective `mine.py:Mine`, using" in card and "secret-project" not in card
    assert "| `objective` | `mine.py:Mine` |" in card
