"""The garbage collector leaves modules alone, and collects the rest."""

from __future__ import annotations

import subprocess
import sys

HEAD = """
import gc
from spattn_olmoe.collector import modules_kept

class Cycle:
    def __init__(self, name):
        self.name, self.self = name, self
    def __del__(self):
        print(self.name)
"""


def printed(code: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_what_is_imported_is_not_collected_and_what_a_run_makes_is():
    assert printed("""
with modules_kept():
    Cycle("imported")
    assert not gc.isenabled()
assert gc.isenabled()
Cycle("of-a-step")
gc.collect()
""") == ["of-a-step"]


def test_the_end_of_the_process_collects_nothing():
    assert printed('Cycle("last")') == ["last"]
    assert printed('with modules_kept(): pass\nCycle("last")') == []


def test_imports_that_fail_leave_the_collector_on():
    assert printed("""
try:
    with modules_kept():
        import no_such_module
except ModuleNotFoundError:
    print(gc.isenabled())
""") == ["True"]
