"""Two ranks find what one finds; lm-eval's own command line finds what scripts/evaluate.py finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from olmo_core.distributed.utils import get_world_size

from benchmarks import forked
from benchmarks.tiny_run import ROOT
from spattn_olmoe import ranks

SCRIPT = str(ROOT / "scripts/evaluate.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASKS = ["--tasks", "copa,lambada_openai", "--limit", "7", "--batch-size", "4"]


def python(*words: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    done = forked.run(*words, cwd=cwd, env=OFFLINE, ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def alone(checkpoint_of, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The tasks on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    python(SCRIPT, "--checkpoint", checkpoint_of("gbhalf"), *TASKS, "--out", ".", cwd=folder)
    return json.loads((folder / "tasks.json").read_text())


def test_two_ranks_write_what_one_writes(checkpoint_of, alone, tmp_path):
    done = python(SCRIPT, "--checkpoint", checkpoint_of("gbhalf"), *TASKS, "--out", ".", cwd=tmp_path, ranks=2)
    together = json.loads((tmp_path / "tasks.json").read_text())
    assert (alone.pop("ranks"), together.pop("ranks")) == (1, 2)
    for results in (alone, together):  # when, how busy the machine was, and by which command
        del results["machine"]
    assert together == alone
    assert alone["truncated_requests"] > 0 and len(alone["measurements"]) == 2
    assert done.stdout.count("Suite tasks") == 1  # the first rank alone prints
    alone["ranks"] = 1


def test_two_ranks_measure_the_loss_that_one_measures(checkpoint_of, evaluate_command, held_out_data, tmp_path):
    words = ["--checkpoint", checkpoint_of("gbhalf"), "--loss", "--data", str(held_out_data), "--limit", "13"]
    words += ["--batch-size", "3"]
    assert evaluate_command(*words, "--out", str(tmp_path / "one"))[0] == 0
    python(SCRIPT, *words, "--out", "two", cwd=tmp_path, ranks=2)
    one, two = (json.loads((tmp_path / name / "loss.json").read_text()) for name in ("one", "two"))
    assert [row["loss"] for row in one["checkpoints"][0]["loss"]] == pytest.approx(
        [row["loss"] for row in two["checkpoints"][0]["loss"]], rel=1e-7
    )


def test_a_mistake_is_said_once_on_two_ranks(checkpoint_of, tmp_path):
    words = ["--checkpoint", checkpoint_of("gbhalf"), "--tasks", "coppa", "--out", "."]
    env = {**forked.environment(), **OFFLINE}
    done = subprocess.run(
        [*TORCHRUN, SCRIPT, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "did you mean 'copa'?" in errors[0]


def test_lm_evals_own_command_line(checkpoint_of, alone, tmp_path):
    module = ["-m", "spattn_olmoe.evaluation"]
    python(*module, "offline-tasks", "definitions", cwd=tmp_path)
    arguments = ["--model", "spattn_olmoe", "--model_args", f"checkpoint={checkpoint_of('gbhalf')}", "--tasks", "copa"]
    arguments += ["--limit", "7", "--device", "cpu", "--include_path", "definitions", "--output_path", "out"]
    done = python(*module, *arguments, cwd=tmp_path)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["copa"]
    ours = alone["measurements"]["copa"]["metrics"]["acc"]
    assert found["acc,none"] == ours["value"] and found["acc_stderr,none"] == pytest.approx(ours["stderr"])
    assert "|copa" in done.stdout


def test_one_rank_alone_yields_as_it_goes():
    computed: list[int] = []
    results = ranks.share_out([1, 2, 3], lambda x: [computed.append(x) or x, -x], description="", quiet=True)
    assert next(results) == 1 and computed == [1]
    assert list(results) == [-1, 2, -2, 3, -3]
    assert "WORLD_SIZE" not in os.environ or get_world_size() == 1
