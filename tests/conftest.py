"""Eight fake CPU devices for every test, so that each mesh of the design can be tried; jax must not be imported yet."""

import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests compile many programs and run each a few times, so quick code costs more than it saves. This leaves out LLVM's
# optimisations; XLA's own, which the tests of memory and copies look at, all stay. `make test-slow` leaves out none.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and metadata.version("jaxlib").startswith("0.10."):
    # The older way to emit a fusion's code compiles twice as fast without optimisations. Later releases have only one.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# `nohup` and `&` start the tests with these signals ignored, and what was ignored stays so: runs would not end by them.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pairs, tokenizers and golden tokens, where the machine has them."""
    folder = os.environ.get("SIMPO_SHARED")
    if not folder:
        pytest.skip("SIMPO_SHARED is not set: no real preference pairs and tokenizers here")
    return Path(folder)
