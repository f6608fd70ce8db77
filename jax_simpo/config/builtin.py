"""The configs that come with the program: the quickstart and one file per published run."""

from __future__ import annotations

import difflib
from pathlib import Path

from jax_simpo.errors import ConfigError

PREFIX = "builtin:"
_PACKAGE = Path(__file__).parents[1]


def configs_folder() -> Path:
    """The folder of the configs: in the installed package, or at the root of a checkout of the repository."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def builtin_configs() -> dict[str, str]:
    """The names of the configs after `builtin:`, each with the first comment of its file."""
    folder = configs_folder()
    files = [*sorted(folder.glob("*.yaml")), *sorted((folder / "plan").glob("*.yaml"))]
    return {str(file.relative_to(folder).with_suffix("")): _first_sentence(file) for file in files}


def find_config(name: str | Path) -> Path:
    """The file that a config's name means: the path itself, or the file of `builtin:NAME`.

    Raises:
        ConfigError: no config of that name comes with the program.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    wanted = text.removeprefix(PREFIX).removesuffix(".yaml")
    known = builtin_configs()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, 1, 0.5)
        hint = f"did you mean `{PREFIX}{near[0]}`?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"{text}: no config of that name comes with jax-simpo; {hint}")
    return configs_folder() / f"{wanted}.yaml"


def _first_sentence(file: Path) -> str:
    """The comment a file begins with, up to the end of its first sentence."""
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    text = " ".join(comment)
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
