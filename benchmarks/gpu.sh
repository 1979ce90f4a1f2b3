#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the extension for it, runs the GPU tests, the small ones under
# compute-sanitizer too, measures, tunes the tiles of the Triton kernels and measures with the tuned ones. Needs torch
# with CUDA, Triton, pytest, ninja, nvcc and a C++ compiler, and no network. One step that fails does not stop the
# others: logs and JSON are in the folder.
#
#     benchmarks/gpu.sh FOLDER
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$out"
python=${PYTHON:-python3}

step() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  echo "   exit $?, $(tail -n 1 "$out/$name.log" | cut -c 1-200)"
}

export PYTHONPATH=$PWD
{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD
} >"$out/machine.txt" 2>&1

CLDF_FAST_CUDA_ARCHITECTURES=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export CLDF_FAST_CUDA_ARCHITECTURES
step build 300 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
step tests 300 "$python" -m pytest -q -p no:cacheprovider -m gpu tests
step doctor 60 "$python" -m cldf_fast.doctor
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Torch's cache of memory would hide accesses beyond the end of a tensor.
    step "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py \
      -k "kernels_do_not_synchronise or broken_image or (agrees and anchors)"
  done
fi
step anchors 60 "$python" -m benchmarks.bench_anchors gpu
step shipped 200 "$python" -m benchmarks.bench_infonce gpu
step tune 400 "$python" -m cldf_fast.kernels.tuning "$out/tuned.json"
if [ -s "$out/tuned.json" ]; then
  name=$("$python" -c 'import torch; from cldf_fast.kernels import tuning; print(tuning.architecture(torch.device("cuda", 0)))')
  cp "$out/tuned.json" "kernels/tuned/$name.json"
  step tuned 200 "$python" -m benchmarks.bench_infonce gpu
fi
