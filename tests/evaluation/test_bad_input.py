"""What a user can get wrong: one line, exit code 2, before anything is spent."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest

from spattn_olmoe.evaluation import scores
from spattn_olmoe.evaluation.suites import suite_of_tasks
from spattn_olmoe.files import hash_file
from spattn_olmoe.model import checkpoint_files


def copy(folder: str, target: Path, *, checksums: bool = False) -> Path:
    """A checkpoint to damage; without checksums, as at a URL, where what is wrong shows only once it is read."""
    shutil.copytree(folder, target)
    if not checksums:
        shutil.rmtree(target / "checksums")
    return target


@pytest.fixture
def expect(evaluate_command):
    def check(words: list[str], *parts: str) -> None:
        code, _, err = evaluate_command(*words)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1, err
        for part in parts:
            assert part in lines[0]

    return check


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--suite", "tabel1"], ["--suite tabel1", "did you mean 'table1'?"]),
        (["--tasks", "winogrand"], ["--tasks winogrand", "did you mean 'winogrande'?", "offline=false"]),
        (["--suite", "table1", "--tasks", "copa"], ["exclude each other"]),
        (["--limit", "0"], ["--limit: '0' must be a whole number from 1"]),
        (["--batch-size", "0"], ["--batch-size: '0' must be"]),
        (["--num-fewshot", "5"], ["--num-fewshot goes with --tasks"]),
        (["followsinput=true"], ["followsinput=true", "did you mean 'follows_input'?"]),
        (["follows_input=both"], ["follows_input=both", "must be true or false"]),
        (["offline=yes"], ["offline=yes: must be true or false"]),
        (["--loss", "--suite", "core"], ["--loss takes no --suite"]),
        (["--loss", "--data", "nowhere"], ["nowhere", "manifest.json"]),
        (["--data", "x"], ["only --loss and --needle read prepared data"]),
        (["--tasks", "copa", "device=cuda:99"], ["device=cuda:99", "no such GPU"]),
        (["--tasks", "copa", "device=gpu"], ["device=gpu", "not a device"]),
        (["tokenizer=missing.json"], ["missing.json", "no such file"]),
    ],
)
def test_arguments(checkpoint_of, expect, tmp_path, words, parts):
    expect(["--checkpoint", checkpoint_of("standard"), "--out", str(tmp_path), *words], *parts)


def test_no_checkpoint(expect, tmp_path):
    expect([], "--checkpoint DIR")
    expect(["--checkpoint", str(tmp_path)], str(tmp_path), "neither a complete checkpoint nor a folder")


def test_a_checkpoint_that_does_not_say_its_attention(checkpoint_of, expect, tmp_path):
    folder = copy(checkpoint_of("standard"), tmp_path / "step12")
    (folder / "attention.json").unlink()
    expect(["--checkpoint", str(folder)], "does not say what attention", "attention.json is missing")


def test_a_checkpoint_that_contradicts_itself(checkpoint_of, expect, tmp_path):
    folder = copy(checkpoint_of("standard"), tmp_path / "step12")
    shutil.copy(Path(checkpoint_of("eball")) / "attention.json", folder)
    expect(["--checkpoint", str(folder)], "contradicts itself", "eball")


def test_no_tokenizer(checkpoint_of, expect, tmp_path):
    folder = copy(checkpoint_of("standard"), tmp_path / "step12")
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["dataset"]["tokenizer"]["identifier"] = "gone/tokenizer.json"
    (folder / "config.json").write_text(json.dumps(config))
    expect(["--checkpoint", str(folder), "--tasks", "copa"], "has no tokenizer.json", "tokenizer=FILE")


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("damage", ["cut off", "gone", "metadata"])
def test_a_damaged_checkpoint(checkpoint_of, expect, tmp_path, damage, checksums):
    folder = copy(checkpoint_of("standard"), tmp_path / "step12", checksums=checksums)
    largest = max((folder / "model_and_optim").glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "gone":
        largest.unlink()
    else:
        path = largest if damage == "cut off" else folder / "model_and_optim/.metadata"
        path.write_bytes(path.read_bytes()[:100])
    said = ("is missing" if damage == "gone" else "is damaged",) if checksums else ("cannot be read", "older stepN")
    expect(["--checkpoint", str(folder), "--tasks", "copa", "--limit", "1"], str(folder), *said)


def test_nowhere_to_write(checkpoint_of, expect, tmp_path):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    expect(["--checkpoint", checkpoint_of("standard"), "--out", out], f"--out {out}: cannot write there")


def test_no_space_for_the_results_prints_them_all_the_same(checkpoint_of, evaluate_command, held_out_data, tmp_path):
    """A limit on the size of files stands in for a full disk: the probe before still fits, the results do not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["--checkpoint", checkpoint_of("standard"), "--loss", "--data", str(held_out_data), "--out", str(tmp_path)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        code, out, err = evaluate_command(*words, "--limit", "100", "device=cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"--out {tmp_path}: cannot write there (File too large)" in line
    assert "Held-out loss in nats per token" in out
    assert list(tmp_path.iterdir()) == []


def test_no_network(checkpoint_of, expect, tmp_path):
    words = ["--checkpoint", checkpoint_of("standard"), "--tasks", "copa", "--out", str(tmp_path), "offline=false"]
    expect(
        words, "offline=false: the data of copa cannot be downloaded", "check the network, or leave out offline=false"
    )


def test_with_network_tasks_are_lm_evals_own():
    with scores.task_manager(suite_of_tasks(["copa", "mmlu_anatomy"]), from_wheel=False) as manager:
        for name in ("copa", "mmlu_anatomy"):
            assert str(manager.task_index[name].yaml_path).startswith(str(Path(lm_eval.tasks.__file__).parent))


@pytest.mark.parametrize("words", [["--tasks", "copa"], ["--loss"]], ids=lambda words: words[0])
def test_a_checkpoint_is_hashed_once(checkpoint_of, evaluate_command, held_out_data, tmp_path, monkeypatch, words):
    hashed: list[Path] = []

    def counting(path, *args):
        hashed.append(Path(path))
        return hash_file(path, *args)

    monkeypatch.setattr(checkpoint_files, "hash_file", counting)
    folder = Path(checkpoint_of("eball"))
    data = ["--data", str(held_out_data)] if words == ["--loss"] else []
    code, _, err = evaluate_command(
        *("--checkpoint", str(folder), *words, "--limit", "1", "--out", str(tmp_path), *data, "follows_input=true")
    )
    assert code == 0, err
    there = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != checkpoint_files.FOLDER]
    assert sorted(hashed) == sorted(there)
