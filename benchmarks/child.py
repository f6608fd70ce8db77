"""Runs a module that ends when its parent does: `python -m benchmarks.child PARENT MODULE ARGUMENTS`.

PARENT is the process id of the parent. A child that was started too late to see it alive does not run.
"""

from __future__ import annotations

import os
import runpy
import sys

from benchmarks.workers import end_with_parent


def main() -> None:
    parent, module = sys.argv[1:3]
    end_with_parent()
    if os.getppid() != int(parent):
        sys.exit(f"process {parent}, which should run {module}, has ended")
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
