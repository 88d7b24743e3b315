#!/usr/bin/env bash
# Exported models in the newest transformers that was tried, where neither spattn_olmoe nor OLMo-core is installed:
# benchmarks/results/cpu/exported.json. $PY is a Python with this project installed, $VENV where transformers goes.
#
#   bash benchmarks/exported.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PY="${PY:-.venv/bin/python}" VENV="$(realpath -m "${VENV:-.venv-transformers}")"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

if [ ! -x "$VENV/bin/python" ]; then
  python3 -m venv "$VENV"
  "$VENV/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
fi
"$PY" -m benchmarks.serving prepare "$WORK"
"$PY" -m benchmarks.exported native "$WORK"
here="$PWD" # checked from elsewhere: the package must not be found
(cd "$WORK" && env -u PYTHONPATH "$VENV/bin/python" "$here/benchmarks/exported.py" check "$WORK")
"$PY" -m benchmarks.exported result "$WORK"
