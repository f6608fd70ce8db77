"""Both sides, every layout, every backend: the same numbers.

The float32 matrix is run once for all tests here: a process of PyTorch, two ranks of ZeRO-3, one process of JAX.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from parity.__main__ import main
from parity.cases import (
    FAMILIES,
    GROUPS,
    LAYOUTS,
    MESHES,
    OBJECTIVES,
    PART_BACKENDS,
    QUICK_ADAPTED,
    QUICK_FAMILY,
    REFERENCE,
    ZERO3,
    Cell,
    Job,
    step_plan,
)
from parity.compare import ALL_RUNS, Outcome, compare
from parity.results import CellResults, read_results, read_tensors
from parity.variants import VARIANTS
from torch_ref.distributed import Ranks
from torch_ref.setup import Setup

CELL = Cell("llama3", "shared + packed", "float32", "jax, fsdp=8")


@dataclass(frozen=True)
class Matrix:
    """The outcome of `python -m parity --quick` and its folder."""

    status: int
    folder: Path
    job: Job
    outcome: Outcome

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())


def run(folder: Path, *arguments: str) -> Matrix:
    with pytest.MonkeyPatch.context() as patch:
        # Twenty steps a cell compute about as long as they compile, so they need some optimisations, unlike most tests.
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
            patch.setenv("XLA_FLAGS", f"{flags} --xla_llvm_disable_expensive_passes=true")
        status = main([*arguments, "--output", str(folder)])
    job = Job.load(folder / "job.json")
    return Matrix(status, folder, job, compare(job))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    pytest.importorskip("deepspeed")
    return run(tmp_path_factory.mktemp("parity"), "--quick")


def test_every_family_layout_and_backend_is_compared(matrix: Matrix) -> None:
    compared = {(c.cell.family, c.cell.layout, c.cell.backend) for c in matrix.outcome.cells}
    full = {(QUICK_FAMILY, layout, b) for layout in LAYOUTS for b in (ZERO3, *MESHES)}
    others = FAMILIES.keys() - {QUICK_FAMILY}
    assert others == {"llama", "mistral", "gemma2", "qwen2", "qwen3"}
    on_one_mesh = (*others, *QUICK_ADAPTED, *OBJECTIVES, *GROUPS)
    part = {(f, layout, "jax, fsdp=4 x tensor=2") for f in on_one_mesh for layout in ("separate", "shared + packed")}
    assert {"llama3 + DPO", "llama3 + ORPO", "llama3 + sigmoid_norm, weighted"} == OBJECTIVES.keys()
    assert {"llama3 + groups"} == GROUPS.keys()
    assert compared == full | part


def test_every_bound_holds(matrix: Matrix) -> None:
    broken = [(c.cell.name, figure) for c in matrix.outcome.cells for figure in c.broken]
    assert not broken
    assert matrix.status == 0


def test_no_gradient_needs_more_than_its_own_bound(matrix: Matrix) -> None:
    """These models do not use the allowance for transformers' own noise."""
    figures = [figure for c in matrix.outcome.cells for figure in c.figures if figure.name == "gradients"]
    assert len(figures) == len(matrix.outcome.cells)
    assert {figure.bound for figure in figures} == {1e-5}


def test_exports_are_read_by_the_other_side(matrix: Matrix) -> None:
    for comparison in matrix.outcome.cells:
        names = {figure.name for figure in comparison.figures}
        expected = comparison.cell.backend in MESHES
        assert ({"JAX export in transformers", "PyTorch export in JAX"} <= names) == expected


def test_training_moves_the_loss_and_the_tokens(matrix: Matrix) -> None:
    """Guards against twenty steps that change nothing, which would agree too."""
    results = read_results(matrix.job.results_folder(CELL))
    loss = results.curve("loss")
    # It falls to 0.52 of what it was on the made-up pairs that stand in where no real ones are, and further on those.
    assert len(loss) == 20 and loss[-1] < 0.6 * loss[0]
    assert results.final_logps is not None and np.abs(results.final_logps - results.logps).max() > 1.0


@pytest.mark.parametrize("family", QUICK_ADAPTED)
def test_an_adapter_trains_alone_and_both_its_matrices_have_gradients(family: str, matrix: Matrix) -> None:
    results = read_results(
        matrix.job.results_folder(Cell(family, "shared + packed", "float32", "jax, fsdp=4 x tensor=2"))
    )
    start = read_tensors(Path(matrix.job.adapters[family]))
    assert results.gradients.keys() == results.weights.keys() == start.keys()
    assert all("lora_" in name and np.abs(gradient).max() > 1e-5 for name, gradient in results.gradients.items())
    assert all(np.abs(results.weights[name] - start[name]).max() > 1e-4 for name in start)
    loss = results.curve("loss")
    assert len(loss) == 20 and loss[-1] < loss[0] - 0.05


@pytest.mark.parametrize("name", VARIANTS)
def test_a_wrong_variant_is_caught(name: str, matrix: Matrix) -> None:
    if name in matrix.outcome.not_tried and not os.environ.get("SIMPO_SHARED"):
        pytest.skip("makes no difference to the built-in pairs")
    comparison = matrix.outcome.variants[name]
    caught = [figure for figure in comparison.broken if figure.name not in ("token log-prob",)]
    assert caught, "no bound is broken but, at most, one for the number of tokens"
    assert max(figure.share for figure in caught) > 100


def test_a_log_prob_of_the_wrong_sort_is_not_the_only_thing_caught(matrix: Matrix) -> None:
    """Some mistakes change no log-prob and show only in the loss and the gradients."""
    figures = {f.name: f for f in matrix.outcome.variants["gamma times beta twice"].figures}
    assert figures["token log-prob"].holds and not figures["gradients"].holds and not figures["loss of a pair"].holds


