"""Tests that `inspect` draws the contents of the rows."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jax_simpo import inspection
from jax_simpo.config import load_config
from jax_simpo.data.groups import Group
from jax_simpo.data.rows import RowBatch, RowShape, build_rows
from jax_simpo.data.synthetic import make_tokenizer
from jax_simpo.inspection import Segment, find_segments, mask_cells
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.training.groups import notes_on
from jax_simpo.training.setup import Setup
from tests.pairs import make_pair, pairs
from tests.training.support import mesh_of

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def lay_out(held: list[Group], prefix_sharing: bool) -> RowBatch:
    numbered = list(enumerate(held))
    return build_rows([numbered], RowShape(128, 128, 2 * len(held) + 1), prefix_sharing=prefix_sharing)


@given(st.lists(pairs(), min_size=1, max_size=4), st.booleans())
def test_the_segments_of_a_response_spell_its_ids(held: list[Group], prefix_sharing: bool) -> None:
    row = lay_out(held, prefix_sharing)
    segments = find_segments(row)
    for number, pair in enumerate(held):
        for kind, response in zip(("chosen", "rejected"), pair.responses, strict=True):
            own = [s for s in segments if s.group == number and s.kind in ("shared", kind)]
            ids = [token for s in own for token in row.tokens[0, s.start : s.stop].tolist()]
            assert ids == response.inputs.tolist()
            assert int(response.ids[-1]) in [token for s in own for token in s.ends]


def test_segments_are_named_by_who_sees_them_and_end_with_the_predicted_token() -> None:
    row = lay_out([make_pair([1, 2, 3], [4, 5, 6, 9], [4, 7, 9]), make_pair([1], [2, 9], [3, 9])], True)
    assert find_segments(row) == [
        Segment(0, (0, 1), 2, "prompt", 0, 3),
        Segment(0, (0, 1), 2, "response", 3, 4),
        Segment(0, (0,), 2, "response", 4, 6, (9,)),
        Segment(0, (1,), 2, "response", 6, 7, (9,)),
        Segment(1, (0, 1), 2, "prompt", 7, 8),
        Segment(1, (0,), 2, "response", 8, 9, (9,)),
        Segment(1, (1,), 2, "response", 9, 10, (9,)),
    ]


def test_separate_responses_share_nothing() -> None:
    row = lay_out([make_pair([1, 2], [3, 9], [4, 9])], False)
    assert [s.name for s in find_segments(row)] == [
        *("chosen prompt", "chosen response"),
        *("rejected prompt", "rejected response"),
    ]


def test_responses_that_differ_in_their_last_token_only_end_in_one_place() -> None:
    segments = find_segments(lay_out([make_pair([1, 2], [3, 8], [3, 9])], True))
    assert segments[-1] == Segment(0, (0, 1), 2, "response", 2, 3, (8, 9))


@given(st.lists(pairs(), min_size=1, max_size=4), st.booleans())
def test_a_mask_that_is_small_enough_is_drawn_exactly(held: list[Group], prefix_sharing: bool) -> None:
    row = lay_out(held, prefix_sharing)
    mask = prepare_mask(jnp.array(row.key_end), jnp.array(row.positions), backend="dense")
    np.testing.assert_array_equal(mask_cells(row.key_end[0], 128), mask.visible()[0])


def test_a_long_mask_is_drawn_in_so_many_cells() -> None:
    picture = mask_cells(np.repeat([5000, 9000], [5000, 4000]), 64)
    assert picture.shape == (64, 64)
    assert picture[30, :31].all()
    assert not picture[40, :35].any()
    assert not np.triu(picture, 1).any()


@given(st.lists(pairs(), min_size=1, max_size=4), st.integers(2, 9))
def test_a_cell_of_the_mask_is_filled_if_any_of_it_is_visible(held: list[Group], columns: int) -> None:
    key_end = lay_out(held, True).key_end[0]
    length = len(key_end)
    place = np.arange(length)
    visible = (place[None] <= place[:, None]) & (place[:, None] < key_end[None])
    cell = -(-length // columns)
    for (i, j), filled in np.ndenumerate(mask_cells(key_end, columns)):
        assert filled == visible[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].any()


def test_text_of_the_data_cannot_steer_the_terminal() -> None:
    assert inspection.printable("a\x1b[31mb\n\u202ec\r") == "a\\x1b[31mb\u23ce\\u202ec\\r"


def test_token_texts_keep_characters_whole(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bpe4k")
    text = "naïve 🙂 café 日本"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    assert "".join(inspection.token_texts(ids, tokenizer)).strip() == text


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    overrides = [f"--data_cache_dir={tmp_path}", "--model_config.num_hidden_layers=1", "--global_batch_size=16"]
    config = load_config(QUICKSTART, overrides)
    return Setup(config, any_mesh=True)


def test_micro_batches_are_shown_with_the_reason_for_their_size(setup: Setup) -> None:
    changes = {"rows_per_device": "auto", "row_length": 256, "mesh": setup.config.mesh}
    texts = {}
    for rows in (2, "auto"):
        changed = Setup(
            setup.config.model_copy(update={**changes, "rows_per_device": rows}), given_mesh=mesh_of((1, 1, 1))
        )
        out = io.StringIO()
        inspection.show(changed, None, 1, Console(file=out, width=200))
        texts[rows] = next(line for line in out.getvalue().splitlines() if line.startswith("micro-batch "))
    assert "a step, of 2 rows a device (`rows_per_device`)" in texts[2]
    # A step of 16 short pairs is far from what the memory holds.
    assert re.search(
        r" 1 micro-batch a step, of \d+ rows a device \(`rows_per_device: auto`: a step fills", texts["auto"]
    )


def test_rows_and_figures_are_readable_without_color(setup: Setup) -> None:
    out = io.StringIO()
    inspection.show(setup, "test", 2, Console(file=out, width=120))
    text = out.getvalue()
    assert "\x1b" not in text
    for part in ("row 0 (step 1)", "row 1 (step 1)", " shared prompt [", "chosen response [", "-> <|end|>"):
        assert part in text
    for part in ("mask: queries down", "█", "test: 512 pairs", "packing fill", "padding", "saved by prefix sharing"):
        assert part in text
    assert "row 2 (" not in text
    assert "simpo (beta 2.5, gamma_beta_ratio 0.5, loss_type sigmoid" in text and "reference" not in text


def test_the_objective_its_reference_and_the_weights_are_shown(tmp_path: Path) -> None:
    row = {"prompt": "a tea for Anna", "chosen": "one tea", "rejected": "one coffee"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**row, "trust": weight}) + "\n" for weight in (0.5, 1, 3)))
    changes = [f"--dataset_mixer={{{file}: 1.0}}", "--weight_column=trust", "--objective=dpo", "--beta=0.1"]
    config = load_config(QUICKSTART, [*changes, "--gamma_beta_ratio=null", "--sft_weight=0"])
    out = io.StringIO()
    inspection.show(Setup(config), None, 0, Console(file=out, width=200))
    text = out.getvalue()
    assert "dpo (beta 0.1, loss_type sigmoid, label_smoothing 0" in text
    assert "the model that the run starts from" in text
    assert "0.5 to 3, median 1, mean 1.5 (`trust`)" in text


def test_messages_with_the_text_of_a_special_token_are_counted_and_noted(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a tea <|end|>", "chosen": "one tea", "rejected": "one coffee"}) + "\n")
    config = load_config(QUICKSTART, [f"--dataset_mixer={{{file}: 1.0}}", f"--data_cache_dir={tmp_path}"])
    setup, out = Setup(config), io.StringIO()
    inspection.show(setup, None, 0, Console(file=out, width=300))
    told = f"1 message holds the text of a special token, such as <|end|> in {file}, row 0 (line 1); it is read as"
    assert f"special tokens           {told}" in out.getvalue()
    assert [note for note in notes_on(setup.train_pairs()) if note.startswith(f"note: {told}")]


def test_the_training_pairs_are_shown_in_the_order_of_training(setup: Setup) -> None:
    out = io.StringIO()
    inspection.show(setup, None, 1, Console(file=out, width=120))
    plan = setup.step_plan(setup.train_pairs(), batch=16, seed=setup.config.seed)
    first = plan.step(0)
    number = int(first.rows[0][0])
    prompt = setup.train_pairs().texts(int(first.groups[number])).prompt
    assert f"pair {number} shared prompt" in out.getvalue()
    assert prompt[:40] in out.getvalue()


def test_json_has_one_object_per_pair_in_input_order(setup: Setup) -> None:
    file = io.StringIO()
    inspection.write_json(setup, "test", file)
    objects = [json.loads(line) for line in file.getvalue().split("\n") if line]
    assert [o["row"] for o in objects] == list(range(512))
    tokenizer = make_tokenizer("cafe")
    first = objects[0]
    assert tokenizer.decode(first["chosen_input_ids"]) == first["text_prompt"] + first["text_chosen"]


def test_inspect_says_how_the_data_was_read_and_shows_what_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"question": f"tea {n % 4}", "chosen": f"a cup {n}", "rejected": "no", "id": n} for n in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    overrides = [f"--dataset_mixer={{{file}: 1.0}}", "--dataset_splits=[train]", "--test_size=0.25"]
    config = load_config(QUICKSTART, [*overrides, f"--data_cache_dir={tmp_path / 'cache'}"])
    assert config.eval_splits == ["held_out"]
    setup = Setup(config, given_mesh=mesh_of((1, 1, 1)))
    assert (len(setup.train_pairs()), len(setup.eval_pairs())) == (15, 5)
    console = Console(file=io.StringIO(), width=300)
    inspection.show(setup, "held_out", 0, console)
    shown = console.file.getvalue()
    read = "pairs.jsonl: read as pairs (prompt from question, chosen, rejected); columns not used: id"
    assert "held_out: 5 pairs" in shown and read in shown
    assert read in notes_on(setup.train_pairs())[0]
