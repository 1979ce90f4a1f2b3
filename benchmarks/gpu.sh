#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the extension for it, runs the GPU tests, the small ones under
# compute-sanitizer too, measures, tunes the tiles of the Triton kernels and measures with the tuned ones. Needs torch
# with CUDA, Triton, pytest, ninja, nvcc and a C++ compiler, and no network; wheels of what else the benchmarks import
# (pydantic, scipy, captum) may lie in a folder wheels/. One step that fails does not stop the others: logs and JSON are
# in the folder.
#
#     benchmarks/gpu.sh FOLDER
#     REHEARSE=1 benchmarks/gpu.sh FOLDER    # without a GPU: the same steps, small, with kernels interpreted
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
rehearse=${REHEARSE:+--rehearse}

step() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  echo "   exit $?, $(tail -n 1 "$out/$name.log" | cut -c 1-200)"
}

export PYTHONPATH=$PWD
CLDF_FAST_COMMIT=$(git rev-parse HEAD 2>/dev/null || echo unversioned)
export CLDF_FAST_COMMIT
{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  echo "$CLDF_FAST_COMMIT"
} >"$out/machine.txt" 2>&1

if [ -z "$rehearse" ]; then
  CLDF_FAST_CUDA_ARCHITECTURES=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
else
  CLDF_FAST_CUDA_ARCHITECTURES=90
fi
export CLDF_FAST_CUDA_ARCHITECTURES
[ -d wheels ] && step wheels 120 "$python" -m pip install --quiet --no-deps --no-index wheels/*.whl
step build 300 "$python" setup.py -q build_ext --inplace
step tests 300 "$python" -m pytest -q -p no:cacheprovider -m gpu tests ${rehearse:+--collect-only}
step doctor 60 "$python" -m cldf_fast.doctor
if command -v compute-sanitizer >/dev/null && [ -z "$rehearse" ]; then
  for tool in memcheck racecheck; do
    # Torch's cache of memory would hide accesses beyond the end of a tensor.
    step "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py \
      -k "kernels_do_not_synchronise or broken_image or (agrees and anchors)"
  done
fi
step measure 240 "$python" -m benchmarks gpu --out "$out/shipped" $rehearse
[ -n "$rehearse" ] && exit  # how tiles are tuned is rehearsed by tests/test_tuning.py
step tune 240 "$python" -m cldf_fast.kernels.tuning "$out/tuned.json"
if [ -s "$out/tuned.json" ]; then
  name=$("$python" -c 'import torch; from cldf_fast.kernels import tuning; print(tuning.architecture(torch.device("cuda", 0)))')
  cp "$out/tuned.json" "kernels/tuned/$name.json"
  step tuned 120 "$python" -m benchmarks gpu infonce --out "$out/tuned"
fi
