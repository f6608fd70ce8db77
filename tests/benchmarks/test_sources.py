"""A measurement holds for the source that its script runs, and outlasts changes to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sources import ROOT, code_digest, source_files

FILES = {
    "pack/__init__.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from pack.lazy import thing
        def __getattr__(name): ...
    """,
    "pack/script.py": """
        from pack import top, registry as them
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from pack.types_alone import Kind
        def run():
            from pack.sub.late import call
            start("pack.worker")
    """,
    "pack/other.py": "from pack import thing, top",
    "pack/top.py": "import numpy, pack.sub.deep",
    "pack/registry.py": "NAMES = {'a': 'pack.sub.backend'}",
    "pack/sub/__init__.py": "TABLE = ('pack.unrelated',)",
    "pack/sub/late.py": "from .deep import something",
    "pack/sub/deep.py": "something = 'a sentence. It names pack.unrelated but is no name.'",
    "pack/sub/backend.py": "",
    **dict.fromkeys(("pack/worker.py", "pack/lazy.py", "pack/types_alone.py", "pack/unrelated.py"), ""),
}
OF_SCRIPT = ("__init__", "script", "top", "registry", "sub/__init__", "sub/late", "sub/deep", "sub/backend", "worker")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(line[8:] if line[:8].isspace() else line for line in text.splitlines()))
    return tmp_path


def test_a_script_s_sources_are_what_it_imports_and_the_modules_that_it_names(root: Path) -> None:
    assert source_files("pack.script", root) == {root / f"pack/{name}.py" for name in OF_SCRIPT}


def test_a_package_that_is_asked_for_a_name_brings_what_it_looks_up(root: Path) -> None:
    assert root / "pack/lazy.py" in source_files("pack.other", root)


@pytest.mark.parametrize("changed", [*OF_SCRIPT, "lazy", "types_alone", "unrelated", "other"])
def test_an_edit_voids_what_ran_the_file_and_nothing_else(changed: str, root: Path) -> None:
    before = code_digest.__wrapped__("pack.script", root)
    with (root / f"pack/{changed}.py").open("a") as file:
        file.write("\n# an edit\n")
    assert (code_digest.__wrapped__("pack.script", root) != before) == (changed in OF_SCRIPT)


@pytest.mark.parametrize(
    ("script", "has", "has_not"),
    [
        ("attention_speed", ["jax_simpo/ops/attention/pallas/kernel", "torch_ref/attention"], ["benchmarks/loss_head"]),
        ("layers", ["benchmarks/layers_sides", "jax_simpo/models/transformer"], ["benchmarks/peers", "parity/compare"]),
        ("loss_head", ["benchmarks/loss_head_sides", "jax_simpo/ops/loss_head/triton_kernels"], ["benchmarks/layers"]),
        ("peers", ["benchmarks/contenders/ours", "torch_ref/trainer", "jax_simpo/config/schema"], ["parity/compare"]),
        ("parity_gpu", ["parity/jax_side", "parity/torch_side", "jax_simpo/training/attention"], ["benchmarks/peers"]),
        ("throughput", ["jax_simpo/training/verdicts", "benchmarks/dpo"], ["torch_ref/trainer", "benchmarks/layers"]),
    ],
)
def test_the_scripts_of_a_gpu_have_the_sources_of_their_workers(
    script: str, has: list[str], has_not: list[str]
) -> None:
    files = {str(path.relative_to(ROOT)).removesuffix(".py") for path in source_files(f"benchmarks.{script}")}
    assert set(has) <= files and not set(has_not) & files
