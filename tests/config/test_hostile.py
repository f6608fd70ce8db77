"""Whatever stands in a config file or an override, the config loads, or one line says which key or line is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jax_simpo.config import TrainConfig, foreign, help, load_config
from jax_simpo.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset_mixer": "{pairs.jsonl: 1.0}"}
KEYS = [*help.keys_of(TrainConfig), *sorted(foreign.KEYS), "unknown", "mesh.fsdp", "model_config.rope_parameters"]

# Texts that YAML, Python or an operating system takes for something special.
_TRICKY = r"""
nan .nan inf -.inf 1e308 1e309 -1e308 5e-324 -0 010 0x1f 1_000 1__0 1:30 1e18 9223372036854775808 true no on ~ null <<
= * & ! !! | > % @ ` ? - -- ... --- # [] {} [[]] [null] {a} {~:~} {.nan:1} {1:2} [a [a] {a: ] 2024-01-01 2024-13-45
!!int !!float !!bool !!null !!timestamp !!binary !!set !!omap *a x.py:A :a ü "\0" "\ud800" "\uffff" "\UFFFFFFFF" "\x"
'' ""
""".split()
_TRICKY += ["{<<: 1}", "{<<: {a: 1}}", "{a: 1, a: 2}", "{~: ~}", "{.nan: 1}", "a\tb", "[" * 60 + "]" * 60]
_TRICKY += ["9" * 5000, "1" + "0" * 400, "x" * 300, "/" + "y/" * 2500]
_TAGS = ["int", "float", "bool", "null", "str", "seq", "map", "set", "omap", "binary", "timestamp", "merge", "value"]
_SCALARS = (
    st.sampled_from(_TRICKY)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.text(max_size=20)
    | st.text(max_size=20).map(json.dumps)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(_SCALARS, inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"{key}: {item}" for key, item in items.items()) + "}"
        )
        | inner.map("&a {}".format)
        | st.tuples(st.sampled_from(_TAGS), inner).map(lambda pair: f"!!{pair[0]} {pair[1]}")
    ),
    max_leaves=6,
)


def fault_of(path: Path, key: str, *overrides: str) -> str | None:
    """Returns what is wrong with how a config was read or refused; None if nothing is."""
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
        if wrong := [line for line in lines if not line.isprintable() or len(line) >= 2000]:
            return f"a line that cannot be shown, or is too long: {wrong[0][:200]!r}"
        if wrong := [line for line in lines if not line.startswith((f"{path}, line ", f"{path}: ", "--"))]:
            return f"a line that names no file and no override: {wrong[0]!r}"
        told = key.partition(".")[0] in str(error) or ", line " in str(error)
        return None if told else f"neither the key nor a line is named: {error}"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return None if load_config(path) == config else "the config is another when it is written and read again"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "run.yaml"


@settings(max_examples=300)
@given(key=st.sampled_from([key for key in KEYS if "." not in key]), value=_VALUES)
def test_any_value_in_a_file_loads_or_is_told_with_its_key_or_line(path: Path, key: str, value: str) -> None:
    lines = {**BASE, key: value}
    path.write_text("".join(f"{k}: {v}\n" for k, v in lines.items()), encoding="utf-8", errors="surrogatepass")
    assert fault_of(path, key) is None


@settings(max_examples=300)
@given(key=st.sampled_from(KEYS), value=_VALUES)
def test_any_value_of_an_override_loads_or_is_told_with_its_key(path: Path, key: str, value: str) -> None:
    path.write_text("".join(f"{k}: {v}\n" for k, v in BASE.items()), encoding="utf-8")
    assert fault_of(path, key, f"--{key}={value}") is None


@given(key=st.text(min_size=1, max_size=30))
def test_any_key_of_an_override_that_is_none_is_told(path: Path, key: str) -> None:
    known = {name.partition(".")[0] for name in KEYS}  # to a key that takes text, `[1` is one
    assume(key.partition(".")[0].replace("-", "_") not in known)
    path.write_text("".join(f"{k}: {v}\n" for k, v in BASE.items()), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"--{key}=[1"])
    assert str(caught.value).isprintable() and str(caught.value).startswith("--")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("a: &a [*a]", "line 4: not valid YAML: `*a` stands inside of what it stands for"),
        ("a: &a {<<: *a}", "line 4: not valid YAML: `*a` stands inside of what it stands for"),
        ("beta: " + "[" * 10_000, "line 4: not valid YAML: more than 50 levels of lists and mappings"),
        ("beta: " + "[" * 10_000 + "]" * 10_000, "line 4: not valid YAML: more than 50 levels of lists and mappings"),
        ("beta:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 99)), "more than 50 levels of lists and mappings"),
        ("model_config: {a: !!set {x}}", "line 4: not valid YAML: `!!set` cannot be read here"),
        ("seed: !!int x", "line 4: not valid YAML: `!!int` cannot be read here"),
        ("seed: !!timestamp x", "line 4: not valid YAML: `!!timestamp` cannot be read here"),
        ("seed: " + "9" * 5000, "line 4: not valid YAML: a number of 5,000 digits"),
        ("run_name: a\x07b", "line 4: not valid YAML: the character U+0007 cannot stand here"),
        ('run_name: "\\ud800"', "line 4: not valid YAML: the text holds half of a Unicode surrogate pair"),
        ('run_name: "\\UFFFFFFFF"', "line 4: not valid YAML: "),
        ('output_dir: "a\\0b"', "line 4: `output_dir` holds the character NUL; remove it"),
        ('data_cache_dir: ""', "line 4: `data_cache_dir` is empty; give a name or a path, or leave the key out"),
        (
            "output_dir: ~nobody-of-this-name/x",
            "line 4: `output_dir` begins with the home folder of a user who has none",
        ),
        ("output_dir: " + "x" * 300, "line 4: `output_dir` is too long"),
        ("bf16: nan\n", "line 4: `bf16` is 'nan'; expected true or false"),
        ("max_seq_length: .nan", "line 4: `max_seq_length` is nan; expected a whole number >= 2"),
        ("gamma: .inf", "line 4: `gamma` (inf) is read as gamma / beta (2.0); both must be numbers > 0"),
        ("gradient_checkpointing: true\nactivation_checkpointing: false", "`gradient_checkpointing: true` contradict"),
        ("row_length: 1000000000000000000", "a multiple of 128, such as 2147483520"),
        ("seed: 9223372036854775808", "`seed` is 9223372036854775808; expected at most 9223372036854775807: a seed"),
        ("warmup_steps: 3e9", "`warmup_steps` is 3000000000; expected at most 2147483647: the optimizer counts"),
        ("logprob_chunk: 2e6", "`logprob_chunk` is 2000000; expected at most 1048576: the logits of"),
        ("lora_r: 1e18", "`lora_r` is 1000000000000000000; expected at most 65536: no layer is as wide"),
        ("sample_tokens: 1e6", "`sample_tokens` is 1000000; expected at most 65536: "),
    ],
)
def test_a_value_that_no_run_can_use_is_told_with_its_line(message, more, told):
    assert told in message(more)


def test_aliases_that_stand_for_billions_of_values_are_refused_before_these_are_made(message):
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
    assert "more than 100,000 values, or aliases that stand for as many" in message("a0: &a0 [1]\n" + laughs)
    merges = "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 10)}]}}\n" for n in range(1, 30))
    assert "more than 100,000 values, or aliases that stand for as many" in message("b0: &b0 {k: 1}\n" + merges)


def test_aliases_and_merged_mappings_of_a_usual_size_are_read(load):
    base = "tokenizer_name_or_path: t\ndataset_mixer: {a: 1}\nmodel_config:\n"
    nested = "  rope_parameters: &rope {rope_theta: 1.0, rope_type: default}\n  other: {<<: *rope, rope_theta: 2.0}\n"
    config = load(base=base + nested + "  again: *rope\n").new_model_config
    assert config["other"] == {"rope_theta": 2.0, "rope_type": "default"}
    assert config["again"] == config["rope_parameters"]


def test_a_file_of_any_size_is_read_up_to_the_longest_config_only(tmp_path, message):
    assert "longer than 1,000,000 bytes, which no config is" in message("# " + "x" * 1_000_000)
    with pytest.raises(ConfigError, match=r"/dev/zero: longer than 1,000,000 bytes"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        load_config(tmp_path / ("x" * 300))


def test_of_thousands_of_mistakes_the_first_are_told(message):
    lines = message("".join(f"key{n}: 1\n" for n in range(5000))).split("\n")
    assert len(lines) == 51
    assert lines[0].endswith(
        "run.yaml, line 4: unknown key `key0` (value 1). `python -m jax_simpo.config` lists all keys."
    )
    assert lines[-1].endswith("these are the first of 5,000 mistakes")


def test_a_key_with_thousands_of_dots_is_told(message):
    assert "the key has 10,000 dots" in message("", "--model_config" + ".a" * 10_000 + "=1")


def test_a_value_that_a_surrogate_stands_in_is_told_in_python():
    with pytest.raises(ConfigError, match=r"`output_dir` holds bytes that are not UTF-8"):
        TrainConfig(model_name_or_path="m", output_dir="a\udcff")
