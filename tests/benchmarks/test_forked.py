"""Processes of benchmarks/forked.py are what a new Python would be."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import forked
from spattn_olmoe.commands import ROOT

ELSEWHERE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])  # as pytest does: in this process alone
from benchmarks import forked
done = forked.run("-c", "import os; print(os.getcwd())", cwd=Path("/"))
print(done.returncode, done.stdout, done.stderr, Path.cwd())
"""


def test_the_server_starts_from_any_folder(tmp_path):
    """The first of a process starts it: a test that had gone to a folder of its own made all later ones fail."""
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT)]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, text=True, capture_output=True, timeout=300)
    assert done.stdout.split() == ["0", "/", str(tmp_path)], done.stdout + done.stderr


def test_output_errors_and_status_are_those_of_the_script():
    done = forked.run("-c", "import sys; print(sys.argv); print('no', file=sys.stderr); sys.exit(3)", "a", cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (3, "['-c', 'a']\n", "no\n")


def test_what_a_script_raises_is_among_its_errors():
    done = forked.run("-c", "1 / 0", cwd=Path("/"))
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_when_one_of_several_ranks_fails_all_end_with_its_status():
    script = "import os, sys, time; sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(200)"
    assert forked.run("-c", script, cwd=ROOT, ranks=2, timeout=100).returncode == 5
