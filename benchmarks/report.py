"""Tables and a plot, made from stored results and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(path: Path) -> list[Path]:
    """``attention.md`` and ``attention.svg`` beside a result file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the benchmark first")
    data = json.loads(path.read_text())
    table, plot = path.with_suffix(".md"), path.with_suffix(".svg")
    table.write_text(markdown(data))
    _plot(data["rows"], plot)
    return [table, plot]


def print_rows(setting: object, rows: list[Row]) -> None:
    print(f"\n{setting}")
    print("\n".join(_table(rows)))
    for row in rows:
        if "error" in row:
            print(f"  {row['pattern']}, {row['contender']}: {row['error']}")


def markdown(data: dict[str, Any]) -> str:
    """The whole report: where it was measured, one table a setting, and what did not run."""
    lines = ["# Attention", ""]
    for number, run in enumerate(data["runs"]):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(
            f"- Run {number}: {run['device']}, {run['cores']} CPU cores ({run['threads']} threads), {versions}, "
            f"commit `{str(run['commit'])[:12]}`{' with changes' if run['changed'] else ''}, {run['date'][:10]}, "
            f"`{run['command']}`" + (f". {run['note']}" if run.get("note") else "")
        )
    lines += [
        "",
        "Median ms. The ratios are the rival's time by ours: above 1 ours is faster. TFLOP/s count attended pairs only.",
    ]
    for setting in _unique(row["setting"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["setting"] == setting]
        lines += ["", f"## {setting}", "", *_table(rows)]
        errors = [f"- not timed: {r['pattern']}, {r['contender']}: {r['error']}" for r in rows if "error" in r]
        lines += ["", *errors] if errors else []
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    timed = [row for row in rows if "ms" in row]
    rivals = _unique(row["contender"] for row in timed if row["contender"] not in ("ours", "ours dense"))
    head = ["mask", "mode", "ours ms", "TFLOP/s", "of bound", "peak MiB", *(f"vs {rival}" for rival in rivals)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    by_key = {(row["pattern"], row["contender"], row["mode"]): row for row in timed}
    for row in timed:
        if row["contender"] not in ("ours", "ours dense"):
            continue
        share = row["share_of_bound"]
        cells = [
            row["pattern"],
            row["mode"],
            f"{row['ms']:.3g}",
            f"{row['tflops']:.3g}",
            share if isinstance(share, str) else f"{share:.0%}",
            "n/a" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}",
        ]
        for rival in rivals:
            other = by_key.get((row["pattern"], rival, row["mode"])) or by_key.get(("dense", rival, row["mode"]))
            cells.append(f"{other['ms'] / row['ms']:.2f}x" if other else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _plot(rows: list[Row], path: Path) -> None:
    """Speed-up of fwd+bwd over each rival: one panel a setting, one group of bars a mask."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "attention"  # the same results give the same file
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row.get("mode") == "fwd+bwd"]
    settings = _unique(row["setting"] for row in timed)
    figure, axes = plt.subplots(len(settings), 1, figsize=(8, 2.6 * len(settings)), squeeze=False)
    for setting, axis in zip(settings, axes[:, 0], strict=True):
        mine = [row for row in timed if row["setting"] == setting]
        ours = [row for row in mine if row["contender"] == "ours"]
        rivals = _unique(row["contender"] for row in mine if row["contender"] not in ("ours", "ours dense"))
        by_key = {(row["pattern"], row["contender"]): row["ms"] for row in mine}
        for n, rival in enumerate(rivals):
            ratios = [
                by_key.get((row["pattern"], rival), by_key.get(("dense", rival), float("nan"))) / row["ms"]
                for row in ours
            ]
            axis.bar([i + n * 0.8 / len(rivals) for i in range(len(ours))], ratios, 0.8 / len(rivals), label=rival)
        axis.set_xticks([i + 0.4 - 0.4 / len(rivals) for i in range(len(ours))], [row["pattern"] for row in ours])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("rival's time / ours")
        axis.set_title(f"{setting}, forward and backward")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
