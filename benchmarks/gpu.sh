#!/usr/bin/env bash
# Everything that needs a GPU: builds the extension for it, runs the GPU tests, measures, runs the small tests under
# compute-sanitizer, tunes the tiles of the Triton kernels and measures with the tuned ones. Needs torch with CUDA,
# Triton, pytest, hypothesis, scipy, setuptools, ninja, pybind11, nvcc and a C++ compiler, and no network. Wheels of what
# else the benchmarks import may lie in a folder wheels/: pydantic, pydantic_core, annotated_types, typing_inspection,
# captum. One step that fails does not stop the others: logs and JSON are in the folder.
#
#     benchmarks/gpu.sh FOLDER [STEP ...]    # build tests doctor measure (9 minutes at most), sanitize tune (8); or all
#     REHEARSE=1 benchmarks/gpu.sh FOLDER    # without a GPU: the same steps, small, with kernels interpreted
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/gpu.sh FOLDER [STEP ...]}
shift
steps=" ${*:-build tests doctor measure sanitize tune} "
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

wanted() { [[ $steps == *" $1 "* ]]; }

for name in $steps; do
  case $name in
    build | tests | doctor | measure | sanitize | tune) ;;
    *) echo "gpu.sh: expected build, tests, doctor, measure, sanitize or tune, got $name" >&2 && exit 2 ;;
  esac
done

export PYTHONPATH=$PWD
CLDF_FAST_COMMIT=${CLDF_FAST_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unversioned)}
export CLDF_FAST_COMMIT
{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  echo "$CLDF_FAST_COMMIT"
} >"$out/machine.txt" 2>&1

[ -d wheels ] && step wheels 60 "$python" -m pip install --quiet --no-deps --no-index wheels/*.whl
# What an install maps: the kernels lie beside the package.
if ! "$python" -c 'import cldf_fast.kernels' 2>/dev/null; then
  ln -s ../kernels cldf_fast/kernels
  trap 'rm -f cldf_fast/kernels' EXIT
fi

if wanted build; then
  if [ -z "$rehearse" ]; then
    CLDF_FAST_CUDA_ARCHITECTURES=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  else
    CLDF_FAST_CUDA_ARCHITECTURES=90
  fi
  export CLDF_FAST_CUDA_ARCHITECTURES
  step build 150 "$python" setup.py -q build_ext --inplace
fi
if wanted tests; then
  # By file: others import what a machine with a GPU need not have.
  mapfile -t files < <(grep -rl 'mark.gpu' tests --include='test_*.py')
  step tests 150 "$python" -m pytest -q -p no:cacheprovider -m gpu "${files[@]}" ${rehearse:+--collect-only}
fi
wanted doctor && step doctor 30 "$python" -m cldf_fast.doctor
wanted measure && step measure 240 "$python" -m benchmarks gpu --out "$out/shipped" $rehearse
[ -n "$rehearse" ] && exit # how tiles are tuned is rehearsed by tests/test_tuning.py
if wanted sanitize && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Torch's cache of memory would hide accesses beyond the end of a tensor.
    step "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops/test_cuda.py \
      -k "kernels_do_not_synchronise or broken_image or (agrees and anchors)"
  done
fi
if wanted tune; then
  name=$("$python" -c 'import torch; from cldf_fast.kernels import tuning; print(tuning.architecture(torch.device("cuda", 0)))')
  shipped="kernels/tuned/$name.json"
  [ -f "$shipped" ] && cp "$shipped" "$out/tuned.json"
  step tune 240 "$python" -m cldf_fast.kernels.tuning "$out/tuned.json" 128
  # Written after every kernel, so that what was measured before time was up counts.
  if [ -f "$out/tuned.json" ] && ! cmp -s "$out/tuned.json" "$shipped"; then
    cp "$out/tuned.json" "$shipped"
    step tuned 90 "$python" -m benchmarks gpu infonce --out "$out/tuned"
  fi
fi
