#!/usr/bin/env bash
# Proves the kernels on one GPU: correctness over the emulator's cases, graph replay, memory checks, bandwidth.
#
#   bash benchmarks/gpu/prove.sh [PYTHON]
#
# Needs torch with CUDA, the `dev` extra, compute-sanitizer (of CUDA, or the nvidia-cuda-sanitizer-api wheel) and
# nvcc (or the five pip wheels that semantic_ep/runtime/kernels/build.py names). Runs every step, whatever the one
# before it did, and fails at the end if one failed or skipped what it is for. Writes
# benchmarks/results/dispatch_<gpu>_<yyyymm>.json and .md, and a log beside them: commit all three.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python}
# One hardware queue a stream, and kernels loaded early: ranks that wait for each other must not wait for the driver.
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER OMP_NUM_THREADS=1

gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
  echo "prove.sh: torch sees no CUDA device, so nothing can be proven here" >&2
  exit 1
}
name=dispatch_${gpu}_$(date -u +%Y%m)
results=benchmarks/results
mkdir -p $results
exec > >(tee "$results/$name.log") 2>&1
failed=()

step() { # step TITLE COMMAND...: runs it, and notes if it fails
  echo "== $1"
  "${@:2}" || failed+=("$1")
}
on_gpu() { # on_gpu PYTEST_ARGUMENT...: a test that finds no GPU or no library must not pass for a proof
  local output
  output=$($python -m pytest -q -rs -p no:cacheprovider "$@" 2>&1)
  local status=$?
  echo "$output"
  [ $status -eq 0 ] && ! grep -qE "[0-9]+ skipped" <<< "$output"
}
sanitizer() { # prints where compute-sanitizer is
  local places="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin"
  places+=:$($python -c 'import glob, sys; print(":".join(d for p in sys.path for d in glob.glob(p + "/nvidia/*/bin")))')
  PATH=$places command -v compute-sanitizer
}
memcheck() {
  local tool
  tool=$(sanitizer) || { echo "compute-sanitizer is not installed: memory was not checked"; return 1; }
  "$tool" --tool memcheck --error-exitcode 66 \
    $python -m pytest -q -rs tests/kernels/test_emulated.py -k "cuda and one_at_a_time"
}
bandwidth() { # bandwidth LAUNCH
  $python -m benchmarks.run dispatch --device cuda --launch "$1" \
    --json "$results/$name.json" --markdown "$results/$name.md"
}

nvidia-smi || true
step "library" $python -c 'from semantic_ep.runtime.kernels.build import find_library; o = find_library("cuda"); print(o.reason); raise SystemExit(o.path is None)'
step "compiled code" $python -m pytest -q -rs tests/kernels/test_compiled.py
step "the emulator's cases" on_gpu tests/kernels/test_emulated.py -k "cuda"
step "operators and graph replay" on_gpu tests/kernels/test_virtual_ranks.py -k "cuda or graph"
step "compute-sanitizer memcheck" memcheck
step "bandwidth" bandwidth graph
if [[ " ${failed[*]-} " == *" bandwidth "* ]]; then
  # The figures of a run from the host are still figures; the graph remains a failure.
  step "bandwidth, launched from the host" bandwidth streams
fi

if ((${#failed[@]})); then
  printf 'NOT PROVEN: %s\n' "${failed[@]}"
  exit 1
fi
echo "proven; commit $results/$name.{json,md,log}"
