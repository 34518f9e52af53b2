#!/usr/bin/env bash
# Everything that needs a GPU, in one command and below eight minutes; no network is used.
#
#   kernels/gpu_check.sh [--dry-run] [OUT]
#
# It builds the kernels, runs their tests on the device, measures every op
# (OUT/kernels_h200.json), the training step with kernels and without (OUT/mfu_h200.json), and a
# live growth (OUT/growth_h200.json).  OUT is benchmarks/ unless given.  --dry-run walks the same
# steps on a CPU with the emulated kernels; the files it writes mean nothing, so it needs OUT.
#
# Settings: PYTHON (python3), WHEELS (a folder of carried wheels), LIMIT (seconds in all, 480).
# What must be carried along is told in kernels/README.md.
set -u -o pipefail
cd "$(dirname "$0")/.."
DRY=
if [ "${1:-}" = --dry-run ]; then DRY=--dry-run; shift; fi
OUT=${1:-}
if [ -n "$DRY" ] && [ -z "$OUT" ]; then
  echo "gpu_check: --dry-run needs a folder for its files, which mean nothing" >&2; exit 2; fi
OUT=${OUT:-benchmarks}
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + ${LIMIT:-480}))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
mkdir -p "$OUT"
FAILED=

if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl \
    || exit 1
  export PYTHONPATH=$PYTHONPATH:$SITE
fi
for module in torch numpy pydantic psutil yaml deepspeed pytest pytest_timeout hypothesis; do
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" \
    || { echo "gpu_check: Python module $module is missing; carry it (kernels/README.md)" >&2
         FAILED="$FAILED $module"; }
done
if [ -n "$FAILED" ]; then exit 1; fi
if [ -n "$DRY" ]; then
  export MEGAGROW_TEST_DEVICE=cpu DS_ACCELERATOR=cpu
else
  export MEGAGROW_TEST_DEVICE=cuda
  "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null \
    || { echo "gpu_check: PyTorch sees no CUDA device (--dry-run needs none)" >&2; exit 1; }
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
fi

# step NAME SECONDS COMMAND...: runs it, but no longer than it may and than time is left.
step() {
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) begin=$SECONDS status=0; shift 2
  if [ "$left" -lt 5 ]; then echo "== $name: no time left"; FAILED="$FAILED $name"; return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" || status=$?
  echo "== $name: status $status, $((SECONDS - begin)) s"
  if [ "$status" != 0 ]; then FAILED="$FAILED $name"; fi
}

GROWTH=(growth --ranks 1 --operator width --from-layout zero=1 --to-layout zero=1 --files none)
if [ -n "$DRY" ]; then
  step build 300 "$PYTHON" -m megagrow.ops --build emulated
  step tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_adamw.py \
    tests/ops/test_training.py
  SIZE=1e5
else
  step build 150 "$PYTHON" -m megagrow.ops --build cuda
  step active 60 env MEGAGROW_KERNELS=cuda "$PYTHON" -m megagrow.ops
  # Those that test the emulator, or compile for other targets, belong to a CPU.
  step tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_kernels.py \
    tests/ops/test_adamw.py tests/ops/test_training.py tests/ops/test_parallel_loss.py \
    tests/ops/test_third_party.py
  step training 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/engine/test_gpu.py
  SIZE=1e9
fi
step kernels 200 "$PYTHON" launch/benchmark.py kernels $DRY --json "$OUT/kernels_h200.json"
step mfu 150 "$PYTHON" launch/benchmark.py mfu $DRY --json "$OUT/mfu_h200.json"
step growth 120 "$PYTHON" launch/benchmark.py "${GROWTH[@]}" --parameters "$SIZE" \
  --json "$OUT/growth_h200.json"

echo "gpu_check: $SECONDS s; failed:${FAILED:- none}"
[ -z "$FAILED" ]
