#!/usr/bin/env bash
# Sets up .venv and runs the tests.   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup test,wandb
exec "$PY" -m pytest "$@"
