"""Draws the terminal of the tutorial: runs its commands, and writes what they print as SVG (`make docs-pictures`)."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
COLUMNS = 100


def main() -> None:
    """Runs the blocks that the pictures need, in a temporary folder."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / "tutorial.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    own = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # the `python` of the blocks
    with tempfile.TemporaryDirectory() as folder:
        for block in blocks:
            if "<<'END'" in block:
                subprocess.run(["bash", "-euc", block], cwd=folder, env=own, check=True, capture_output=True)
        mask = "mask: queries"
        rows, _, rest = terminal("inspect cafe.yaml --rows 1", folder).partition(mask)
        tokens = rows.splitlines()
        # The head of the table, the tokens of a pair, and the picture of the mask.
        first = next(i for i, line in enumerate(tokens) if "shared prompt [" in line)
        shown = [*tokens[:6], "", *tokens[first : first + 6], mask + rest.partition("\n\n")[0]]
        draw("terminal-inspect", "jax-simpo inspect cafe.yaml --rows 1", "\n".join(shown))
        draw("terminal-train", "jax-simpo train cafe.yaml", terminal("train cafe.yaml", folder))


def terminal(arguments: str, folder: str) -> str:
    """Returns what a command prints on a terminal with colours."""
    wanted = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS)}
    environment = {**os.environ, **wanted, "TTY_INTERACTIVE": "0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jax_simpo", *arguments.split()]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, text=True, capture_output=True)
    lines = (done.stdout + done.stderr).replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if not re.search(r"\x1b\[\d*[AKlh]|\x1b\[\?25", line))


def draw(name: str, title: str, output: str) -> None:
    """Writes coloured output as a picture beside the pages."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(output))
    (DOCS / f"{name}.svg").write_text(console.export_svg(title=title), encoding="utf-8")


if __name__ == "__main__":
    main()
