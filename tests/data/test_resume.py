"""Killed at any moment, the same command gives the same bytes; anything else that goes wrong leaves what was finished."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import ROOT, error_line, folder_bytes, read_ids, run_script, write_jsonl

from spattn_olmoe.data import DataConfig, Manifest, prepare, verify

Make = Callable[..., DataConfig]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def config_file(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weighted sources, several formats, some rejects, small shards and eager checkpoints: seconds of work."""
    folder = tmp_path_factory.mktemp("resume")
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [path.read_bytes().decode("utf-8", "replace") for path in sources if "test" not in path.parts]
    texts = [text for text in texts if text.strip()][:420]
    write_jsonl(folder / "in" / "a.jsonl", texts[:130])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[130:270]) + "{\n"
    (folder / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"text": [*texts[270:], ""]}), folder / "in" / "c.parquet", row_group_size=20)
    path = folder / "config.yaml"
    path.write_text(f"""
output: {folder}/straight
sources:
  - paths: ["{folder}/in/*.jsonl*"]
    weight: 2
  - paths: ["{folder}/in/c.parquet"]
tokenizer: {{identifier: "{tokenizer_file}"}}
validation_share: 0.1
shard_bytes: 300000
checkpoint_seconds: 0.05
workers: 2
""")
    return path


