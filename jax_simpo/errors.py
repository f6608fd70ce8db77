"""The mistakes a user can make, one exception type per kind.

Every message says where (file, row, config key), what is wrong and what to do. The command line prints a `UserError`
without a traceback; any other exception is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import signal

from jax_simpo.redact import redact
from jax_simpo.terminal import visible


def words_of(error: Exception) -> str:
    """Returns the words of another library's error in one line and without secrets, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(" ".join(lines))[:300].rstrip(".") or type(error).__name__


class UserError(Exception):
    """Base class of the mistakes that you can mend without reading this code.

    Attributes:
        status: the exit status of a command that ends with it.
    """

    status = 1

    def __str__(self) -> str:
        """Returns the message, made visible and without secrets: it quotes rows, file names and libraries.

        Python's tracebacks show it, too.
        """
        return visible(redact(super().__str__()))


class ConfigError(UserError):
    """A wrong key or value in the YAML file or in a `--key=value` override."""


class DataError(UserError):
    """A data file, split or row that cannot be used, or a tokenizer that cannot render one."""


class ModelError(UserError):
    """A model folder that cannot be used: its `config.json`, or a tensor that is missing, extra or misshapen."""


class MeshError(UserError):
    """A mesh that does not fit the devices or the model."""


class CheckpointError(UserError):
    """A checkpoint or output directory that cannot be used by this run."""


class LaunchError(UserError):
    """Processes of one run that cannot find each other or do not agree."""


class TrainingError(UserError):
    """A run that cannot continue, such as one whose loss is no longer finite."""


class HubError(UserError):
    """A model that could not be uploaded to the Hugging Face hub. The run that made it is complete."""


class StoppedError(UserError):
    """A run that a signal ended; starting it again continues it.

    Args:
        text: what happened, and what to do.
        number: the signal. The exit status is 128 and its number, as of a shell: 130 of SIGINT, 143 of SIGTERM.
        saved: the run was taking steps and has saved its last one. Then all its processes end at the same step.
    """

    def __init__(self, text: str, number: signal.Signals, *, saved: bool = False) -> None:
        super().__init__(text)
        self.status, self.saved = self.status_of(number), saved

    @staticmethod
    def status_of(number: signal.Signals) -> int:
        """Returns the exit status of a process that a signal ended."""
        return 128 + number


class PlanError(UserError):
    """A topology that no hardware plan can be made for, or whose compiler is missing."""
