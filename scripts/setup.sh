# Makes .venv with the tested versions. Sourced by the other scripts: setup EXTRA[,EXTRA]; afterwards $PY is its Python.
# PYTHON=python3.12 chooses another interpreter, VENV=/path another place.

setup() {
  local extras="$1" venv="${VENV:-.venv}" python="${PYTHON:-python3}" stamp
  if ! command -v "$python" >/dev/null; then
    echo "error: $python not found: install Python 3.10 or newer, or name one with PYTHON=/path/to/python" >&2
    return 2
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version) is too old: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python" >&2
    return 2
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  PY="$venv/bin/python"
  stamp="$extras $(cat pyproject.toml constraints.txt | cksum)"
  if ! grep -qsxF "$stamp" "$venv/installed"; then
    echo "installing into $venv (a GPU build of PyTorch is a few GB; this can take minutes) ..."
    "$PY" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    echo "$stamp" >>"$venv/installed"
  fi
  # Where Python writes no bytecode (PYTHONDONTWRITEBYTECODE, in many images), each process would compile the package anew.
  "$PY" -m compileall -q spattn_olmoe benchmarks
}
