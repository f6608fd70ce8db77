#!/usr/bin/env bash
# All GPU measurements, in calls of nine minutes: `benchmarks/gpu.sh [FOLDER]`, and with --resume until all is done.
#
#   benchmarks/gpu.sh                      measures for nine minutes, in the order of what matters
#   benchmarks/gpu.sh --resume             goes on: what is measured is kept
#   benchmarks/gpu.sh --part correct ...   these parts only; --list names all
#   benchmarks/gpu.sh FOLDER --device cpu  rehearses every part on a CPU with tiny shapes
#
# It needs a python (PYTHON, default python3) with jax, flax, optax, torch and transformers, and this checkout. The parts
# of torch_ref need more, and say so first. FOLDER (default docs/benchmarks/gpu) then holds the pages, `summary.txt` with
# how each part ended, `cells/` with every single measurement and `logs/`; FOLDER.tar.gz has it all.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TMPDIR=${TMPDIR:-/tmp} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# jax and torch share the GPU: jax takes memory as it needs it, and may take more than its usual three quarters.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$TMPDIR/jax-simpo-cache/jax}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$TMPDIR/jax-simpo-cache/torch}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Two small packages that the measured code imports, but of which it needs nothing here.
for package in jaxtyping xxhash; do
  "$python" -c "import $package" 2>/dev/null || export PYTHONPATH=$PYTHONPATH:$PWD/benchmarks/stand_ins
done
exec "$python" -m benchmarks.gpu "$@"