@pytest.fixture(scope="module")
def straight(config_file: Path) -> tuple[dict[str, bytes], float]:
    """The undisturbed run's files, and how long it took."""
    begun = time.monotonic()
    done = run_script("prepare_data.py", "--config", str(config_file))
    assert done.returncode == 0, done.stderr
    manifest = verify(config_file.parent / "straight", hashes=True)
    assert len(manifest.train_paths) > 5 and manifest.statistics["rejects"] == 2
    return folder_bytes(manifest.directory), time.monotonic() - begun


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_it_gives_the_same_bytes(
    config_file: Path, straight: tuple[dict[str, bytes], float], seed: int
) -> None:
    wanted, _ = straight
    output = config_file.parent / f"killed-{seed}"
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--config", str(config_file)]
    total = sum(len(data) for name, data in wanted.items() if name.endswith(".bin"))
    chance, kept = random.Random(seed), [0]
    for _ in range(4):
        process = subprocess.Popen([*command, f"output={output}"], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        # by the bytes on the disk, so that a slow machine is killed in the middle of the work as well as a fast one
        enough = _written(output) + chance.uniform(0.02, 0.12) * total
        while _written(output) < enough and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break  # it was through first
        kept.append(json.loads((output / "progress.json").read_bytes())["progress"]["sources"][0]["documents"])
    assert len(kept) > 2, "it was not killed often enough to say anything"
    assert kept == sorted(kept) and kept[-1] > 0, "finished work was lost"
    assert subprocess.run([*command, f"output={output}"], env=ENVIRONMENT, stderr=subprocess.DEVNULL).returncode == 0
    assert folder_bytes(output) == wanted


def _written(folder: Path) -> int:
    sizes = 0
    for path in folder.glob("*.bin*"):
        with contextlib.suppress(FileNotFoundError):  # renamed in between
            sizes += path.stat().st_size
    return sizes


def test_workers_do_not_outlive_a_killed_parent(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--config", str(config_file)]
    process = subprocess.Popen([*command, f"output={tmp_path}/out"], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    workers: list[int] = []
    while len(workers) < 2 and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert process.poll() is None
    time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_is_one_line_and_goes_on_later(
    config_file: Path, straight: tuple[dict[str, bytes], float], tmp_path: Path, number: int
) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--config", str(config_file)]
    command.append(f"output={tmp_path}/out")
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "train-00000.bin").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip() == "error: stopped; run the same command again to resume"
    assert subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert folder_bytes(tmp_path / "out") == straight[0]


def test_a_disk_that_takes_no_more_is_one_line_and_what_was_finished_stays(
    config_file: Path, straight: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    # no file beyond 200 kB: the shards, of 300 kB, cannot be finished
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--config", str(config_file)]
    command.append(f"output={tmp_path}/out")
    failed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert "File too large" in error_line(failed)
    assert subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert folder_bytes(tmp_path / "out") == straight[0]


def test_a_full_disk_is_one_line_and_what_was_finished_stays(
    config_file: Path, straight: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        failed = run_script("prepare_data.py", "--config", str(config_file), f"output={disk}/out")
        assert "No space left on device; free some space and run the same command again" in error_line(failed)
        shutil.copytree(disk / "out", tmp_path / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert list((tmp_path / "out").glob("train-*.bin"))
    done = run_script("prepare_data.py", "--config", str(config_file), f"output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert folder_bytes(tmp_path / "out") == straight[0]


def test_a_complete_corpus_is_left_alone(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents))
    first = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    assert prepare(config) == first
    assert {path: path.stat().st_mtime_ns for path in first.directory.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed: expected 1, found 0"),
        ({"shard_bytes": 8192}, "shard_bytes: expected 8192, found 1073741824"),
        ({"validation_share": 0.1}, "validation_share: expected 0.1, found 0.0"),
        ({"dtype": "uint32"}, 'dtype: expected "uint32", found "uint16"'),
        ({"max_tokens": 10}, "max_tokens: expected 10, found null"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_options_on_an_existing_output_are_refused(
    change: dict, words: str, complete: bool, documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    if complete:
        prepare(make_config(path))
    else:
        with pytest.raises(_Interrupted):
            prepare(make_config(path), report=_interrupt)
    with pytest.raises(ValueError) as error:
        prepare(make_config(path, **change))
    assert words in str(error.value) and "\n" not in str(error.value)


class _Interrupted(Exception):
    pass


def _interrupt(_progress: object, _share: object) -> None:
    raise _Interrupted


def test_another_input_or_tokenizer_on_an_existing_output_is_refused(
    documents: list[str], make_config: Make, tmp_path: Path
) -> None:
    from spattn_olmoe.data import TokenizerSection, train_tokenizer

    path = write_jsonl(tmp_path / "a.jsonl", documents)
    prepare(make_config(path))
    train_tokenizer(documents, 601, tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"tokenizer\.sha256"):
        prepare(make_config(path, tokenizer=TokenizerSection(identifier=str(tmp_path / "other.json"))))
    write_jsonl(path, documents[:-1])
    with pytest.raises(ValueError, match=r"sources\[0\]\.files\[0\]\[1\]: expected \d+, found \d+"):
        prepare(make_config(path))


def test_a_checkpoint_whose_bytes_are_gone_is_refused(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents))
    with pytest.raises(_Interrupted):
        prepare(config, report=_interrupt)
    partial = Path(config.output) / "train-00000.bin.partial"
    partial.write_bytes(partial.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train-00000\.bin\.partial.*shorter than recorded"):
        prepare(config)


def test_shards_of_unknown_origin_are_not_overwritten(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"train-00000\.bin: is there without progress\.json"):
        prepare(make_config(write_jsonl(tmp_path / "a.jsonl", documents)))
    assert (tmp_path / "out" / "train-00000.bin").read_bytes() == b"precious"


def test_two_processes_do_not_write_to_one_folder(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents))

    def prepare_again(_progress: object, _share: object) -> None:
        with pytest.raises(ValueError, match="another process is preparing it"):
            prepare(config)

    manifest = prepare(config, report=prepare_again)
    assert manifest.count("train").documents == len(documents)


def test_where_the_file_system_has_no_locks_a_corpus_is_prepared_with_a_warning(
    documents: list[str],
    make_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents))
    assert prepare(config).count("train").documents == len(documents)
    (warning,) = [record.getMessage() for record in caplog.records if "locks" in record.getMessage()]
    assert warning.startswith(f"{config.output}: ")


def test_an_unfinished_corpus_is_no_corpus(documents: list[str], make_config: Make, tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "a.jsonl", documents))
    with pytest.raises(_Interrupted):
        prepare(config, report=_interrupt)
    with pytest.raises(ValueError, match=r"its preparation has not finished"):
        verify(config.output)


def test_the_command_lines(config_file: Path, straight: tuple[dict[str, bytes], float], tmp_path: Path) -> None:
    folder = config_file.parent / "straight"
    shown = run_script("inspect_data.py", str(folder), "--hashes", "--documents", "0", "3", "--characters", "50")
    manifest = Manifest.load(folder)
    assert shown.returncode == 0, shown.stderr
    for words in (f"{manifest.train_tokens:,} tokens", "all shards as recorded", "train 3:", "document lengths"):
        assert words in shown.stdout
    assert "found none; prepare" in error_line(run_script("inspect_data.py", str(tmp_path)))
    assert "does not exist" in error_line(run_script("prepare_data.py", "--config", str(tmp_path / "none.yaml")))
    result = run_script(
        "prepare_data.py", "--config", str(config_file), "tokenizer.identifier=no/thing", HF_HUB_OFFLINE="1"
    )
    assert "check the name and the network" in error_line(result)
    parts = [f"output={tmp_path}/parts", "sources=[{paths: ['" + str(config_file.parent) + "/in/*.jsonl*']}]"]
    for part in ("0/2", "1/2"):
        done = run_script("prepare_data.py", "--config", str(config_file), "--part", part, *parts)
        assert done.returncode == 0, done.stderr
    merged = run_script("prepare_data.py", "--config", str(config_file), "--merge", *parts)
    assert merged.returncode == 0 and "rejects" in merged.stderr
    assert read_ids(verify(tmp_path / "parts").train_paths)
