"""Commands that start the scripts: as a person types them in a checkout, or as this process starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = "$HEAD_NODE:29500"
"""Where the ranks of several machines meet; the shell that starts them knows the host."""
SHUTDOWN = 540
"""Seconds that ranks may take to save when torchrun is told to stop; its own 30 are too few for a large checkpoint."""


def train_command(
    config: str | Path,
    overrides: Sequence[str],
    ranks: int | str | None = None,
    nodes: int = 1,
    *,
    to_run: bool = False,
) -> list[str]:
    """``scripts/train.py`` with a config, by torchrun where ``ranks`` is given.

    For several machines it is a line for a shell on each of them, which share the save folder: OLMo-core wants to be told.

    :param ranks: processes of each machine, ``gpu`` for one a GPU; None for a single process without torchrun.
    :param nodes: machines; with more than one, a person sets ``$HEAD_NODE``.
    :param to_run: with this interpreter and the script's absolute path, from whatever folder it is started.
    """
    if ranks is None:
        launcher = [sys.executable if to_run else "python"]
    elif nodes == 1:
        launcher = [sys.executable, "-m", "torch.distributed.run"] if to_run else ["torchrun"]
        launcher += ["--standalone", f"--nproc_per_node={ranks}"]
    else:
        assert not to_run
        launcher = ["OLMO_SHARED_FS=1", "torchrun", f"--nnodes={nodes}", f"--nproc_per_node={ranks}"]
        launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint={HEAD}", f"--shutdown-timeout={SHUTDOWN}"]
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
