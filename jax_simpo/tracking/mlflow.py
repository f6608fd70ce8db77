"""MLflow: a run of an experiment of the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from jax_simpo.redact import redact
from jax_simpo.tracking.tracker import PROJECT, Ending, Start

rewinds = False

_PARAMS = 100  # the most parameters of a request
_LENGTH = 6000  # the longest value of a parameter
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def check(output: Path) -> None:
    """Makes sure that the server, or the store, answers."""
    with _one_retry():
        MlflowClient().search_experiments(max_results=1)


class Mlflow:
    """Logs records as metrics, the config as parameters, and the files as artifacts."""

    def __init__(self, start: Start) -> None:
        self._client = MlflowClient()
        if start.run is not None:
            self._client.update_run(start.run, status="RUNNING")
            self.run = start.run
        else:
            name = start.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            self.run = self._client.create_run(_experiment(self._client, name), run_name=start.name).info.run_id
            params = list(_params(start.config))
            for first in range(0, len(params), _PARAMS):
                self._client.log_batch(self.run, params=params[first : first + _PARAMS])
        self.place = f"run {self.run} at {redact(self._client.tracking_uri)}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def flush(self) -> None:
        """Does nothing: a record is at the server when `log` returns."""

    def attach(self, attached: Mapping[str, Path]) -> None:
        for path in attached.values():
            self._client.log_artifact(self.run, str(path))

    def close(self, ending: Ending) -> None:
        with redirect_stdout(io.StringIO()):  # it prints the server's address whole, and stdout is for results
            self._client.set_terminated(self.run, _STATUS[ending])


begin = Mlflow


@contextmanager
def _one_retry() -> Iterator[None]:
    """Has requests tried twice inside the block. MLflow's own seven retries wait four minutes for a missing server."""
    former = os.environ.get(_RETRIES)
    os.environ.setdefault(_RETRIES, "1")
    try:
        yield
    finally:
        if former is None:
            del os.environ[_RETRIES]


def _experiment(client: MlflowClient, name: str) -> str:
    """Returns the id of an experiment, which is made where there is none."""
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another run has made it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _params(config: Mapping[str, object]) -> Iterator[Param]:
    """Yields the keys of a config; what is too long for a parameter stands in the file alone."""
    for key, value in config.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) <= _LENGTH:
            yield Param(key, text)
