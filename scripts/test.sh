#!/usr/bin/env bash
# Sets up .venv and runs the tests.   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup test,wandb
# One process a core, four at most, and a thread each: more threads than cores make PyTorch crawl.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PY" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
