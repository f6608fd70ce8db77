"""Serves a page of one or several runs to a browser on this machine, and tells it what is new while they train."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jax_simpo.config import yaml_files
from jax_simpo.errors import ConfigError, UserError
from jax_simpo.run import charts, files
from jax_simpo.run.facts import read_facts
from jax_simpo.run.follow import RunFollower, check_runs, folder_names, is_running
from jax_simpo.run.health import read_findings
from jax_simpo.run.prose import pieces
from jax_simpo.run.report import Run, duration
from jax_simpo.terminal import visible

HOST = "127.0.0.1"
STANDING = ("state", "step", "loss", "accuracy", "evaluation accuracy", "margin", "gradient norm", "learning rate")
"""The columns of the table above the curves."""

_NONE = "-"


class WatchedRun:
    """One run on a page.

    Args:
        output: its folder.
        name: its name on the page.
    """

    def __init__(self, output: Path, name: str) -> None:
        self.output, self.name = output, name
        self._follower = RunFollower(output)
        self._lock = threading.Lock()  # two browsers may ask at once

    def news(self, generation: int = -1, train: int = 0, evals: int = 0) -> dict[str, Any]:
        """Returns what a page lacks that has so many records of a generation, and where the run stands.

        A file that cannot be read, because it is being written or is damaged, is told of in the state.
        """
        with self._lock:
            problem = ""
            try:
                self._follower.read()
            except UserError as error:
                problem = str(error)
            followed = self._follower
            if followed.generation != generation:
                train = evals = 0
            try:
                run = self._run()
                findings = [{"step": one.step, "said": pieces(visible(one.sentence))} for one in run.latest_findings]
            except (UserError, ValueError, OSError) as error:
                return self._unread(followed.generation, str(error))
            first = {"starts_as_reference": run.starts_as_reference}
            return {
                "name": visible(self.name),
                "generation": followed.generation,
                "target_margin": run.target_margin,
                "train": charts.train_columns(followed.train[train:], **first),
                "eval": charts.eval_columns(followed.evals[evals:], **first),
                "findings": findings,
                "standing": _standing(run, problem),
            }

    def _unread(self, generation: int, problem: str) -> dict[str, Any]:
        standing = [visible(problem), *[_NONE] * (len(STANDING) - 1)]
        empty: dict[str, Any] = {"train": {}, "eval": {}, "findings": [], "target_margin": None}
        return {"name": visible(self.name), "generation": generation, "standing": standing, **empty}

    def _run(self) -> Run:
        config = self.output / files.CONFIG
        return Run(
            output=self.output,
            config=yaml_files.read_file(config)[0] if config.exists() else {},
            config_text="",
            train=self._follower.train,
            evals=self._follower.evals,
            samples=(),
            findings=read_findings(self.output),
            facts=read_facts(self.output),
            left_out=0,
        )


def _standing(run: Run, problem: str) -> list[str]:
    """Returns the cells of the table: how the run stands, and its last figures."""
    if not run.train:
        state = problem or ("waiting for its first step" if is_running(run.output) else "no step yet, not running")
        return [visible(state), *[_NONE] * (len(STANDING) - 1)]
    last, total = run.train[-1], run.facts.get("total_steps")
    return [
        visible(problem or _state(run)),
        f"{last['step']:,}" + (f" of {total:,}" if total else ""),
        f"{last['loss']:.4f}",
        run.accuracy(last),
        run.accuracy(run.evals[-1]) if run.evals else _NONE,
        f"{last['rewards/margins']:.4f}",
        f"{last['grad_norm']:.3g}" if "grad_norm" in last else _NONE,
        f"{last['learning_rate']:.2e}" if "learning_rate" in last else _NONE,
    ]


def _state(run: Run) -> str:
    if run.facts.get("exported_step") == run.train[-1]["step"]:
        return "finished"
    if not is_running(run.output):
        return "not running"
    since = time.time() - (run.output / files.METRICS).stat().st_mtime
    return "training" if since < 60 else f"training, last record {duration(since)} ago"


def watched_runs(outputs: Sequence[Path]) -> list[WatchedRun]:
    """Returns the runs of folders, named by them.

    Raises:
        CheckpointError: a folder holds no run.
    """
    check_runs(list(outputs))
    return [WatchedRun(output, name) for output, name in zip(outputs, folder_names(list(outputs)), strict=True)]


def runs_page(runs: Sequence[WatchedRun], *, live: bool, pictures: Sequence[tuple[str, str, str]] = ()) -> str:
    """Renders the page of runs, with all that is known of them.

    Args:
        runs: the runs.
        live: the page asks for more.
        pictures: of each run its name and its curves in light and dark, as base64, for readers without JavaScript.
    """
    known = [run.news() for run in runs]
    return charts.render(
        "runs.html.jinja",
        {"runs": known},
        live=live,
        title=", ".join(run["name"] for run in known),
        columns=STANDING,
        runs=known,
        pictures=pictures,
    )


# --- the server


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if not self._is_asked_by_its_own_name():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "open the address that `report --watch` has printed\n")
        elif address.path == "/":
            self._answer(HTTPStatus.OK, "text/html", runs_page(self.server.runs, live=True))
        elif address.path == "/data":
            since = parse_qs(address.query).get("since", [""])[0]
            self._answer(HTTPStatus.OK, "application/json", json.dumps({"runs": self.server.news(since)}))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is nothing here\n")

    def _is_asked_by_its_own_name(self) -> bool:
        """False for a page of the web whose host name has come to mean this machine: it could read the data here."""
        return (self.headers.get("Host") or "").rpartition(":")[0] in (HOST, "localhost")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in {**headers, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: a page asks every two seconds."""


class LiveServer(ThreadingHTTPServer):
    """Serves the page of some runs on this machine alone.

    Args:
        runs: the runs.
        port: where; 0 takes a free one.

    Raises:
        ConfigError: the port is taken, or may not be used.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[WatchedRun], port: int = 0) -> None:
        self.runs = runs
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--port {port}: cannot be used ({error}). Give another one, or leave the option out to take a free one"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Passes over a browser that has gone before it had its answer; other errors are printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def news(self, since: str) -> list[Mapping[str, Any]]:
        """Returns the news of every run.

        Args:
            since: of each run `GENERATION:TRAIN:EVAL`, what the page has, with commas between; all of a run for which
                there is none.
        """
        counts = [part.split(":") for part in since.split(",")]
        known = [tuple(map(int, c)) if len(c) == 3 and all(n.isdecimal() for n in c) else () for c in counts]
        padded = [*known, *[()] * len(self.runs)]
        return [run.news(*have) for run, have in zip(self.runs, padded, strict=False)]
