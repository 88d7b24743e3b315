"""Checkpoints that were damaged after they were written, or could not be written."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spattn_olmoe.model.checkpoint_files import find_checkpoint, find_damage, resolve_checkpoint, write_checksums
from spattn_olmoe.train.checkpoints import is_own
from tests.faults.injected import inject
from tests.faults.processes import Run

WEIGHTS = "model_and_optim/__0_0.distcp"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated weights": (WEIGHTS, truncate, "is damaged"),
    "a flipped bit": (WEIGHTS, flip, "SHA-256"),
    "weights missing": (WEIGHTS, Path.unlink, "is missing"),
    "trainer state missing": ("train/rank0.pt", Path.unlink, "is missing"),
    "index missing": ("model_and_optim/.metadata", Path.unlink, "is missing"),
    "marker missing": (".metadata.json", Path.unlink, "is missing"),
    "checksums cut off": ("checksums/rank0.json", truncate, "is damaged"),
}


@pytest.fixture(scope="module")
def copied(unbroken: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(unbroken.folder, tmp_path_factory.mktemp("copied") / "run"))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_the_checkpoint_before_taken(copied, tmp_path, caplog, what):
    name, damage, words = DAMAGE[what]
    folder = Path(shutil.copytree(copied, tmp_path / "run"))
    assert find_checkpoint(folder) == str(folder / "step12")
    assert not caplog.records
    damage(folder / "step12" / name)
    assert resolve_checkpoint(folder) == str(folder / "step8")
    (record,) = caplog.records
    said = record.getMessage()
    assert f"{folder / 'step12' / name} " in said and words in said and f"going back to {folder / 'step8'}" in said
    with pytest.raises(ValueError, match=r"step12/.*another trainer\.save_folder"):
        resolve_checkpoint(folder / "step12")


def test_where_all_are_damaged_nothing_starts_anew(copied, tmp_path):
    folder = Path(shutil.copytree(copied, tmp_path / "run"))
    for step in (4, 8, 12):
        flip(folder / f"step{step}" / WEIGHTS)
    run = Run(folder, copied)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact") as caught:
        find_checkpoint(run.folder)
    assert all(f"step{step}/{WEIGHTS}" in str(caught.value) for step in (4, 8, 12))


def test_without_checksums_a_checkpoint_is_taken_with_a_warning(copied, tmp_path, caplog):
    folder = Path(shutil.copytree(copied / "step12", tmp_path / "step12"))
    shutil.rmtree(folder / "checksums")
    assert find_checkpoint(tmp_path) == str(folder)
    assert f"{folder} has no checksums" in caplog.records[0].getMessage()
    (folder / ".metadata.json").unlink()
    caplog.clear()
    assert find_checkpoint(tmp_path) is None
    assert f"{folder}: never finished" in caplog.records[0].getMessage()


def test_ranks_answer_for_their_own_files(copied, tmp_path, caplog):
    folder = Path(shutil.copytree(copied / "step12", tmp_path / "step12"))
    shutil.rmtree(folder / "checksums")
    for path in (
        folder / "train/rank1.pt",
        folder / "model_and_optim/__1_0.distcp",
        folder / "model_and_optim/__10_0.distcp",
    ):
        path.write_bytes(b"of another rank")
    for rank in (0, 1, 10):
        write_checksums(folder, rank=rank, ranks=11)
    listed = {rank: json.loads((folder / f"checksums/rank{rank}.json").read_text())["files"] for rank in (0, 1, 10)}
    assert set(listed[1]) == {"train/rank1.pt", "model_and_optim/__1_0.distcp"}
    assert set(listed[10]) == {"model_and_optim/__10_0.distcp"}
    there = {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.parent.name != "checksums"
    }
    assert there == {name for files in listed.values() for name in files}
    assert find_damage(str(folder)) is None
    assert "no checksums of ranks [2, 3, 4, 5, 6, 7, 8, 9]" in caplog.records[0].getMessage()
    flip(folder / "model_and_optim/__10_0.distcp")
    assert "__10_0.distcp is damaged" in str(find_damage(str(folder)))


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(unbroken: Run, new_run, tmp_path) -> Run:
    """A run with checkpoints of steps 4 and 8 of 12."""
    run = new_run()
    shutil.copytree(unbroken.folder, run.folder, ignore=shutil.ignore_patterns("step12"))
    return run


def test_a_run_goes_back_to_the_last_intact_checkpoint(unbroken, stopped):
    flip(stopped.folder / "step8" / WEIGHTS)
    assert stopped() == 0, stopped.log
    assert stopped.log.count(f"going back to {stopped.folder / 'step4'}") == 1
    assert f"{stopped.folder / 'step8' / WEIGHTS} is damaged" in stopped.log
    assert f"resuming from {stopped.folder / 'step4'}" in stopped.log
    assert stopped.curve == unbroken.curve
    assert find_damage(str(stopped.folder / "step8")) is None  # saved again


def test_a_run_whose_checkpoints_are_all_damaged_ends_with_one_line(stopped):
    for step in (4, 8):
        truncate(stopped.folder / f"step{step}" / WEIGHTS)
    assert stopped() == 2
    errors = [line for line in stopped.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no checkpoint in" in errors[0] and "Traceback" not in stopped.log
    assert not (stopped.folder / "step12").exists()


@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints(unbroken, new_run, how):
    run = new_run(f"trainer.callbacks.checkpointer.save_async={str(how == 'asynchronous').lower()}")
    assert run(inject("FullDisk", at=8)) == 1
    last = run.log.splitlines()[-1]
    for words in (f"{run.folder}/step8 could not be saved", "File too large", "GiB are free", "trainer.save_folder"):
        assert words in last
    assert last.startswith("error: ")
    assert find_damage(str(run.folder / "step4")) is None
    assert find_checkpoint(run.folder) == str(run.folder / "step4")
    assert run() == 0, run.log
    assert run.curve == unbroken.curve


def test_a_finished_run_is_not_saved_again(unbroken, new_run):
    run = new_run()
    shutil.copytree(unbroken.folder, run.folder)
    before = run.files("step12")
    assert run() == 0, run.log
    assert run.files("step12") == before


@pytest.mark.parametrize("spelling", ["{}/", "{}/../run", "{}//"])
def test_a_runs_own_checkpoint_is_known_however_its_folder_is_spelled(tmp_path, spelling):
    assert is_own(spelling.format(tmp_path / "run"), tmp_path / "run" / "step4")
    assert not is_own(spelling.format(tmp_path / "run"), tmp_path / "run2" / "step4")


def test_no_more_checkpoints_are_kept_however_often_the_run_is_resumed(unbroken, new_run):
    run = new_run("trainer.callbacks.checkpointer.save_interval=2", "trainer.callbacks.checkpointer.max_checkpoints=2")
    for stop, kept in ((5, ["step4", "step5"]), (8, ["step6", "step8"])):
        assert run(f"trainer.hard_stop={{value: {stop}, unit: steps}}") == 0, run.log
        assert run.steps() == kept
    flip(run.folder / "step8" / WEIGHTS)
    assert run("trainer.hard_stop={value: 10, unit: steps}") == 0, run.log
    assert run.steps() == ["step10", "step8"]
    assert run() == 0, run.log
    assert run.steps() == ["step10", "step12"]
    assert run.curve == unbroken.curve


# ---- steps whose gradient is not finite ------------------------------------------------------------------------------


def test_a_step_without_a_finite_loss_is_skipped(unbroken, new_run):
    run = new_run()
    assert run(inject("NaN", at=6)) == 0, run.log
    assert "step 6 skipped: the gradient's norm is nan (1 in a row)" in run.log
    assert list(run.curve) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert all(run.curve[step] == unbroken.curve[step] for step in range(1, 6))
    # Left out as if by hand, but that a step skipped by hand is not even computed.
    by_hand = Run(run.folder.with_name("by_hand"), run.data)
    assert by_hand("trainer.steps_to_skip=[{start: 6, stop: 7}]") == 0, by_hand.log
    assert run.curve == by_hand.curve


def test_after_so_many_bad_steps_the_run_stops_with_finite_weights(unbroken, new_run):
    run = new_run("trainer.callbacks.skip_non_finite.stop_after=5")
    assert run(inject("NaN", at=6, steps=100), "trainer.callbacks.checkpointer.save_async=false") == 1
    assert "FloatingPointError: steps 6 to 10 had no finite gradient" in run.log
    assert run.steps() == ["step4", "step8"]
    state = torch.load(run.folder / "step8/train/rank0.pt", weights_only=False)
    assert state["callbacks"]["skip_non_finite"] == {"in_a_row": 3}
    assert all(tensor.isfinite().all() for tensor in weights(run.folder / "step8"))
    assert run(inject("NaN", at=6, steps=100)) == 1  # the third and fourth are remembered
    assert "FloatingPointError: steps 6 to 10 had" in run.log


def weights(checkpoint: Path) -> list[torch.Tensor]:
    from olmo_core.distributed.checkpoint import get_checkpoint_metadata, load_keys

    folder = checkpoint / "model_and_optim"
    tensors = list(load_keys(str(folder), list(get_checkpoint_metadata(str(folder)).state_dict_metadata)))
    assert len(tensors) > 50  # weights and moments
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def test_weights_that_are_not_finite_are_not_saved(unbroken, new_run):
    run = new_run()
    assert run(inject("Poison", at=7)) not in (0, None)  # behind the save of step 8 it would be too late for that
    assert "step8 is not saved: weight" in run.log and run.steps() == ["step4"]
    assert run() == 0, run.log
    assert run.curve == unbroken.curve


def test_a_checkpoint_that_holds_nan_is_passed_over(unbroken, new_run):
    run = new_run()
    assert run("trainer.hard_stop.value=8", "trainer.hard_stop.unit=steps") == 0, run.log
    _poison(run.folder / "step8")
    assert run() == 0, run.log
    assert "step8 is passed over: its weight" in run.log and "step4" in run.log
    assert run.curve[12] == unbroken.curve[12]


def test_a_run_that_is_behind_its_end_is_refused(unbroken, new_run):
    run = new_run()
    assert run("trainer.max_duration.value=8") == 0, run.log
    assert run("trainer.max_duration.value=7") == 2, run.log
    assert "trainer.max_duration.value=7" in run.log and "at 8 already" in run.log


def test_data_of_less_than_a_batch_are_refused(unbroken, new_run):
    run = new_run("data_loader.global_batch_size=8192")  # of 4096 tokens
    assert run() == 2, run.log
    errors = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "data_loader.global_batch_size=8192 (tokens) is more than the" in errors[0]


def _poison(checkpoint: Path) -> None:
    """NaN in the weights of a checkpoint, whose checksums are right."""
    index = pickle.loads((checkpoint / "model_and_optim/.metadata").read_bytes())
    _key, place = next((k, p) for k, p in index.storage_data.items() if k.fqn.startswith("model."))
    path = checkpoint / "model_and_optim" / place.relative_path
    data = path.read_bytes()
    tensor = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]))
    tensor.flatten()[0] = float("nan")
    out = io.BytesIO()
    torch.save(tensor, out)
    assert len(out.getvalue()) == place.length
    path.write_bytes(data[: place.offset] + out.getvalue() + data[place.offset + place.length :])
    write_checksums(checkpoint, rank=0, ranks=1)
