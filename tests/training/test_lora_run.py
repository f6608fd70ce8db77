"""A run that trains an adapter: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jax_simpo import hf
from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError, UserError
from jax_simpo.run.metrics import read_metrics
from jax_simpo.training import trainer
from jax_simpo.training.evaluate import GROUPS_PER_PLAN, evaluation_metrics, score_groups
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import make_score_function
from tests.training.test_trainer import MODEL, config_of, losses, run, stop_after

ADAPTER = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = {**MODEL, "initializer_range": 0.2}  # an adapter can do little with weights next to zero
    setup = Setup(config_of(folder, model_config=model))
    with jax.set_mesh(setup.mesh):
        return hf.save_model(setup.load_params(), setup.model, folder / "model", "float32", tokenizer=setup.tokenizer)


def adapter_config(folder: Path, base: Path, **changes: Any) -> TrainConfig:
    model = {"model_config": None, "tokenizer_name_or_path": None, "model_name_or_path": str(base)}
    evaluation = {"do_eval": True, "dataset_mixer": {"builtin:cafe": 0.02}, "max_steps": 8}
    return config_of(folder, **{**model, **evaluation, **ADAPTER, "mesh": {"fsdp": 4, "tensor": 2}, **changes})


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, list[dict[str, Any]]]:
    config = adapter_config(tmp_path_factory.mktemp("finished"), base)
    return config, run(config)


def evaluated(config: TrainConfig, choice: str | None) -> dict[str, float]:
    setup = Setup(config, choice, any_mesh=True)
    pairs = setup.eval_pairs()
    plan = setup.step_plan(pairs, batch=GROUPS_PER_PLAN, seed=None)
    with jax.set_mesh(setup.mesh):
        score = make_score_function(setup.forward, setup.mesh)
        return evaluation_metrics(score_groups(score, setup.load_params(), plan, pairs, setup.mesh), setup.objective)


def test_a_run_writes_an_adapter_that_peft_loads_and_checkpoints_of_it_alone(
    finished: tuple[TrainConfig, list[dict[str, Any]]], base: Path
) -> None:
    config, records = finished
    output = Path(config.output_dir)
    assert len(records) == 8
    assert {p.name for p in (output / "model").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert not (output / "model" / "config.json").exists()
    fields = json.loads((output / "model" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base) and fields["r"] == 4 and len(fields["target_modules"]) == 7
    card = (output / "model" / "README.md").read_text()
    assert "library_name: peft" in card and "LoRA adapter" in card and "`lora_r` | 4" in card and str(base) not in card

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "model")
    names = {n for n, p in loaded.named_parameters() if "lora_" in n and p.abs().sum() > 0}
    assert len(names) == 2 * 7  # one layer

    facts = json.loads((output / "run.json").read_text())
    assert facts["parameters"] == sum(
        x.size for x in load_file(output / "model" / "adapter_model.safetensors").values()
    )
    saved = json.loads((output / "checkpoints" / "8" / "params" / "_METADATA").read_text())["tree_metadata"]
    assert len(saved) == 2 * 7 and all("'adapter'" in path for path in saved)


def test_the_folder_a_step_and_the_merged_model_score_alike(
    finished: tuple[TrainConfig, list[dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    config, _ = finished
    output = Path(config.output_dir)
    last = read_metrics(output)[-1]
    expected = {key: last[f"eval_{key}"] for key in ("loss", "rewards/margins", "logps/chosen", "logps/rejected")}
    setup = Setup(config, str(output / "model"), any_mesh=True)
    with jax.set_mesh(setup.mesh):
        params = setup.load_params()
        assert setup.export(params, tmp_path / "merged", merge=True) == "model, adapter merged"
        assert setup.export(params, tmp_path / "again") == f"adapter of {base}"
    one, two = (load_file(f / "adapter_model.safetensors") for f in (output / "model", tmp_path / "again"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    for choice in (str(output / "model"), "8", str(tmp_path / "merged")):
        found = evaluated(config, choice)
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5), choice
    before = evaluated(config, None)
    assert before["loss"] == pytest.approx(read_metrics(output)[0]["eval_loss"], abs=1e-5)
    assert abs(before["logps/chosen"] - expected["logps/chosen"]) > 0.01


def test_a_killed_run_goes_on_with_the_same_numbers(
    finished: tuple[TrainConfig, list[dict[str, Any]]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adapter_config(tmp_path, base)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    records = run(config)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert losses(records) == losses(finished[1])
    shutil.rmtree(Path(config.output_dir) / "checkpoints" / "8")
    (base / "SHA256SUMS").unlink()  # or the change is found as damage
    weights = base / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"another run; these settings differ:\n  base weights: was \["):
            run(config)
    finally:
        weights.write_bytes(good)
    with pytest.raises(CheckpointError, match=r"another run; these settings differ:\n  lora_r: was 4, is 2\n"):
        run(adapter_config(tmp_path, base, lora_r=2))


@pytest.mark.slow
def test_the_adapter_of_a_new_model_is_merged_for_its_base_has_no_name(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, **{**ADAPTER, "max_steps": 1, "warmup_ratio": 0.0, "dtype": "bfloat16", "save_strategy": "no"}
    )
    run(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (
        str(model.dtype) == "torch.bfloat16"
        and "library_name: transformers" in (tmp_path / "run/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target_modules": ["q_proj", "w_up"]}, "'w_up' is no linear layer of a llama model"),
        ({"lora_target_modules": []}, "names nothing to train"),
        ({"lora_dropout": 0.05}, r"`lora_dropout: 0.05` cannot be honoured: adapters have no dropout.*torch_ref"),
        ({"load_in_4bit": True}, r"`load_in_4bit: true` cannot be honoured"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "load_params", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ConfigError, match=message):
        trainer.train(adapter_config(tmp_path, base, **changes), Console(quiet=True))


def test_an_adapter_without_its_base_is_told(
    finished: tuple[TrainConfig, list[dict[str, Any]]], tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(Path(finished[0].output_dir) / "model", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone: no such folder"):
        _ = Setup(finished[0], str(folder)).model
    file.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    assert Setup(finished[0], str(folder)).start.base == finished[0].model_name_or_path
    new = config_of(tmp_path, **ADAPTER)
    with pytest.raises(UserError, match=r"adapter_config.json: names no `base_model_name_or_path`"):
        _ = Setup(new, str(folder)).model
    file.write_text(json.dumps({**fields, "base_model_name_or_path": ["x"]}))
    with pytest.raises(UserError, match=r"adapter_config.json: `base_model_name_or_path` is \['x'\]; expected text"):
        _ = Setup(new, str(folder)).model
    file.write_text(json.dumps({**fields, "r": 10**9}))
    with pytest.raises(UserError, match=r"has shape .* but the base model and `r` of adapter_config.json make it"):
        _ = Setup(finished[0], str(folder)).load_params()
