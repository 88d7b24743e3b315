"""What a training command shows and writes, in a pipe and in a terminal of 100 columns."""

from __future__ import annotations

import logging
import os
import pty
import re
import struct
import subprocess
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from benchmarks.forked import environment
from benchmarks.tiny_run import run_training
from spattn_olmoe.commands import train_command
from spattn_olmoe.train.output import Screen

TWENTY = ("trainer.max_duration.value=20", "trainer.metrics_collect_interval=1")


@pytest.fixture(scope="module")
def piped(tiny_data: Path, tiny_yaml: Path, tmp_path_factory) -> tuple[str, Path]:
    """What twenty steps with a held-out loss at each tenth print into a pipe, and the folder where they ran."""
    folder = tmp_path_factory.mktemp("piped")
    evaluator = "trainer.callbacks.lm_evaluator"
    held_out = [f"{evaluator}.enabled=true", f"{evaluator}.eval_interval=10"]
    held_out += [f"{evaluator}.eval_duration={{value: 2, unit: steps}}"]
    held_out += [f"{evaluator}.eval_dataset.paths=[{tiny_data}/train-*.bin]"]
    done = run_training(tiny_yaml, "attention.type=spattention", *TWENTY, *held_out, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, folder


def in_terminal(command: list[str], cwd: Path) -> tuple[int, str]:
    """Exit code and output of a command whose standard output and error are a terminal."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    env = {**environment(), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = bytearray()
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the last process has closed the terminal
            break
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_a_pipe_gets_a_line_a_step_and_a_summary(piped):
    text, _ = piped
    lines = text.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(" |")[0] for line in steps if "| loss " in line] == [f"step {n}/20" for n in range(1, 21)]
    assert len(lines) <= 60 and "n/a" not in text and "\x1b" not in text and "warning" not in text
    assert lines[0].startswith("tiny: ") and lines[0].endswith("/tiny-spattention")
    assert re.search(r"; (sharing|exclusive) attends [\d.]+% of dense's pairs; ", lines[0])  # the mask, not its type
    assert re.search(r"\| held-out \d\.\d{4} \|", steps[9]) and "held-out" not in steps[8]
    assert re.search(r"[\d,]+ tokens/s \| \d+ (s|min) left$", steps[9])
    end = lines[lines.index(steps[-1]) + 1 :]
    assert re.match(r"done: step 20 of 20 in \d+ (s|min), [\d,]+ tokens/s$", end[0])
    assert re.match(
        r"  loss +6\.\d{3} at step 1 \(a uniform guess has ln 512 = 6\.238\), \d\.\d{3} at step 20$", end[1]
    )
    assert re.match(r"  held-out +\d\.\d{3} at step 20 \(validation\)$", end[2])
    assert [line.split()[0] for line in end[3:]] == ["checkpoints", "metrics", "messages"]


def test_what_the_screen_leaves_out_is_in_the_log(piped):
    text, folder = piped
    log = (folder / "runs/tiny-spattention/train.log").read_text()
    for words in ("MoETransformer(", "TOKENIZERS_PARALLELISM", "Callback order", "will train from scratch"):
        assert words in log and words not in text
    for line in text.splitlines():
        assert line in log


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("FutureWarning: `torch.distributed.all_gather_into_tensor` is deprecated. Please use another", False),
        ("FutureWarning: torch.distributed.nn.functional.all_to_all_single is deprecated, use another", False),
        ("FutureWarning: something else is deprecated", True),
        ("Skipping EP-MP high-priority group creation because backend is 'gloo'", False),
        ("Detected inconsistent metrics between ranks.", True),
    ],
)
def test_warnings_of_libraries_about_their_own_affairs_are_left_to_the_log(message: str, shown: bool):
    record = logging.LogRecord("py.warnings", logging.WARNING, "", 0, message, None, None)
    assert Screen().filter(record) is shown
    assert Screen(verbose=True).filter(record) is True


def test_verbose_shows_it_all_and_a_finished_run_says_so(tiny_yaml: Path, piped):
    _, folder = piped
    done = run_training(tiny_yaml, "attention.type=spattention", *TWENTY, "--verbose", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "MoETransformer(" in done.stdout and "Callback order" in done.stdout
    assert "resuming from" in done.stdout and "nothing left to train: already at step 20 of 20" in done.stdout
    assert re.search(r"6\.\d{3} at step 1 .*at step 20$", done.stdout, flags=re.MULTILINE)


def test_a_terminal_gets_a_bar(tiny_yaml: Path, tmp_path: Path):
    command = train_command(tiny_yaml, ["attention.type=spattention", *TWENTY], to_run=True)
    code, shown = in_terminal(command, tmp_path)
    assert code == 0, shown
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert re.search(r"\d+/20 ━*.*loss \d\.\d{4} \| [\d,]+ tokens/s \| \d+ (s|min) left", plain)
    assert "\nstep " not in plain and "done: step 20 of 20" in plain
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back
    assert "step 20/20 | loss" in (tmp_path / "runs/tiny-spattention/train.log").read_text()


FAULT = """
import runpy, sys
from spattn_olmoe.train.progress import Throughput

def post_step(self, inner=Throughput.post_step):
    inner(self)
    if self.step == 5:
        raise ArithmeticError("the fifth step")

Throughput.post_step = post_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_error_under_the_bar_shows_its_traceback(tiny_yaml: Path, tmp_path: Path):
    python, *arguments = train_command(tiny_yaml, ["attention.type=spattention", *TWENTY], to_run=True)
    code, shown = in_terminal([python, "-c", FAULT, *arguments], tmp_path)
    assert code == 1
    assert "ArithmeticError: the fifth step" in shown and "Traceback" in shown and "post_step" in shown
    assert "done:" not in shown and shown.count("\x1b[?25l") == shown.count("\x1b[?25h")
    assert "Traceback" in (tmp_path / "runs/tiny-spattention/train.log").read_text()
