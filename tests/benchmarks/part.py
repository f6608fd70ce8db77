"""Is a part of the GPU measurements for tests: measures three cells, and ends as its options say."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

from benchmarks.cells import WRONG, Cells
from benchmarks.options import Option, run


def main(
    output: Annotated[Path, Option("Folder for the results.")],
    name: Annotated[str, Option("Stem of the files.")],
    cells: Annotated[Path, Option("File of the cells.")],
    ends: Annotated[
        str, Option("In its middle, the first time.", ("well", "killed", "hangs", "wrong", "fails"))
    ] = "well",
    quick: Annotated[bool, Option("Changes nothing.")] = False,
) -> None:
    store = Cells(cells)
    for number in range(3):
        fails = ends == "fails" and number == 1 and not (output / f"{name}.begun").exists()
        store.measure(
            {"number": number}, lambda number=number, fails=fails: {"failed": "no kernel"} if fails else number
        )
        print(f"cell {number}", flush=True)
        if number == 1 and not (output / f"{name}.begun").exists():
            (output / f"{name}.begun").touch()
            if ends == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if ends == "hangs":
                time.sleep(600)
    (output / f"{name}.md").write_text("the page")
    if ends == "wrong":
        print("a number is wrong", flush=True)
        raise SystemExit(WRONG)


if __name__ == "__main__":
    run(main)
