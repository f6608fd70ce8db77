"""Tests that weights are read and written without changing a bit, and that errors name the tensor at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from jax_simpo import hf
from jax_simpo.errors import ModelError
from jax_simpo.hf import safetensors_files, write
from jax_simpo.hf.safetensors_files import TensorWriter
from jax_simpo.models.transformer import Model
from jax_simpo.sharding import make_mesh


def load(folder: Path, **axes: int) -> tuple[Any, Model]:
    mesh = make_mesh(**(axes or {"fsdp": 4, "tensor": 2}))
    model = Model(hf.load_model_config(folder)[0])
    return hf.load_params(folder, model, mesh), model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def edit(folder: Path, **change: Any) -> None:
    """Changes tensors of a folder's single weight file; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama2", "llama3_tied", "llama3.1", "biases", "mistral", "gemma2", "qwen2", "qwen3"]
)
@pytest.mark.parametrize("read_shard", ["1GB", "60KB"], ids=["from one file", "from several"])
@pytest.mark.parametrize("write_shard", [10**9, 60_000], ids=["to one file", "to several"])
def test_weights_go_in_and_out_without_changing_a_bit(
    family: str, read_shard: str, write_shard: int, make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    make_hf(family).save_pretrained(tmp_path / "in", max_shard_size=read_shard)
    out = hf.save_model(*load(tmp_path / "in"), tmp_path / "out", "float32", max_shard_bytes=write_shard)
    assert same(weights(out), weights(tmp_path / "in"))
    assert (len(list(out.glob("*.safetensors"))) > 1) == (write_shard < 10**9)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_every_mesh_loads_the_same_parameters_in_its_own_shards(axes: dict[str, int], saved: Path) -> None:
    params, model = load(saved, **axes)
    expected, _ = load(saved, fsdp=4, tensor=2)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert jax.tree.map(lambda x: x.sharding, params) == model.shardings(make_mesh(**axes))


def test_loaded_parameters_survive_a_step_that_donates_them(saved: Path) -> None:
    params, _ = load(saved, data=2, fsdp=2, tensor=2)
    before = jax.tree.map(np.array, params)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, before)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama3.1", torch.bfloat16), ("llama3.1", torch.float16), ("gemma2", torch.bfloat16), ("qwen3", torch.bfloat16)],
)
def test_half_precision_files_are_read_exactly(
    family: str, dtype: torch.dtype, make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    make_hf(family).to(dtype).save_pretrained(tmp_path / "in")
    params, model = load(tmp_path / "in")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    out = hf.save_model(params, model, tmp_path / "out", "float32")
    assert same(weights(out), {name: tensor.float() for name, tensor in weights(tmp_path / "in").items()})
    if dtype is torch.bfloat16:
        out = hf.save_model(params, model, tmp_path / "rounded", "bfloat16")
        assert same(weights(out), weights(tmp_path / "in"))


def test_a_bfloat16_export_rounds_as_pytorch_does(saved: Path, tmp_path: Path) -> None:
    out = hf.save_model(*load(saved), tmp_path / "out", "bfloat16")
    assert same(weights(out), {name: tensor.bfloat16() for name, tensor in weights(saved).items()})


def test_parameters_without_a_mesh_are_exported_too(saved: Path, tmp_path: Path) -> None:
    params, model = load(saved)
    out = hf.save_model(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params), model, tmp_path / "out", "float32")
    assert same(weights(out), weights(saved))


@pytest.mark.parametrize("family", ["llama3.1", "mistral", "gemma2", "qwen2", "qwen2_windows", "qwen3"])
def test_transformers_loads_the_export_and_gives_the_same_logits(
    family: str, make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    make_hf(family).save_pretrained(tmp_path / "in")
    out = hf.save_model(*load(tmp_path / "in"), tmp_path / "out", "float32", max_shard_bytes=100_000)
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager") for folder in (tmp_path / "in", out)
    )
    assert type(ours) is type(theirs)
    assert ours.config.use_cache and ours.dtype == torch.float32
    assert ours.config.rope_parameters == theirs.config.rope_parameters
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


