"""Says which keys of a config make a run that run and no other."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from jax_simpo.config import help, objectives
from jax_simpo.config.schema import TrainConfig


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """Returns the keys that define the mathematics of a run. A run whose keys differ cannot be resumed.

    How rows are made, the mesh, attention, remat, and the cadence of logging, saving and evaluating may change. So
    may the keys of the batch: the batch size itself is stored with the checkpoint. With a learning rate that does
    not depend on the length of the run, a run may also be made longer.
    """
    values = config.model_dump(by_alias=True)
    identity = {key: values[key] for key, field in help.keys_of(type(config)).items() if help.extras(field)["identity"]}
    identity["dataset_splits"] = config.train_splits
    if code := objectives.code_of(config.objective):
        file = Path(code[0]).expanduser()
        digest = sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "missing"
        identity["objective"] = f"{config.objective}, file {digest}"
    # Keys that ask for nothing are left out, so that a run of a version without them can be continued.
    groups = ("train_on", "group_by", "max_responses", "min_score_gap", "ties", *objectives.GROUP_KEYS)
    rows = ("dataset_format", "dataset_columns", "test_size", "max_samples", "shuffle_seed")
    rendering = ("chat_rendering", "special_tokens_in_messages")
    others = ("optim", "adam_mu_dtype", "lr_scheduler_kwargs", "weight_column")
    for key in (*rows, *rendering, *others, *groups):
        if values[key] == help.default_of(type(config), key):
            del identity[key]
    unread = {"objective", *objectives.ALL_KEYS, objectives.REFERENCE_KEY}
    for key in [key for key in unread if identity[key] in (None, "simpo", "response")]:
        del identity[key]
    by_steps = config.lr_scheduler_type == "constant_with_warmup" and (config.warmup_steps or not config.warmup_ratio)
    if config.lr_scheduler_type == "constant" or by_steps:
        del identity["max_steps"], identity["num_train_epochs"]
    return identity
