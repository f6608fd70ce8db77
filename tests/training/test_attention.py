"""`auto` passes over backends that are wrong or slow on the device at hand, and remembers what it saw."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.evidence import Distance, Shape, Speed, Verdict
from jax_simpo.training import attention, verdicts
from jax_simpo.training.attention import choose_attention
from jax_simpo.training.setup import Setup
from tests.ops.attention.planted import plant
from tests.ports import free_port
from tests.training.runs import config_of, losses, run, run_printing

SHAPE = Shape(
    dtype="float32",
    heads=2,
    kv_heads=2,
    head_dim=16,
    windows=(None,),
    scale=0.25,
    softcap=None,
    rows=1,
    row_length=256,
)
ROOT = Path(__file__).parents[2]
SPEED = Speed(0.001, 0.003, 1.0, 0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps the verdicts of each test apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "jax-simpo" / "attention"


def test_a_run_with_planted_backends_has_the_losses_of_dense(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "wrong_mask", "nan", "crash", "slow")
    records, printed = run_printing(config_of(tmp_path, max_steps=3, row_length=256))
    assert "'wrong_mask' is passed over: it is wrong: its result is off by" in printed
    assert "'nan' is passed over: it gives NaN or infinity" in printed
    assert "'crash' is passed over: it fails: NotImplementedError: no lowering for this" in printed
    assert "attention: dense (auto: the fastest right one on cpu; slow " in printed
    assert "loss head: xla (auto on a CPU: the only one there)" in printed
    monkeypatch.undo()
    assert losses(records) == losses(run(config_of(tmp_path / "dense", max_steps=3, row_length=256, attention="dense")))


class Trials:
    """Stands in for `examine`, and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: str | None = None, raised: bool = False) -> None:
        self.count, self.problem, self.raised = 0, problem, raised
        monkeypatch.setattr(verdicts, "examine", self)

    def __call__(self, name: str, shape: Shape, device: jax.Device, *, timed: bool) -> Verdict:
        self.count += 1
        speed = SPEED if self.problem is None else None
        return Verdict(name, self.problem, {"out": Distance(1e-7, 1e-6)}, speed, self.raised)


def verdict_on(name: str, shape: Shape = SHAPE, **options: bool) -> Verdict:
    return verdicts.of_backends([name], shape, jax.devices()[0], **options)[0]


def test_a_verdict_is_kept_until_something_changes(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(monkeypatch)
    first = verdict_on("dense")
    assert verdict_on("dense") == first and trials.count == 1
    changes = {
        "the shape": lambda: verdict_on("dense", replace(SHAPE, row_length=512)),
        "a flag": lambda: monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_x=1") or verdict_on("dense"),
        "the driver": lambda: monkeypatch.setattr(verdicts, "nvidia_driver", lambda: "581") or verdict_on("dense"),
        "a kernel": lambda: monkeypatch.setattr(verdicts, "_sources", lambda kind: "other") or verdict_on("dense"),
        "the user's wish": lambda: verdict_on("dense", anew=True),
    }
    for number, (change, again) in enumerate(changes.items(), start=2):
        again()
        assert trials.count == number, change
    assert {path.suffix for path in own_cache.iterdir()} == {".json"}
    for kept in own_cache.iterdir():
        kept.write_text(kept.read_text()[:40])  # cut by somebody
    assert verdict_on("dense").problem is None and trials.count == 7


def test_what_raised_is_tried_again_and_what_is_wrong_is_not(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising = Trials(monkeypatch, "fails: RESOURCE_EXHAUSTED", raised=True)
    assert verdict_on("dense") == verdict_on("dense") and raising.count == 2
    wrong = Trials(monkeypatch, "gives NaN")
    assert verdict_on("dense") == verdict_on("dense") and wrong.count == 1
    assert [path.suffix for path in own_cache.iterdir()] == [".json"]


def test_a_cache_that_cannot_be_written_costs_trials_only(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(monkeypatch)
    own_cache.mkdir(parents=True)

    def full(*_: object) -> None:
        raise ConfigError("cannot be written: No space left on device")

    monkeypatch.setattr(verdicts, "write_text", full)
    assert verdict_on("dense").problem is None and verdict_on("dense").problem is None and trials.count == 2
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert verdict_on("dense").problem is None and trials.count == 3


def tried_by_a_child(then: str) -> int:
    """Lets a process of its own try a backend, and end as a kernel would let it end: with no time for anything."""
    child = (
        "import os, signal, time, jax\n"
        "from jax_simpo.run import signals\n"
        "from jax_simpo.training import verdicts\n"
        "from tests.training.test_attention import SHAPE\n"
        f"verdicts.examine = lambda *_, **__: {then}\n"
        "with signals.handled(ends_process=True):\n"
        "    verdicts.of_backends(['blockwise'], SHAPE, jax.devices()[0])\n"
    )
    return subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True).returncode


def test_a_backend_that_has_ended_two_processes_is_not_tried_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials(monkeypatch)
    by_signal = "(os.kill(os.getpid(), signal.SIGINT), time.sleep(60))"
    assert tried_by_a_child(by_signal) == 130
    assert not list(own_cache.glob("*.trial"))  # that was the user's wish
    assert tried_by_a_child("os._exit(3)") == 3 == tried_by_a_child("os._exit(3)")
    banned = verdict_on("blockwise")
    assert banned.problem is not None and "ended 2 processes that tried it" in banned.problem and trials.count == 0
    (mark,) = own_cache.glob("*.trial")
    assert str(mark) in banned.problem
    assert verdict_on("blockwise", anew=True).problem is None and trials.count == 1
    assert verdict_on("blockwise").problem is None and not mark.exists()


def test_a_trial_that_breaks_the_device_ends_the_run_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(monkeypatch, "fails: illegal address", raised=True)
    monkeypatch.setattr(verdicts, "_answers", lambda device: False)
    with pytest.raises(ConfigError, match="'dense' fails: illegal address, and cpu answers no more"):
        verdict_on("dense")
    problem = verdict_on("dense").problem
    assert problem is not None and "ended 2 processes" in problem and trials.count == 1


def test_a_named_backend_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "nan")
    config = config_of(tmp_path).model_copy(update={"attention": "nan"})  # the schema knows no planted backend
    device = jax.devices()[0]
    with pytest.raises(ConfigError, match=r"`attention: nan` gives NaN .*Choose `attention: auto`.*attention_check: f"):
        choose_attention(config, SHAPE, device)
    unchecked = config.model_copy(update={"attention_check": False})
    assert choose_attention(unchecked, SHAPE, device).backend == "nan"


@pytest.mark.parametrize(
    ("row_length", "expected"),
    [(9344, (8192, 128)), (1920, (1024, 384)), (384, (256, 128)), (4096, (4096, 0)), ("auto", (8192, 128))],
)
def test_rows_are_tried_at_a_power_of_two_and_what_is_left_over(
    row_length: int | str, expected: tuple[int, int], tmp_path: Path
) -> None:
    shape = Setup(config_of(tmp_path, row_length=row_length), any_mesh=True).attention_shape()
    assert (shape.row_length, shape.remainder) == expected


def test_rows_to_try_hold_the_longest_pair_on_a_device_that_is_too_small_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "device_memory", 0)
    assert Setup(config_of(tmp_path, max_length=2048), any_mesh=True).attention_shape().row_length == 2048


