#!/bin/sh
# Everything that needs a GPU, within a time limit: sh benchmarks/lease.sh probe | main | all | PART ...
# benchmarks/lease.py has the details.
#
#   PYTHON=...          an interpreter with ldo's packages (default: .venv/bin/python if it exists, else python3)
cd "$(dirname "$0")/.." || exit 2
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" benchmarks/lease.py "$@"
