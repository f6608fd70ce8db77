"""All trackers of a run: they are checked before it, follow its records, and get its config and report.

What each has been sent stands in `tracking.json`, so that a resumed run goes on in the same run of the tracker and no
step is sent twice. Records are written to `metrics.jsonl` first. A tracker that fails later on is left behind with a
warning; `send_run` sends what it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from rich.console import Console

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError, StoppedError, UserError, words_of
from jax_simpo.run import files, quiet
from jax_simpo.run.lock import locked
from jax_simpo.run.manifest import check_free, write_file
from jax_simpo.run.metrics import read_metrics
from jax_simpo.tracking.follower import NOTHING, Follower, Place, place_of
from jax_simpo.tracking.tracker import Ending, Library, Start

_ATTACHED = {"config": files.CONFIG, "report": files.REPORT, "card": files.CARD, "curves": files.CURVES}


class Trackers:
    """The trackers that a config names. Leaving the block ends the run in each of them.

    Args:
        config: the settings of the run.
        output: its output directory.
        console: where notes go.
        write: False turns them off: of several processes one sends.
    """

    def __init__(self, config: TrainConfig, output: Path, console: Console, *, write: bool = True) -> None:
        self._config, self._output, self._console = config, output, console
        self._names: Sequence[str] = config.report_to if write else ()
        self._followers: list[Follower] = []
        self._others: dict[str, _State] = {}  # trackers of former parts of this run, which get none of its records now
        self._write, self._told = write, set[str]()
        self._finished = False
        quiet.hide_secrets()

    def check(self) -> None:
        """Makes sure that every tracker could begin now.

        Raises:
            ConfigError: a package is missing, nobody is logged in, or a server does not answer.
            CheckpointError: there is a `tracking.json`, or a folder `tensorboard`, that no run wrote.
        """
        if self._names:
            check_free(self._output, (files.TRACKING,))
        for name in self._names:
            try:
                _library(name).check(self._output)
            except Exception as error:
                raise _refusal(name, error) from error

    def begin(self, step: int | None) -> None:
        """Begins a run in every tracker, or goes on with the one there is, and sends the records it lacks.

        It is called before the resumed run drops the records it will write again: a tracker has them.

        Args:
            step: the step that the run goes on from, 0 for a new run; None for a run that is over.

        Raises:
            ConfigError: a tracker cannot begin.
            CheckpointError: `metrics.jsonl` or `tracking.json` is damaged.
        """
        states = {} if step == 0 or not self._write else _read_states(self._output)
        if not self._names and not states:
            return
        records = [] if step == 0 else read_metrics(self._output)
        last = max(map(place_of, records), default=NOTHING)
        self._others = {
            name: _State(state.run, state.sent_before(last), behind=True)
            for name, state in states.items()
            if name not in self._names
        }
        for name in self._names:
            library, state = _library(name), states.get(name)
            sent = state.sent_before(last) if state is not None else NOTHING
            if library.rewinds and step is not None:
                sent = min(sent, (step, 1))
            start = Start(
                output=self._output,
                name=self._config.run_name or self._output.resolve().name,
                project=self._config.project,
                config=json.loads(json.dumps(self._config.model_dump(by_alias=True), default=str)),
                config_text=self._config.to_yaml(),
                run=None if state is None else state.run,
                next_step=sent[0] + 1,
            )
            try:
                follower = Follower(name, library.begin(start), sent)
            except Exception as error:
                raise _refusal(name, error) from error
            self._followers.append(follower)
            self._console.print(f"{name}: {follower.tracker.place}")
            for record in records:
                if step is None or place_of(record) <= (step, 1):
                    follower.put(record)
        self._write_states()

    def log(self, record: Mapping[str, Any]) -> None:
        """Has every tracker sent a record; it returns at once."""
        for follower in self._followers:
            follower.put(record)
        self._tell_failures()

    def flush(self) -> None:
        """Has every tracker bring what it was sent to the disk: the run can be resumed from here."""
        for follower in self._followers:
            follower.flush()
        self._tell_failures()

    def finish(self, *, finished: bool) -> None:
        """Attaches the run's files. `finished` says that all steps are done, and not that the run goes on later."""
        there = {name: self._output / file for name, file in _ATTACHED.items() if (self._output / file).is_file()}
        for follower in self._followers:
            follower.attach(there)
        self._finished = finished

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        goes_on = kind is None or issubclass(kind, StoppedError | KeyboardInterrupt)
        ending: Ending = "stopped" if goes_on else "failed"
        for follower in self._followers:
            follower.close("finished" if self._finished else ending)
        self._tell_failures()
        for follower in self._followers:
            if follower.failure:
                lacks = f"{follower.unsent:,} records" if follower.unsent else "what was attached"
                self._console.print(
                    f"warning: {follower.name} lacks {lacks}; nothing is lost, {files.METRICS} has them all. "
                    "`jax-simpo track` with the same config sends them",
                    style="yellow",
                )
        if self._followers:
            # What ends the run is told, and not that a full disk has no room for this file either.
            with nullcontext() if kind is None else suppress(UserError):
                self._write_states()

    def _tell_failures(self) -> None:
        for follower in self._followers:
            if follower.failure and follower.name not in self._told:
                self._told.add(follower.name)
                self._console.print(
                    f"warning: {follower.name} gets no more of this run: {follower.failure}. Training goes on",
                    style="yellow",
                )
                self._write_states()

    def _write_states(self) -> None:
        states = self._others | {
            follower.name: _State(follower.tracker.run, follower.sent, bool(follower.failure))
            for follower in self._followers
        }
        content = {name: vars(state) for name, state in states.items()}
        write_file(self._output, files.TRACKING, json.dumps(content, indent=2) + "\n")


