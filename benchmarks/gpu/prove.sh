#!/usr/bin/env bash
# Proves the kernels on one GPU: correctness of virtual ranks, graph replay, memory checks, bandwidth.
#
#   bash benchmarks/gpu/prove.sh [PYTHON]
#
# Needs torch with CUDA, pytest and nvcc (or the five pip wheels that semantic_ep/runtime/kernels/build.py
# names). Writes benchmarks/results/dispatch_<gpu>_<yyyymm>.json and a log beside it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python}
# One hardware queue a stream: ranks that wait for each other must not stand in one queue.
export CUDA_DEVICE_MAX_CONNECTIONS=32 OMP_NUM_THREADS=1

gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
name=dispatch_${gpu}_$(date -u +%Y%m)
log=benchmarks/results/$name.log
mkdir -p benchmarks/results
exec > >(tee "$log") 2>&1

echo "== library"
$python -c 'from semantic_ep.runtime.kernels.build import find_library; o = find_library("cuda"); print(o.reason); raise SystemExit(o.path is None)'
echo "== correctness and graph replay"
$python -m pytest -q -rs tests/kernels/test_virtual_ranks.py tests/kernels/test_compiled.py
if command -v compute-sanitizer > /dev/null; then
  echo "== compute-sanitizer memcheck"
  compute-sanitizer --tool memcheck --error-exitcode 66 \
    $python -m pytest -q -rs tests/kernels/test_virtual_ranks.py -k "cuda and small"
else
  echo "== compute-sanitizer is not on the path: memory was not checked"
fi
echo "== bandwidth"
$python -m benchmarks.run dispatch --device cuda --json "benchmarks/results/$name.json" --markdown "benchmarks/results/$name.md"
