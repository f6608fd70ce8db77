"""Continuing a run: from which step, whether it is the same run, and whether anything is left of it to do.

Nothing here reads a checkpoint's arrays. Both trainers use it; each says which folders of steps it can read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from jax_simpo.config import TrainConfig, identity_of
from jax_simpo.data.store import GroupDataset
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run import files
from jax_simpo.run.facts import read_facts

Trainer = Literal["jax-simpo train", "python -m torch_ref train"]

# Keys beside the identity of the run that saved a step.
ENGINE = "engine"  # the engine of the PyTorch reference that wrote it
REFERENCE_WEIGHTS, BASE_WEIGHTS = FROZEN = "reference weights", "base weights"
GUARD = "guard"  # the state of the guard that looks at steps


def run_identity(config: TrainConfig, global_batch_size: int, pairs: GroupDataset) -> dict[str, Any]:
    """Returns what makes a run this run and no other: its settings, its batch size and the tokens it trains on.

    A trainer adds digests of the weights that no step holds, because they are not trained (`FROZEN`).

    Args:
        config: the settings of the run.
        global_batch_size: pairs per optimizer step.
        pairs: the training pairs.
    """
    digest = sha256()
    for group in pairs.groups(range(len(pairs))):
        for place, (rank, response) in enumerate(zip(group.ranks, group.responses, strict=True)):
            known = f"{len(response.ids)}:{response.prompt_length}:"
            if rank != place or response.length < len(response.ids) - response.prompt_length:
                known = f"{len(response.ids)}:{response.spans}:{rank}:"  # ties, and turns that are not scored
            digest.update(known.encode() + response.ids.tobytes())
    if getattr(config.objective, "compare_weights", config.compare_weights) == "score_gap":
        digest.update(pairs.scores.tobytes())
    if config.weight_column is not None:
        digest.update(pairs.weights.tobytes())
    identity = {
        **identity_of(config),
        "global_batch_size": global_batch_size,
        "training pairs": f"{len(pairs)} pairs, tokens {digest.hexdigest()[:16]}",
    }
    return dict(json.loads(json.dumps(identity)))  # as it comes back from a checkpoint: all keys are text, say


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], output: Path) -> None:
    """Refuses to continue a run as another one. Frozen weights count once they are known.

    Args:
        saved: the identity that a checkpoint holds.
        current: the identity of the run that is to continue it.
        output: the output directory.

    Raises:
        CheckpointError: names every key that differs, with both values, and what to do.
    """
    left_out = {ENGINE, GUARD, *(key for key in FROZEN if key not in current)}
    keys = [key for key in {**saved, **current} if key not in left_out and saved.get(key) != current.get(key)]
    if keys:
        differences = "\n".join(f"  {key}: was {saved.get(key)!r}, is {current.get(key)!r}" for key in keys)
        raise CheckpointError(
            f"{output} holds a checkpoint of another run; these settings differ:\n{differences}\nSet them back to "
            "continue it, give another `output_dir`, or set `overwrite_output_dir: true` to remove it and start afresh"
        )


def check_trainer(output: Path, trainer: Trainer) -> None:
    """Makes sure that the checkpoints of an output directory are not those of the other trainer.

    Raises:
        CheckpointError: they are; it names who wrote them, and the way to go on from the exported model.
    """
    folder = output / files.CHECKPOINTS
    steps = [entry for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    for step in sorted(steps, key=lambda entry: int(entry.name)):
        writer, engine = _writer(step)
        if writer is not None and writer != trainer:
            raise CheckpointError(
                f"{folder} holds checkpoints of `{writer}`{engine}, which `{trainer}` cannot read. Give another "
                "`output_dir`; to start from its model, set `model_name_or_path` to its folder `model`"
            )


def _writer(step: Path) -> tuple[Trainer | None, str]:
    """The trainer that wrote a step folder and, in brackets, its engine; None where neither has finished it."""
    if (step / "_CHECKPOINT_METADATA").exists():  # Orbax leaves it in its folders
        return "jax-simpo train", " (Orbax)"
    run = step / files.STEP_RUN
    if run.is_file():
        try:
            engine = dict(json.loads(run.read_text(encoding="utf-8"))).get(ENGINE)
        except (OSError, ValueError, TypeError):  # damaged, which its seal will say
            engine = None
        return "python -m torch_ref train", f" ({engine})" if engine else ""
    return ("python -m torch_ref train", "") if any(step.glob("*.pt")) else (None, "")


@dataclass(frozen=True)
class Resume:
    """Describes from where a run continues.

    Attributes:
        step: the step to continue from; 0 starts afresh.
        notes: sentences the user should read.
        damaged: later steps that are damaged.
    """

    step: int
    notes: Sequence[str] = ()
    damaged: Sequence[int] = ()


def choose_step(
    wanted: bool | int | str | None, steps: Sequence[int], output: Path, damage: Callable[[int], str | None]
) -> Resume:
    """Chooses the step that `resume_from_checkpoint` means.

    Args:
        wanted: the value of the key: None takes the newest whole step, if there is a step; True wants a step, False
            wants none; otherwise the number of a step, or its folder.
        steps: the steps, oldest first.
        output: the output directory.
        damage: returns what is wrong with a step, or None.

    Raises:
        CheckpointError: there is no such step, none is whole, or there are steps that would be lost.
        ConfigError: the value is none that the key may have.
    """
    folder = output / files.CHECKPOINTS
    if wanted is False and steps:
        raise CheckpointError(
            f"`resume_from_checkpoint` is false, but {output} holds checkpoints (steps {list(steps)}). Give "
            "another `output_dir`, or set `overwrite_output_dir: true` to remove them"
        )
    if wanted is True and not steps:
        raise CheckpointError(
            f"`resume_from_checkpoint` is true, but {folder} holds no checkpoint. Remove the key to start afresh, "
            "or correct `output_dir`"
        )
    if wanted is False or (wanted is None and not steps):
        return Resume(0)
    if wanted is None or wanted is True:
        return _newest_whole(steps, folder, damage)
    step = _read_step(wanted, folder)
    if step not in steps:
        raise CheckpointError(f"{folder}: there is no step {step}; there are: {list(steps) or 'none'}")
    if reason := damage(step):
        others = [other for other in steps if other != step]
        raise CheckpointError(f"{folder / str(step)}: {reason}. Take another step; there are: {others or 'none'}")
    later = ", ".join(str(other) for other in steps if other > step)
    note = f"note: the run goes back to step {step}, and removes the later ones: {later}"
    return Resume(step, [note] if later else [])


def _newest_whole(steps: Sequence[int], folder: Path, damage: Callable[[int], str | None]) -> Resume:
    found: dict[int, str] = {}
    for step in reversed(steps):
        reason = damage(step)
        if reason is None:
            note = f"warning: {'; '.join(found.values())}; the run goes on from step {step}, the newest that is whole"
            aside = ", ".join(f"{other}.damaged" for other in sorted(found))
            return Resume(step, [f"{note}. The damaged ones are set aside: {aside}"] if found else [], sorted(found))
        found[step] = f"{folder / str(step)}: {reason}"
    raise CheckpointError(
        f"{'; '.join(found.values())}. No step is whole, so the run cannot go on. Put a copy of a step back, give "
        "another `output_dir`, or set `overwrite_output_dir: true` to start afresh"
    )


def _read_step(wanted: int | str, folder: Path) -> int:
    path = Path(str(wanted))
    number = path.name.removeprefix("checkpoint-")
    elsewhere = len(path.parts) > 1 and path.parent.absolute() != folder.absolute()
    if not number.isdecimal() or elsewhere:
        raise ConfigError(
            f"`resume_from_checkpoint` is {wanted!r}; expected true, false, a step number, or a folder {folder}/STEP"
        )
    return int(number)


def check_not_finished(
    output: Path, step: int, total_steps: int, *, writes: Collection[str] = files.AT_THE_END
) -> None:
    """Refuses to train nothing. A run that was killed before it had written everything is not finished.

    Args:
        output: the output directory.
        step: the step to continue from.
        total_steps: optimizer steps of the whole run.
        writes: what a run writes after its last step.

    Raises:
        CheckpointError: all steps are done, or early stopping has ended the run, and the rest is written.
    """
    facts = read_facts(output) if all((output / name).exists() for name in writes) else {}
    early = bool(facts.get("ended_early"))
    if facts.get("exported_step") == step and (step >= total_steps or early):
        by = " by early stopping" if early else ""
        raise CheckpointError(
            f"{output} holds this run, finished{by} at step {step}: nothing is left to train. Give another "
            "`output_dir`, or set `overwrite_output_dir: true` to train it again"
        )
