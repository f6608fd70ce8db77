"""`auto` passes over backends that are wrong or slow on the device at hand, and remembers what it saw."""

from __future__ import annotations

import socket
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
from tests.ops.attention.planted import plant
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
    monkeypatch.undo()
    assert losses(records) == losses(run(config_of(tmp_path / "dense", max_steps=3, row_length=256, attention="dense")))


def test_a_verdict_is_kept_until_the_shape_or_a_kernel_changes(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    tried = []

    def examine(name: str, shape: Shape) -> Verdict:
        tried.append(name)
        return Verdict(name, None, {"out": Distance(1e-7, 1e-6)}, SPEED)

    monkeypatch.setattr(verdicts, "examine", examine)
    device = jax.devices()[0]
    first = verdicts.of_backends(["dense"], SHAPE, device)
    assert verdicts.of_backends(["dense"], SHAPE, device) == first and tried == ["dense"]
    verdicts.of_backends(["dense"], replace(SHAPE, row_length=512), device)
    assert len(tried) == 2
    monkeypatch.setattr(verdicts, "_sources", lambda: "another kernel")
    verdicts.of_backends(["dense"], SHAPE, device)
    assert len(tried) == 3
    kept = sorted(own_cache.iterdir())
    assert [path.suffix for path in kept] == [".json"] * 3
    kept[0].write_text(kept[0].read_text()[:40])  # cut by somebody
    monkeypatch.undo()


def test_a_backend_that_ended_its_process_is_not_tried_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "examine", lambda name, shape: pytest.fail("tried"))
    device = jax.devices()[0]
    # The child dies as a kernel would let it die: with no time for anything.
    child = (
        "import os, jax\n"
        "from jax_simpo.training import verdicts\n"
        "from tests.training.test_attention import SHAPE\n"
        "verdicts.examine = lambda name, shape: os._exit(3)\n"
        "verdicts.of_backends(['blockwise'], SHAPE, jax.devices()[0])\n"
    )
    assert subprocess.run([sys.executable, "-c", child], cwd=Path(__file__).parents[2]).returncode == 3
    (verdict,) = verdicts.of_backends(["blockwise"], SHAPE, device)
    assert verdict.problem is not None and "ended the process that tried it last" in verdict.problem
    (mark,) = own_cache.glob("*.trial")
    assert str(mark) in verdict.problem
    mark.unlink()
    monkeypatch.setattr(verdicts, "examine", lambda name, shape: Verdict(name, None, {}, SPEED))
    assert verdicts.of_backends(["blockwise"], SHAPE, device)[0].problem is None


def test_a_named_backend_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "nan")
    config = config_of(tmp_path).model_copy(update={"attention": "nan"})  # the schema knows no planted backend
    device = jax.devices()[0]
    with pytest.raises(ConfigError, match=r"`attention: nan` gives NaN .*Choose `attention: auto`.*attention_check: f"):
        choose_attention(config, SHAPE, device)
    unchecked = config.model_copy(update={"attention_check": False})
    assert choose_attention(unchecked, SHAPE, device).backend == "nan"


def test_no_right_backend_is_an_error_that_names_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "nan")
    found = [Verdict("nan", "gives NaN", {}), Verdict("dense", "is wrong", {})]
    monkeypatch.setattr(attention.verdicts, "of_backends", lambda *_: found)
    with pytest.raises(ConfigError, match=r"no backend computes right numbers on .*nan gives NaN; dense is wrong"):
        choose_attention(config_of(tmp_path), SHAPE, jax.devices()[0])


def test_a_less_preferred_backend_must_be_clearly_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "slow")
    for seconds, chosen in ((0.00295, "slow"), (0.0028, "dense")):
        found = [Verdict("slow", None, {}, SPEED), Verdict("dense", None, {}, replace(SPEED, seconds=seconds))]
        monkeypatch.setattr(attention.verdicts, "of_backends", lambda *_, found=found: found)
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
        "def tried(names, shape, device):\n"
        "    print('tried', file=sys.stderr)\n"
        "    return [Verdict('nan', 'gives NaN', {}), Verdict('dense', None, {}, SPEED)]\n"
        "verdicts.of_backends = tried\n"
        "choice = attention.choose_attention(config_of(Path('.')), SHAPE, jax.devices()[0])\n"
        "print(choice.backend, *choice.warnings, file=sys.stderr)\n"
        "distributed.finish()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", child, address]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen([*command, str(i)], cwd=root, stderr=subprocess.PIPE, text=True) for i in range(2)]
    first, second = (process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    passed_over = "dense warning: attention backend 'nan' is passed over: it gives NaN"
    assert first.splitlines()[-2:] == ["tried", passed_over]
    assert "tried" not in second and second.splitlines()[-1] == passed_over
