"""A table from training on, at a tiny scale, killed on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.forked import environment
from benchmarks.tiny_run import ROOT
from spattn_olmoe.data import DataConfig, SourceConfig, TokenizerSection, prepare
from spattn_olmoe.files import replace_file
from spattn_olmoe.paper.comparison import Comparison
from spattn_olmoe.paper.train_and_evaluate import only_one


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in the tokens of ``tiny_data``, a fifth of it held out."""
    folder = tmp_path_factory.mktemp("reproduction_data")
    lines = (tiny_data.parent / "corpus.jsonl").read_text().splitlines(keepends=True)[:20]
    (folder / "corpus.jsonl").write_text("".join(lines))
    prepare(
        DataConfig(
            output=str(folder / "shards"),
            sources=[SourceConfig(paths=[str(folder / "corpus.jsonl")])],
            tokenizer=TokenizerSection(identifier=str(tiny_data / "tokenizer.json")),
            sequence_length=32,
            validation_share=0.2,
            workers=1,
        )
    )
    return folder / "shards"


@pytest.fixture
def words(tiny_yaml: Path, data: Path) -> list[str]:
    """The arguments of a table of two runs."""
    return [
        *("table3", "--config", str(tiny_yaml), "--out", "out"),
        *("--variants", "eball,exclusive", "--seeds", "1", "--jobs", "1"),
        *(f"dataset.paths=[{data}/train-*.bin]", f"dataset.tokenizer.identifier={data}/tokenizer.json"),
    ]


def start(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/reproduce.py"), *words],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_killed_and_started_again_it_goes_on(words, reproduce, data: Path, tmp_path: Path):
    first = start(words, tmp_path)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("out/runs/tiny-eball-*/step4/.metadata.json")):
        assert first.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)  # with the training that it started
    first.communicate()
    assert not list(tmp_path.glob("out/results/*.json"))

    code, said, err = reproduce(*words)
    assert code == 0, err
    lines = [line for line in said.splitlines() if line.startswith("[")]
    assert len(lines) == 2, said
    assert lines[0].startswith("[1/2] tiny-eball-seed0: 12 steps") and ", resumed at step " in lines[0]
    assert lines[1].startswith("[2/2] tiny-exclusive-seed0: 12 steps") and "resumed" not in lines[1]

    results = [json.loads((tmp_path / f"out/results/tiny-{v}-seed0.json").read_text()) for v in ("eball", "exclusive")]
    assert results[0]["start"] == results[1]["start"]
    assert results[0]["key"] != results[1]["key"]
    (comparison,) = Comparison.of(results)
    # One mask under two names: the run that was killed is the same as the one that was not, to the last digit.
    assert comparison.twins() == [("eball", "exclusive", 0.0)]
    report = (tmp_path / "out/table3.md").read_text()
    assert "eball and exclusive have the same masks: every loss of theirs is the same to the last digit." in report
    assert results[0]["start"]["weights"][:12] in report
    for name in ("table3-tiny-loss.png", "table3-tiny-context.png", "table3.csv", "table3.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/r*/**/*") if path.is_file()}
    shutil.rmtree(next(tmp_path.glob("out/runs/tiny-exclusive-*")))  # a result stands without its checkpoints
    code, third, _ = reproduce(*words)
    assert code == 0 and third.count("done before") == 2, third
    assert all(path.stat().st_mtime_ns == t for path, t in before.items() if path.exists())

    # Other text under the same names is another experiment, for results and for what was trained without one.
    manifest = data / "manifest.json"
    (hash_,) = {
        shard["sha256"] for shard in json.loads(manifest.read_text())["shards"] if shard["path"].startswith("train-")
    }
    replace_file(manifest, manifest.read_bytes().replace(hash_.encode(), b"0" * 64))
    result = Path("out/results/tiny-eball-seed0.json")
    code, _, err = reproduce(*words)
    assert code == 2 and err.startswith(f"error: {result}: was trained on other text than dataset.paths="), err
    shutil.rmtree(tmp_path / "out/results")
    code, _, err = reproduce(*words)
    assert code == 2 and err.startswith("error: out/runs/tiny-eball-seed0-") and "was trained on other text" in err, err


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path: Path):
    """A killed command may leave its training running, which holds the folder; the next command waits for it."""
    said: list[str] = []
    holding = (
        f"import fcntl, sys; f = open({str(tmp_path / 'reproduction.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", f"{holding}; print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout and other.stdout.readline() == "held\n"

    def let_go(line: str) -> None:
        said.append(line)
        other.communicate("")

    with only_one(tmp_path, let_go):
        assert other.poll() == 0
    assert len(said) == 1 and "waiting for it to end" in said[0]
    with only_one(tmp_path, said.append):
        assert len(said) == 1


def test_a_folder_is_trained_in_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    said: list[str] = []
    with only_one(tmp_path, said.append):
        assert not said
