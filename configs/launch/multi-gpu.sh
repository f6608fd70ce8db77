#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process: JAX drives them all, so there is nothing to join.
#
#   configs/launch/multi-gpu.sh                                    # the published Llama-3 8B run
#   configs/launch/multi-gpu.sh my-run.yaml --mesh.tensor=2        # another config, any overrides
#   CUDA_VISIBLE_DEVICES=0,1,2,3 configs/launch/multi-gpu.sh       # some of the GPUs
#
# docs/launch.md explains it.
set -euo pipefail

CONFIG="${1:-configs/llama-3-8b-instruct-v2.yaml}"

# JAX takes this share of each GPU's memory at the start. More than its own 0.75, less than all: NCCL has none of it.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# --no-distributed: one process, also where a scheduler's variables speak of more.
exec jax-simpo train "$CONFIG" --no-distributed --mesh.fsdp=-1 "${@:2}"
