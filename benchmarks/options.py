"""Makes a script's options from the parameters of its main function, with the standard library alone.

The annotation of a parameter has the text of `--help`:

    def main(rounds: Annotated[int, Option("Runs of each.")] = 5) -> None: ...

    run(main)

A list is an option that can be repeated, a bool is `--name` and `--no-name`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """An option of a script.

    Attributes:
        help: the text of `--help`.
        choices: the values that it may have.
        flag: its name, if it is not that of the parameter.
    """

    help: str
    choices: Sequence[str] | None = None
    flag: str | None = None


class BadOption(ValueError):
    """The options of a script do not go together. The message says why, and what to give instead."""


def run(main: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Calls a main function with the options of the command line.

    Args:
        main: a function whose parameters are annotated with `Annotated[TYPE, Option(...)]`.
        arguments: instead of those of the command line.
    """
    text = sys.modules[main.__module__].__doc__
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(main, include_extras=True)
    parameters = inspect.signature(main).parameters
    for name, parameter in parameters.items():
        annotated, option = get_args(hints[name])
        kind = next(iter(set(get_args(annotated)) - {NoneType})) if NoneType in get_args(annotated) else annotated
        settings: dict[str, Any] = {"default": None, "help": _help(option, parameter.default)}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is list:
            settings |= {"action": "append", "type": get_args(kind)[0], "choices": option.choices}
        else:
            settings |= {"type": kind, "choices": option.choices}
        parser.add_argument(option.flag or f"--{name.replace('_', '-')}", dest=name, **settings)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        main(**given)
    except BadOption as error:
        parser.error(str(error))


def _help(option: Option, default: Any) -> str:
    shown = "" if default is None or isinstance(default, bool) else f" Default: {default}."
    return f"{option.help}{shown}".replace("%", "%%")
