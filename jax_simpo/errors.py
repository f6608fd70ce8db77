"""What a user can get wrong, one exception type per kind of mistake.

Every message says where (file, row, config key), what is wrong and what to do. The command line prints the
message without a traceback; anything that is not a `UserError` is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
    """Base of the mistakes a user can mend without reading our code."""


class ConfigError(UserError):
    """A key or value of the YAML file or of a `--key=value` override."""


class DataError(UserError):
    """A data file, split or row, or a tokenizer that cannot render it."""


class ModelError(UserError):
    """A model folder: its `config.json`, or a tensor that is missing, extra or misshapen."""


class MeshError(UserError):
    """A mesh that does not fit the devices or the model."""


class CheckpointError(UserError):
    """A checkpoint or output directory that cannot be used by this run."""


class LaunchError(UserError):
    """Processes that are to be one run, and cannot find each other or do not agree."""


class TrainingError(UserError):
    """A run that cannot go on, such as a loss that is no longer finite."""


class PlanError(UserError):
    """A topology that no plan can be made for, or whose compiler is missing."""
