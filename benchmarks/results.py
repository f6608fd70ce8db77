"""Writes a benchmark's results as JSON, Markdown and pictures, whose file names begin with the script's name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.facts import main_module


@dataclass(frozen=True)
class Table:
    """A table for a reader. It shows numbers with three digits; the JSON has them in full."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line([_cell(value) for value in row]) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


@dataclass(frozen=True)
class Result:
    """The results of a script.

    Attributes:
        name: the stem of the files.
        title: the title of the page.
        about: a description of the measurement, for the page.
        facts: the facts of `machine_facts`.
        tables: the tables of the page.
        data: all measurements, for the JSON.
        pictures: names of files that `picture` wrote.
    """

    name: str
    title: str
    about: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    data: Any
    pictures: Sequence[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes `name.json` and `name.md` and prints the tables."""
        folder.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m", main_module(), *_shown(sys.argv[1:])])
        content = {"command": command, "facts": dict(self.facts), "data": self.data}
        content["tables"] = [asdict(table) for table in self.tables]
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        tables = [table.markdown() for table in self.tables]
        facts = "; ".join(f"{key}: {value}" for key, value in self.facts.items())
        page = [f"# {self.title}", "", self.about, "", f"`{command}`", ""]
        page += [f"![{self.title}]({name})\n" for name in self.pictures]
        page += [*tables, f"*{facts}*", ""]
        (folder / f"{self.name}.md").write_text("\n".join(page), encoding="utf-8")
        print("\n".join(tables))
        print(folder / f"{self.name}.md")


def _shown(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the arguments that a reader would give: not those that say where this run keeps its files."""
    words = iter(arguments)
    for word in words:
        if word in ("--output", "--cells"):
            next(words, None)
        elif not word.startswith(("--output=", "--cells=")):
            yield word


def can_draw() -> bool:
    """Returns True if matplotlib, which `picture` needs, is installed; says so if it is not."""
    found = find_spec("matplotlib") is not None
    if not found:
        print("no picture is drawn: matplotlib is not installed", flush=True)
    return found


@contextmanager
def picture(folder: Path, name: str, columns: int = 1) -> Iterator[Any]:
    """Yields the axes of a picture (an array of axes if there are several columns) and saves it at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(1.5 + 4.5 * columns, 4.0), layout="constrained")
    try:
        yield axes
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=110)
    finally:
        plt.close(figure)


def gib(count: float | None) -> str:
    """Formats a number of bytes for a reader."""
    if count is None:
        return "not known"
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def percent(share: float) -> str:
    """Formats a share for a reader."""
    return f"{100 * share:.1f} %"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
