"""`findings.jsonl`: what the program found wrong with a run while it trained, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.health.rules import Finding
from jax_simpo.run.manifest import read_manifest, write_file


def write_findings(output: Path, findings: Sequence[Finding]) -> None:
    """Writes the file whole, with the findings of a run so far; without any, a file of a former start is emptied.

    Raises:
        CheckpointError: there is such a file that no run wrote.
    """
    if findings or (output / files.FINDINGS).exists():
        write_file(output, files.FINDINGS, "".join(json.dumps(asdict(finding)) + "\n" for finding in findings))


def read_findings(output: Path) -> list[Finding]:
    """Returns the findings of a run, oldest first.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = output / files.FINDINGS
    if not path.is_file() or files.FINDINGS not in read_manifest(output):
        return []
    try:
        return [Finding(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error!r}). Put a good copy back, or remove the file") from error