def test_auto_passes_over_a_backend_that_is_wrong_in_the_last_block_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "wrong_in_the_last_block")
    choice = choose_attention(config_of(tmp_path), replace(SHAPE, row_length=1024, remainder=128), jax.devices()[0])
    assert choice.backend == "dense" and "ends within a block" in choice.warnings[0]


def test_no_right_backend_is_an_error_that_names_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "nan")
    found = [Verdict("nan", "gives NaN", {}), Verdict("dense", "is wrong", {})]
    monkeypatch.setattr(attention.verdicts, "of_backends", lambda *_, **__: found)
    with pytest.raises(ConfigError, match=r"no backend computes right numbers on .*nan gives NaN; dense is wrong"):
        choose_attention(config_of(tmp_path), SHAPE, jax.devices()[0])


def test_a_less_preferred_backend_must_be_clearly_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "slow")
    for seconds, chosen in ((0.00295, "slow"), (0.0028, "dense")):
        found = [Verdict("slow", None, {}, SPEED), Verdict("dense", None, {}, replace(SPEED, seconds=seconds))]
        monkeypatch.setattr(attention.verdicts, "of_backends", lambda *_, found=found, **__: found)
        assert choose_attention(config_of(tmp_path), SHAPE, jax.devices()[0]).backend == chosen


def test_nothing_is_tried_where_every_test_runs(tmp_path: Path, own_cache: Path) -> None:
    choice = choose_attention(config_of(tmp_path), SHAPE, jax.devices("cpu")[0])
    assert choice.backend == "blockwise" and not own_cache.exists()


def test_of_two_processes_the_first_tries_for_both(tmp_path: Path) -> None:
    child = (
        "import sys, jax, pytest\n"
        "from pathlib import Path\n"
        "from jax_simpo.ops.attention.evidence import Verdict\n"
        "from jax_simpo.processes import distributed\n"
        "from jax_simpo.training import attention, verdicts\n"
        "from tests.ops.attention.planted import plant\n"
        "from tests.training.runs import config_of\n"
        "from tests.training.test_attention import SHAPE, SPEED\n"
        "distributed.join(sys.argv[1], 2, int(sys.argv[2]), None)\n"
        "plant(pytest.MonkeyPatch(), 'nan')\n"
        "def tried(names, shape, device, timed):\n"
        "    print('it tried', file=sys.stderr)\n"
        "    return [Verdict('nan', 'gives NaN', {}), Verdict('dense', None, {}, SPEED)]\n"
        "verdicts.of_backends = tried\n"
        "choice = attention.choose_attention(config_of(Path('.')), SHAPE, jax.devices()[0])\n"
        "print('it chose', choice.backend, *choice.warnings, file=sys.stderr)\n"
        "distributed.finish()\n"
    )
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", child, address]
    processes = [subprocess.Popen([*command, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in range(2)]
    first, second = (process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    chose = "it chose dense warning: attention backend 'nan' is passed over: it gives NaN"
    assert [line for line in first.splitlines() if line.startswith("it ")] == ["it tried", chose]
    assert [line for line in second.splitlines() if line.startswith("it ")] == [chose]
