"""One run, one job: a lock in a folder that only one process may write at a time."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from .exit_code import keep
from .json_files import parse_json

log = logging.getLogger(__name__)

FILE_NAME = "lock"
BEAT = 10.0
"""Seconds between two signs of life of a holder; one that gives none for 2.5 times as long is dead."""
PATIENCE = 180.0
"""Seconds to wait for a lock that an earlier attempt of the same job still holds: file servers free those of a lost machine
only after a while."""


class Lock:
    """A folder's lock, held until :meth:`release` or the end of the process, however that ends.

    The file names its holder: host, job, pid, and since when; empty, it is free. Where the file system has ``flock``, the
    kernel frees it with the process. Some have none, or one that other machines do not see: a holder also gives the file
    a new time every :data:`BEAT` seconds, and whoever wants the lock of another machine watches for that, by changes,
    not by clocks. A holder that was silent for too long, and whose lock was taken over, ends at once when it finds out: the
    folder is another's.

    :raises ValueError: somebody else holds it.
    """

    def __init__(self, folder: str | Path, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.path = Path(folder) / FILE_NAME
        self._beat_seconds = beat
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._ended = threading.Event()
        self._record = json.dumps(
            {
                "host": socket.gethostname(),
                "job": _job(),
                "pid": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
        )
        try:
            self._acquire(patience)
        except BaseException:
            os.close(self._file)
            raise
        atexit.register(self.release)
        os.register_at_fork(after_in_child=self._close)  # else data workers would hold it after this process has ended
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Free the lock. One that was taken over is left to its holder."""
        if self._file >= 0:
            self._ended.set()
            with contextlib.suppress(OSError):  # the file was removed
                if self._read() == self._record:
                    os.ftruncate(self._file, 0)
            self._close()

    def _acquire(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while not self._free():
            holder = _holder(self._read())
            if not (_job() and holder.get("job") == _job()) or time.monotonic() > deadline:
                raise ValueError(
                    f"{self.path.parent} is in use: {_describe(holder)} writes it (see {self.path}). "
                    "Wait for it, stop it, or give this one another folder (trainer.save_folder)"
                )
            time.sleep(min(1.0, patience))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, self._record.encode(), 0)

    def _free(self) -> bool:
        """Whether nobody holds the lock. Where the kernel can tell, it is ours from here on."""
        if (granted := flock(self._file)) is False:
            return False
        record = self._read()
        if not record:
            return True
        holder = _holder(record)
        if granted and holder.get("host") == socket.gethostname():
            return True
        log.info("%s was locked by %s: looking whether it still lives", self.path.parent, _describe(holder))
        before = self._signs_of_life()
        time.sleep(2.5 * self._beat_seconds)
        if self._signs_of_life() != before:
            return False
        log.warning("%s was locked by %s, which is dead: its lock is taken over", self.path.parent, _describe(holder))
        return True

    def _read(self) -> str:
        return self.path.read_text()  # opened anew, since NFS shows an open file's old state

    def _signs_of_life(self) -> tuple[str, int]:
        with self.path.open() as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            try:
                lost = self._read() != self._record
                if not lost:
                    os.utime(self._file)
            except OSError as error:
                log.warning("the lock %s cannot be renewed: %s", self.path, error)
                continue
            if lost and not self._ended.is_set():
                log.error(
                    "%s was taken over (see %s): this process ends, and saves nothing there",
                    self.path.parent,
                    self.path,
                )
                keep(1)
                os._exit(1)  # not by a signal: that would end in a checkpoint

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def flock(file: int) -> bool | None:
    """Lock an open file or folder until it is closed: whether nobody else has; None where the file system cannot lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _job() -> str:
    """The job that this process is part of; all attempts of a job have the same. Empty without one."""
    return os.environ.get("SPATTN_JOB") or os.environ.get("SLURM_JOB_ID", "")


def _holder(record: str) -> dict[str, Any]:
    """Who holds a lock; nobody that is known, where the file is damaged."""
    try:
        return parse_json(record or "{}", FILE_NAME, dict)
    except ValueError:
        return {}


def _describe(holder: dict[str, object]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')},"
