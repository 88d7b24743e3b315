"""Checkpoints of strangers: an object that would run code is refused wherever it lies, and good ones are read as before."""

from __future__ import annotations

import enum
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from benchmarks.tiny_run import run_training
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.checkpoint_files import write_checksums
from spattn_olmoe.model.unpickling import UnsafeFileError, load_state, read_index


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def in_index(checkpoint: Path, evil: Runs) -> None:
    (checkpoint / "model_and_optim/.metadata").write_bytes(pickle.dumps(evil))


def in_index_beside_the_rest(checkpoint: Path, evil: Runs) -> None:
    path = checkpoint / "model_and_optim/.metadata"
    index = pickle.loads(path.read_bytes())
    index.planner_data = evil
    path.write_bytes(pickle.dumps(index))


def in_every_entry(checkpoint: Path, evil: Runs) -> None:
    """Tensors and plain values alike become the object."""
    out = io.BytesIO()
    torch.save(evil, out)
    path = checkpoint / "model_and_optim/.metadata"
    index = pickle.loads(path.read_bytes())
    (checkpoint / "model_and_optim/__0_0.distcp").write_bytes(out.getvalue())
    for place in index.storage_data.values():
        place.relative_path, place.offset, place.length = "__0_0.distcp", 0, len(out.getvalue())
    path.write_bytes(pickle.dumps(index))


def in_plain_values(checkpoint: Path, evil: Runs) -> None:
    """Only what is no tensor, which PyTorch's own planner unpickles."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    out = io.BytesIO()
    torch.save(evil, out)
    path = checkpoint / "model_and_optim/.metadata"
    index = pickle.loads(path.read_bytes())
    (checkpoint / "model_and_optim/__9_0.distcp").write_bytes(out.getvalue())
    for key, place in list(index.storage_data.items()):
        index.state_dict_metadata[key.fqn] = BytesStorageMetadata()
        index.storage_data[MetadataIndex(key.fqn)] = place
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(out.getvalue())
    path.write_bytes(pickle.dumps(index))


def in_trainer_state(checkpoint: Path, evil: Runs) -> None:
    torch.save(evil, checkpoint / "train/rank0.pt")


def outside(checkpoint: Path, evil: Runs) -> None:
    """No code, but shards that lie elsewhere."""
    path = checkpoint / "model_and_optim/.metadata"
    index = pickle.loads(path.read_bytes())
    for place in index.storage_data.values():
        place.relative_path = f"../../../{place.relative_path}"
    path.write_bytes(pickle.dumps(index))


WEIGHTS = [in_index, in_index_beside_the_rest, in_every_entry, in_plain_values, outside]


@pytest.fixture
def poisoned(trained: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A copy of a good checkpoint with one object in one place, its checksums right; and the file that must not appear."""

    def make(poison: Callable[[Path, Runs], None]) -> tuple[Path, Path]:
        checkpoint, trace = tmp_path / "run/step12", tmp_path / "it-ran"
        shutil.copytree(trained, checkpoint)
        poison(checkpoint, Runs(trace))
        write_checksums(checkpoint, rank=0, ranks=1)
        return checkpoint, trace

    return make


@pytest.mark.parametrize("poison", WEIGHTS)
def test_no_object_of_a_checkpoint_runs_where_it_is_loaded(poisoned: Callable, poison: Callable) -> None:
    checkpoint, trace = poisoned(poison)
    with pytest.raises(ValueError, match=r"step12 is not loaded: .* which (no|is not)") as refused:
        Checkpoint.open(checkpoint).load()
    assert len(str(refused.value).splitlines()) == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    ("by", "poison"), [("trainer.load_path", in_trainer_state), ("trainer.save_folder", in_plain_values)]
)
def test_no_object_of_a_checkpoint_runs_where_training_goes_on_from_it(
    poisoned: Callable, poison: Callable, by: str, tiny_yaml: Path, tmp_path: Path
) -> None:
    checkpoint, trace = poisoned(poison)
    folder = checkpoint if by == "trainer.load_path" else checkpoint.parent
    done = run_training(tiny_yaml, f"{by}={folder}", "trainer.max_duration.value=13", cwd=tmp_path)
    assert not trace.exists()
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "is not loaded" in lines[0] and "Traceback" not in done.stderr


def test_the_state_of_a_rank_is_read_as_it_was_written(trained: Path) -> None:
    path = trained / "train/rank0.pt"
    ours, stock = load_state(path), torch.load(path, weights_only=False)
    assert ours.keys() == stock.keys() and len(stock) > 3
    assert repr(ours) == repr(stock)


def test_an_index_is_read_as_it_was_written(trained: Path) -> None:
    path = trained / "model_and_optim/.metadata"
    with open(path, "rb") as file:
        assert read_index(file) == pickle.loads(path.read_bytes())


@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x04.", pickle.dumps({"a": 1}), pickle.dumps(3)])
def test_a_damaged_index_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_index(io.BytesIO(data))


def test_names_inside_allowed_modules_are_not_a_way_around() -> None:
    for module, name in (
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("builtins", "eval"),
        ("torch", "Size.mro"),
    ):
        data = (
            b"\x80\x04\x8c"
            + bytes([len(module)])
            + module.encode()
            + b"\x8c"
            + bytes([len(name)])
            + name.encode()
            + b"\x93."
        )
        with pytest.raises(UnsafeFileError, match="asks for"):
            read_index(io.BytesIO(data))


@pytest.mark.parametrize("place", ["pattern", "class", "deep class", "attention.json"])
def test_no_module_is_imported_for_a_name_in_a_checkpoint(
    trained: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evilmod.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    checkpoint = tmp_path / "step12"
    shutil.copytree(trained, checkpoint)
    file = "attention.json" if place == "attention.json" else "config.json"
    content = json.loads((checkpoint / file).read_text())
    if place == "attention.json":
        content["layers"][0]["name"] = "evilmod.spattention"
    elif place == "pattern":
        content["model"]["block"]["sequence_mixer"]["pattern"]["name"] = "evilmod.spattention"
    elif place == "class":
        content["model"]["_CLASS_"] = "evilmod.X"
    else:
        content["model"]["block"]["sequence_mixer"]["pattern"]["a"] = [{"_CLASS_": "evilmod.X"}]
    (checkpoint / file).write_text(json.dumps(content))
    write_checksums(checkpoint, rank=0, ranks=1)
    with pytest.raises(ValueError, match=r"evilmod") as refused:
        Checkpoint.open(checkpoint).load()
    assert not (tmp_path / "it-ran").exists()
    assert len(str(refused.value).splitlines()) == 1


class As3112(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 do, Debian 12's among them."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_an_index_that_another_python_wrote_is_read(trained: Path):
    index = pickle.loads((trained / "model_and_optim/.metadata").read_bytes())
    out = io.BytesIO()
    As3112(out).dump(index)
    assert b"getattr" in out.getvalue()
    assert read_index(io.BytesIO(out.getvalue())) == index


@pytest.mark.parametrize(("kind", "name"), [(Metadata, "__init__"), (torch.Size, "count"), (Path, "touch")])
def test_no_other_attribute_is_taken(kind: type, name: str):
    class Attribute:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (kind, name)

    with pytest.raises(UnsafeFileError, match=name):
        read_index(io.BytesIO(pickle.dumps(Attribute())))
