#!/bin/sh
# All that needs a GPU, in order of value, within a time: sh benchmarks/lease.sh probe | main | all | PART ... ; see benchmarks/lease.py
#
#   PYTHON=...          an interpreter with ldo's packages (default .venv/bin/python if it is there, else python3)
cd "$(dirname "$0")/.." || exit 2
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" benchmarks/lease.py "$@"