def _gradient(folder: Path) -> None:
    (file,) = (folder / "gradients").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    file.unlink()
    save_file({**tensors, name: tensors[name] * np.float32(1 + 1e-4)}, file)


def _missing_gradient(folder: Path) -> None:
    (file,) = (folder / "gradients").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    file.unlink()
    save_file(tensors, file)


def _token(folder: Path) -> None:
    with np.load(folder / "results.npz") as file:
        arrays = dict(file)
    arrays["logps"][7] = np.nan
    (folder / "results.npz").unlink()
    np.savez(folder / "results.npz", **arrays)


def _loss(folder: Path) -> None:
    values = json.loads((folder / "results.json").read_text())
    values["steps"][-1]["loss"] += 2e-4
    (folder / "results.json").unlink()
    (folder / "results.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (_gradient, "gradients"),
        (_missing_gradient, "gradients"),
        (_token, "token log-prob"),
        (_loss, "losses, 20 steps"),
    ],
)
def test_a_broken_bound_gives_exit_status_1(
    change: Callable[[Path], None],
    figure: str,
    matrix: Matrix,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(matrix.folder, folder, copy_function=os.link)
    for report in folder.glob("report.*"):
        report.unlink()  # a hard link: writing to it would change the other folder's report
    (folder / "job.json").unlink()  # for the same reason
    family = {CELL.family: matrix.job.configs[CELL.family]}
    one_cell = {"configs": family, "adapters": {}, "cells": [CELL.on(REFERENCE), CELL], "variants": []}
    replace(matrix.job, work=str(folder), **one_cell).save()
    change(folder / matrix.job.results_folder(CELL).relative_to(matrix.folder))
    assert main(["--report-only", "--output", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert f"BROKEN  {CELL.name}: {figure}" in shown and "NO PARITY" in shown
    assert json.loads((folder / "report.json").read_text())["holds"] is False


def test_the_report_tells_figures_bounds_and_what_was_caught(matrix: Matrix) -> None:
    report = matrix.report
    assert report["holds"] is True
    figures = report["cells"][0]["figures"]
    assert {"name", "value", "bound", "holds", "detail"} <= set(figures[0])
    assert all(variant["caught"] for variant in report["wrong variants"].values())
    text = (matrix.folder / "report.md").read_text()
    assert "PARITY: all" in text and "| gradients |" in text and REFERENCE in text
    page = (matrix.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page  # the page fetches nothing


def test_nothing_to_report_is_an_error_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report-only", "--output", str(tmp_path)]) == 2
    assert "holds no comparison" in capsys.readouterr().err


@pytest.mark.slow
def test_bfloat16_rounds_no_worse_in_jax_than_in_pytorch(tmp_path: Path) -> None:
    full = run(tmp_path / "full")
    rounded = [c for c in full.outcome.cells if c.cell.dtype == "bfloat16" and c.cell.backend in MESHES]
    assert {c.cell.layout for c in rounded} == {*LAYOUTS, ALL_RUNS}
    assert not [(c.cell.name, figure) for c in rounded for figure in c.broken]
    assert full.status == 0


# --- both sides against a third: TRL's functions

BETA, RATIO = 2.5, 0.55
RUNS = [("llama", b) for b in PART_BACKENDS] + [("llama3", b) for b in ("jax, 1 device", *PART_BACKENDS)]


def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns about its own future
        from trl.experimental.cpo import CPOTrainer
    return CPOTrainer


@pytest.fixture(scope="module")
def trl_means(request: pytest.FixtureRequest, matrix: Matrix) -> tuple[str, np.ndarray]:
    """Computes mean log-probs of the first step's pairs with TRL's function, from transformers' logits, one by one."""
    from transformers import AutoModelForCausalLM

    job, cell = matrix.job, Cell(request.param, "separate", "float32", "torch, 1 process")
    config = job.config(cell)
    pairs = Setup(config, Ranks(0, 1, torch.device("cpu"), launched=False)).train_pairs()
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    means = []
    for pair in pairs.groups(step_plan(job, config, pairs.lengths).groups(0)):
        for response in pair.responses:
            ids = torch.from_numpy(response.ids.astype(np.int64))[None]
            labels = ids.clone()
            labels[:, : response.prompt_length] = -100
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            means.append(trl().get_batch_logps(logits, labels, average_log_prob=True).item())
    return request.param, np.array(means).reshape(-1, 2)


def results_of(matrix: Matrix, family: str, layout: str, backend: str) -> CellResults:
    return read_results(matrix.job.results_folder(Cell(family, layout, "float32", backend)))


@pytest.mark.parametrize(("trl_means", "backend"), RUNS, indirect=["trl_means"])
@pytest.mark.parametrize("layout", ["separate", "shared + packed"])
def test_mean_log_probs_and_losses_are_trls(
    layout: str, backend: str, trl_means: tuple[str, np.ndarray], matrix: Matrix
) -> None:
    family, means = trl_means
    results = results_of(matrix, family, layout, backend)
    np.testing.assert_allclose(results.means.reshape(-1, 2), means, atol=2e-5)
    settings = SimpleNamespace(
        beta=BETA,
        simpo_gamma=BETA * RATIO,
        label_smoothing=0.0,
        loss_type="simpo",
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, rejected = trl().cpo_loss(settings, *torch.from_numpy(means).T)
    np.testing.assert_allclose(results.losses, losses.numpy(), atol=2e-5)
    first = results.steps[0]
    np.testing.assert_allclose(first["rewards/chosen"], chosen.mean().item(), atol=2e-5)
    np.testing.assert_allclose(first["rewards/rejected"], rejected.mean().item(), atol=2e-5)
