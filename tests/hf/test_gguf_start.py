"""Tests that a run starts from a GGUF file, with the model and the tokenizer in it, and exports a usual folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from jax_simpo.config import TrainConfig
from jax_simpo.run.model_card import _is_adapter
from jax_simpo.sharding import make_mesh
from jax_simpo.training.reference import start_weights
from jax_simpo.training.setup import Setup
from tests.gguf_models import write_with_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


@pytest.fixture
def model_file(make_hf: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A Llama with 400 rows of embeddings for the 360 tokens of its tokenizer."""
    return write_with_tokenizer(make_hf("llama2", vocab_size=400), tmp_path / "model.gguf", TEMPLATE)


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_run_starts_from_a_gguf_file_and_exports_a_folder(use_peft: bool, model_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model_name_or_path=str(model_file), dataset_mixer={"pairs.jsonl": 1.0}, use_peft=use_peft, dtype="float32"
    )
    setup = Setup(config, given_mesh=make_mesh(fsdp=1, devices=jax.devices()[:1]))
    tokens = setup.prompt_encoder.encode([{"role": "user", "content": "the cat"}])
    assert setup.tokenizer.decode(tokens) == "<s>user: the cat</s>"
    assert setup.end_ids == (setup.tokenizer.eos_token_id,)
    written = setup.export(setup.load_params(), tmp_path / "out")
    # peft reads no GGUF file, so an adapter would have no base.
    assert written == ("model, adapter merged: peft reads no GGUF file" if use_peft else "model")
    assert not _is_adapter(config)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.vocab_size == 400
    np.testing.assert_array_equal(
        exported.model.embed_tokens.weight.detach().numpy(), setup.load_params()["embed"]["embedding"]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE and tokenizer("the cat") == setup.tokenizer("the cat")


def test_the_weights_of_a_file_are_told_apart_by_their_content(model_file: Path) -> None:
    config = TrainConfig(model_name_or_path=str(model_file), dataset_mixer={"pairs.jsonl": 1.0})
    before = start_weights(Setup(config))
    content = bytearray(model_file.read_bytes())
    content[-1] ^= 1
    model_file.write_bytes(content)
    assert start_weights(Setup(config)) != before
