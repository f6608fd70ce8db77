#!/usr/bin/env bash
# Trains on all GPUs of this machine in one process, which drives them all.
#
#   configs/launch/multi-gpu.sh                                    # the published Llama-3 8B run
#   configs/launch/multi-gpu.sh my-run.yaml --mesh.tensor=2        # another config, any overrides
#   CUDA_VISIBLE_DEVICES=0,1,2,3 configs/launch/multi-gpu.sh       # some of the GPUs
#
#   docker build --target gpu -t jax-simpo:gpu .                   # the same in a container:
#   docker run --gpus all --shm-size=8g -v "$PWD:/work" \
#     --entrypoint /opt/jax-simpo/configs/launch/multi-gpu.sh jax-simpo:gpu my-run.yaml
#
# https://jax-simpo.github.io/jax-simpo/launch.html explains it.
set -euo pipefail

CONFIG="${1:-builtin:llama-3-8b-instruct-v2}"

# JAX takes this share of each GPU's memory at the start. Its default is 0.75; the rest is left to NCCL.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# jax-simpo sets XLA options that overlap communication with computation (performance.html there). What you set in XLA_FLAGS
# stays; JAX_SIMPO_XLA_FLAGS=false sets none.
export JAX_SIMPO_XLA_FLAGS="${JAX_SIMPO_XLA_FLAGS:-true}"

# --no-distributed keeps the run to one process where a scheduler's variables name several.
exec jax-simpo train "$CONFIG" --no-distributed --mesh.fsdp=-1 "${@:2}"
