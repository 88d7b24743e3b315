"""Files of results: written whole or not at all, read back. Without lm-eval, which held-out loss does not need."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..json_files import read_json, to_json
from .compare import check_results

FORMAT = "spattn_olmoe evaluation 2"


def writable_folder(folder: str | Path) -> Path:
    """Make the folder of results, before hours are spent on what goes there.

    :raises ValueError: it is a file, or nothing can be written there.
    """
    path = Path(folder)
    probe = path / f".write-{os.getpid()}"
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    return path


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what goes wrong in writing results, a full disk for one, into a ValueError that names the folder.

    Results are printed before they are written, so that they are not lost then.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--out {folder}: cannot write there ({error.strerror}): make room or name another folder"
        ) from None


def write(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, all or nothing."""
    replace_file(path, (to_json(results, indent=1) + "\n").encode())


def read(path: str | Path) -> dict[str, Any]:
    """Read results that :func:`write` wrote.

    :raises ValueError: the file is missing, or not written by this package.
    """
    try:
        results = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such results file") from None
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, found {found!r}: give a file of scripts/evaluate.py")
    check_results(results, str(path))
    return results
