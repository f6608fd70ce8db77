"""Adapters of ours and of peft compute the same, beside the base or merged; adapters that do not fit are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from jax_simpo import hf
from jax_simpo.errors import ConfigError, ModelError
from jax_simpo.hf import adapters
from jax_simpo.hf.config import read_model_config
from jax_simpo.hf.lora_targets import choose_targets
from jax_simpo.models import lora
from jax_simpo.models.lora import Lora
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import prepare_causal_mask
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.sharding import make_mesh

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = np.random.default_rng(0).integers(0, 320, (8, 128))
# Grouped queries; biases beside the adapters; scaled embeddings, tied head and windows that differ by layer.
TARGETS = {"llama3.1": None, "qwen2": ["q_proj", "v_proj", "self_attn.o_proj"], "gemma2": ["down_proj", "k_proj"]}


def torch_logps(model: Any) -> np.ndarray:
    """Computes the log-prob of each next token."""
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].numpy()


def jax_logps(model: Model, params: Any, mesh: Any) -> np.ndarray:
    @jax.jit
    def logps(params: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = prepare_causal_mask(positions, model.config.windows)
        hidden = model.hidden_states(params, tokens, positions, mask)
        index = positions[:, :-1]
        return target_logps(hidden, model.head(params), index, tokens[:, 1:], softcap=model.config.logit_softcap)

    with jax.set_mesh(mesh):
        return np.asarray(logps(params, jnp.asarray(TOKENS, jnp.int32)))


@dataclass(frozen=True)
class Sides:
    """A base model with an adapter that peft made, and the same model in JAX."""

    base: Path
    peft: Path
    expected: np.ndarray
    plain: np.ndarray
    model: Model
    params: Any
    mesh: Any


@pytest.fixture(scope="module", params=TARGETS)
def sides(
    request: pytest.FixtureRequest, make_hf: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Sides:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_hf(request.param)
    base.save_pretrained(folder / "base")
    plain = torch_logps(base)
    targets = TARGETS[request.param]
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=targets or "all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager"), settings
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "peft")

    adapter = adapters.find(folder / "peft")
    assert adapter is not None and adapter.base == str(folder / "base")
    config, _ = hf.load_model_config(folder / "base")
    model, mesh = Model(config, "float32", lora=adapter.lora(config)), make_mesh(fsdp=4, tensor=2)
    params = model.join(adapters.load(folder / "peft", model, mesh), hf.load_params(folder / "base", model, mesh))
    return Sides(folder / "base", folder / "peft", torch_logps(adapted.eval()), plain, model, params, mesh)


def test_an_adapter_of_peft_gives_the_same_log_probs_here(sides: Sides) -> None:
    assert np.abs(sides.expected - sides.plain).max() > 0.1  # it does something
    np.testing.assert_allclose(jax_logps(sides.model, sides.params, sides.mesh), sides.expected, atol=2e-5)


def test_an_adapter_of_ours_gives_the_same_log_probs_in_peft(sides: Sides, tmp_path: Path) -> None:
    adapters.save(sides.params, sides.model, tmp_path / "ours", base=str(sides.base))
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "ours", sides.peft))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    base = AutoModelForCausalLM.from_pretrained(sides.base, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logps(loaded), sides.expected, atol=2e-5)


def test_a_merged_adapter_gives_the_same_log_probs_in_transformers(sides: Sides, tmp_path: Path) -> None:
    hf.save_model(sides.params, sides.model, tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    np.testing.assert_allclose(torch_logps(merged.eval()), sides.expected, atol=2e-5)


def test_adapters_lie_on_the_mesh_along_the_axis_of_their_kernel(sides: Sides) -> None:
    for path in sides.model.lora.targets:  # type: ignore[union-attr]
        part, name = path.split("/")
        layer = sides.params["layers"][part][name]
        kernel, a, b = (x.sharding.spec for x in (layer["kernel"], layer["adapter"]["a"], layer["adapter"]["b"]))
        assert a[1] == kernel[1] and b[2] == kernel[2] and {kernel[1], kernel[2]} == {"fsdp", "tensor"}


# --- a model with adapters


CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def model_of(dtype: str = "float32", **changes: Any) -> Model:
    from jax_simpo.hf.config import read_model_config

    settings = Lora(**{"rank": 4, "alpha": 8, "targets": choose_targets(None, "llama"), **changes})
    return Model(read_model_config(CONFIG), dtype, lora=settings)


def test_fresh_adapters_are_drawn_as_peft_draws_them_and_leave_the_base_as_it_is() -> None:
    mesh, model = make_mesh(devices=jax.devices()[:1]), model_of(rank=16)
    adapted, base = model.split(model.init(3, mesh))
    chex.assert_trees_all_equal(base, replace(model, lora=None).init(3, mesh))
    chex.assert_trees_all_equal(adapted, model.init_trained(3, mesh))
    a, b = (adapted["layers"]["mlp"]["down"]["adapter"][key] for key in "ab")
    assert a.shape == (2, 48, 16) and b.shape == (2, 16, 32)
    bound = 48**-0.5
    # Uniform: the largest of 1,536 numbers is close to the bound, their deviation is bound / sqrt(3).
    assert 0.98 * bound < np.abs(a).max() <= bound and np.std(a) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not np.asarray(b).any()
    assert np.abs(a[0] - a[1]).max() > 0.1 * bound


def test_fresh_adapters_are_the_same_on_every_mesh() -> None:
    model = model_of()
    on_one_device = model.init_trained(0, make_mesh(devices=jax.devices()[:1]))
    chex.assert_trees_all_equal(on_one_device, jax.device_get(model.init_trained(0, make_mesh(fsdp=4, tensor=2))))


def test_the_base_is_held_in_the_compute_dtype_and_adapters_in_float32(tmp_path: Path) -> None:
    mesh, model = make_mesh(devices=jax.devices()[:1]), model_of("bfloat16")
    plain = replace(model, lora=None)
    (adapted, fresh), unadapted = model.split(model.init(0, mesh)), plain.init(0, mesh)
    hf.save_model(unadapted, plain, tmp_path / "base", "float32")
    loaded = hf.load_params(tmp_path / "base", model, mesh)
    chex.assert_trees_all_equal(fresh, loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), unadapted))

    def dtypes(params: Any) -> set[str]:
        return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}

    assert dtypes(loaded) == dtypes(fresh) == {"bfloat16"}
    assert dtypes(adapted) == dtypes(hf.load_params(tmp_path / "base", plain, mesh)) == {"float32"}


def test_join_undoes_split() -> None:
    model = model_of(targets=("attention/q",))
    trained, frozen = model.split(model.abstract)
    assert trained == {"layers": {"attention": {"q": {"adapter": trained["layers"]["attention"]["q"]["adapter"]}}}}
    assert model.join(trained, frozen) == model.abstract
    assert "adapter" not in str(frozen) and model.trained_count == 2 * 4 * (32 + 32)
    assert model.parameter_count == model.trained_count + replace(model, lora=None).parameter_count
    plain = replace(model, lora=None)
    assert plain.split(plain.abstract) == (plain.abstract, {}) and plain.trained_count == plain.parameter_count


# --- names


def test_targets_are_named_as_in_peft() -> None:
    assert choose_targets(["v_proj", "q_proj"], "llama") == ("attention/q", "attention/v")
    assert choose_targets(["self_attn.q_proj", "down_proj"], "gemma2") == ("attention/q", "mlp/down")
    assert len(choose_targets(None, "qwen2")) == 7


@pytest.mark.parametrize("name", ["qproj", "proj", "lm_head", "embed_tokens", "layers.0.self_attn.q_proj", ""])
def test_a_target_that_is_no_linear_layer_is_an_error_that_lists_the_linear_layers(name: str) -> None:
    with pytest.raises(ConfigError, match=r"lora_target_modules.*no linear layer of a llama model.*q_proj, k_proj, v_"):
        choose_targets(["q_proj", name], "llama")


# --- adapter folders that do not fit


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Model]:
    """Saves a fresh adapter. Returns its folder and its model."""
    mesh, model = make_mesh(devices=jax.devices()[:1]), model_of(targets=("attention/q", "mlp/up"))
    adapters.save(model.init_trained(0, mesh), model, tmp_path / "adapter", base="a/base")
    return tmp_path / "adapter", model


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type`.* are 'IA3'"),
        ({"r": "four"}, "`r`.*'four'"),
        ({"use_rslora": True}, "`use_rslora` is True, which is not built in"),
        ({"use_dora": True}, "`use_dora`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is .*lm_head"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern`"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(fields: dict[str, Any], message: str, saved: tuple[Path, Model]) -> None:
    edit(saved[0], **fields)
    with pytest.raises(ModelError, match=message):
        adapters.find(saved[0])


def test_a_rank_that_is_not_that_of_the_tensors_is_refused(saved: tuple[Path, Model]) -> None:
    folder, model = saved
    edit(folder, r=8)
    other = replace(model, lora=replace(model.lora, rank=8))
    with pytest.raises(ModelError, match=r"lora_A.weight` has shape \[4, 32\], but .*`r`.* make it \[8, 32\]"):
        adapters.load(folder, other, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"layers.2.self_attn.q_proj.lora_A.weight` is missing: the base model has 3 layers"),
        ({"num_hidden_layers": 1}, r"layers.1.mlp.up_proj.lora_A.weight` has no place in a llama model of 1 layers"),
        (
            {"hidden_size": 64},
            r"lora_A.weight` has shape \[4, 32\].*make it \[4, 64\].*base model that the adapter was",
        ),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    changes: dict[str, Any], message: str, saved: tuple[Path, Model]
) -> None:
    folder, _ = saved
    config, adapter = read_model_config({**CONFIG, **changes}), adapters.find(folder)
    assert adapter is not None
    with pytest.raises(ModelError, match=message):
        adapters.load(folder, Model(config, lora=adapter.lora(config)), make_mesh(devices=jax.devices()[:1]))


def test_a_tensor_of_no_adapter_and_a_folder_without_tensors_are_refused(saved: tuple[Path, Model]) -> None:
    folder, model = saved
    adapter, file = adapters.find(folder), folder / "adapter_model.safetensors"
    assert adapter is not None and adapter.lora(model.config) == model.lora
    save_file({**load_file(file), "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(ModelError, match=r"`base_model.model.lm_head.lora_A.weight` has no place"):
        adapter.lora(model.config)
    file.unlink()
    with pytest.raises(ModelError, match=r"has adapter_config.json but no adapter_model.safetensors"):
        adapter.lora(model.config)


def test_a_folder_that_is_no_adapter_is_none_and_an_adapter_is_no_model(saved: tuple[Path, Model]) -> None:
    assert adapters.find(saved[0].parent) is None
    with pytest.raises(ModelError, match=r"This is an adapter; `jax-simpo export --merge`"):
        hf.load_model_config(saved[0])


def test_merging_is_done_in_float32() -> None:
    kernel, a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(64, 48), (64, 4), (4, 48)]))
    merged = lora.merged(kernel.astype(jnp.bfloat16), a, b, 1.5)
    exact = np.asarray(kernel.astype(jnp.bfloat16), np.float64) + 1.5 * np.asarray(a, np.float64) @ np.asarray(
        b, np.float64
    )
    assert merged.dtype == jnp.float32
    np.testing.assert_allclose(merged, exact, atol=1e-5)
