"""How far loss curves lie apart: python -m benchmarks.loss_curves REFERENCE RUN [RUN ...] [--out DIR]

Reads the ``metrics.jsonl`` of runs with the same data, seeds and initial weights. The first is what the others are compared
with; a run of the same attention in another precision among them shows what rounding alone does. Writes
``loss_curves.json`` and ``loss_curves.png`` into the results of this machine, or into ``DIR``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from spattn_olmoe import machine
from spattn_olmoe.errors import Parser, user_errors

LAST = 20
"""Steps at the end of a run whose mean loss is compared."""


def compare(folders: list[Path]) -> list[dict[str, Any]]:
    """For every run but the first: distance from the first's loss, over all steps and at the end.

    :raises ValueError: a run has no metrics, or other steps than the first.
    """
    from spattn_olmoe.paper.loss_curves import loss_curve

    curves = {folder: dict(zip(*loss_curve(folder), strict=True)) for folder in folders}
    first = curves[folders[0]]
    rows = []
    for folder in folders[1:]:
        if curves[folder].keys() != first.keys():
            raise ValueError(f"{folder} has other steps than {folders[0]}: train both to the end")
        apart = [abs(curves[folder][step] - first[step]) for step in first]
        ends = [sum(list(curve.values())[-LAST:]) / min(LAST, len(first)) for curve in (curves[folder], first)]
        rows.append(
            {
                "run": folder.name,
                "against": folders[0].name,
                "steps": len(first),
                "mean_distance": sum(apart) / len(apart),
                "largest_distance": max(apart),
                "end": ends[0],
                "end_of_reference": ends[1],
            }
        )
    return rows


def main(arguments: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("reference", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    from spattn_olmoe.paper.loss_curves import plot_losses

    folders = [args.reference, *args.runs]
    device = machine.default_device()
    with user_errors():
        rows = compare(folders)
    out = (args.out or machine.results_folder(device)) / "loss_curves.json"
    machine.write_json(out, {"run": machine.describe(device), "rows": rows})
    plot_losses(folders, out.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['run']}: loss {row['end']:.4f} at the end, {row['against']} {row['end_of_reference']:.4f}; "
            f"{row['mean_distance']:.4f} apart on average, {row['largest_distance']:.4f} at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
