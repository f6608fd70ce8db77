"""On a GPU the measurements run where only jax, flax, optax, torch and transformers are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import PARTS

ROOT = Path(__file__).parents[2]
# Everything else that the project depends on, and that none of those five brings along everywhere.
ABSENT = ("pydantic", "annotated_types", "typer", "pyarrow", "datasets", "matplotlib", "xxhash", "jaxtyping", "trl")
IMPORTS = """
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

stand_ins, absent, modules = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.path.insert(0, stand_ins)
sys.modules.update({name: import_module(name) for name in ("jaxtyping", "xxhash")})
sys.meta_path.insert(0, Absent())
for name in modules:
    import_module(name)
import_module("benchmarks.backends").choosers()
"""


def test_scripts_and_sides_are_imported_without_the_packages_of_the_config_and_the_data() -> None:
    modules = {part.module for part in PARTS.values() if not part.needs}
    # What their workers import when they start.
    modules |= {"benchmarks.steps", "benchmarks.layers_sides", "benchmarks.loss_head_sides", "benchmarks.flex"}
    modules |= {"benchmarks.backends", "torch_ref.attention"}
    modules |= {"jax_simpo.hf.config", "jax_simpo.ops.attention.pallas.backend", "jax_simpo.ops.logprobs"}
    arguments = [str(ROOT / "benchmarks" / "stand_ins"), ",".join(ABSENT), ",".join(sorted(modules))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTS, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
