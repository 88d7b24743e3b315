"""Which checkpoint is complete and intact: the one answer for resuming, generating and evaluating.

A checkpoint is complete once OLMo-core has written ``.metadata.json``. Behind that, every rank writes ``checksums/rankN.json``:
size and SHA-256 of the files that it wrote, so that hashing takes as long as one rank's share, needs no collective in
the thread of an asynchronous save, and is still affordable for a checkpoint of terabytes. Reading them back is shared by
the ranks that read. An object store checks its own uploads: at a URL there are no checksums.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from olmo_core.aliases import PathOrStr
from olmo_core.distributed.utils import broadcast_object, get_rank, get_world_size
from olmo_core.io import is_url, normalize_path
from olmo_core.train import Checkpointer
from olmo_core.train.callbacks import Callback

from ..files import hash_file, inside, replace_file
from ..json_files import read_json
from ..ranks import first_problem

log = logging.getLogger(__name__)

FOLDER = "checksums"
_CHECKSUMS = {"ranks": int, "files": {str: {"size": int, "sha256": str}}}
_STEP = re.compile(r"step(\d+)")
_OWNER = re.compile(r"train/rank(\d+)\.pt|model_and_optim/__(\d+)_\d+\.distcp")


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Checksums(Callback):
    """Writes the checksums of every checkpoint, after all that other callbacks put into it."""

    priority: ClassVar[int] = -100

    def post_checkpoint_saved(self, path: PathOrStr) -> None:
        if not is_url(path):
            write_checksums(path, rank=get_rank(), ranks=get_world_size())


def write_checksums(checkpoint: PathOrStr, *, rank: int, ranks: int) -> None:
    """Write size and SHA-256 of the files of a complete checkpoint that a rank answers for.

    Those are the ones it wrote itself; rank 0 answers for what no other rank does.
    """
    root = Path(checkpoint)
    files = {
        path.relative_to(root).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path).hexdigest()}
        for path in _files(root)
        if _owner(path, root) == rank
    }
    (root / FOLDER).mkdir(exist_ok=True)
    content = {"ranks": ranks, "files": files}
    replace_file(root / FOLDER / f"rank{rank}.json", json.dumps(content, indent=1).encode())


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.parent != root / FOLDER)


def _owner(path: Path, root: Path) -> int:
    found = _OWNER.fullmatch(path.relative_to(root).as_posix())
    return int(found[1] or found[2]) if found else 0


# ---- looking for one -------------------------------------------------------------------------------------------------


def find_checkpoint(folder: PathOrStr, *, verify: bool = True, passing_over: Collection[str] = ()) -> str | None:
    """A checkpoint folder itself, or the newest complete and intact checkpoint of a run's folder.

    All ranks call it together and get the same answer. What is newer and damaged or was never finished is named in
    a warning. None where no checkpoint was ever completed.

    :param verify: read all of it, to compare it with its checksums; without, a complete one is taken to be intact.
    :param passing_over: checkpoints that were found to be of no use by other means.
    :raises ValueError: there are complete checkpoints, and all of them are damaged.
    """
    complete, unfinished = broadcast_object(_candidates(folder) if get_rank() == 0 else ([], []))
    damaged: list[str] = []
    for checkpoint in complete:
        if checkpoint in passing_over:
            continue
        problem = find_damage(checkpoint) if verify else None
        if problem is None:
            passed_over = damaged + [f"{path} was never finished" for path in unfinished if _newer(path, checkpoint)]
            if passed_over:
                _warn("%s: going back to %s", "; ".join(passed_over), checkpoint)
            return checkpoint
        damaged.append(problem)
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is intact: {'; '.join(damaged)}. Restore one from a copy, or give the run another "
            "trainer.save_folder to start anew"
        )
    if unfinished:
        _warn("%s: never finished; there is no complete checkpoint", ", ".join(unfinished))
    return None


def resolve_checkpoint(folder: PathOrStr, *, verify: bool = True) -> str:
    """As :func:`find_checkpoint`, for a command that cannot do without one.

    :raises ValueError: there is none, or none that is intact.
    """
    found = find_checkpoint(folder, verify=verify)
    if found is None:
        raise ValueError(f"--checkpoint {folder}: neither a complete checkpoint nor a folder of checkpoints (stepN/)")
    return found


def _candidates(folder: PathOrStr) -> tuple[list[str], list[str]]:
    """The checkpoints of a folder that were complete once, newest first, and those that never were."""
    folder = normalize_path(folder)
    if Checkpointer.dir_is_checkpoint(folder):
        return [folder], []
    if is_url(folder):
        try:
            return [Checkpointer.latest_checkpoint(folder)], []
        except FileNotFoundError:
            return [], []
    if (Path(folder) / FOLDER).is_dir():
        return [folder], []
    steps = [path for path in Path(folder).glob("step*") if path.is_dir() and _STEP.fullmatch(path.name)]
    complete: list[str] = []
    unfinished: list[str] = []
    for path in sorted(steps, key=_step, reverse=True):
        # Checksums are written last: where they are, a file that is not there has been lost.
        was_complete = Checkpointer.dir_is_checkpoint(path) or (path / FOLDER).is_dir()
        (complete if was_complete else unfinished).append(str(path))
    return complete, unfinished


def _step(path: PathOrStr) -> int:
    found = _STEP.fullmatch(Path(path).name)
    return int(found[1]) if found else -1


def _newer(path: str, than: str) -> bool:
    return _step(path) > _step(than)


def _warn(message: str, *values: object) -> None:
    if get_rank() == 0:
        log.warning(message, *values)


# ---- checking one ----------------------------------------------------------------------------------------------------


def find_damage(checkpoint: str) -> str | None:
    """What is wrong with a complete checkpoint, in words; None if nothing is. All ranks call it together.

    Without checksums, as older versions left it, a checkpoint is taken as it is, with a warning.
    """
    if is_url(checkpoint):
        return None
    recorded = broadcast_object(_Record.read(Path(checkpoint)) if get_rank() == 0 else _Record())
    if recorded.problem is not None:
        return recorded.problem
    if not recorded.files:
        _warn("%s has no checksums: that its files are there is all that can be checked", checkpoint)
    elif recorded.missing:
        _warn("%s has no checksums of ranks %s: their files are not checked", checkpoint, recorded.missing)
    files = recorded.files
    return first_problem(sorted(files), lambda name: _damage(Path(checkpoint) / name, *files[name]))


@dataclass
class _Record:
    """What the ranks that saved a checkpoint wrote down."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size and SHA-256 by path."""
    missing: list[int] = field(default_factory=list)
    """Ranks that wrote nothing down: they ended before they could."""
    problem: str | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> _Record:
        record = cls()
        there, ranks = set(), 0
        for path in sorted((checkpoint / FOLDER).glob("rank*.json")):
            try:
                content = read_json(path, _CHECKSUMS)
                for name, file in content["files"].items():
                    inside(checkpoint, name)
                    record.files[name] = (file["size"], file["sha256"])
                there.add(int(path.stem.removeprefix("rank")))
                ranks = int(content["ranks"])
            except ValueError as error:
                return cls(problem=f"{path} is damaged ({error})")
        record.missing = sorted(set(range(ranks)) - there)
        return record


def _damage(path: Path, size: int, sha256: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path} is damaged ({found} bytes, {size} were written)"
        if hash_file(path).hexdigest() != sha256:
            return f"{path} is damaged (its SHA-256 is not what was written)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None
