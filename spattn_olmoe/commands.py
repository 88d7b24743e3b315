"""Commands that start the scripts: as a person types them in a checkout, or as this process starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = "$HEAD_NODE:29500"
"""Where the ranks of several machines meet; the shell that starts them knows the host."""


def train_command(
    config: str | Path,
    overrides: Sequence[str],
    ranks: int | str | None = None,
    nodes: int = 1,
    *,
    to_run: bool = False,
) -> list[str]:
    """``scripts/train.py`` with a config, by torchrun where ``ranks`` is given.

    :param ranks: processes of each machine, ``gpu`` for one a GPU; None for a single process without torchrun.
    :param nodes: machines; with more than one, a person sets ``$HEAD_NODE``.
    :param to_run: with this interpreter and the script's absolute path, from whatever folder it is started.
    """
    if ranks is None:
        launcher = [sys.executable if to_run else "python"]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run"] if to_run else ["torchrun"]
        launcher += ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}"]
        launcher += [f"--nproc_per_node={ranks}"]
        launcher += [] if nodes == 1 else ["--rdzv_backend=c10d", f"--rdzv_endpoint={HEAD}"]
    return [*launcher, _script("train", to_run), "--config", str(config), *overrides]


def script_command(name: str, arguments: Sequence[str], *, to_run: bool = False) -> list[str]:
    """Another of the scripts, in one process."""
    return [sys.executable if to_run else "python", _script(name, to_run), *arguments]


def _script(name: str, to_run: bool) -> str:
    path = ROOT / "scripts" / f"{name}.py"
    return str(path) if to_run else relative(path)


def relative(path: str | Path) -> str:
    """A path as one types it at the top of the checkout; one outside stays as it is."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def environment() -> dict[str, str]:
    """What scripts are started with: this process's environment, and this very package."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
