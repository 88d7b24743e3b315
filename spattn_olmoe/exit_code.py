"""How a process ended, kept for the script that launched it: of all exit codes torchrun makes 1, and srun often 143."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "SPATTN_EXIT_CODE"
"""The environment variable that names the file. Without it nothing is kept."""


@contextlib.contextmanager
def kept_exit_code() -> Iterator[None]:
    """Keep the exit code of a command: use it around all of ``main``, which must end by returning or by ``sys.exit``."""
    try:
        yield
    except SystemExit as end:
        keep(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except BaseException:
        keep(1)
        raise
    keep(0)


def keep(code: int) -> None:
    """Keep an exit code, for an end that no exception leads to.

    What failed first decides: a rank that a signal ended (more than 128) ended because another rank, or the launcher, did.
    """
    name, rank = os.environ.get(VARIABLE), os.environ.get("RANK", "0")
    if not name:
        return
    path = Path(name)
    if (code == 0 or code > 128) and (rank != "0" or path.exists()):
        return
    new = path.with_name(f"{path.name}.{rank}")
    with contextlib.suppress(OSError):  # a full disk may be what ended the run, and must not hide its own error
        new.write_text(f"{code}\n")
        new.replace(path)
