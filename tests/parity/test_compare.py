"""The arithmetic of the comparison."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_simpo.data.groups import GroupLengths
from jax_simpo.errors import UserError
from parity import __main__ as program
from parity import processes
from parity.cases import Cell, Job
from parity.compare import Comparison, Figure, Outcome, relative_distances, token_figure, worst_tensor
from parity.processes import SideFailed, run_process, users_job
from parity.results import TokenTable
from tests.pairs import make_pair
from tests.torch_ref.start import config_file


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1e-5])
def test_what_is_beyond_the_bound_or_no_number_does_not_hold(value: float) -> None:
    assert not Figure("gradients", value, 1e-5).holds


def test_a_tensor_that_one_side_lacks_is_infinitely_far() -> None:
    ours, theirs = {"a": np.ones(3)}, {"a": np.ones(3), "b": np.ones(3)}
    assert relative_distances(ours, theirs) == {"a": 0.0, "b": math.inf}
    assert relative_distances(theirs, ours)["b"] == math.inf
    assert relative_distances({"a": np.ones(4)}, ours)["a"] == math.inf


def test_final_weights_are_measured_by_how_far_they_moved() -> None:
    start, theirs, ours = {"a": np.zeros(1) + 10}, {"a": np.zeros(1) + 11}, {"a": np.zeros(1) + 11.5}
    assert relative_distances(ours, theirs, start)["a"] == pytest.approx(0.5)


def test_the_worst_tensor_is_the_one_nearest_to_its_own_bound() -> None:
    figure = worst_tensor("gradients", {"noisy": 2e-5, "quiet": 9e-6}, 1e-5, {"noisy": 1e-4})
    assert (figure.value, figure.bound) == (9e-6, 1e-5)
    figure = worst_tensor("gradients", {"noisy": 4e-4, "quiet": 9e-6}, 1e-5, {"noisy": 1e-4})
    assert figure.bound == pytest.approx(3e-4) and not figure.holds
    assert "noisy" in figure.detail and "own noise" in figure.detail


def test_a_nan_is_the_worst_tensor() -> None:
    assert not worst_tensor("gradients", {"a": 1e-9, "b": math.nan}, 1e-5, {}).holds


def test_other_numbers_of_tokens_are_infinitely_far_apart() -> None:
    assert token_figure("token log-prob", np.zeros(3), np.zeros(4)).value == math.inf
    assert token_figure("token log-prob", np.zeros(3), np.zeros(3), same=False).value == math.inf


def test_a_wrong_variant_that_passes_breaks_the_check() -> None:
    cell = Cell("llama3", "shared + packed", "float32", "jax, 1 device")
    right = Comparison(cell, "torch", [Figure("loss", 0.0, 1.0)])
    wrong = Comparison(cell, "torch", [Figure("loss", 2.0, 1.0)])
    assert Outcome([right], [], {"double BOS": wrong}).holds
    assert not Outcome([right], [], {"double BOS": right}).holds
    assert not Outcome([wrong], [], {"double BOS": wrong}).holds


def test_tokens_are_kept_response_after_response() -> None:
    pairs = [make_pair([9], [1, 2], [3]), make_pair([9], [4], [5, 6, 7])]
    table = TokenTable(GroupLengths.of(pairs))
    table.put(1, 1, np.array([5.0, 6.0, 7.0]))
    table.put(0, 0, np.array([1.0, 2.0]))
    assert table.logps.tolist() == [1, 2, 0, 0, 5, 6, 7]


def test_a_config_that_one_side_alone_can_honour_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = config_file(tmp_path / "model", tmp_path, steps=1, optim="lion", adam_mu_dtype="bfloat16")
    with pytest.raises(UserError, match=r"`optim: lion` cannot be honoured(.|\n)*`adam_mu_dtype: bfloat16` cannot"):
        users_job(tmp_path / "work", file, 4, [])
    assert not (tmp_path / "work").exists()


def test_a_failed_side_says_where_its_output_is(tmp_path) -> None:
    job = Job(str(tmp_path), {}, {"tiny": {}}, [], [], 1, 1, 1, 1)
    with pytest.raises(SideFailed, match=r"jax ended with status 3.*jax\.log(.|\n)*what went wrong"):
        run_process(job, "jax", ["sh", "-c", "echo what went wrong; exit 3"], lambda _: None)


def test_parity_says_that_it_needs_torch_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert program.main(["--output", str(tmp_path / "compared")]) == 2
    said = "error: parity needs PyTorch, which is not installed here: pip install 'jax-simpo[torch]'\n"
    assert capsys.readouterr() == ("", said) and list(tmp_path.iterdir()) == []


def test_parity_says_what_it_runs_and_now_and_then_how_many_cells_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_SECONDS_BETWEEN_LINES", 0.05)
    cells = [Cell("llama3", "shared + packed", "float32", backend) for backend in ("torch", "jax, 1 device")]
    job = Job(str(tmp_path), {}, {"tiny": {}}, cells, [], 1, 1, 1, 1)
    job.results_folder(cells[0]).mkdir(parents=True)
    (job.results_folder(cells[0]) / "results.npz").touch()
    said: list[str] = []
    run_process(job, "jax", ["sleep", "0.1"], said.append)
    assert said[0] == "running jax" and len(said) > 1
    assert all(re.fullmatch(r"running jax: 1 of 2 cells done, 0:\d\d", line) for line in said[1:]), said


def test_what_parity_started_ends_when_parity_is_killed(tmp_path: Path) -> None:
    """The started program leads a session of its own, as torchrun's ranks do, and prints its number."""
    rank = "import os, time; from parity.leash import end_with_leash; end_with_leash(); os.setsid(); "
    rank += "print(os.getpid(), flush=True); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {rank!r}])"
    command = [sys.executable, "-m", "parity.leash", sys.executable, "-c", launcher]
    caller = (
        f"import subprocess, time; subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.kill()
        deadline = time.monotonic() + 30
        while runs(number) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not runs(number)


def runs(number: int) -> bool:
    """Returns True for a process that runs: neither gone nor waiting for its new parent to take note of its end."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