class FakeTokenizer:
    bos_token_id, eos_token_id, pad_token_id = 11, 12, 12

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_the_tokenizer_goes_along_and_names_the_tokens_of_a_fresh_model(saved: Path, tmp_path: Path) -> None:
    edit_config(saved, bos_token_id=None, eos_token_id=None)
    out = hf.save_model(*load(saved), tmp_path / "out", tokenizer=FakeTokenizer())
    assert (out / "tokenizer.json").is_file()
    assert hf.load_model_config(out)[0].eos_token_id == 12
    assert GenerationConfig.from_pretrained(out).eos_token_id == 12


def test_the_tokens_of_a_configuration_and_its_generation_settings_are_kept(saved: Path, tmp_path: Path) -> None:
    edit_config(saved, eos_token_id=[2, 7])
    (saved / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [2, 7]}')
    settings = hf.load_generation_config(saved)
    out = hf.save_model(*load(saved), tmp_path / "out", tokenizer=FakeTokenizer(), generation_config=settings)
    assert hf.load_model_config(out)[0].eos_token_id == (2, 7)
    assert GenerationConfig.from_pretrained(out).temperature == 0.6


# --- an export that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_blocks_of_rows_add_up_to_the_tensors_on_any_mesh(
    axes: dict[str, int], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (write, safetensors_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1500)  # divides nothing
    out = hf.save_model(*load(saved, **axes), tmp_path / "out", "float32", max_shard_bytes=hf.shard_bytes("50KB"))
    assert len(list(out.glob("*.safetensors"))) > 1
    assert same(weights(out), weights(saved))


def test_file_sizes_are_read_as_hugging_face_writes_them() -> None:
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "1.5kb": 1500, "2GiB": 2 * 2**30, "4096": 4096}
    assert {size: hf.shard_bytes(size) for size in sizes} == sizes
    for wrong in ("5 apples", "", "-1GB", "0.1"):
        with pytest.raises(ModelError, match="max_shard_size"):
            hf.shard_bytes(wrong)


