#!/bin/sh
# Everything that needs a GPU, in one command of under ten minutes: tests, then benchmarks, results as JSON.
#   benchmarks/gpu_check.sh [RESULTS]     PYTHON=... names an interpreter that has ldo's packages
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${1:-benchmarks/results}
mkdir -p "$RESULTS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name(), torch.__version__)'
status=0
timeout 300 "$PYTHON" -m pytest -m gpu || [ $? -eq 5 ] || status=1 # 5: no test is marked so yet
for script in benchmarks/bench_*.py; do
    timeout 120 "$PYTHON" "$script" --out "$RESULTS/$(basename "$script" .py).json" || { echo "$script FAILED"; status=1; }
done
exit $status
