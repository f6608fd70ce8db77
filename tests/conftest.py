"""Eight fake CPU devices for every test, so that each mesh of the design can be tried; jax must not be imported yet."""

import os
import re
from importlib import metadata
from importlib.util import find_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests compile many programs and run each a few times, so quick code costs more than it saves. This leaves out LLVM's
# optimisations; XLA's own, which the tests of memory and copies look at, all stay. `make test-slow` leaves out none.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    # Both cores have a test worker, so cutting a program into parts that compile side by side only costs time.
    _flags = "--xla_cpu_parallel_codegen_split_count=1"
    if metadata.version("jaxlib").startswith("0.10."):
        # The older way to emit a fusion's code compiles twice as fast without optimisations. Later releases have one.
        _flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}"

import gc
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# `nohup` and `&` start the tests with these signals ignored, and what was ignored stays so: runs would not end by them.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

# Tracing makes millions of small objects that live on, and looking for cycles among them again and again takes 5 %.
gc.set_threshold(100_000, 20, 20)

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("default")


# Files whose oracles are PyTorch's own cannot even be imported without it. The tests with the newest jax have none.
_TESTS = Path(__file__).parent
_NEEDS_TORCH = re.compile(r"^(import torch|from (torch|peft|torch_ref|trl)\b)", re.MULTILINE)
collect_ignore = (
    [str(file.relative_to(_TESTS)) for file in sorted(_TESTS.rglob("*.py")) if _NEEDS_TORCH.search(file.read_text())]
    if find_spec("torch") is None
    else []
)


def pytest_report_header() -> str | None:
    return f"without torch these are left out: {', '.join(collect_ignore)}" if collect_ignore else None


# The files that take longest, in seconds of one worker. They begin first, so that both workers end together.
_SLOWEST = {
    "parity/test_matrix.py": 363,
    "training/test_hosts.py": 75,
    "torch_ref/test_zero3.py": 64,
    "training/test_step.py": 62,
    "training/test_score.py": 53,
    "ops/attention/test_pallas_gpu.py": 50,
    "training/test_trainer.py": 49,
    "models/test_families.py": 42,
    "models/test_generate.py": 39,
    "training/test_kills.py": 38,
    "training/test_reference.py": 38,
    "ops/attention/test_attention.py": 38,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A stable sort: tests of a file stay together, in their order.
    items.sort(key=lambda item: -_SLOWEST.get(item.path.relative_to(_TESTS).as_posix(), 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets a skipped test fail where SKIPS_FAIL is 1: in a job of CI that is there to run it."""
    report = yield
    if os.environ.get("SKIPS_FAIL") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"SKIPS_FAIL is 1, and this was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pairs, tokenizers and golden tokens, where the machine has them."""
    folder = os.environ.get("SIMPO_SHARED")
    if not folder:
        pytest.skip("SIMPO_SHARED is not set: no real preference pairs and tokenizers here")
    return Path(folder)