def test_an_export_that_dies_leaves_the_former_model_and_nothing_else(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, model = load(saved)
    out = hf.save_model(params, model, tmp_path / "out" / "model", "float32")
    written = []

    def die_at_the_tenth(self: TensorWriter, name: str, rows: np.ndarray, start: int = 0) -> None:
        written.append(name)
        if len(written) == 10:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", die_at_the_tenth)
    with pytest.raises(ModelError, match=r"cannot be written there .*No space left"):
        hf.save_model(params, model, out, "bfloat16")
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert same(weights(out), weights(saved))


def test_the_next_export_clears_what_killed_ones_left(saved: Path, tmp_path: Path) -> None:
    params, model = load(saved)
    out = hf.save_model(params, model, tmp_path / "out" / "model", "float32")
    out.rename(out.with_name(".model.former"))  # killed between moving the old one away and the new one in
    out.with_name(".model.writing-123").mkdir()  # killed while writing
    hf.save_model(params, model, out, "float32")
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_an_export_does_not_replace_a_folder_with_other_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"holds '.*', which is not part of a model"):
        hf.save_model(*load(saved), tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


# --- folders that do not fit -----------------------------------------------------------------------------------------


def test_missing_tensors_are_named(saved: Path) -> None:
    edit(saved, **{"model.layers.1.mlp.up_proj.weight": None, "model.norm.weight": None})
    with pytest.raises(ModelError, match=r"`model.layers.1.mlp.up_proj.weight`, `model.norm.weight` missing"):
        load(saved)


def test_extra_tensors_are_named(saved: Path) -> None:
    edit(saved, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(ModelError, match=r"`model.layers.0.self_attn.q_norm.weight` .* has no place"):
        load(saved)


def test_fewer_layers_in_the_config_than_in_the_weights_is_an_error(saved: Path) -> None:
    edit_config(saved, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"tensor `model.layers.2.* and 4 more .* has no place"):
        load(saved)


def test_a_misshapen_tensor_is_named_with_both_shapes(saved: Path) -> None:
    edit(saved, **{"model.layers.2.mlp.down_proj.weight": torch.ones(64, 111)})
    with pytest.raises(
        ModelError, match=r"down_proj.weight` has shape \[64, 111\], but config.json makes it \[64, 112\]"
    ):
        load(saved)


def test_weights_that_are_not_floats_are_an_error(saved: Path) -> None:
    edit(saved, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"`model.norm.weight` is stored as I8"):
        load(saved)


def test_spare_rope_tensors_of_old_checkpoints_are_accepted(saved: Path) -> None:
    before = jax.device_get(load(saved)[0])
    edit(saved, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    chex.assert_trees_all_equal(jax.device_get(load(saved)[0]), before)


def test_a_tied_head_that_is_written_twice_is_accepted_only_if_it_is_the_embedding(
    make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    make_hf("llama3_tied").save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, **{"lm_head.weight": embedding.clone()})
    load(tmp_path)
    edit(tmp_path, **{"lm_head.weight": embedding + 1e-3})
    with pytest.raises(ModelError, match=r"`lm_head.weight` differs from `model.embed_tokens.weight`.*tie_word"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin but no model.safetensors.*save_pretrained"):
        load(saved)


def test_an_adapter_is_not_a_model(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        load(saved)


def test_a_file_that_was_cut_short_is_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read as safetensors"):
        load(saved)


def test_a_lost_shard_is_named(make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    make_hf().save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name} is named in model.safetensors.index.json but not there"):
        load(tmp_path)


@pytest.mark.parametrize("where", ["../outside", "absolute", "sub"])
def test_an_index_names_files_of_its_folder_only(
    where: str, make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    folder, index = tmp_path / "model", tmp_path / "model" / "model.safetensors.index.json"
    make_hf().save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    other = (folder / where if where != "absolute" else tmp_path).resolve() / shard.name
    other.parent.mkdir(exist_ok=True)
    shard.rename(other)  # it can be read there
    named = str(other) if where == "absolute" else f"{where}/{shard.name}"
    index.write_text(index.read_text().replace(shard.name, named))
    with pytest.raises(ModelError, match=r"index.json: `weight_map` names '.*', which is no file of this folder"):
        load(folder)


def test_files_that_are_links_to_elsewhere_are_read(make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    make_hf().save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    for file in (tmp_path / "plain").iterdir():  # as in the cache of the hub
        (tmp_path / "blobs").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "blobs" / f"blob-{file.name}")
        (tmp_path / "snapshots" / "linked").mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshots" / "linked" / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    linked, plain = load(tmp_path / "snapshots" / "linked")[0], load(tmp_path / "plain")[0]
    assert jax.tree.leaves(plain)
    jax.tree.map(np.testing.assert_array_equal, linked, plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": {"a": 5}}', "`weight_map` names 5, which is no file of this folder"),
        ('{"weight_map": {"a": ["x"]}}', r"`weight_map` names \['x'\]"),
        ('{"weight_map": {"a": null, "b": "x"}}', "`weight_map` names None"),
        ('{"weight_map": {"a": "\\u0000"}}', "`weight_map` names"),
        ('{"weight_map": {}}', "names no file"),
    ],
)
def test_a_broken_index_is_named(content: str, message: str, saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "x")
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=rf"model.safetensors.index.json: {message}"):
        load(saved)


def test_more_layers_in_the_config_than_in_the_weights_name_the_key(saved: Path) -> None:
    edit_config(saved, num_hidden_layers=10_000)
    with pytest.raises(ModelError, match=r"missing .*config.json asks for 10000 layers \(`num_hidden_layers`\)"):
        load(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        (f'{{"hidden_size": {"9" * 5000}}}', "not valid JSON"),
        (None, "no such file"),
    ],
)
def test_a_bad_config_file_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"config.json: {message}"):
        hf.load_model_config(tmp_path)


# --- finding the folder ----------------------------------------------------------------------------------------------


def test_a_folder_is_its_own_place_and_a_hub_id_becomes_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.resolve_model_folder(saved) == saved and not asked
    assert hf.resolve_model_folder("org/model", revision="v2") == saved
    assert (asked["name"], asked["revision"]) == ("org/model", "v2")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
def test_a_path_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(ModelError, match=f"^{name}: no such folder"):
        hf.resolve_model_folder(name)


def test_a_hub_that_does_not_answer_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"org/model: no such folder, and the hub .*no route to host.*hf auth login"):
        hf.resolve_model_folder("org/model")
