#!/usr/bin/env bash
# All GPU measurements in one command: `benchmarks/gpu.sh [FOLDER]`, nine minutes at most on one GPU.
#
# Needs python with jax, flax, optax, torch and transformers (with typer, rich, pyarrow and matplotlib, which those and
# theirs bring as a rule), and this checkout. What needs more (pytest for the kernel tests, pydantic for torch_ref and
# parity, trl for TRL) fails alone where it is missing, and the log says so. Every part has a time limit of its own:
# one that fails or hangs loses no other. Results and logs lie in FOLDER (default docs/benchmarks/gpu), with
# `summary.txt` saying how each part ended; commit them.
#
#   PYTHON=...        the interpreter (default python3)
#   DEVICE=cpu        rehearses every part on a CPU with tiny shapes
#   SLOWER=10         that many times the time for each part
#   PARTS="a b"       runs these parts only. Two are in no default run, for each takes up to nine minutes of its own:
#                     `profiles` sets jax-simpo beside torch_ref on all six length profiles, and `parity` trains both
#                     sides on the GPU and compares them number by number
set -u
cd "$(dirname "$0")/.." || exit 1
out=$(mkdir -p "${1:-docs/benchmarks/gpu}" && cd "${1:-docs/benchmarks/gpu}" && pwd) || exit 1
python=${PYTHON:-python3}
device=${DEVICE:-gpu}
parts=${PARTS:-facts attention_tests layers throughput_1b peers loss_head throughput_8b}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/jax-simpo-cache}
export TMPDIR=${TMPDIR:-/tmp} HF_HUB_OFFLINE=1
tiny=()
if [ "$device" = cpu ]; then
  export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
  tiny=(--quick)
fi
: >"$out/summary.txt"

# part NAME SECONDS COMMAND...: runs a command if its part was asked for, its output in NAME.log.
part() {
  local name=$1 limit=$(($2 * ${SLOWER:-1})) started=$SECONDS status
  shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) status=ok ;;
    124 | 137) status="stopped after $limit s" ;;
    *) status="failed ($status): $(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-200)" ;;
  esac
  echo "$name: $status, $((SECONDS - started)) s" | tee -a "$out/summary.txt"
}

facts() {
  (command -v nvidia-smi >/dev/null && nvidia-smi) || true
  "$python" -c 'import jax; print(jax.__version__, jax.devices())'
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.is_available())'
  "$python" -c 'import pydantic' || echo "pydantic is missing: torch_ref's parts of peers and parity cannot run"
}
# FlexAttention and our kernel against one another, number by number, on a small model.
parity() {
  local work status
  work=$(mktemp -d)
  "$python" -m benchmarks.parity_start "$work" && "$python" -m parity "$work/config.yaml" --output "$work" "$@"
  status=$?
  for kind in md json; do cp "$work/report.$kind" "$out/parity.$kind"; done
  rm -rf "$work"
  return "$status"
}
# Ours beside torch_ref on every length profile: longer than the rest together has time for, so asked for by name.
profiles() {
  for profile in capybara hh-rlhf metamath-dpo tldr tulu-helpsteer ultrafeedback; do
    "$python" -m benchmarks.peers --output "$out" --name "peers_$profile" --device "$device" --model llama-3.2-1b \
      --profile "$profile" --remat full --batch 64 --only "shared+packed, bfloat16" --only "jax-simpo, bfloat16" "$@" || return
  done
}
export -f facts parity profiles
export python out device

part facts 30 bash -c facts
# The kernels as the hardware runs them, against the dense reference; needs pytest, but none of the tests' other packages.
part attention_tests 60 env JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}" "$python" -m pytest -q -rs -p no:cacheprovider \
  --noconftest -o addopts=--import-mode=importlib -o filterwarnings=default tests/ops/attention/test_pallas_on_gpu.py
part layers 100 "$python" -m benchmarks.layers --output "$out" --rounds 3 --response 128 --response 1024 "${tiny[@]}"
part throughput_1b 120 "$python" -m benchmarks.throughput --output "$out" --name throughput_1b --model llama-3.2-1b \
  --dtype bfloat16 --remat full --unpacked-batch 0 --rounds 3 --dpo-rounds 0 "${tiny[@]}"
part peers 100 "$python" -m benchmarks.peers --output "$out" --device "$device" --model llama-3.2-1b --profile tldr \
  --remat full --only bfloat16 --rounds 3 "${tiny[@]}"
part loss_head 40 "$python" -m benchmarks.loss_head --output "$out" --width 2048 --targets 8192 --dtype bfloat16 "${tiny[@]}"
part throughput_8b 50 "$python" -m benchmarks.throughput --output "$out" --name throughput_8b --model llama-3-8b --layers 8 \
  --dtype bfloat16 --remat full --unpacked-batch 0 --rounds 2 --dpo-rounds 0 --profiles capybara "${tiny[@]}"
part parity 540 bash -c 'parity "$@"' parity "${tiny[@]}"
part profiles 540 bash -c 'profiles "$@"' profiles "${tiny[@]}"
