"""The keys of objectives: their defaults, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_simpo.config import TrainConfig, identity_of, load_config
from jax_simpo.config.objectives import ALL_KEYS, OBJECTIVE_KEYS, WITH_REFERENCE
from jax_simpo.errors import ConfigError
from jax_simpo.run.objective_texts import OBJECTIVE_TEXTS


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="model", **settings)


@pytest.mark.parametrize("objective", OBJECTIVE_KEYS)
def test_an_objective_has_its_own_defaults_and_leaves_other_keys_empty(objective: str, tmp_path: Path) -> None:
    config = config_of(objective=objective, dataset_mixer={"pairs.jsonl": 1.0})
    own = {"sft_weight": 0.0, "sft_over": "response", **OBJECTIVE_KEYS[objective]}
    assert {key: getattr(config, key) for key in ALL_KEYS} == {**dict.fromkeys(ALL_KEYS), **own}
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config
    assert objective in OBJECTIVE_TEXTS


def test_the_default_is_simpo_and_its_identity_has_no_other_key_than_before_there_were_objectives() -> None:
    config = config_of(beta=2.5)
    assert config.objective == "simpo" and (config.beta, config.gamma_beta_ratio) == (2.5, 0.25)
    keys = ("objective", "alpha", "delta", "dpop_lambda", "sft_over", "ref_model_name_or_path")
    assert not identity_of(config).keys() & set(keys)
    assert identity_of(config_of(objective="dpo"))["objective"] == "dpo"


def test_a_sum_takes_the_defaults_of_the_first_that_reads_a_key() -> None:
    config = config_of(objective={"dpo": 1.0, "robust": 0.5, "sft": 0.1})
    assert (config.beta, config.label_smoothing, config.sft_weight, config.loss_type) == (0.1, 0.0, 0.1, "sigmoid")
    assert config_of(objective={"cpo": 1.0}).sft_weight == 0.0  # a sum names all of its terms


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "simp"}, "`objective` simp is not known. Did you mean `simpo`?"),
        ({"objective": "zzz"}, "is not known. Expected one of simpo, alphapo"),
        ({"objective": "sft"}, "`objective` sft is not known"),
        ({"objective": {"sft": 1.0}}, "names no preference objective; add one"),
        ({"objective": {"dpo": -1.0}}, "the weight of dpo is -1.0; expected a number >= 0"),
        ({"objective": {"dpo": 0.0}}, "the weight 0"),
        ({"objective": {"dpo": "much"}}, "'much'"),
        ({"objective": 3}, "`objective` is 3; expected text or a mapping from objective to weight"),
        ({"objective": "dpo", "gamma_beta_ratio": 0.5}, "`gamma_beta_ratio` has no effect with `objective: dpo`"),
        ({"objective": "simpo", "alpha": 0.5}, "`alpha` has no effect with `objective: simpo`"),
        ({"ref_model_name_or_path": "x"}, "`ref_model_name_or_path` has no effect with `objective: simpo`"),
        ({"objective": "simper", "beta": 1.0}, "`beta` has no effect with `objective: simper`"),
        ({"objective": "dpo", "loss_type": "hinge", "label_smoothing": 0.1}, "no effect with `loss_type: hinge`"),
        ({"objective": {"dpo": 1.0}, "sft_weight": 0.1}, "write `sft: WEIGHT`"),
        ({"objective": "exo_pair", "label_smoothing": 0.0}, "needs a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("objective", OBJECTIVE_KEYS)
def test_the_page_gives_the_defaults_of_every_objective(objective: str) -> None:
    page = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{objective}` |")]
    keys = ", ".join(f"`{key}: {value}`" for key, value in OBJECTIVE_KEYS[objective].items())
    assert row.endswith(f"| {keys} |" if keys else "| |")


@pytest.mark.parametrize("objective", WITH_REFERENCE)
def test_a_reference_model_may_be_named_where_there_is_one(objective: str) -> None:
    assert config_of(objective=objective, ref_model_name_or_path="x").ref_model_name_or_path == "x"


def test_gamma_of_older_files_is_divided_by_the_objectives_beta() -> None:
    assert config_of(objective="alphapo", gamma=1.0).gamma_beta_ratio == 0.5
    assert config_of(objective="simpo", beta=4.0, gamma=1.0).gamma_beta_ratio == 0.25
