"""The commands as a user types them: what they print and write, and what each mistake is told."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from jax_simpo import cli
from jax_simpo.config import load_config
from jax_simpo.data.synthetic import make_rows
from jax_simpo.terminal import visible
from tests.training.runs import MODEL
from tests.whole_runs import quick_runs

__all__ = ["quick_runs"]

PAIRS = make_rows("cafe", "train")[:40]
BASE = {
    "model_config": MODEL,
    "tokenizer_name_or_path": "builtin:cafe",
    "max_length": 128,
    "learning_rate": 1e-3,
    "global_batch_size": 16,
    "max_steps": 4,
    "save_steps": 2,
    "dtype": "float32",
    "mesh": {"fsdp": 8},
}


class User:
    """Somebody at a prompt, in a folder of their own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.folder, self._capsys, self._patch = folder, capsys, patch
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("COLUMNS", "400")  # messages in one line

    def writes(self, name: str, rows: Any) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return name

    def configures(self, **changes: Any) -> None:
        config = {**BASE, "dataset_mixer": {"pairs.jsonl": 1.0}, "output_dir": "run", **changes}
        (self.folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))

    def types(self, command: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        self._patch.setattr("sys.argv", ["jax-simpo", *shlex.split(command)])
        with pytest.raises(SystemExit) as status:
            cli.main()
        printed = self._capsys.readouterr()
        return int(status.value.code or 0), printed.out, printed.err


@pytest.fixture
def user(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> User:
    user = User(tmp_path, capsys, monkeypatch)
    user.writes("pairs.jsonl", PAIRS)
    user.configures()
    return user


def test_train_score_eval_export_and_report_as_a_user_runs_them(user: User) -> None:
    status, _, log = user.types("train config.yaml --sample_prompts=1 --sample_tokens=4")
    assert status == 0, log
    run = user.folder / "run"
    written = {"config.yaml", "metrics.jsonl", "checkpoints", "model", "README.md", "report.html", "curves.png"}
    assert written <= {path.name for path in run.iterdir()}

    # A step of the run and the folder it was exported to are the same model.
    assert user.types("export config.yaml --output exported")[0] == 0
    by_step, by_folder = ((f"score config.yaml --split train --output {n}.jsonl --model {m}") for n, m in
                          (("step", "4"), ("folder", "exported")))  # fmt: skip
    assert user.types(by_step)[0] == user.types(by_folder)[0] == 0
    scores = [json.loads(line) for line in (user.folder / "step.jsonl").read_text().splitlines()]
    assert [score["row"] for score in scores] == list(range(40))
    assert set(scores[0]) == set(
        "row chosen_logp_sum chosen_length chosen_logp rejected_logp_sum rejected_length rejected_logp "
        "reward_chosen reward_rejected margin loss responses".split()
    )
    assert (user.folder / "step.jsonl").read_text() == (user.folder / "folder.jsonl").read_text()

    status, out, _ = user.types("eval config.yaml --split train --model exported")
    metrics = json.loads(out)
    assert metrics["eval_pairs"] == 40
    assert metrics["eval_loss"] == pytest.approx(sum(s["loss"] for s in scores) / 40, abs=1e-6)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(sum(s["margin"] > 0 for s in scores) / 40)

    status, _, err = user.types("eval config.yaml --split train --model 5")
    assert status == 1 and "--model 5" in err and "has no such step; there are: 2, 4" in err

    (run / "report.html").unlink()
    assert user.types("report config.yaml")[0] == 0 and (run / "report.html").exists()


def test_an_adapter_is_trained_scored_exported_and_merged(user: User) -> None:
    assert user.types("train config.yaml --max_steps=1")[0] == 0
    status, _, err = user.types("export config.yaml --output x --merge")
    assert status == 1 and "--merge: 1 is no adapter, there is nothing to merge" in err
    user.configures(
        model_config=None,
        model_name_or_path="run/model",
        use_peft=True,
        output_dir="adapted",
        tokenizer_name_or_path=None,
    )
    status, _, log = user.types("train config.yaml --lora_r=2 --max_steps=2")
    assert status == 0 and "frozen ones" in log, log
    assert (user.folder / "adapted/model/adapter_model.safetensors").exists()
    status, _, log = user.types("export config.yaml --lora_r=2 --output merged --merge")
    assert status == 0 and "step 2 exported (model, adapter merged)" in log
    assert (user.folder / "merged/config.json").exists()
    # Whatever the config says of adapters: a folder says itself what it is.
    user.configures()
    for name, model in {"a": "adapted/model", "b": "merged"}.items():
        status, _, log = user.types(f"score config.yaml --split train --output {name}.jsonl --model {model}")
        assert status == 0, log
    a, b = ([json.loads(line) for line in (user.folder / f"{n}.jsonl").read_text().splitlines()] for n in "ab")
    assert [x["chosen_logp"] for x in a] == pytest.approx([x["chosen_logp"] for x in b], abs=2e-5)


def test_inspect_writes_what_the_model_is_fed_in_input_order(user: User) -> None:
    assert user.types("inspect config.yaml --json fed.jsonl")[0] == 0
    fed = [json.loads(line) for line in (user.folder / "fed.jsonl").read_text().splitlines()]
    assert [pair["row"] for pair in fed] == list(range(40))
    for pair, row in zip(fed, PAIRS, strict=True):
        assert row["chosen"][0]["content"] in pair["text_prompt"]
        assert row["chosen"][1]["content"] in pair["text_chosen"]
        assert len(pair["chosen_input_ids"]) > pair["chosen_response_length"] > 0
    status, out, _ = user.types("inspect config.yaml --rows 1")
    assert status == 0 and "chosen" in out and "rejected" in out


def test_inspect_writes_the_training_pairs_of_all_train_splits_cut_to_their_fraction(user: User) -> None:
    user.writes("data/train_a.jsonl", PAIRS[:10])
    user.writes("data/train_b.jsonl", PAIRS[10:16])
    user.configures(dataset_mixer={"data": 0.5}, dataset_splits=["train_a", "train_b"])
    assert user.types("inspect config.yaml --json fed.jsonl")[0] == 0
    fed = [json.loads(line) for line in (user.folder / "fed.jsonl").read_text().splitlines()]
    assert [(Path(pair["file"]).name, pair["row"]) for pair in fed] == [
        *(("train_a.jsonl", row) for row in range(5)),
        *(("train_b.jsonl", row) for row in range(3)),
    ]


def test_inspect_plans_for_the_mesh_of_the_config_where_it_can(user: User) -> None:
    _, eight, _ = user.types("inspect config.yaml --rows 0")
    _, four, _ = user.types("inspect config.yaml --rows 0 --mesh.fsdp=4 --mesh.tensor=2")
    assert "micro-batch              8 rows" in eight
    assert "micro-batch              4 rows" in four
    status, other, notes = user.types("inspect config.yaml --rows 0 --mesh.fsdp=64")
    assert status == 0 and other == eight
    assert "fsdp=64" in notes and "Rows are planned for the devices that are here" in notes


def test_rows_of_several_files_are_told_apart_by_the_file(user: User) -> None:
    user.writes("more.jsonl", PAIRS[:2])
    user.configures(dataset_mixer={"pairs.jsonl": 1.0, "more.jsonl": 1.0})
    assert user.types("score config.yaml --split train --output scores.jsonl")[0] == 0
    scores = [json.loads(line) for line in (user.folder / "scores.jsonl").read_text().splitlines()]
    origins = [(score["file"], score["row"]) for score in scores]
    assert origins == [("more.jsonl", 0), ("more.jsonl", 1), *(("pairs.jsonl", row) for row in range(40))]


@pytest.mark.parametrize("command", ["score config.yaml --output", "inspect config.yaml --json"])
def test_a_failed_command_leaves_no_file_behind_and_empties_none(command: str, user: User) -> None:
    user.writes("kept.jsonl", "what was there\n")
    before = sorted(user.folder.iterdir())
    for file in ("kept.jsonl", "new.jsonl", "new/folder/new.jsonl"):
        status, _, err = user.types(f"{command} {file} --split tset")
        assert status == 1 and "tset" in err
    assert (user.folder / "kept.jsonl").read_text() == "what was there\n"
    assert sorted(user.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "why"), [("pairs.jsonl/x.jsonl", "Not a directory"), ("folder", "Is a directory")], ids=["file", "folder"]
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(file: str, why: str, user: User) -> None:
    (user.folder / "folder").mkdir()
    user.configures(dataset_mixer={"nowhere.jsonl": 1.0})
    status, _, err = user.types(f"score config.yaml --split train --output {file}")
    assert status == 1 and "cannot be written" in err and why in err


@pytest.mark.parametrize("command", ["eval", "score --split train --output x.jsonl", "export --output x"])
def test_a_step_that_is_not_there_is_told_before_the_pairs_are_tokenised(command: str, user: User) -> None:
    user.configures(dataset_mixer={"nowhere.jsonl": 1.0})
    name, *options = command.split(" ", 1)
    status, _, err = user.types(f"{name} config.yaml {' '.join(options)} --model 5")
    assert status == 1 and "run/checkpoints does not exist" in err


def test_paths_are_printed_as_they_are_however_long_and_odd(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = f"[bold]/{'long ' * 20}.jsonl"
    status, _, err = user.types(f"inspect config.yaml --json '{file}'")
    assert status == 0 and err.endswith(f"written: {file}\n")


def test_the_help_of_every_command_fits_80_columns_with_its_titles_whole(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    commands: Any = get_command(cli.app)
    panels = set()
    for name, command in commands.commands.items():
        titles = {getattr(parameter, "rich_help_panel", None) for parameter in command.params} - {None}
        status, out, _ = user.types(f"{name} --help")
        assert status == 0 and max(map(len, out.splitlines())) <= 80, name
        assert [title for title in titles if f" {title} " not in out] == [], name
        panels |= titles
    assert panels


def test_text_of_the_data_and_names_of_files_cannot_steer_the_terminal(user: User) -> None:
    clear, title, reverse = "\x1b[2J", "\x1b]0;owned\x07", "\u202e\x9b31m"
    file = user.writes(
        f"a{title}b/pairs{clear}.jsonl", [{"prompt": clear, "chosen": f"{reverse} tea", "rejected": title}]
    )
    user.configures(dataset_mixer={file: 1.0}, output_dir=f"run{clear}", global_batch_size=8)
    printed = "".join(
        "".join(user.types(command)[1:])
        for command in (
            "train config.yaml --max_steps=1 --sample_prompts=1 --sample_tokens=4",
            "inspect config.yaml",
            f"inspect config.yaml --json '{file}.json'",
            f"score config.yaml --split train --output '{file}.json'",
            "eval config.yaml --split train",
            f"eval config.yaml --split '{clear}'",
            f"train config.yaml '--learning_rat{title}=1'",
            f"train config.yaml '--objective={clear}'",
            f"train '{file}.yaml'",
            f"score config.yaml --split train --output x --model '{clear}'",
            f"configs '{clear}'",
        )
    )
    for part in ("run\u241b[2J", "\u241b]0;owned\u2407", "\ufffd\ufffd31m tea", "pairs scored"):
        assert part in printed
    assert visible(printed) == printed


def test_a_folder_of_files_has_their_names_as_splits(user: User) -> None:
    user.writes("data/train.jsonl", PAIRS[:30])
    user.writes("data/held.out.jsonl", PAIRS[30:])
    user.configures(dataset_mixer={"data": 1.0}, dataset_splits=["train", "held.out"], do_eval=True)
    status, out, log = user.types("eval config.yaml")
    assert status == 0, log
    assert json.loads(out)["eval_pairs"] == 10


def broken(text: str) -> Callable[[User], None]:
    """A config whose data file has this text."""
    return lambda user: user.configures(dataset_mixer={user.writes("broken.jsonl", text): 1.0})


def other_checkpoint(user: User) -> None:
    assert user.types("train config.yaml --max_steps=2")[0] == 0


def no_template(user: User) -> None:
    from jax_simpo.data.chat import load_tokenizer

    tokenizer = load_tokenizer("builtin:cafe")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(user.folder / "tokenizer")


GOOD_LINE = json.dumps(PAIRS[0]) + "\n"
SAME = '{"chosen": "b", "rejected": "b"}\n'


@pytest.mark.parametrize(
    ("prepare", "arguments", "told"),
    [
        (None, "--learning_rat=1", ["--learning_rat=1", "unknown key", "learning_rate"]),
        (None, "--loss_type=sigmoyd", ["loss_type", "sigmoyd", "sigmoid", "hinge"]),
        (None, "--max_prompt_length=128", ["max_prompt_length", "(128)", "no room for a response", "max_length"]),
        (None, "'--dataset_mixer={nowhere.jsonl: 1}'", ["nowhere.jsonl", "no such file or folder"]),
        (broken(""), "", ["broken.jsonl", "empty"]),
        (broken(GOOD_LINE + '{"chosen": [\n'), "", ["broken.jsonl", "line 2", "JSON"]),
        (broken('{"question": "a", "answer": "b"}\n'), "", ["broken.jsonl", "question", "chosen", "rejected"]),
        (broken(GOOD_LINE + SAME), "", ["broken.jsonl", "row 1 (line 2)", "on_bad_row"]),
        (no_template, "--tokenizer_name_or_path=tokenizer", ["tokenizer", "no chat template", "`chat_template`"]),
        (None, "--row_length=128 --max_length=400 --prefix_sharing=false '--dataset_mixer={long.jsonl: 1}'",
         ["long.jsonl, row 0", "128", "row_length"]),
        (None, "--mesh.fsdp=3", ["mesh", "fsdp=3", "8 cpu device(s)", "product is 8"]),
        (other_checkpoint, "--beta=9", ["run", "another run", "beta: was 2.0, is 9.0", "overwrite_output_dir"]),
        (None, "--output_dir=pairs.jsonl/run", ["pairs.jsonl/run", "cannot be written to", "Not a directory"]),
        (None, "--model_config.hidden_size=36", ["mesh axis `fsdp` has 8 devices", "hidden_size=36"]),
        (None, "--model_config.model_type=gpt2", ["model_config", "gpt2", "llama"]),
        (None, "'--dataset_mixer={{a.jsonl: 1}: 1}'", ["not valid YAML", "a key is text"]),
        (None, "--objective=mine.py:M", ["--objective=mine.py:M: `objective: mine.py:M`", "--allow_code"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_mistake_is_told_in_one_message_and_ends_in_status_1(
    prepare: Callable[[User], None] | None, arguments: str, told: list[str], user: User
) -> None:
    user.writes("long.jsonl", [{"prompt": "Anna", "chosen": "One" + " tea" * 150, "rejected": "One coffee"}])
    if prepare is not None:
        prepare(user)
    status, out, err = user.types(f"train config.yaml {arguments}")
    assert status == 1 and out == ""
    _, message = err.split("error: ")
    for part in told:
        assert part in message


def test_a_missing_config_and_a_split_that_is_not_there_are_told(user: User) -> None:
    status, _, err = user.types("train nothing.yaml")
    assert status == 1 and "error: nothing.yaml: no such config file" in err and "has config.yaml" in err
    status, _, err = user.types("train --beta=3")
    assert status == 1 and "error: --beta=3: the config file comes first" in err
    status, _, err = user.types("score config.yaml --split tset --output x.jsonl")
    assert status == 1 and "tset" in err and "train" in err


def test_skipped_rows_are_counted_and_summarised(user: User) -> None:
    broken(GOOD_LINE * 3 + SAME)(user)
    status, _, err = user.types("train config.yaml --on_bad_row=skip --max_steps=1")
    assert status == 0 and "1 of 4 rows skipped" in err


def test_convert_and_init_write_configs_that_the_other_commands_take(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = {"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0, "finetuning_type": "full"}
    factory |= {"model_name_or_path": "m", "dataset": "pairs", "cutoff_len": 128, "quantization_bit": 4}
    user.writes("factory.yaml", yaml.safe_dump(factory))
    status, _, err = user.types("train factory.yaml")
    assert status == 1 and "this is a LLaMA-Factory file" in err and "jax-simpo convert factory.yaml" in err
    status, _, err = user.types("convert factory.yaml --output ours.yaml")
    assert status == 1 and "`quantization_bit: 4` cannot be kept" in err and "give the data with --data" in err
    assert not (user.folder / "ours.yaml").exists()
    status, _, err = user.types(
        "convert factory.yaml --output ours.yaml --data pairs.jsonl --drop quantization_bit --devices 4"
    )
    assert status == 0 and "written: ours.yaml, from a LLaMA-Factory file" in err
    ours = yaml.safe_load((user.folder / "ours.yaml").read_text())
    assert (ours["gamma_beta_ratio"], ours["global_batch_size"]) == (0.5, 32)
    assert load_config(user.folder / "ours.yaml").objective == "simpo"
    assert user.types("convert factory.yaml --output ours.yaml")[0] == 1  # it is there already

    monkeypatch.setattr("sys.stdin", io.StringIO())
    status, _, err = user.types("init new.yaml --model m")
    assert status == 1 and "there is no terminal to ask on; answer with options, such as --data" in err
    status, _, err = user.types("init new.yaml --model m --data pairs.jsonl --objective dpo --method lora")
    assert status == 0 and "Next: jax-simpo inspect new.yaml" in err
    written = yaml.safe_load((user.folder / "new.yaml").read_text())
    assert (written["objective"], written["use_peft"], written["test_size"]) == ("dpo", True, 0.05)
    assert "exists already" in user.types("init new.yaml")[2]


def test_init_asks_what_no_option_answers(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    asked: list[str] = []

    def prompt(text: str, default: str) -> str:
        asked.append(text)
        return {"Preference data": "pairs.jsonl"}.get(text.partition(" (")[0], default)

    monkeypatch.setattr("typer.prompt", prompt)
    assert user.types("init asked.yaml --model m --method lora")[0] == 0
    assert len(asked) == 3
    assert yaml.safe_load((user.folder / "asked.yaml").read_text())["dataset_mixer"] == {"pairs.jsonl": 1.0}


def test_the_schema_is_printed_for_editors(user: User) -> None:
    status, out, _ = user.types("configs --schema")
    assert status == 0 and json.loads(out)["properties"]["beta"]["description"].startswith("Scale of the rewards")
