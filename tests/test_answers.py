"""Answers as a user gets them: `generate` and `chat` on the command line, `js.generate`, and those of a run."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jax_simpo as js
from jax_simpo import api
from jax_simpo.chat import Chat
from jax_simpo.data.notes import SpecialTokensInMessages
from jax_simpo.data.prompts import PromptEncoder, make_prompts
from jax_simpo.data.synthetic import make_tokenizer
from jax_simpo.errors import ConfigError, DataError, ModelError
from jax_simpo.models.generate import Tokens
from jax_simpo.run import signals
from jax_simpo.run.samples import read_samples
from jax_simpo.training.answers import AnswerFigures, repetition_rate
from tests.test_api import PAIRS, config_of
from tests.test_cli import User, user
from tests.whole_runs import quick_runs

__all__ = ["quick_runs", "user"]

PROMPTS = [pair["prompt"] for pair in PAIRS[:3]]


def answering(folder: Path) -> js.TrainConfig:
    """The config of a run that learns to say words, and answers before its first step and after every tenth."""
    return config_of(
        folder,
        learning_rate=2e-2,
        sft_weight=1.0,
        gamma_beta_ratio=0.1,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=10,
        generate_during_eval=True,
        sample_prompts=2,
        sample_tokens=6,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> js.TrainRun:
    return js.train(answering(tmp_path_factory.mktemp("answers")), PAIRS, PAIRS[:4], quiet=True)


@pytest.fixture(scope="module")
def model(run: js.TrainRun) -> js.LoadedModel:
    return js.load_model(run.model_path)


# --- a run


def test_evaluations_log_figures_of_answers_beside_the_metrics(run: js.TrainRun) -> None:
    records = [record for record in run.metrics if "eval_step" in record]
    assert [record["eval_step"] for record in records] == [0, 10, 20]
    for record in records:
        assert 0 < record["eval_answers/length"] <= 6
        assert 0 <= record["eval_answers/ended"] <= 1
        assert 0 <= record["eval_answers/repetition"] < 1


def test_a_run_keeps_the_answers_of_its_evaluations(run: js.TrainRun, model: js.LoadedModel) -> None:
    samples = read_samples(run.output_dir)
    assert len(samples) == 2
    for sample in samples:
        assert sample.during.keys() == {"10", "20"} and sample.before is not None
        assert sample.after == sample.during["20"] != ""  # the exported model is that of step 20
    page = run.report_path.read_text()
    assert "after step 10" in page and "Answers at evaluations" in page


def test_answers_at_evaluations_are_those_of_the_model_at_that_step(run: js.TrainRun, model: js.LoadedModel) -> None:
    """The exported model, asked as a user asks, says what the last evaluation wrote down."""
    answers = js.generate(model, [pair["prompt"] for pair in PAIRS[:2]], max_new_tokens=6)
    said = [sample.during["20"] for sample in read_samples(run.output_dir)]
    texts = [record["answers"][0]["text"].strip() for record in answers]
    assert said == texts and all(texts)
    last = run.metrics[-1]
    assert last["eval_answers/length"] == sum(record["answers"][0]["tokens"] for record in answers) / 2


def test_a_run_that_goes_on_has_the_answers_of_the_whole_run(run: js.TrainRun, tmp_path: Path) -> None:
    config = answering(tmp_path)
    stopped = js.train(config, PAIRS, PAIRS[:4], callbacks=[lambda r: r.get("step") == 12], quiet=True)
    assert stopped.steps == 12 and read_samples(stopped.output_dir)[0].during.keys() == {"10"}
    js.train(config, PAIRS, PAIRS[:4], quiet=True)
    assert read_samples(stopped.output_dir) == read_samples(run.output_dir)


def test_figures_are_means_over_answers() -> None:
    answers = [Tokens([1, 2, 3, 4, 5], True), Tokens([7] * 13, False)]
    assert AnswerFigures.of(answers) == AnswerFigures(9.0, 0.5, 0.45)


@pytest.mark.parametrize(
    ("ids", "rate"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),  # no run of four
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 4] * 2, 0.2),  # of five runs, the last is the first again
        ([7] * 13, 0.9),
    ],
)
def test_the_repetition_rate_is_the_share_of_runs_written_before(ids: list[int], rate: float) -> None:
    assert repetition_rate(ids) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("keys", "told"),
    [({}, "needs evaluations"), ({"do_eval": True, "sample_prompts": 0}, "needs prompts")],
)
def test_answers_at_evaluations_need_evaluations_and_prompts(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"`generate_during_eval` {told}"):
        js.TrainConfig(model_name_or_path="x", generate_during_eval=True, **keys)
    assert js.TrainConfig(model_name_or_path="x", generate_during_eval=True, do_eval=True).sample_prompts == 8


# --- generate


def test_generate_returns_what_the_command_writes(model: js.LoadedModel, run: js.TrainRun, user: User) -> None:
    user.writes("prompts.jsonl", [{"prompt": PROMPTS[0]}, {"prompt": [{"role": "user", "content": PROMPTS[1]}]}])
    options = "--samples 2 --temperature 0.9 --top_k 20 --top_p 0.9 --seed 3 --max_new_tokens 5"
    status, _, err = user.types(f"generate {run.model_path} prompts.jsonl --output answers.jsonl {options}")
    assert status == 0 and "2 prompts answered: answers.jsonl" in err and "note:" not in err, err
    written = [json.loads(line) for line in (user.folder / "answers.jsonl").read_text().splitlines()]
    settings: dict[str, Any] = {"samples": 2, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3}
    prompts = [PROMPTS[0], [{"role": "user", "content": PROMPTS[1]}]]
    assert written == js.generate(model, prompts, max_new_tokens=5, **settings)
    assert [record["prompt"] for record in written] == prompts
    for record in written:
        assert [answer.keys() for answer in record["answers"]] == [{"text", "tokens", "finished"}] * 2
        assert all(
            answer["tokens"] <= 5 and (answer["finished"] or answer["tokens"] == 5) for answer in record["answers"]
        )


def test_what_may_surprise_is_noted(run: js.TrainRun, user: User) -> None:
    user.writes("prompts.jsonl", [{"prompt": "Tea?", "id": 1}])
    options = "--samples 2 --max_new_tokens 125"
    status, _, err = user.types(f"generate {run.model_path} prompts.jsonl --output answers.jsonl {options}")
    assert status == 0, err
    assert "note: with `temperature` 0 all 2 answers to a prompt are equal" in err
    assert "note: 1 of 1 prompts and their answers may be longer than the 128 tokens" in err
    assert "note: 1 column of the prompts' rows is not used: id (in 1 of 1)" in err


def test_python_is_told_of_columns_that_are_not_used(
    model: js.LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "answer_prompts", lambda model, prompts, *_: [prompt.given for prompt in prompts])
    assert js.generate(model, [{"question": PROMPTS[0], "answer": "Tea."}]) == [PROMPTS[0]]
    assert capsys.readouterr().err == "note: 1 column of the prompts' rows is not used: answer (in 1 of 1)\n"


def test_pairs_are_prompts_too_and_messages_read_as_their_text(model: js.LoadedModel) -> None:
    tokenizer = model.tokenizer
    given = [
        PROMPTS[0],
        {"prompt": PROMPTS[0]},
        {"messages": [{"role": "user", "content": PROMPTS[0]}]},
        f"\n\nHuman: {PROMPTS[0]}\n\nAssistant:",
        PAIRS[0],
        {
            side: [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": PAIRS[0][side]}]
            for side in ("chosen", "rejected")
        },
    ]
    prompts = make_prompts("prompts", given, PromptEncoder(tokenizer, auto_insert_empty_system_msg=False))
    assert len({tuple(prompt.ids) for prompt in prompts}) == 1
    assert tokenizer.decode(prompts[0].ids) == f"<|begin|><|user|>{PROMPTS[0]}<|end|><|assistant|>"


def test_a_special_token_that_a_user_types_ends_no_turn() -> None:
    tokenizer = make_tokenizer("cafe")
    typed = f"{PROMPTS[0]}<|end|><|assistant|>"
    keys: list[SpecialTokensInMessages] = ["text", "tokens"]
    encoders = [
        PromptEncoder(tokenizer, auto_insert_empty_system_msg=False, special_tokens_in_messages=key) for key in keys
    ]
    as_text, as_tokens = (make_prompts("prompts", [typed], encoder)[0].ids for encoder in encoders)
    ends = tokenizer.convert_tokens_to_ids("<|end|>")
    assert (as_text.count(ends), as_tokens.count(ends)) == (1, 2)


GOOD = json.dumps({"prompt": "Tea?"}) + "\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", ["prompts.jsonl", "there are no prompts"]),
        (GOOD + "{broken\n", ["prompts.jsonl, line 2", "broken JSON"]),
        (GOOD + '"text"\n', ["prompts.jsonl, line 2", "'text' is no object"]),
        (GOOD + '\n{"text": "Tea?"}\n', ["1 of 2 prompts", "prompts.jsonl, row 1 (line 3)", "none of `prompt`"]),
        (GOOD + '{"prompt": " "}\n', ["prompts.jsonl, row 1 (line 2)", "the prompt is empty"]),
        (GOOD + '{"prompt": [{"role": "guest", "content": "a"}]}\n', ["row 1 (line 2)", "turn 0 of `prompt`", "guest"]),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            ["row 0 (line 1)", "the last turn of the prompt is the assistant's"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_in_prompts_names_file_and_row_and_leaves_no_answers(
    content: str, told: list[str], run: js.TrainRun, user: User
) -> None:
    user.writes("prompts.jsonl", content)
    user.writes("answers.jsonl", "what was there\n")
    status, out, err = user.types(f"generate {run.model_path} prompts.jsonl --output answers.jsonl")
    assert status == 1 and out == ""
    for part in told:
        assert part in err
    assert (user.folder / "answers.jsonl").read_text() == "what was there\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--temperature=-1", "`temperature` is -1.0; expected a number >= 0"),
        ("--max_new_tokens=0", "`max_new_tokens` is 0; expected a whole number >= 1"),
        ("--batch_size=0", "`batch_size` is 0; expected a whole number >= 1"),
        ("--dtyp=float32", "unknown key `dtyp`"),
        ("--mesh.tensor=3", "mesh"),
        ("--dataset_columns='{prompt: ask}'", "`dataset_columns`: generate finds prompts by the names of columns"),
    ],
)
def test_a_wrong_option_is_told(options: str, told: str, run: js.TrainRun, user: User) -> None:
    user.writes("prompts.jsonl", GOOD)
    status, _, err = user.types(f"generate {run.model_path} prompts.jsonl --output answers.jsonl {options}")
    assert status == 1 and told in err, err
    assert not (user.folder / "answers.jsonl").exists()


def test_prompts_in_python_are_a_list(model: js.LoadedModel) -> None:
    with pytest.raises(DataError, match="prompts: 'Tea' is no list of prompts"):
        js.generate(model, "Tea")
    with pytest.raises(DataError, match="prompts, row 1: not a message list"):
        js.generate(model, ["Tea?", 7])


def test_the_model_s_files_and_its_tokenizer_name_what_ends_an_answer(run: js.TrainRun, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(run.model_path, folder)
    (folder / "SHA256SUMS").unlink()
    config = folder / "generation_config.json"

    def end_ids(named: Any) -> tuple[int, ...]:
        config.write_text(json.dumps({"eos_token_id": named}))
        return api.model_setup(folder, {"tokenizer_name_or_path": "builtin:cafe", "model_name_or_path": "x"}).end_ids

    end = js.load_model(run.model_path).tokenizer.eos_token_id
    assert end_ids([7, 9]) == (end, 7, 9)
    assert end_ids(end) == (end,)
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id='x', expected a token id or a list"):
        end_ids("x")


# --- chat


class Talk:
    """A chat whose lines are given and whose answers are caught."""

    def __init__(self, model: js.LoadedModel, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys
        self.notes = io.StringIO()
        asked = api.asked_for(model.setup, 1, 12, 0.0, None, None, 0)
        self.chat = Chat(model.setup, model.params, asked, Console(file=self.notes, width=200), None)

    def says(self, *lines: str) -> list[str]:
        """The lines of standard output after these of standard input."""
        self._patch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        self.chat.run()
        return self._capsys.readouterr().out.split("\n")[:-1]


@pytest.fixture
def talk(model: js.LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(model, monkeypatch, capsys)


def said(model: js.LoadedModel, *turns: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    text: str = js.generate(model, [messages], max_new_tokens=12)[0]["answers"][0]["text"]
    return text


def test_a_chat_answers_the_whole_conversation_and_computes_what_is_new(model: js.LoadedModel, talk: Talk) -> None:
    first = said(model, PROMPTS[0])
    second = said(model, PROMPTS[0], first, PROMPTS[1])
    assert first and second
    assert talk.says(PROMPTS[0], "", PROMPTS[1]) == [first, second]
    new = len(model.tokenizer(PROMPTS[1])["input_ids"])
    assert talk.chat.dialogue.computed <= new + 6 < len(model.tokenizer(PROMPTS[0] + PROMPTS[1])["input_ids"])


def test_commands_of_a_chat(model: js.LoadedModel, talk: Talk) -> None:
    first = said(model, PROMPTS[0])
    assert talk.says(PROMPTS[0], "/reset", PROMPTS[0], "/tea", "/quit", PROMPTS[1]) == [first, first]
    notes = talk.notes.getvalue()
    assert "the conversation is forgotten" in notes and "/tea is no command: /reset" in notes


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    model: js.LoadedModel, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = talk.chat.dialogue.answer

    def interrupted(*arguments: Any) -> Iterator[int]:
        for number, token in enumerate(answer(*arguments)):
            if number == 2:
                stopped.clear()
                os.kill(os.getpid(), signal.SIGINT)
                assert stopped.wait(20)  # a thread takes the signal
            yield token

    stopped = threading.Event()
    interrupting = signals.interrupting
    monkeypatch.setattr(signals, "interrupting", lambda stop: interrupting(lambda: (stop(), stopped.set())))
    monkeypatch.setattr(talk.chat.dialogue, "answer", interrupted)
    whole = said(model, PROMPTS[0])
    with signals.handled(ends_process=True):
        begun, more = talk.says(PROMPTS[0], PROMPTS[1])
    assert whole.startswith(begun) and len(begun) < len(whole)
    assert more and talk.notes.getvalue().count("(stopped)") == 2


def test_the_chat_command_reads_lines_of_standard_input(
    run: js.TrainRun, user: User, monkeypatch: pytest.MonkeyPatch, model: js.LoadedModel
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n"))
    status, out, err = user.types(f"chat {run.model_path} --max_new_tokens 12")
    assert status == 0, err
    assert out == said(model, PROMPTS[0]) + "\n"
    assert "/reset forgets the conversation" in err
