"""A tracker holds every record of a run once, under its names, however often the run was ended and continued."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from jax_simpo.cli import app
from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run import files
from jax_simpo.run.manifest import write_file
from jax_simpo.run.metrics import MetricsLog, read_metrics
from jax_simpo.run.sums import Sum, new_digest
from jax_simpo.tracking import follower, trackers
from jax_simpo.tracking.follower import NOTHING, Follower, figures_of, place_of
from jax_simpo.tracking.tracker import Ending, Start
from jax_simpo.tracking.trackers import Trackers
from tests.tracking.read_back import READERS, Points, wandb_records
from tests.training.runs import config_of, run
from tests.whole_runs import PICTURE

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "alembic"}
INSTALLED = [name for name, package in NEEDS.items() if find_spec(name) and find_spec(package)]
each_tracker = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed"))
        for name in NEEDS
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which every tracker keeps what it writes on this machine."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)  # MLflow keeps artifacts beside the program
        yield folder


def written(config: TrainConfig, records: Iterable[dict[str, Any]], *, step: int, last: int, ends: bool = True) -> str:
    """Writes records as a run does that goes on from a step; returns what it prints."""
    output, console = Path(config.output_dir), Console(record=True, width=1000, file=StringIO())
    output.mkdir(exist_ok=True)
    with Trackers(config, output, console) as tracked:
        tracked.begin(step)
        kept = b"".join(
            json.dumps(record).encode() + b"\n"
            for record in (read_metrics(output) if step else [])
            if place_of(record) <= (step, 1)
        )
        digest = new_digest()
        digest.update(kept)
        before = Sum(len(kept), digest.hexdigest()) if step else None
        with MetricsLog(output, before=before) as log:
            for record in records:
                if ((step, 1) if step else NOTHING) < place_of(record) <= (last, 1):
                    log.write(record)
                    tracked.log(record)
        tracked.finish(finished=ends)
    return console.export_text()


RECORDS: list[dict[str, Any]] = [
    {"eval_step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5},
    *({"step": step, "loss": 1 / step, "rewards/chosen": -step / 3, "learning_rate": 1e-6} for step in range(1, 9)),
    {"eval_step": 8, "eval_loss": 0.2, "eval_rewards/accuracies": 0.75},
]


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    """The output of a run that was ended two steps after a checkpoint, and continued to its end."""
    config = config_of(folder, report_to=INSTALLED, run_name="a run")
    output = Path(config.output_dir)
    written(config, RECORDS, step=0, last=6, ends=False)
    for name, content in (
        (files.CONFIG, config.to_yaml().encode()),
        (files.CARD, b"---\nlibrary_name: transformers\n---\n\n# a run\n\n## Evaluation\n"),
        (files.REPORT, b"<html>the report</html>"),
        (files.CURVES, PICTURE),
    ):
        write_file(output, name, content)
    printed = written(config, RECORDS, step=4, last=8)  # 5 and 6 are taken twice
    assert "warning: " not in printed
    return output


def points_of(output: Path, name: str) -> Points:
    state = json.loads((output / files.TRACKING).read_text())[name]
    return READERS[name](output, state["run"])


def expected(output: Path) -> dict[tuple[str, int], float]:
    return {
        (name, place_of(record)[0]): value
        for record in read_metrics(output)
        for name, value in figures_of(record).items()
    }


@each_tracker
def test_a_tracker_has_each_figure_of_metrics_jsonl_once_although_the_run_was_resumed(name: str, resumed: Path) -> None:
    points = points_of(resumed, name)
    values = expected(resumed)
    assert len(values) == 8 * 3 + 2 * 2
    assert sorted((key, step) for key, step, _ in points) == sorted(values)
    for key, step, value in points:
        assert value == pytest.approx(values[key, step], rel=1e-6), (key, step)  # TensorBoard keeps float32


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="tensorboard is not installed")
def test_tensorboard_shows_the_config_the_card_and_the_curves(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    texts = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in ("config/text_summary", "report/text_summary")
    }
    assert (resumed / files.CONFIG).read_text() in texts["config/text_summary"]
    assert [image.step for image in events.Images("curves")] == [8]
    assert "# a run" in texts["report/text_summary"] and "## Evaluation" in texts["report/text_summary"]


@pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
def test_wandb_has_the_config_and_the_files_and_one_run(resumed: Path) -> None:
    state = json.loads((resumed / files.TRACKING).read_text())["wandb"]
    records = list(wandb_records(resumed, state["run"]))
    configs = [
        {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for record in records
        if record.HasField("run")
    ]
    written = yaml.safe_load((resumed / files.CONFIG).read_text())
    assert len(configs) == 2 and all(written.items() <= config.items() for config in configs)
    folders = sorted(resumed.parent.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(state["run"]) for folder in folders)
    for name in (files.CONFIG, files.REPORT):
        assert (folders[-1] / "files/jax-simpo" / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="mlflow is not installed")
def test_mlflow_has_the_config_and_the_files_of_a_finished_run(resumed: Path) -> None:
    from mlflow import MlflowClient

    run = MlflowClient().get_run(json.loads((resumed / files.TRACKING).read_text())["mlflow"]["run"])
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert run.data.params["learning_rate"] == "0.001" and run.data.params["run_name"] == "a run"
    attached = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    assert attached == {files.CONFIG, files.REPORT, files.CARD, files.CURVES}


@pytest.mark.skipif("trackio" not in INSTALLED, reason="trackio is not installed")
def test_trackio_has_the_config_and_the_files(resumed: Path) -> None:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((resumed / files.TRACKING).read_text())["trackio"]["run"]
    written = yaml.safe_load((resumed / files.CONFIG).read_text())
    kept = SQLiteStorage.get_run_config("jax-simpo", name)
    assert {key: kept[key] for key in written} == written
    assert "# a run" in SQLiteStorage.get_logs("jax-simpo", name)[-1]["report"]["_value"]
    assert trackio.__version__


# --- a tracker that fails


class Flaky:
    """A tracker in a list, which refuses what comes after so many records."""

    kept: list[tuple[int, Mapping[str, float]]]
    rewinds = False

    def __init__(self, takes: int, says: str = "no route to host\nmore") -> None:
        self.kept, self.takes, self.says, self.endings = [], takes, says, []
        self.run, self.place = "flaky", "nowhere"

    def check(self, output: Path) -> None:
        pass

    def begin(self, start: Start) -> Flaky:
        self.started = start
        return self

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if len(self.kept) >= self.takes:
            raise ConnectionError(self.says)
        self.kept.append((step, figures))

    def flush(self) -> None:
        pass

    def attach(self, attached: Mapping[str, Path]) -> None:
        self.attached = attached

    def close(self, ending: Ending) -> None:
        self.endings.append(ending)


def test_a_tracker_that_fails_is_told_once_and_what_it_lacks_is_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(takes=4)
    monkeypatch.setattr(trackers, "_library", lambda name: flaky)
    config = config_of(tmp_path, report_to="mlflow")
    printed = written(config, RECORDS, step=0, last=5)
    (told,) = [line for line in printed.splitlines() if "mlflow gets no more" in line]
    assert "no route to host" in told and "more\n" not in told
    (end,) = [line for line in printed.splitlines() if "mlflow lacks" in line]
    assert "2 records" in end and "metrics.jsonl" in end and "jax-simpo track" in end
    assert [step for step, _ in flaky.kept] == [0, 1, 2, 3]

    flaky.takes = 5  # a run that is continued sends what was missing first, and fails again
    assert "mlflow lacks 5 records" in written(config, RECORDS, step=5, last=8)
    assert [step for step, _ in flaky.kept] == [0, 1, 2, 3, 4]

    flaky.takes = 100
    trackers.send_run(config, Path(config.output_dir), Console(file=StringIO()))
    assert [step for step, _ in flaky.kept] == [*range(9), 8]
    assert [figures for _, figures in flaky.kept] == [figures_of(record) for record in RECORDS]
    assert flaky.started.run == "flaky" and flaky.endings == ["finished"] * 3
    assert set(flaky.attached) == set()  # a run that was only written has neither config nor report


def test_neither_what_is_printed_nor_what_is_written_repeats_the_secrets_of_a_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:planted1@mlflow.example/?key=planted2")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted3")
    flaky = Flaky(takes=2, says="401 for https://ann:planted1@mlflow.example/api?key=planted2: `planted3` is no token")
    monkeypatch.setattr(trackers, "_library", lambda name: flaky)
    config = config_of(tmp_path, report_to="mlflow")
    printed = written(config, RECORDS, step=0, last=5)
    assert "no more of this run: 401 for https://mlflow.example/api: `***` is no token. Training goes on" in printed
    files_written = [path.read_text() for path in Path(config.output_dir).iterdir()]
    assert len(files_written) > 2 and not [text for text in (printed, *files_written) if "planted" in text]

    monkeypatch.setattr(flaky, "check", lambda output: flaky.log(0, {}))
    with pytest.raises(ConfigError, match=r"cannot begin: 401 for https://mlflow\.example/api: ") as refused:
        trackers.Trackers(config, tmp_path, Console(file=StringIO())).check()
    assert "planted" not in str(refused.value)


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="mlflow is not installed")
def test_mlflow_itself_tells_nobody_the_password_of_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with mlflow_server() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:planted@127.0.0.1:{port}")
        config = config_of(tmp_path, report_to="mlflow")
        with Trackers(config, tmp_path, Console(file=StringIO())) as tracked:
            tracked.check()
        printed = written(config, RECORDS, step=0, last=8)
        assert f"mlflow: run 7 at http://127.0.0.1:{port}\n" in printed and "warning" not in printed
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="`mlflow`, which cannot begin") as refused:  # the server has ended
        Trackers(config, tmp_path, Console(file=StringIO())).check()
    told = [printed, str(refused.value), *capfd.readouterr(), (Path(config.output_dir) / files.TRACKING).read_text()]
    assert not [text for text in told if "planted" in text]


@contextmanager
def mlflow_server() -> Iterator[int]:
    """Serves the few calls of MLflow's REST API that a run makes; yields the port."""
    run = {"info": {"run_id": "7", "experiment_id": "1", "run_name": "a run", "status": "RUNNING"}, "data": {}}
    answers = {
        "experiments/search": {"experiments": []},
        "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "jax-simpo"}},
        "runs/create": {"run": run},
        "runs/update": {"run_info": run["info"]},
        "runs/get": {"run": run},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = json.dumps(answers.get(self.path.partition("/mlflow/")[2].partition("?")[0], {})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_run_that_is_continued_twice_from_one_step_sends_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(takes=100)
    monkeypatch.setattr(trackers, "_library", lambda name: flaky)
    config = config_of(tmp_path, report_to="mlflow")
    for step, last in ((0, 6), (4, 5), (4, 8)):  # it got to step 6, then to step 5 alone
        written(config, RECORDS, step=step, last=last)
    assert [step for step, _ in flaky.kept] == [*range(9), 8]  # the last is an evaluation


def test_a_tracker_that_was_left_out_for_a_while_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(takes=100)
    monkeypatch.setattr(trackers, "_library", lambda name: flaky)
    with_it, without = (config_of(tmp_path, report_to=names) for names in ("mlflow", "none"))
    for config, step, last in ((with_it, 0, 3), (without, 2, 6), (with_it, 5, 8)):
        written(config, RECORDS, step=step, last=last)
    assert [step for step, _ in flaky.kept] == [*range(9), 8]


def test_a_run_from_the_start_is_a_new_one_for_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(takes=100)
    monkeypatch.setattr(trackers, "_library", lambda name: flaky)
    for _ in range(2):
        written(config_of(tmp_path, report_to="mlflow"), RECORDS, step=0, last=2)
        assert flaky.started.run is None
    assert [step for step, _ in flaky.kept] == [0, 1, 2, 0, 1, 2]


def test_a_tracker_that_hangs_does_not_keep_a_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    flaky = Flaky(takes=9)
    monkeypatch.setattr(flaky, "log", lambda step, figures: free.wait(30))
    monkeypatch.setattr(follower, "CLOSE_SECONDS", 0.05)
    following = Follower("mlflow", flaky, NOTHING)
    following.put({"step": 1, "loss": 0.5})
    following.close("finished")
    assert "still sending" in following.failure
    free.set()


# --- what is refused before a run


def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "jax_simpo.tracking.wandb", raising=False)
    config = config_of(tmp_path, report_to="wandb")
    with pytest.raises(ConfigError, match=r"`report_to` names `wandb`.*pip install 'jax-simpo\[wandb\]'"):
        run(config)
    assert not list(Path(config.output_dir).iterdir())


@pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
def test_wandb_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    import wandb

    wandb.teardown()  # what it has read of the environment before
    with pytest.raises(ConfigError, match="`wandb`, which cannot begin: nobody is logged in; run `wandb login`"):
        trackers.Trackers(config_of(tmp_path, report_to="wandb"), tmp_path, Console(file=StringIO())).check()


def test_a_folder_of_event_files_that_no_run_wrote_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    config = config_of(tmp_path, report_to="tensorboard")
    theirs = Path(config.output_dir) / "tensorboard" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(CheckpointError, match="holds `tensorboard`, which no run of jax-simpo wrote"):
        run(config)
    assert theirs.read_text() == "mine"


# --- the command


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="tensorboard is not installed")
def test_track_sends_a_run_that_had_no_tracker(resumed: Path, folder: Path) -> None:
    output = folder / "untracked"
    output.mkdir()
    for name in (files.METRICS, files.CONFIG):
        (output / name).write_bytes((resumed / name).read_bytes())
    arguments = ["track", str(output / files.CONFIG), f"--output_dir={output}", "--report_to=tensorboard"]
    for _ in range(2):  # the second time there is nothing to send
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    points = points_of(output, "tensorboard")
    assert sorted((name, step) for name, step, _ in points) == sorted(expected(output))


def test_track_without_a_tracker_or_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set `report_to`"):
        trackers.send_run(config_of(tmp_path), tmp_path, Console(file=StringIO()))
    with pytest.raises(CheckpointError, match="holds no records"):
        trackers.send_run(config_of(tmp_path, report_to="wandb"), tmp_path, Console(file=StringIO()))


def test_figures_are_the_numbers_of_a_record() -> None:
    record: dict[str, Any] = {"step": 3, "loss": 0.5, "pairs": 16, "note": "text", "odd": None, "flag": True}
    assert figures_of(record) == {"loss": 0.5, "pairs": 16}
    assert place_of(record) < place_of({"eval_step": 3}) < place_of({"step": 4})
