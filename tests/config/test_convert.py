"""Files of other trainers become configs that train the same; what cannot be kept is told all at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jax_simpo.config import TrainConfig, foreign, help, load_config
from jax_simpo.config.convert.engine import Converted, convert
from jax_simpo.config.convert.rules import Keep, Options, meaning
from jax_simpo.config.convert.trainers import CHOICES, TRAINERS, recognise
from jax_simpo.errors import ConfigError

FILES = Path(__file__).parent / "other_trainers"

# File -> what `--from` says, and what our config must say.
EXPECTED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "trl_simpo": (
        None,
        {
            "objective": "simpo",
            "beta": 2.5,
            "gamma_beta_ratio": 0.55,
            "sft_weight": 0.0,
            "loss_type": "sigmoid",
            "dataset_mixer": {"trl-lib/ultrafeedback_binarized": 1.0},
            "dataset_configs": ["default"],
            "dataset_splits": ["train", "test"],
            "max_length": 2048,
            "max_prompt_length": 1800,
            "auto_insert_empty_system_msg": False,
            "optim": "adamw",
            "learning_rate": 6e-7,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 16,
            "remat": "full",
            "dtype": "bfloat16",
            "eval_strategy": "steps",
            "eval_steps": 100,
            "save_strategy": "no",
            "output_dir": "qwen-simpo",
            "seed": 7,
        },
    ),
    "trl_dpo": (
        None,
        {
            "objective": {"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0},
            "loss_type": "sigmoid",
            "beta": 0.05,
            "sft_weight": 1.0,
            "dataset_splits": ["train_prefs", "test_prefs"],
            "learning_rate": 1e-6,
            "max_length": 1024,
            "warmup_ratio": 0.1,
            "warmup_steps": 0,
            "use_peft": True,
            "lora_r": 32,
            "lora_alpha": 16,
            "lora_target_modules": None,
            "lora_dropout": 0.0,
            "dtype": "bfloat16",
        },
    ),
    "handbook_orpo": (
        "trl-orpo",
        {
            "chat_rendering": "auto",
            "objective": "orpo",
            "beta": 0.05,
            "sft_weight": 1.0,
            "sft_over": "prompt_and_response",
            "dataset_mixer": {"argilla/distilabel-capybara-dpo-7k-binarized": 0.5},
            "dataset_splits": ["train"],
            "auto_insert_empty_system_msg": True,
            "max_prompt_length": 1792,
            "warmup_steps": 100,
            "optim": "adamw",
        },
    ),
    "llama_factory_simpo": (
        None,
        {
            "objective": "simpo",
            "beta": 2.0,
            "gamma_beta_ratio": 0.5,
            "sft_weight": 0.1,
            "chat_template": "llama-3",
            "dataset_format": "conversation",
            "dataset_columns": {"conversation": "turns"},
            "dataset_splits": ["train"],
            "test_size": 0.1,
            "max_samples": 1000,
            "max_length": 2048,
            "use_peft": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["q_proj", "v_proj"],
            "learning_rate": 5e-6,
            "eval_strategy": "steps",
            "dtype": "bfloat16",
            "auto_insert_empty_system_msg": False,
        },
    ),
    "axolotl_dpo": (
        None,
        {
            "objective": "dpo",
            "loss_type": "hinge",
            "beta": 0.2,
            "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
            "chat_template": "llama-3",
            "dataset_mixer": {"fozziethebeat/alpaca_messages_2k_dpo_test": 1.0, "owner/orca_pairs": 1.0},
            "dataset_columns": None,
            "test_size": 0.05,
            "max_length": 4096,
            "use_peft": True,
            "lora_r": 32,
            "lora_target_modules": None,
            "num_train_epochs": 4.0,
            "learning_rate": 2e-4,
            "warmup_steps": 10,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "optim": "adamw",
            "eval_strategy": "epoch",
            "dtype": "bfloat16",
        },
    ),
    "axolotl_simpo": (
        None,
        {
            "objective": "simpo",
            "beta": 10.0,
            "gamma_beta_ratio": 0.5,
            "sft_weight": 0.0,
            "use_peft": False,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "num_train_epochs": 1.0,
            "save_strategy": "steps",
            "save_steps": 400,
            "chat_template": "gemma",
        },
    ),
    "open_instruct_simpo": (
        None,
        {
            "objective": "simpo",
            "beta": 10.0,
            "gamma_beta_ratio": 0.3,
            "sft_weight": 0.0,
            "dataset_mixer": {"allenai/ultrafeedback_binarized_cleaned": 1.0, "owner/other-preferences": 0.5},
            "tokenizer_name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
            "max_grad_norm": 0.0,
            "num_train_epochs": 1.0,
            "save_steps": 1000,
            "save_total_limit": 3,
            "use_peft": False,
        },
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_whole_file_becomes_a_config_that_trains_the_same(name: str, tmp_path: Path) -> None:
    origin, expected = EXPECTED[name]
    converted = convert(FILES / f"{name}.yaml", origin)
    file = tmp_path / f"{name}.yaml"
    file.write_text(converted.text)
    config = load_config(file)
    assert config == converted.config and not config.notices
    values = config.model_dump(by_alias=True)
    assert {key: values[key] for key in expected} == expected
    theirs = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    assert not [key for key in theirs if key not in converted.text], "a key has no line that says what became of it"


def write(tmp_path: Path, **values: Any) -> Path:
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run(tmp_path: Path, origin: str | None = None, options: Options | None = None, **values: Any) -> Converted:
    return convert(write(tmp_path, **values), origin, options)


TRL = {"model_name_or_path": "m", "dataset_name": "owner/pairs"}
FACTORY = {"model_name_or_path": "m", "stage": "dpo", "dataset": "owner/pairs", "dataset_dir": "ONLINE"}
AXOLOTL = {"base_model": "m", "datasets": [{"path": "owner/pairs", "type": "chat_template.default"}]}
AXOLOTL |= {"learning_rate": 1e-6}
OPEN = {"model_name_or_path": "m", "dataset_name": "owner/pairs", "num_epochs": 1, "warmup_ratio": 0.1}
OPEN |= {"max_seq_length": 512}
QLORA = {"rl": "dpo", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16}
OPEN_LOSS = {"dpo_loss_type": "simpo", "dpo_beta": 10}
SIMPO = {"loss_type": "simpo", "beta": 10, "gamma_beta_ratio": 0.3}


@pytest.mark.parametrize(
    ("origin", "values", "expected"),
    [
        # CPOTrainer's default loss is CPO, and its default cross-entropy weight 1.
        ("trl-cpo", TRL, {"objective": "cpo", "loss_type": "sigmoid", "beta": 0.1, "sft_weight": 1.0}),
        ("trl-cpo", TRL | {"loss_type": "simpo"}, {"objective": "simpo", "gamma_beta_ratio": 5.0, "sft_weight": 1.0}),
        (
            "trl-cpo",
            TRL | {"loss_type": "alphapo", "alpha": 0.25, "beta": 10, "simpo_gamma": 1.0},
            {"objective": "alphapo", "alpha": 0.25, "gamma_beta_ratio": 0.1, "sft_weight": 0.0},
        ),
        ("trl-cpo", TRL | {"loss_type": "hinge", "cpo_alpha": 0.2}, {"objective": "cpo", "sft_weight": 0.2}),
        ("trl-dpo", TRL, {"objective": "dpo", "loss_type": "sigmoid", "beta": 0.1, "sft_weight": 0.0}),
        ("trl-dpo", TRL | {"loss_type": "apo_zero"}, {"objective": "apo_zero", "beta": 0.1}),
        ("trl-dpo", TRL | {"loss_type": "robust", "label_smoothing": 0.2}, {"objective": "robust"}),
        ("trl-dpo", TRL | {"rpo_alpha": 0.5}, {"objective": "dpo", "sft_weight": 0.5}),
        ("trl-orpo", TRL | {"beta": 0.2}, {"objective": "orpo", "beta": 0.2, "sft_over": "prompt_and_response"}),
        (None, FACTORY, {"objective": "dpo", "beta": 0.1, "use_peft": True, "lora_r": 8, "dtype": "float32"}),
        (None, FACTORY | {"pref_loss": "simpo"}, {"objective": "simpo", "gamma_beta_ratio": 5.0, "sft_weight": 0.0}),
        (None, FACTORY | {"pref_loss": "orpo"}, {"objective": "orpo", "sft_over": "response", "sft_weight": 1.0}),
        (None, FACTORY | {"pref_loss": "ipo", "finetuning_type": "full"}, {"objective": "ipo", "use_peft": False}),
        (None, FACTORY | {"pref_loss": "hinge"}, {"objective": "dpo", "loss_type": "hinge"}),
        (None, AXOLOTL | {"rl": "ipo", "rl_beta": 0.3}, {"objective": "ipo", "beta": 0.3, "warmup_ratio": 0.03}),
        (None, AXOLOTL | {"rl": "orpo", "orpo_alpha": 0.3}, {"objective": "orpo", "beta": 0.3}),
        (None, AXOLOTL | {"rl": "dpo", "trl": {"beta": 0.4}}, {"beta": 0.4, "lr_scheduler_type": "cosine"}),
        (
            None,
            OPEN | {"dpo_loss_type": "dpo", "dpo_beta": 0.2},
            {"objective": "dpo", "beta": 0.2, "max_grad_norm": 0.0},
        ),
        ("trl-dpo", TRL, {"chat_rendering": "in_context", "special_tokens_in_messages": "tokens"}),
        (
            None,
            FACTORY | {"pref_loss": "ipo", "split_special_tokens": True},
            {"chat_rendering": "in_context", "special_tokens_in_messages": "text"},
        ),
        ("trl-dpo", TRL | {"use_peft": True}, {"lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"]}),
        ("open-instruct", OPEN | SIMPO | {"use_lora": True}, {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.0}),
        (
            "open-instruct",
            OPEN | {"dpo_loss_type": "dpo_norm", "dpo_beta": 5},
            {"objective": "sigmoid_norm", "beta": 5},
        ),
    ],
)
def test_losses_and_defaults_are_those_of_the_other_trainer(
    origin: str | None, values: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = run(tmp_path, origin, **values).config.model_dump(by_alias=True)
    assert {key: config[key] for key in expected} == expected


def test_everything_that_cannot_be_kept_is_told_at_once_and_may_be_left_out(tmp_path: Path) -> None:
    values = AXOLOTL | {"rl": "dpo", "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    values |= {
        "peft_use_dora": True,
        "neftune_noise_alpha": 5,
        "optimizer": "sinkgd",
        "made_up": 1,
        "lr_scheduler": "rex",
    }
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, **values)
    message = str(caught.value)
    for part in (
        r"line \d+: `peft_use_dora: true` cannot be kept: there is no such method here",
        r"line \d+: `neftune_noise_alpha: 5` cannot be kept: noise on embeddings",
        r"line \d+: `optimizer: sinkgd` cannot be kept",
        r"line \d+: `made_up` is not known to be a key of Axolotl; if it does not matter, add --drop made_up",
        r"line \d+: `lr_scheduler` is 'rex'; expected one of linear, cosine",
    ):
        assert re.search(part, message), part
    drop = ("peft_use_dora", "neftune_noise_alpha", "optimizer", "made_up")
    with pytest.raises(ConfigError, match=r"`lora_dropout: 0\.05` cannot be honoured.*--drop lora_dropout"):
        run(tmp_path, options=Options(drop=drop), **{**values, "lr_scheduler": "cosine"})
    converted = run(tmp_path, options=Options(drop=(*drop, "lora_dropout")), **{**values, "lr_scheduler": "cosine"})
    assert "peft_use_dora: true -- left out, as --drop asks" in converted.text
    assert converted.config.lora_dropout == 0
    with pytest.raises(ConfigError, match="--drop no_such_key: the file has no such key"):
        run(tmp_path, options=Options(drop=("no_such_key",)), **AXOLOTL, rl="dpo")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (FACTORY | {"stage": "kto"}, r"`stage: kto` cannot be kept: only `stage: dpo`"),
        (FACTORY | {"quantization_bit": 4}, r"`quantization_bit: 4` cannot be kept"),
        (FACTORY | {"dataset_dir": "nowhere"}, r"dataset_info\.json, which is not in .*give the data with --data"),
        (FACTORY | {"eval_dataset": "x"}, r"`eval_dataset: x` cannot be kept: evaluation data are a split"),
        (FACTORY | {"lora_target": "lm_head"}, r"the head and the embedding get no adapter here"),
        (FACTORY | {"save_steps": 0.5}, r"`save_steps: 0\.5` cannot be kept: it is no whole number of steps"),
        (AXOLOTL | {"rl": "dpo", "special_tokens": {"eos_token": "<|x|>"}}, r"tokenizers stay as they are"),
        (AXOLOTL | {"rl": "kto"}, r"`rl: kto` cannot be kept: there are simpo, dpo, ipo and orpo"),
        (AXOLOTL | {"rl": "simpo"}, r"`rl: simpo` needs `simpo_gamma`"),
        (AXOLOTL | {"rl": "dpo", "adapter": "dora"}, r"`adapter: dora` cannot be kept: there is lora here"),
        (AXOLOTL | QLORA, r"`load_in_4bit: true` cannot be honoured: weights are not .*--drop load_in_4bit goes"),
        (AXOLOTL | {"rl": "dpo", "datasets": [{"path": "x", "type": "sharegpt"}]}, r"x has type: sharegpt"),
        (AXOLOTL | {"rl": "dpo", "datasets": [{"path": "json"}]}, r"names no file; give its `data_files`"),
        (AXOLOTL | {"rl": "dpo", "datasets": "x"}, r"expected a list of data sets"),
        (TRL | {"cpo_alpha": 1.0, "loss_type": "ipo"}, r"of CPOTrainer's losses there are simpo, alphapo"),
        (TRL | {"loss_weights": [1], "loss_type": "aot"}, r"there is no aot loss here"),
        (TRL | {"loss_weights": [1], "loss_type": {}}, r"a value is not of the kind that TRL takes"),
        (TRL | {"cpo_alpha": 0, "dataset_train_split": "prefs"}, r"training splits have `train` in their name"),
        (TRL | {"cpo_alpha": 0, "dataset_train_split": "train[:9]"}, r"is a part of one; name the split"),
        (TRL, r"does not say which of TRL's trainers .* add --from trl-dpo"),
        ({"text": 1}, r"not known to be a file of TRL, LLaMA-Factory, Axolotl, open-instruct; say with --from"),
        ({"model_name_or_path": "m", "beta": 0.1}, r"every key of it is known here, so it may need no conversion"),
        (OPEN | SIMPO | {"dataset_mixer_list": ["a", 100], "dataset_name": None}, r"a: 100 counts rows"),
        (
            OPEN | {"use_lora": True, "with_tracking": True},
            r"leaves dpo_loss_type/loss_type, dpo_beta/beta to open-",
        ),
    ],
)
def test_what_cannot_be_kept_says_what_to_do(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **values)


SECRET = "hf_" + "planted" * 5


@pytest.mark.parametrize(
    ("origin", "values", "report_to", "others"),
    [
        ("trl-cpo", TRL | {"report_to": "wandb", "project": "p"}, ["wandb"], {"project": "p"}),
        ("trl-cpo", TRL | {"report_to": ["comet_ml", "mlflow"]}, ["mlflow"], {}),
        ("trl-cpo", TRL | {"report_to": "all"}, [], {}),
        ("trl-dpo", TRL | {"push_to_hub": True, "hub_strategy": "checkpoint"}, [], {"hub_strategy": "every_save"}),
        (
            "trl-dpo",
            TRL | {"push_to_hub": True, "hub_model_id": "o/n", "hub_private_repo": True, "hub_token": SECRET},
            [],
            {"push_to_hub": True, "hub_model_id": "o/n", "hub_private_repo": True},
        ),
        ("llama-factory", FACTORY | {"report_to": ["tensorboard"], "hf_hub_token": SECRET}, ["tensorboard"], {}),
        (
            "axolotl",
            AXOLOTL | {"rl": "dpo", "wandb_project": "p", "use_tensorboard": True, "hub_model_id": "o/n"},
            ["wandb", "tensorboard"],
            {"project": "p", "push_to_hub": True, "hub_model_id": "o/n"},
        ),
        (
            "axolotl",
            AXOLOTL | {"rl": "dpo", "use_mlflow": True, "mlflow_tracking_uri": f"https://ann:{SECRET}@h.example/"},
            ["mlflow"],
            {},
        ),
        ("open-instruct", OPEN | OPEN_LOSS | {"with_tracking": True}, ["wandb"], {}),
        ("open-instruct", OPEN | OPEN_LOSS | {"report_to": "wandb"}, [], {}),
        (
            "open-instruct",
            OPEN | OPEN_LOSS | {"push_to_hub": True, "hf_entity": "o", "hf_repo_id": "n"},
            [],
            {"push_to_hub": True, "hub_model_id": "o/n"},
        ),
    ],
)
def test_trackers_and_the_hub_are_kept_and_tokens_are_not_repeated(
    origin: str, values: dict[str, Any], report_to: list[str], others: dict[str, Any], tmp_path: Path
) -> None:
    converted = run(tmp_path, origin, **values)
    assert sorted(converted.config.report_to) == sorted(report_to)
    assert {key: getattr(converted.config, key) for key in others} == others
    assert SECRET not in converted.text + "".join(converted.notes)


def test_the_names_of_llama_factorys_data_sets_are_looked_up(tmp_path: Path) -> None:
    values = FACTORY | {"dataset": "comparisons, dpo_en_demo", "dataset_dir": str(FILES / "factory_data")}
    with pytest.raises(ConfigError, match="no entry none"):
        run(tmp_path, **values | {"dataset": "none"})
    with pytest.raises(ConfigError, match="alpaca_en_demo is no ranking"):
        run(tmp_path, **values | {"dataset": "alpaca_en_demo"})
    config = run(tmp_path, **values).config
    file = str(FILES / "factory_data" / "dpo_en_demo.json")
    assert config.dataset_mixer == {"owner/comparisons": 1.0, file: 1.0}
    assert config.dataset_configs == ["english", None]
    assert config.dataset_format == {"owner/comparisons": "pairs", file: "conversation"}
    assert config.dataset_columns == {"owner/comparisons": {"prompt": "question"}, file: {"conversation": "turns"}}


def test_the_handbooks_mixture_becomes_sources_and_splits(tmp_path: Path) -> None:
    def mixture(*splits: str, weight: float = 1.0, **more: Any) -> dict[str, Any]:
        listed = [{"id": "owner/pairs", "config": "default", "split": split, "weight": weight} for split in splits]
        return {"model_name_or_path": "m", "dataset_mixture": {"datasets": listed, **more}}

    both = run(tmp_path, "trl-dpo", **mixture("train_prefs", "test_prefs", test_split_size=2000))
    assert both.config.dataset_splits == ["train_prefs", "test_prefs"] and both.config.test_size is None
    assert any("test_prefs is trained on too, and a test split of 2000 drawn from all" in note for note in both.notes)
    one = run(tmp_path, "trl-dpo", **mixture("train_a", "train_b", weight=0.5, test_split_size=0.1, seed=3)).config
    assert (one.dataset_mixer, one.dataset_splits) == ({"owner/pairs": 0.5}, ["train_a", "train_b"])
    assert (one.dataset_configs, one.test_size, one.shuffle_seed) == (["default"], 0.1, 3)
    with pytest.raises(ConfigError, match="stands in it more than once"):
        run(tmp_path, "trl-dpo", **mixture("train", "train"))


def test_the_users_own_data_stand_in_for_those_of_the_file(tmp_path: Path) -> None:
    values = FACTORY | {"dataset_dir": "nowhere"}
    config = run(tmp_path, options=Options(data=("pairs.jsonl",)), **values).config
    assert config.dataset_mixer == {"pairs.jsonl": 1.0} and config.dataset_splits == ["train"]


def test_an_adapter_on_quantised_weights_becomes_one_on_whole_weights_if_asked(tmp_path: Path) -> None:
    converted = run(tmp_path, options=Options(drop=("load_in_4bit",)), **AXOLOTL | QLORA)
    assert converted.config.use_peft and not converted.config.load_in_4bit
    assert converted.config.lora_target_modules == ["q_proj", "v_proj"]
    assert any("on weights that are not quantised" in note for note in converted.notes)


def test_keys_of_which_nothing_came_are_named(tmp_path: Path) -> None:
    text = run(tmp_path, **FACTORY, simpo_gamma=0.7, dpo_label_smoothing=0.0).text
    assert "#   simpo_gamma: 0.7 -- beside the other keys it has no effect" in text
    assert "#   dpo_label_smoothing: 0.0 -- it asks for nothing" in text
    converted = run(tmp_path, "trl-dpo", **TRL, lora_r=8, do_eval=True)
    assert "lora_r: 8 -- there is no adapter" in converted.text
    assert not load_config(write_text(tmp_path, converted.text)).notices


def write_text(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "ours.yaml"
    file.write_text(text)
    return file


def test_a_number_of_devices_fixes_the_batch(tmp_path: Path) -> None:
    values = FACTORY | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert run(tmp_path, options=Options(devices=8), **values).config.global_batch_size == 64
    assert any("--devices N" in note for note in run(tmp_path, **values).notes)


# --- files and keys of others, where ours are expected


@pytest.mark.parametrize(
    ("name", "title", "key"),
    [
        ("trl_simpo", "TRL", "simpo_gamma"),
        ("llama_factory_simpo", "LLaMA-Factory", "stage"),
        ("axolotl_dpo", "Axolotl", "base_model"),
        ("open_instruct_simpo", "open-instruct", "dataset_mixer_list"),
    ],
)
def test_a_file_of_another_trainer_is_told_from_ours(name: str, title: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"this is a {title} file \(it has .*`{key}`.*Run `jax-simpo convert"):
        load_config(FILES / f"{name}.yaml")


def test_a_file_of_the_handbook_is_not_taken_for_one_of_simpo_without_a_word(tmp_path: Path) -> None:
    values = {"model_name_or_path": "m", "dataset_mixer": {"owner/pairs": 1.0}, "beta": 0.01}
    (notice,) = load_config(write(tmp_path, **values)).notices
    assert "line 1: `beta: 0.01` is small for `objective: simpo`" in notice and "--from trl-dpo" in notice
    for said in ({"objective": "simpo"}, {"gamma_beta_ratio": 0.5}, {"beta": 2.0}, {"objective": "dpo"}):
        assert not load_config(write(tmp_path, **{**values, **said})).notices


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("cpo_alpha", "It is a key of TRL: here it is `sft_weight`."),
        ("simpo_gamma", "here it is `gamma_beta_ratio`, which is simpo_gamma / "),
        ("pref_beta", "It is a key of LLaMA-Factory: here it is `beta`."),
        ("cutoff_len", "here it is `max_length`"),
        ("lora_rank", "here it is `lora_r`"),
        ("base_model", "It is a key of Axolotl: here it is `model_name_or_path`."),
        ("micro_batch_size", "here it is `per_device_train_batch_size`"),
        ("dpo_beta", "here it is `beta`"),
        ("flash_attn", "here it is not needed: `attention` chooses the kernel"),
        ("peft_use_dora", "it cannot be kept here"),
    ],
)
def test_a_key_of_another_trainer_is_explained(key: str, hint: str) -> None:
    assert hint in help.did_you_mean(key, TrainConfig)


@pytest.mark.parametrize("key", ["xyz_alpha", "text_dropout", "bad_steps_dir", "simpo_lambda", "cpo_beta"])
def test_a_key_that_merely_looks_alike_is_not_suggested(key: str) -> None:
    assert help.did_you_mean(key, TrainConfig) == " `python -m jax_simpo.config` lists all keys."


def test_the_tables_name_keys_that_exist_and_markers_that_are_theirs_alone() -> None:
    ours = help.keys_of(TrainConfig).keys()
    for trainer in TRAINERS:
        assert not trainer.markers & (ours | foreign.KEYS) and trainer.markers <= trainer.rules.keys()
        assert trainer.defaults.keys() <= ours
        kept = {rule.key for rule in trainer.rules.values() if isinstance(rule, Keep)}
        assert kept <= ours, kept - ours
    for one in TRAINERS:
        for other in TRAINERS:
            assert one is other or not one.markers & other.markers
    assert all(recognise({key: 1}) for trainer in TRAINERS for key in trainer.markers)
    assert {trainer.name for trainer, _ in CHOICES.values()} == {trainer.name for trainer in TRAINERS}


def test_the_page_on_other_trainers_says_what_the_tables_say() -> None:
    page = (Path(__file__).parents[2] / "docs/other-trainers.md").read_text()
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| (`.+?) \|$", page, re.M)
    by_title = {trainer.title: trainer for trainer in TRAINERS}
    assert len(rows) == 16
    for keys, titles, ours in rows:
        for title in titles.split(", "):
            rules = by_title[title].rules
            own = [key.partition(":")[0] for key in re.findall(r"`(.+?)`", keys)]
            there = [meaning(rules[key]) for key in own if key in rules]
            assert there, f"{title} has none of {own}"
            named = re.findall(r"`(\w+)", ours)
            assert any(f"`{name}`" in text or f"`{name}:" in text for name in named for text in there), (title, own)
