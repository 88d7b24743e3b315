"""Pictures as files, and what goes with them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import replace_file

ENDINGS = (".png", ".svg", ".pdf")


def check_out(out: str | Path) -> Path:
    """The file of a picture.

    :raises ValueError: its ending is none of a picture.
    """
    path = Path(out)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--out {out}: must end in {', '.join(ENDINGS)}")
    if "\0" in str(out):
        raise ValueError("--out: a name cannot hold a null byte")
    return path


def save_figure(figure: Figure, out: str | Path, *, dpi: int) -> Path:
    """Write a picture, all or nothing; the format follows the file's ending, and its folder is made.

    :raises ValueError: the ending is none of a picture.
    """
    path = check_out(out)
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=path.suffix[1:].lower())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data.getvalue())
    return path


def save_study(name: str, results: Mapping[str, Any], page: str, figure: Figure, out: Path) -> list[Path]:
    """What a study found: ``NAME.json``, its report ``NAME.md``, and ``NAME.png``."""
    out.mkdir(parents=True, exist_ok=True)
    data, report = out / f"{name}.json", out / f"{name}.md"
    replace_file(data, (json.dumps(results) + "\n").encode())
    replace_file(report, page.encode())
    return [data, report, save_figure(figure, out / f"{name}.png", dpi=144)]
