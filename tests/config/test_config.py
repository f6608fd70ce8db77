"""Config files, overrides, their messages, and the reference page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.config import TrainConfig, help, identity_of, jax_only, load_config
from jax_simpo.errors import ConfigError
from tests.config.conftest import MINIMAL

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted((ROOT / "tests/fixtures/simpo_configs").glob("*.yaml"))
OURS = sorted((ROOT / "configs").glob("*.yaml"))
# The data sets of the prefix-sharing paper -> model, longest pair and prompt, beta, learning rate, batch.
LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
PREFIX_SHARING = {
    "capybara": (LLAMA, 2842, 2180, 0.1, 1e-6, 16),
    "hh-rlhf": (LLAMA, 1024, 768, 0.1, 1e-6, 16),
    "metamath": (LLAMA, 2048, 1536, 0.1, 1e-6, 16),
    "tldr": (LLAMA, 1024, 896, 0.1, 1e-6, 16),
    "tulu-helpsteer": (LLAMA, 2048, 1536, 0.1, 1e-6, 16),
    "ultrafeedback": ("alignment-handbook/zephyr-7b-sft-full", 1024, 512, 0.01, 5e-7, 32),
}
NO_SIMPO = ("quickstart", "quickstart-real", "zephyr-7b-dpo", *(f"dpo-{name}" for name in PREFIX_SHARING))


# --- published files


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_published_file_parses_and_its_values_arrive(path):
    config = load_config(path)
    raw = yaml.safe_load(path.read_text())
    kept = set(help.keys_of(TrainConfig)) & set(raw)
    assert len(kept) > 20
    values = config.model_dump(by_alias=True)
    assert {key: values[key] for key in kept} == {key: raw[key] for key in kept} | {"optim": "adamw"}
    assert raw["optim"] == "adamw_torch"
    assert (config.dtype, config.remat, config.eval_strategy) == ("bfloat16", "full", "steps")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_each_key_of_a_published_file_that_does_nothing_is_noticed_once(path):
    notices = load_config(path).notices
    for key in ("gradient_checkpointing_kwargs", "log_level"):
        assert len([n for n in notices if f"`{key}`" in n]) == 1
    assert not [n for n in notices if "torch_dtype" in n]  # null asks for nothing


def test_the_gamma_of_the_first_published_files_becomes_the_ratio_that_replaced_it():
    folder = ROOT / "tests/fixtures/simpo_configs"
    first, later = (load_config(folder / f"mistral-7b-base{which}.yaml") for which in ("-first", ""))
    assert first.gamma_beta_ratio == later.gamma_beta_ratio == 0.8


@pytest.mark.parametrize("path", [p for p in OURS if p.stem not in NO_SIMPO], ids=lambda p: p.stem)
def test_our_file_of_a_published_run_has_the_published_mathematics(path):
    ours, theirs = (identity_of(load_config(p)) for p in (path, ROOT / "tests/fixtures/simpo_configs" / path.name))
    ours.pop("chat_template"), theirs.pop("chat_template")  # named here, guessed or written out there
    # Ours say how the original wrote answers; its own files leave that to the defaults.
    assert ours.pop("chat_rendering") == "original" and ours.pop("special_tokens_in_messages") == "tokens"
    assert ours == theirs
    assert load_config(path).global_batch_size == 128
    assert load_config(path).notices == ()


def test_there_is_a_config_for_every_published_run():
    assert {p.stem for p in PUBLISHED if not p.stem.endswith("first")} == {p.stem for p in OURS} - set(NO_SIMPO)


def test_the_dpo_recipe_of_zephyr_is_the_published_one():
    config = load_config(ROOT / "configs/zephyr-7b-dpo.yaml")
    assert (config.objective, config.beta, config.learning_rate) == ("dpo", 0.01, 5e-7)
    assert (config.max_length, config.max_prompt_length, config.global_batch_size) == (1024, 512, 128)
    assert (config.lr_scheduler_type, config.warmup_ratio, config.num_train_epochs) == ("cosine", 0.1, 1)
    assert config.gamma_beta_ratio is None and config.ref_model_name_or_path is None and config.notices == ()


@pytest.mark.parametrize("name", PREFIX_SHARING)
def test_there_is_a_dpo_config_for_every_data_set_of_the_prefix_sharing_paper(name):
    config = load_config(ROOT / f"configs/dpo-{name}.yaml")
    lengths = config.max_length, config.max_prompt_length
    measured = (config.model_name_or_path, *lengths, config.beta, config.learning_rate, config.global_batch_size)
    assert measured == PREFIX_SHARING[name]
    assert (config.objective, config.lr_scheduler_type, config.warmup_ratio) == ("dpo", "linear", 0.1)
    assert config.do_eval == bool(config.eval_splits) and config.notices == ()


def test_the_quickstart_needs_no_network():
    config = load_config(ROOT / "configs/quickstart.yaml")
    assert config.model_name_or_path is None
    assert config.tokenizer_name_or_path.startswith("builtin:")
    assert all(source.startswith("builtin:") for source in config.dataset_mixer)


def test_the_quickstart_with_a_real_model_needs_no_hub_and_ends_after_half_an_hour():
    config = load_config("builtin:quickstart-real")
    assert config.model_name_or_path == "builtin:smollm2" and [*config.dataset_mixer] == ["builtin:manners"]
    assert config.max_steps * config.global_batch_size <= 1300  # whatever the size of the user's file
    assert config.do_eval and config.generate_during_eval and config.sample_prompts


# --- values and defaults


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "0.0000005", "5E-07"])
def test_a_learning_rate_is_a_number_however_it_is_written(load, text):
    assert load(base=MINIMAL.replace("1e-6", text)).learning_rate == 5e-7
    assert load("", f"--learning_rate={text}").learning_rate == 5e-7


def test_eval_strategy_no_is_not_taken_for_false(load):
    assert load("eval_strategy: no\nsave_strategy: no\n").eval_strategy == "no"


def test_whole_numbers_may_be_written_as_powers_of_ten_but_not_as_truth_values(load, message):
    assert load("", "--save_steps=1e6").save_steps == 1_000_000
    assert "`save_steps` is true; expected a whole number >= 1" in message("", "--save_steps=true")


def test_prompt_length_follows_max_length_unless_given(load):
    assert load().max_prompt_length == 1800
    assert load("max_length: 1024").max_prompt_length == 776
    assert load("max_length: 128").max_prompt_length == 64
    assert load("max_length: 1e3").max_prompt_length == 752
    assert load("max_length: 1024\nmax_prompt_length: 512").max_prompt_length == 512


def test_a_configuration_name_may_be_missing(load):
    more = "dataset_configs: [null, default]\n"
    assert load(more, "--dataset_mixer.b=1").dataset_configs == [None, "default"]


def test_evaluation_is_on_where_a_strategy_asks_for_it_and_off_where_the_user_says_so(load):
    assert not load().do_eval
    assert load("eval_strategy: steps").do_eval
    assert not load("eval_strategy: steps", "--do_eval=false").do_eval


def test_run_name_and_output_dir_come_from_the_file_name_unless_given(load):
    assert (load().run_name, load().output_dir) == ("run", "outputs/run")
    assert load("run_name: other").output_dir == "outputs/other"
    assert load("run_name: other\noutput_dir: here").output_dir == "here"


def test_splits_with_train_in_their_name_are_trained_on_and_the_others_evaluated(load):
    config = load("dataset_splits: [train_prefs, test_prefs, validation]")
    assert (config.train_splits, config.eval_splits) == (["train_prefs"], ["test_prefs", "validation"])


# --- keys of other trainers


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("bf16: true", "dtype", "bfloat16"),
        ("bf16: false", "dtype", "float32"),
        ("gradient_checkpointing: false", "remat", "none"),
        ("evaluation_strategy: epoch", "eval_strategy", "epoch"),
        ("dataset_num_proc: 3", "preprocessing_num_workers", 3),
    ],
)
def test_keys_under_another_name_act(load, line, attribute, value):
    assert getattr(load(line), attribute) == value
    assert getattr(load("", "--" + line.replace(": ", "=")), attribute) == value


def test_an_override_of_our_key_beats_the_other_name_in_the_file(load):
    assert load("bf16: true", "--dtype=float32").dtype == "float32"


def test_two_names_of_one_setting_that_disagree_are_an_error(message):
    assert "`bf16: true` and `dtype: float32` contradict each other" in message("bf16: true\ndtype: float32\n")


@pytest.mark.parametrize("line", ["fp16: true", "load_in_4bit: true", "neftune_noise_alpha: 5"])
def test_a_key_that_cannot_be_honoured_is_an_error(message, line):
    assert f"`{line}` cannot be honoured" in message(line)


def test_dropout_of_an_adapter_is_refused_with_its_line_and_left_to_the_reference(load, message):
    told = message("use_peft: true\nlora_dropout: 0.05\n")
    assert "line " in told and "`lora_dropout: 0.05` cannot be honoured" in told and "torch_ref" in told
    assert load("use_peft: true\nlora_dropout: 0\n").use_peft
    (notice,) = load("lora_dropout: 0.05").notices
    assert "`lora_dropout` has no effect without `use_peft`" in notice
    assert "`lora_modules_to_save: ['lm_head']` cannot be honoured" in message("lora_modules_to_save: [lm_head]")


def test_the_pytorch_reference_says_what_sends_its_runs_afterwards(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: a/b\ndataset_mixer: {builtin:cafe: 1.0}\nreport_to: wandb\npush_to_hub: true\n"
    )
    assert not load_config(file).notices
    told = load_config(file, torch=True).notices
    assert ["`jax-simpo track`" in told[0], "`jax-simpo push`" in told[1]] == [True, True]


@pytest.mark.parametrize("line", ["fp16: false", "use_peft: false", "report_to: none", "push_to_hub: false"])
def test_a_foreign_key_that_asks_for_nothing_passes_without_a_word(load, line):
    assert load(line).notices == ()


@pytest.mark.parametrize(
    ("line", "done"),
    [
        ("do_train: false", "do_train: true"),
        ("save_safetensors: false", "save_safetensors: true"),
        ("use_cache: false", "use_cache: true"),
        ("remove_unused_columns: false", "remove_unused_columns: true"),
        ("disable_dropout: false", "disable_dropout: true"),
        ("logging_strategy: no", "logging_strategy: steps"),
    ],
)
def test_a_foreign_key_that_asks_for_something_by_being_off_is_noticed(load, line, done):
    (notice,) = load(line).notices
    assert f"`{line.partition(':')[0]}` has no effect here" in notice
    assert load(done).notices == ()


# --- overrides


def test_overrides_reach_nested_keys_and_the_last_one_counts(load):
    config = load("mesh: {tensor: 2}", "--mesh.fsdp=4", "--mesh.fsdp=8", "--beta=3", "--model-revision=v1")
    assert config.mesh.model_dump() == {"data": 1, "fsdp": 8, "tensor": 2}
    assert (config.beta, config.model_revision) == (3.0, "v1")


def test_a_value_may_contain_equal_signs_and_template_braces(load):
    template = "{% set a = b == 'c' %}{{ a }}: # no comment"
    assert load("", f"--chat_template={template}").chat_template == template


def test_text_keys_take_text_that_looks_like_a_number(load):
    assert load("", "--output_dir=2024").output_dir == "2024"
    assert load("", "--run_name=null").run_name is None


def test_an_override_of_the_ratio_beats_gamma_in_the_file_and_the_reverse(load):
    config = load("beta: 2\ngamma: 1.6", "--gamma_beta_ratio=0.3")
    assert (config.gamma_beta_ratio, config.notices) == (0.3, ())
    assert load("beta: 2\ngamma_beta_ratio: 0.3", "--gamma=1.6").gamma_beta_ratio == 0.8
    assert load("beta: 2", "--gamma=1.6", "--gamma_beta_ratio=0.3").gamma_beta_ratio == 0.3


@pytest.mark.parametrize("source", ["path/to/file.jsonl", "a=b/file.v2.json", "org/name", "/abs/x.parquet"])
def test_a_source_with_dots_slashes_and_equal_signs_can_be_set(load, source):
    assert load("", f"--dataset_mixer.{source}=0.5").dataset_mixer == {"pairs.jsonl": 1.0, source: 0.5}


def test_sources_can_be_replaced_and_removed(load):
    assert load("", "--dataset_mixer={other.jsonl: 1}").dataset_mixer == {"other.jsonl": 1.0}
    assert load("", "--dataset_mixer.b=1", "--dataset_mixer.pairs.jsonl=null").dataset_mixer == {"b": 1.0}


def test_model_config_can_be_changed_key_by_key(load):
    base = "model_config: {model_type: llama, hidden_size: 64}\ntokenizer_name_or_path: t\ndataset_mixer: {a: 1}\n"
    config = load("", "--model_config.hidden_size=32", "--model_config.rope_parameters.rope_theta=5e5", base=base)
    assert config.new_model_config["hidden_size"] == 32
    assert config.new_model_config["rope_parameters"] == {"rope_theta": 5e5}


@pytest.mark.parametrize("argument", ["beta=3", "--beta", "-beta=3", "--=3", "3"])
def test_an_argument_of_another_form_is_answered_with_the_right_form(message, argument):
    text = message("", argument)
    assert text.startswith(f"{argument}: not an override; write `--key=value` as one argument, here `--")


# --- messages: where, which key, its value, what was expected, the nearest valid key


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            "lerning_rate: 1e-6",
            "run.yaml, line 4: unknown key `lerning_rate` (value 1e-06). Did you mean `learning_rate`?",
        ),
        ("mesh: {fsd: 2}", "run.yaml, line 4: unknown key `mesh.fsd` (value 2). Did you mean `mesh.fsdp`?"),
        ("tensor: 2", "run.yaml, line 4: unknown key `tensor` (value 2). Did you mean `mesh.tensor`?"),
        ("bf_16: true", "run.yaml, line 4: unknown key `bf_16` (value true). Did you mean `bf16`?"),
        ("beta: high", "run.yaml, line 4: `beta` is 'high'; expected a number > 0"),
        ("beta: 0", "run.yaml, line 4: `beta` is 0; expected a number > 0"),
        (
            "weight_decay: ~",
            "run.yaml, line 4: `weight_decay` is null; expected a number >= 0. For the default (0.0) leave the key out",
        ),
        ("dataset_columns: {prompt: 3}", "`dataset_columns.prompt` is 3; expected text or a mapping"),
        (
            "dataset_format: {a.jsonl: 3}",
            "`dataset_format` is {'a.jsonl': 3}; expected text or a mapping from source to",
        ),
        (
            "test_size: 1.5\ndataset_splits: [train]",
            "`test_size` is 1.5; expected a share below 1, or from 1 on a whole",
        ),
        (
            "test_size: 0.1\ndataset_splits: [train, test]",
            "`dataset_splits` names test to evaluate on; keep one of the",
        ),
        ("dataset_columns: {prompt: q, a.jsonl: {prompt: q}}", "mixes columns of all sources with columns of single"),
        ("remat: ful", "`remat` is 'ful'; expected one of none, dots, attention, full. Did you mean `full`?"),
        ("dtype: bf16", "`dtype` is 'bf16'; expected one of float32, bfloat16. Did you mean `bfloat16`?"),
        ("loss_type: sigmiod", "expected one of sigmoid, hinge. Did you mean `sigmoid`?"),
        (
            "evaluation_strategy: stps",
            "`evaluation_strategy` is 'stps'; expected one of no, steps, epoch. Did you mean",
        ),
        ("label_smoothing: 0.5", "`label_smoothing` is 0.5; expected a number >= 0 and < 0.5"),
        ("label_smoothing: 0.1\nloss_type: hinge", "`label_smoothing` has no effect with `loss_type: hinge`"),
        (
            "max_prompt_length: 2048",
            "`max_prompt_length` (2048) leaves no room for a response within `max_length` (2048)",
        ),
        ("row_length: 1000", "`row_length` is 1000; expected auto or a multiple of 128, such as 1024"),
        ("mesh: {fsdp: 0}", "`mesh.fsdp` is 0; expected a positive number, or -1"),
        ("mesh: {fsdp: x}", "`mesh.fsdp` is 'x'; expected a whole number"),
        ("mesh: {data: -1}", "only one axis of `mesh` can be -1"),
        ("max_steps: 0", "`max_steps` is 0; expected a positive number, or -1"),
        (
            "dataset_splits: train",
            "`dataset_splits` is 'train'; expected a list of text. Write `dataset_splits: [train]`",
        ),
        ("dataset_splits: [test]", "`dataset_splits` ['test'] has nothing to train on"),
        ("dataset_splits: []", "run.yaml: `dataset_splits` [] has nothing to train on"),
        ("dataset_splits: [train, test, train]", "run.yaml: `dataset_splits` names train more than once"),
        ("dataset_configs: [1]", "`dataset_configs[0]` is 1; expected text or null. Put it in quotes"),
        ("beta: '2.5'", "`beta` is '2.5'; expected a number > 0. Write 2.5 without quotes"),
        ("seed: '7'", "`seed` is '7'; expected a whole number >= 0. Write 7 without quotes"),
        ("row_length: '512'", "`row_length` is '512'; expected auto or a whole number. Write 512 without quotes"),
        ("mesh: {fsdp: '2'}", "`mesh.fsdp` is '2'; expected a whole number. Write 2 without quotes"),
        ("packing: yes", "`packing` is 'yes'; expected true or false. Write true"),
        ("packing: off", "`packing` is 'off'; expected true or false. Write false"),
        ("packing: 1", "`packing` is 1; expected true or false. Write true"),
        ("packing: 'true'", "`packing` is 'true'; expected true or false. Write true without quotes"),
        ("lr: 1e-6", "unknown key `lr` (value 1e-06). `python -m jax_simpo.config` lists all keys."),
        ("loss_type: ipo", "`loss_type` is 'ipo'; expected one of sigmoid, hinge"),
        ("? [a]\n: 1", "run.yaml, line 4: not valid YAML: a key is text, not a list or a mapping"),
        ("mesh: {[a]: 1}", "run.yaml, line 4: not valid YAML: a key is text, not a list or a mapping"),
        ("dataset_configs: [a, b]", "`dataset_configs` has 2 entries and `dataset_mixer` 1"),
        ("output_dir: 2024", "`output_dir` is 2024; expected text. Put it in quotes"),
        ("model_config: {hidden_size: 8}", "`model_name_or_path` (a model to start from) and `model_config`"),
        ("on_bad_row: ignore", "`on_bad_row` is 'ignore'; expected one of error, skip"),
        ("seed: 1.5", "`seed` is 1.5; expected a whole number >= 0"),
        ("learning_rate: 2e-6", "line 4: not valid YAML: the key `learning_rate` stands twice, first in line 3"),
        ("beta: [1", "run.yaml, line 4: not valid YAML"),
        (r'run_name: "a\e[2Jb"', r"`run_name` 'a\x1b[2Jb' holds a control character, such as a line end; give a name"),
        (r'run_name: "a\nb"', r"`run_name` 'a\nb' holds a control character"),
        (r'run_name: "a\u0085b"', r"`run_name` 'a\x85b' holds a control character"),
    ],
)
def test_a_mistake_in_the_file_is_told(message, more, expected):
    assert expected in message(more)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--lerning_rate=1e-6", "--lerning_rate=1e-6: unknown key `lerning_rate` (value 1e-06). Did you mean"),
        ("--beta=high", "--beta=high: `beta` is 'high'; expected a number > 0"),
        ("--max_length=1000", "--max_length=1000: `max_prompt_length` (1800) leaves no room"),
        ("--beta.x=1", "--beta.x=1: `beta` has no keys below it; write `--beta=VALUE`"),
        ("--mash.fsdp=1", "--mash.fsdp=1: unknown key `mash`. Did you mean `mesh`?"),
        ("--mesh={fsdp: [1}", "--mesh={fsdp: [1}: the value is not valid YAML"),
        ("--mesh={[a]: 1}", "--mesh={[a]: 1}: the value is not valid YAML (a key is text, not a list or a mapping)"),
        ("--dataset_mixer={{a.jsonl: 1}: 1}", "the value is not valid YAML (a key is text, not a list or a mapping)"),
        ("--packing=yes", "--packing=yes: `packing` is 'yes'; expected true or false. Write true"),
        ("--dataset_mixer.pairs.jsonl='1'", "expected a number from 0 to 1. Write 1 without quotes"),
        ("--dataset_mixer=pairs.jsonl", "Write `dataset_mixer: {pairs.jsonl: 1.0}`"),
        ("--dataset_mixer.pairs.jsonl=1.5", "the fraction of pairs.jsonl is 1.5; expected 0 to 1"),
        ("--dataset_mixer.pairs.jsonl=0", "`dataset_mixer` takes nothing"),
        ("--fp16=true", "--fp16=true: `fp16: true` cannot be honoured"),
    ],
)
def test_a_mistake_in_an_override_is_told(message, override, expected):
    assert expected in message("max_prompt_length: 1800", override)


def test_all_mistakes_are_told_at_once(message):
    lines = message("lerning_rate: 1\nbeta: high\nremat: ful\n").splitlines()
    assert len(lines) == 3


def test_a_model_and_data_are_required(message):
    assert "`dataset_mixer` is required" in message(base="model_name_or_path: m\n")
    assert "no model: give `model_name_or_path`" in message(base="dataset_mixer: {a: 1}\n")
    assert "give `tokenizer_name_or_path`" in message(base="dataset_mixer: {a: 1}\nmodel_config: {model_type: llama}\n")


def test_a_file_that_is_missing_empty_or_no_mapping_is_told(tmp_path, message):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file in /"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; name the YAML file in it"):
        load_config(tmp_path)
    assert "the file is empty" in message(base="# nothing\n")
    assert "expected lines of `key: value`, got a list" in message(base="- a\n- b\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "binary.yaml")


# --- round trip, page

_ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)
# `~name` is the home folder of a user, who must exist; names must not be blank.
_TEXT = _ANY_TEXT.filter(lambda text: not text.startswith("~") and bool(text.strip()))
_TRICKY = st.sampled_from(["no", "5e-7", "1:30", "0x1f", "~", "null", "true", "010", "2024-01-01", "a: b", "<<", "- x"])
_CONFIGS = st.fixed_dictionaries(
    {
        "model_name_or_path": _TEXT | _TRICKY,
        "dataset_mixer": st.dictionaries(_TEXT | _TRICKY, st.floats(0.01, 1), min_size=1, max_size=3),
    },
    optional={
        "chat_template": _TEXT | _TRICKY | st.just("{{ a }}\n  {% b: 'c' %} # d\n"),
        "run_name": _TEXT | _TRICKY,
        "output_dir": _TEXT | _TRICKY,
        "learning_rate": st.floats(1e-12, 1e3),
        "beta": st.integers(1, 100),
        "max_length": st.integers(2, 10**6),
        "row_length": st.just("auto") | st.integers(1, 100).map(lambda n: 128 * n),
        "mesh": st.fixed_dictionaries({"fsdp": st.just(-1) | st.integers(1, 8), "tensor": st.integers(1, 8)}),
        "resume_from_checkpoint": st.none() | st.booleans() | st.integers(0, 10**6) | _TRICKY,
        "save_total_limit": st.none() | st.integers(1, 9),
        "eval_strategy": st.sampled_from(["no", "steps", "epoch"]),
    },
)


@given(_CONFIGS)
def test_a_resolved_config_reads_back_as_itself(tmp_path_factory, values: dict[str, Any]):
    config = TrainConfig(**values)
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_published_config_resolved_reads_back_as_itself_without_its_notices(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert config.notices and not again.notices
    assert again == config
    assert load_config(tmp_path / "config.yaml", ["--beta=3"]) != config


def test_the_resolved_config_is_plain_yaml_for_every_reader(load):
    config = load("", "--run_name=no", "--output_dir=5e-7")
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(by_alias=True)


def test_a_config_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load().beta = 3.0


def test_every_key_is_described():
    assert all(field.description for field in help.keys_of(TrainConfig).values())


def test_the_reference_page_is_up_to_date():
    page = help.reference_page(TrainConfig)
    assert (ROOT / "docs/config.md").read_text() == page, "run `make docs`"


def test_the_module_prints_the_reference_page():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_simpo.config"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == (ROOT / "docs/config.md").read_text(), done.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("optim: adamw_8bit", "`optim` is 'adamw_8bit'; expected one of adamw, adafactor, lion, muon"),
        ("optim: adafactor\nadam_mu_dtype: bfloat16", "`adam_mu_dtype` has no effect with `optim: adafactor`"),
        ("optim: muon\nuse_peft: true", "`optim: muon` is for whole weight matrices"),
        ("lr_scheduler_type: cosine_with_min_lr", "needs either `min_lr`, the lowest learning rate, or `min_lr_rate`"),
        ("lr_scheduler_kwargs: {power: 2}", "`lr_scheduler_type: linear` has no setting `power`; it takes no settings"),
        ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1}", "`lr_end` is 1; expected less than"),
        ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: -1}", "`power` is -1; expected a number >= 0"),
        (
            "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {decay_type: wavy}",
            "`decay_type` is 'wavy'; expected one of linear, cosine, 1-sqrt",
        ),
        (
            "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 0.5}",
            "`num_decay_steps` is 0.5; expected a whole number >= 1",
        ),
        ("load_best_model_at_end: true", "`load_best_model_at_end` needs evaluations to compare"),
        ("early_stopping_patience: 3", "`early_stopping_patience` needs evaluations to compare"),
        (
            "load_best_model_at_end: true\neval_strategy: steps\nsave_strategy: 'no'",
            "`load_best_model_at_end` reads the best step from its checkpoint",
        ),
    ],
)
def test_a_setting_of_the_optimizer_or_of_the_best_model_that_cannot_work_is_an_error(message, line, told):
    assert told in message(line)


def test_a_key_that_the_optimizer_does_not_read_is_noticed(load):
    (notice,) = load("optim: adafactor\nadam_beta1: 0.8").notices
    assert "`adam_beta1` has no effect with `optim: adafactor`" in notice
    (notice,) = load("metric_for_best_model: loss").notices
    assert "has no effect without `load_best_model_at_end` or `early_stopping_patience`" in notice


def test_lion_has_the_second_decay_of_its_paper_unless_another_is_given(load):
    assert load("optim: lion_32bit").adam_beta2 == 0.99
    assert load("optim: lion\nadam_beta2: 0.95").adam_beta2 == 0.95
    assert load("").adam_beta2 == 0.999


def test_the_pytorch_reference_names_what_it_cannot_honour(load):
    assert jax_only(load("")) == {}
    reasons = jax_only(load("optim: lion\nadam_mu_dtype: bfloat16"))
    assert "`optim: lion` cannot be honoured by `python -m torch_ref`: it trains with AdamW only" in reasons["optim"]
    assert list(reasons) == ["optim", "adam_mu_dtype"]


def test_all_mistakes_of_a_kind_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\ndataset_mixer: {pairs.jsonl: 2.0}\nmax_steps: 0\nrow_length: 7\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["--max_length=100", "--max_prompt_length=200"])
    said = str(caught.value).splitlines()
    assert len(said) == 4
    for part in ("fraction of pairs.jsonl is 2.0", "--max_prompt_length=200", "`row_length` is 7", "`max_steps` is 0"):
        assert sum(part in line for line in said) == 1, part
    with pytest.raises(ConfigError, match=r"(?s)--beta: not an override.*--nokey\.x=1: unknown key"):
        load_config(file, ["--beta", "--nokey.x=1"])
    file.write_text("model_name_or_path: m\ndataset_mixer: {pairs.jsonl: 1.0}\nfp16: true\nbf16: 3\n")
    with pytest.raises(ConfigError, match=r"(?s)`fp16: true` cannot be honoured.*`bf16` is 3; expected true or false"):
        load_config(file)