def send_run(config: TrainConfig, output: Path, console: Console) -> None:
    """Sends the records, the config and the report of a run that is over to the config's trackers, as far as they lack.

    Raises:
        ConfigError: the config names no tracker, or one cannot begin.
        CheckpointError: there is no run, or another one is writing.
    """
    if not config.report_to:
        raise ConfigError("no tracker: set `report_to`, such as `--report_to=tensorboard`")
    if not read_metrics(output):
        raise CheckpointError(f"{output / files.METRICS} holds no records: give the `output_dir` of a run")
    with locked(output), Trackers(config, output, console) as trackers:
        trackers.check()
        trackers.begin(None)
        trackers.finish(finished=True)


@dataclass(frozen=True)
class _State:
    """Holds the entry of a tracker in `tracking.json`.

    Attributes:
        run: the tracker's own name of the run.
        sent: the last record it was known to have when this was written.
        behind: it failed after that record, and has no later one.
    """

    run: str
    sent: Place
    behind: bool

    def sent_before(self, last: Place) -> Place:
        """Returns the last record that the tracker has, of a run whose last record is `last`."""
        return self.sent if self.behind else max(self.sent, last)


def _read_states(output: Path) -> dict[str, _State]:
    path = output / files.TRACKING
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): _State(str(state["run"]), (int(state["sent"][0]), int(state["sent"][1])), bool(state["behind"]))
            for name, state in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: does not say what trackers were sent ({error!r}). Remove it, and they begin a new run"
        ) from error


def _library(name: str) -> Library:
    return cast(Library, import_module(f"jax_simpo.tracking.{name}"))


def _refusal(name: str, error: Exception) -> UserError:
    """Returns the error that ends a run before it begins."""
    if isinstance(error, UserError):
        return error
    without = f"or leave `{name}` out of `report_to`"
    if isinstance(error, ImportError):
        return ConfigError(
            f"`report_to` names `{name}`, which is not installed ({words_of(error)}). Run `pip install "
            f"'jax-simpo[{name}]'`, {without}"
        )
    return ConfigError(
        f"`report_to` names `{name}`, which cannot begin: {words_of(error)}. Mend that, {without}: `jax-simpo track` "
        "sends a run afterwards, too"
    )
