"""A page of runs shows what their records say while they are written, and gives away nothing beyond this machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jax_simpo.cli import _run_folders
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.pages import SITE, page_url
from jax_simpo.run import curves, files
from jax_simpo.run.comparison import write_comparison
from jax_simpo.run.facts import write_facts
from jax_simpo.run.follow import RunFollower, folder_names, is_running
from jax_simpo.run.health import Finding, write_findings
from jax_simpo.run.live import LiveServer, runs_page, watched_runs
from jax_simpo.run.lock import locked
from jax_simpo.terminal import visible
from tests.run.test_report import STEERING, Page, evaluation_record, make_run, training_record

FACTS: dict[str, Any] = {
    "mesh": {"data": 1},
    "device": "cpu",
    "parameters": 1,
    "training_pairs": 9,
    "noun": "pairs",
    "total_steps": 64,
    "tokens_saved": 0,
}


def line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


@contextmanager
def served(*folders: Path) -> Iterator[LiveServer]:
    with LiveServer(watched_runs(folders)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: LiveServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def data(server: LiveServer, since: str = "") -> list[dict[str, Any]]:
    status, text = asked(server, f"/data?since={since}")
    assert status == 200
    return list(json.loads(text)["runs"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- following a file


def test_records_are_read_as_they_are_written_and_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path, follower = tmp_path / "metrics.jsonl", RunFollower(tmp_path)
    follower.read()
    assert (follower.train, follower.evals, follower.generation) == ([], [], 0)
    text = line(training_record(1)) + line(evaluation_record(1, 0.6)) + line(training_record(2))
    for end in range(0, len(text) + 1, 7):
        path.write_text(text[:end])
        follower.read()
        whole = text[:end].splitlines(keepends=True)
        assert len(follower.train) + len(follower.evals) == sum(one.endswith("\n") for one in whole)
    path.write_text(text)
    follower.read()
    assert [record["step"] for record in follower.train] == [1, 2] and len(follower.evals) == 1
    assert follower.generation == 0


@pytest.mark.parametrize("regrown", [2, 3, 9])
def test_a_resumed_run_is_read_anew_also_if_its_file_has_grown_longer_meanwhile(tmp_path: Path, regrown: int) -> None:
    path, follower = tmp_path / "metrics.jsonl", RunFollower(tmp_path)
    path.write_text("".join(line(training_record(step)) for step in (1, 2, 3)))
    follower.read()
    again = [training_record(1), *(training_record(step, loss=7.0) for step in range(2, regrown + 1))]
    path.write_text("".join(map(line, again)))
    follower.read()
    assert follower.generation == 1 and follower.train == again


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(training_record(1)) + "{}\n")
    follower = RunFollower(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: is no record"):
            follower.read()
    (tmp_path / "metrics.jsonl").write_text(line(training_record(1)) + line(training_record(2)))  # a good copy
    follower.read()
    assert [record["step"] for record in follower.train] == [1, 2]


def test_a_run_runs_while_its_lock_is_held_and_asking_takes_no_lock(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with locked(tmp_path):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = {"host": socket.gethostname(), "process": ended.pid, "since": 0}
    (tmp_path / files.LOCK).write_text(json.dumps(owner))  # what a killed run leaves
    assert not is_running(tmp_path)
    (tmp_path / files.LOCK).write_text(json.dumps({**owner, "host": "elsewhere"}))
    assert is_running(tmp_path)


def test_runs_are_named_by_their_folders_with_as_many_parents_as_tell_them_apart() -> None:
    assert folder_names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert folder_names([Path("/a/x/run"), Path("/b/x/run")]) == ["a/x/run", "b/x/run"]


# --- the server


def test_the_data_of_the_page_grow_with_the_run_and_only_what_is_new_is_sent(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1))
    write_facts(tmp_path, **FACTS)
    with served(tmp_path) as server:
        (run,) = data(server)
        assert run["train"]["step"] == [1] and run["eval"] == {} and run["name"] == tmp_path.name
        assert run["standing"][:2] == ["not running", "1 of 64"] and run["findings"] == []
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(line(evaluation_record(1, 0.75)) + line(training_record(2)) + '{"step": 3, "lo')
        write_findings(tmp_path, [Finding("gamma", 0, "`beta` is large", "Less.")])
        with locked(tmp_path):
            (run,) = data(server, "0:1:0")
        assert run["train"]["step"] == [2] and run["eval"]["rewards/accuracies"] == [0.75]
        assert run["standing"][0] == "training" and run["standing"][4] == "75.0%"
        link = ["link", "healthy-runs#gamma", page_url("healthy-runs", "gamma")]
        said = [["code", "beta"], ["text", " is large. Less. ("], link, ["text", ")"]]
        assert run["findings"] == [{"step": 0, "said": said}]
        (run,) = data(server, "0:2:1")
        assert run["train"] == {} and run["eval"] == {}
        (run,) = data(server, "5:2:1")  # of another generation: all of it
        assert run["train"]["step"] == [1, 2]
        assert data(server, "nonsense:::,-1:x:0") == [run]


def test_columns_stay_side_by_side_where_a_run_starts_as_its_reference(tmp_path: Path) -> None:
    make_run(tmp_path, evaluation_record(0, 0.0), training_record(1))
    (tmp_path / "config.yaml").write_text("objective: dpo\n")
    (run,) = watched_runs([tmp_path])
    first = run.news()
    assert first["train"]["rewards/accuracies"] == first["eval"]["rewards/accuracies"] == [None]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line(training_record(2)) + line(evaluation_record(2, 0.75)))
    second = run.news(0, 1, 1)
    assert second["eval"]["rewards/accuracies"] == [0.75] and second["train"]["step"] == [2]
    for news in (first, second):
        for columns in (news["train"], news["eval"]):
            assert {len(values) for values in columns.values()} == {1}


def test_following_a_run_writes_nothing_to_its_folder(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1))
    before = files_of(tmp_path)
    with served(tmp_path) as server:
        assert asked(server, "/")[0] == 200 and data(server)
    assert files_of(tmp_path) == before


def test_a_run_that_has_not_begun_is_waited_for_and_a_damaged_file_is_told_of(tmp_path: Path) -> None:
    with locked(tmp_path), served(tmp_path) as server:
        assert data(server)[0]["standing"][0] == "waiting for its first step"
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        assert "is no record of a run" in data(server)[0]["standing"][0]
        (tmp_path / "metrics.jsonl").write_text(line(training_record(1)))
        (tmp_path / "run.json").write_text("{")
        assert data(server)[0]["train"] == {}


def test_another_site_cannot_read_the_data_through_the_browser(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1))
    with served(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert asked(server, "/data", host=f"localhost:{server.server_port}")[0] == 200
        for path in ("/", "/data"):
            status, text = asked(server, path, host=f"evil.example:{server.server_port}")
            assert status == 403 and "step" not in text
        assert asked(server, "/../metrics.jsonl")[0] == 404


def test_a_port_that_is_taken_is_an_error_that_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1))
    with served(tmp_path) as server, pytest.raises(ConfigError, match=rf"--port {server.server_port}: cannot be used"):
        LiveServer(watched_runs([tmp_path]), server.server_port)


@pytest.mark.parametrize(("name", "words"), [("missing", "there is no such folder"), (".", "holds no run")])
def test_a_folder_without_a_run_is_an_error_that_says_what_to_give(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{words}.*Give the `output_dir` of a run"):
        watched_runs([tmp_path / name])


# --- the pages


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(curves, "draw_curves", lambda *_, **__: b"\x89PNG")  # which takes a second each
    folders = [tmp_path / "one", tmp_path / f"<b>two{STEERING} & co"]
    for number, folder in enumerate(folders, start=1):
        folder.mkdir()
        make_run(folder, *(training_record(step, loss=float(number)) for step in (1, 2)), evaluation_record(2, 0.9))
        hostile = f"</script><script>x</script>{STEERING} `<em>` https://evil.example/ {SITE}'onload='x"
        write_findings(folder, [Finding("gamma", 0, hostile, "Less.")])
    return folders


def test_runs_are_overlaid_on_a_page_of_their_own_and_their_folders_stay_as_they_are(
    two_runs: list[Path], tmp_path: Path
) -> None:
    before = [files_of(folder) for folder in two_runs]
    page = Page(write_comparison(two_runs, tmp_path / "page.html"))
    assert [files_of(folder) for folder in two_runs] == before
    assert [run["train"]["loss"] for run in page.data["runs"]] == [[1.0, 1.0], [2.0, 2.0]]
    assert page.tags.count("picture") == 2  # the curves of each, for readers without JavaScript
    shown = page.text.partition('{"runs"')[0]
    assert "one" in shown and "90.0%" in shown
    write_comparison(two_runs, tmp_path / "page.html")  # its own page may be replaced
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.html: exists already, and is no page of runs"):
        write_comparison(two_runs, tmp_path / "mine.html")


def test_names_and_findings_of_the_runs_stay_text(two_runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_comparison(two_runs, tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.tags.count("script") == 2 and not re.search(r"<b>two|<script>x", text)
    name = visible(two_runs[1].name)
    assert page.text.count(name) >= 3 and page.data["runs"][1]["name"] == name
    assert "</script><script>x</script>" in page.text and "<em>" in page.text and visible(page.text) == page.text
    links = [address for address in page.addresses if not address.startswith("data:image/png;base64,")]
    assert links == [page_url("healthy-runs", "gamma")] * 2 and page.tags.count("code") == 2
    assert "https://evil.example/" in page.text and "em" not in page.tags


def test_only_a_page_that_is_served_may_ask_and_it_may_ask_its_own_server_alone(two_runs: list[Path]) -> None:
    runs = watched_runs(two_runs)
    live, still = (runs_page(runs, live=on) for on in (True, False))
    assert "connect-src 'self'; base-uri" in live and "<body data-live>" in live and "<noscript>" in live
    assert "connect-src" not in still and "<body>" in still


def test_a_run_is_named_by_its_folder_or_its_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{model_name_or_path: someone/a-model, dataset_mixer: {'builtin:cafe': 1.0}}")
    assert _run_folders([str(tmp_path), str(config)], ["--output_dir=x"]) == [tmp_path, Path("x")]
    with pytest.raises(CheckpointError, match=r"no/such: there is no such folder"):
        _run_folders(["no/such"], [])
    with pytest.raises(ConfigError, match=r"--beta=2: there is no config to override; a run's folder was given"):
        _run_folders([str(tmp_path)], ["--beta=2"])


def test_watch_serves_until_ctrl_c_and_ends_with_a_word(tmp_path: Path) -> None:
    make_run(tmp_path, training_record(1))
    command = [sys.executable, "-m", "jax_simpo", "report", "--watch", str(tmp_path)]
    environment = {**os.environ, "COLUMNS": "200"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"open http://127\.0\.0\.1:(\d+)/ in a browser; Ctrl-C ends it", first)
        assert found, first + process.stderr.read()
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
        connection.request("GET", "/data")
        assert json.loads(connection.getresponse().read())["runs"][0]["train"]["step"] == [1]
        process.send_signal(signal.SIGINT)
        assert "no longer watching; the runs go on" in process.stderr.read()
        assert process.wait(20) == 0
