#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can check: the test suite on CUDA tensors, then every kernel at small
# shapes under compute-sanitizer's memcheck, racecheck and synccheck. Arguments go to pytest.
#
#   tools/cuda_checks.sh [-n 8 ...]
#
# Needs metal_moe installed for the `python` of the path (PYTHON names another), a GPU and the CUDA toolkit's sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
status=0

"$python" -m pytest --device cuda "$@" || status=1

export PYTORCH_NO_CUDA_MEMORY_CACHING=1 METAL_MOE_CUDA_SEPARATE_SCRATCH=1
for tool in memcheck racecheck synccheck; do
  echo "compute-sanitizer: $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 2 "$python" tests/cuda_small_shapes.py || status=1
done
exit $status
