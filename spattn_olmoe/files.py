"""Files that survive a crash: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that after any crash it is either the old one or the new one, whole."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)  # do not leave a truncated file behind
        raise
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def complete_or_absent(to: str | Path, n_bytes: int, key: str = "--to") -> Iterator[Path]:
    """A folder to write to, which gets its name once all is written; it vanishes where that fails.

    :param n_bytes: what will be written, about.
    :param key: what the user has named the folder by.
    :raises ValueError: ``to`` exists, or the disk has no room.
    """
    to = Path(to)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ValueError(f"{key} {to} exists: name a folder that does not, or remove it")
    to.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(to.parent).free
    if free < n_bytes * 1.01:
        raise ValueError(
            f"{key} {to}: {n_bytes / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free: name another disk"
        )
    aside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        yield aside
        _readable(aside)
        os.replace(aside, to)
        sync_folder(to.parent)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"{key} {to}: no space is left on the disk; nothing was kept") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _readable(folder: Path) -> None:
    """The permissions that files made by hand would have: temporary ones are the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def hash_file(path: Path, n_bytes: int | None = None) -> hashlib._Hash:
    """SHA-256 of a file, or of its first ``n_bytes``; more can be added to it."""
    digest = hashlib.sha256()
    left = path.stat().st_size if n_bytes is None else n_bytes
    with open(path, "rb") as file:
        while left:
            data = file.read(min(left, 1 << 22))
            if not data:
                raise OSError(f"{path} is {left} bytes shorter than recorded")
            digest.update(data)
            left -= len(data)
    return digest


def matching(pattern: str) -> list[Path]:
    """The files of a glob, sorted; where there is a file or folder by that very name, as with ``[en]`` in it, that one."""
    if os.path.lexists(pattern):
        return [Path(pattern)]
    try:
        return sorted(map(Path, glob.glob(pattern, recursive=True)))
    except ValueError:  # a null byte, or brackets that make no set
        return []


def regular_file(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a file.

    :raises FileNotFoundError: there is none.
    :raises ValueError: it is a pipe, a device or a folder: reading it would wait or never end.
    """
    try:
        status = os.stat(path)
    except ValueError:  # a null byte in the name
        raise FileNotFoundError(f"{str(path)!r}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: is no regular file")
    return status


def inside(folder: str | os.PathLike[str], name: str, *, links: bool = False) -> Path:
    """The file that a name in a file of ``folder`` stands for.

    :param links: follow a link out of the folder, which whoever made the folder here has put there.
    :raises ValueError: it leads out of the folder (an absolute path, ``..``, a link), or is no regular file.
    """
    where = PurePath(name)
    if not name or "\0" in name or where.is_absolute() or ".." in where.parts:
        raise ValueError(f"{folder}: names {name!r}, which is not inside this folder")
    path = Path(folder) / where
    if not links and not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{folder}: {name!r} is a link that leads out of this folder")
    if path.exists():
        regular_file(path)
    return path
