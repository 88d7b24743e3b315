"""Tables and a plot, made from stored results and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spattn_olmoe.machine import as_line
from spattn_olmoe.tables import table

Row = dict[str, Any]


def write(path: Path, markdown: Callable[[dict[str, Any]], str], plot: Callable[[list[Row], Path], None]) -> list[Path]:
    """Table and plot beside a result file, under its name with ``.md`` and ``.svg``.

    :raises ValueError: there is no such file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the benchmark first")
    data = json.loads(path.read_text())
    paths = [path.with_suffix(".md"), path.with_suffix(".svg")]
    paths[0].write_text(markdown(data))
    plot(data["rows"], paths[1])
    return paths


def print_setting(setting: object, lines: list[str]) -> None:
    """What was measured of one setting, as it is known."""
    print(f"\n{setting}", *lines, sep="\n", flush=True)


def _runs(runs: list[Row]) -> list[str]:
    """Where and how it was measured, a line a run."""
    return [f"- Run {number}: {as_line(run)}" for number, run in enumerate(runs)]


def _page(title: str, words: str, data: dict[str, Any], lines_of: Callable[[list[Row]], list[str]]) -> str:
    """A report: where it was measured, what its words mean, and the lines of each setting."""
    lines = [f"# {title}", "", *_runs(data["runs"]), words.rstrip()]
    for setting in _unique(row["setting"] for row in data["rows"]):
        lines += ["", f"## {setting}", "", *lines_of([row for row in data["rows"] if row["setting"] == setting])]
    return "\n".join(lines) + "\n"


@contextmanager
def _panels(path: Path, n: int, height: float) -> Iterator[list[Any]]:
    """A figure with panels below one another, written when they are drawn: the same results give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(max(n, 1), 1, figsize=(8, height * max(n, 1)), squeeze=False)
    yield list(axes[:n, 0])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_lines(rows: list[Row]) -> list[str]:
    """One setting as it is printed: the table, and what did not run."""
    errors = [f"  {row['pattern']}, {row['contender']}: {row['error']}" for row in rows if "error" in row]
    return [_attention_table(rows), *errors]


def attention_markdown(data: dict[str, Any]) -> str:
    """The whole report: where it was measured, one table a setting, and what did not run."""
    lines = ["# Attention", "", *_runs(data["runs"])]
    lines += [
        "",
        "Median ms. The ratios are the rival's time by ours: above 1 ours is faster. TFLOP/s count attended pairs only.",
    ]
    for setting in _unique(row["setting"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["setting"] == setting]
        lines += ["", f"## {setting}", "", _attention_table(rows)]
        errors = [f"- not timed: {r['pattern']}, {r['contender']}: {r['error']}" for r in rows if "error" in r]
        lines += ["", *errors] if errors else []
    return "\n".join(lines) + "\n"


def _attention_table(rows: list[Row]) -> str:
    timed = [row for row in rows if "ms" in row]
    rivals = _unique(row["contender"] for row in timed if row["contender"] not in ("ours", "ours dense"))
    head = ["mask", "mode", "ours ms", "TFLOP/s", "of bound", "peak MiB", *(f"vs {rival}" for rival in rivals)]
    body = []
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
        body.append(cells)
    return table(head, body, "llr")


def attention_plot(rows: list[Row], path: Path) -> None:
    """Speed-up of fwd+bwd over each rival: one panel a setting, one group of bars a mask."""
    timed = [row for row in rows if row.get("mode") == "fwd+bwd"]
    settings = _unique(row["setting"] for row in timed)
    with _panels(path, len(settings), 2.6) as axes:
        for setting, axis in zip(settings, axes, strict=True):
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


# ---- training --------------------------------------------------------------------------------------------------------

_TRAINING_WORDS = """
A step is forward, backward, clipping and AdamW, of one device. `step ratio`: the dense step's time by this one's.
`attention ratio`: the same of attention alone, forward and backward. `of step`: attention's share of the step's time, its
time alone by the number of its calls. MFU counts the pairs that are attended; `as if dense` counts all causal pairs.
`waits`: times that the host waits for the device in a profiled step. `loop`: whether experts are multiplied one by one.
`layers`: of the model's; fewer where one GPU is too small. On one CPU thread times are the process's processor time.
"""


def training_markdown(data: dict[str, Any]) -> str:
    """The whole report: where it was measured, and one table a model and length."""
    return _page("Training", _TRAINING_WORDS, data, training_lines)


def training_lines(rows: list[Row]) -> list[str]:
    """One setting: the table, and what did not run."""
    head = [
        "attention",
        "kernel",
        "tokens/s",
        "step ratio",
        "attention ratio",
        "of step",
        "MFU",
        "as if dense",
        "peak GiB",
    ]
    head += ["layers", "waits", "loop"]
    body = []
    timed = {row["attention"]: row for row in rows if "ms" in row}
    base = timed.get("dense")
    for row in timed.values():
        profile = row.get("profile", {})
        cells = [
            row["attention"],
            row["attention_kernel"],
            f"{row['tokens_per_second']:,.0f}",
            f"{base['ms'] / row['ms']:.2f}x" if base else "n/a",
            f"{base['attention_ms'] / row['attention_ms']:.2f}x" if base else "n/a",
            f"{row['attention_share']:.1%}",
            *("n/a" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_as_if_dense")),
            f"{row['peak'] / 2**30:.2f}",
            f"{row['layers']} of {row['of_layers']}",
            str(sum(n for name, n in profile["waits"].items() if name.startswith("cuda"))) if profile else "n/a",
            ("yes" if profile["loops_over_experts"] else "no") if profile else "n/a",
        ]
        body.append(cells)
    errors = [f"- not timed: {row['attention']}: {row['error']}" for row in rows if "error" in row]
    return [table(head, body, "llr"), *(["", *errors] if errors else [])]


def training_plot(rows: list[Row], path: Path) -> None:
    """Tokens per second by length: one panel a model, one line a mask, dashed where compiled."""
    timed = [row for row in rows if "ms" in row]
    models = _unique(row["model"] for row in timed)
    with _panels(path, len(models), 3.2) as axes:
        for model, axis in zip(models, axes, strict=True):
            for colour, attention in enumerate(_unique(row["attention"] for row in timed)):
                for compiled in (False, True):
                    found = {
                        row["N"]: row["tokens_per_second"]
                        for row in timed
                        if (row["model"], row["attention"], row["compiled"]) == (model, attention, compiled)
                    }
                    if found:
                        label = attention + (", compiled" if compiled else "")
                        style = {"color": f"C{colour}", "linestyle": "--" if compiled else "-", "marker": "o"}
                        axis.plot(sorted(found), [found[N] for N in sorted(found)], label=label, **style)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("sequence length N")
            axis.set_ylabel("tokens/s")
            axis.set_title(model)
            axis.legend(fontsize="small")


# ---- a step on a CPU -------------------------------------------------------------------------------------------------

_STEP_WORDS = """
A step is forward, backward, clipping and AdamW of the quickstart's model. Least times of all rounds; the contenders of a
table took turns in one process. `over dense`: our dense step's time by this one's, `by operations` the same of their
floating-point operations, the bound. `over transformers`: the time of transformers' step, dense as well, by this one's.
"""


def step_markdown(data: dict[str, Any]) -> str:
    """The whole report: where it was measured, and one table a setting."""
    return _page("A training step on a CPU", _STEP_WORDS, data, step_lines)


def step_lines(rows: list[Row]) -> list[str]:
    """The table of one setting."""
    dense = next((row for row in rows if row["contender"] == "dense"), None)
    theirs = next((row for row in rows if row["contender"].startswith("transformers")), None)
    body = []
    for row in rows:
        ours = dense is not None and row["flops_per_token"]
        cells = [
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            f"{dense['seconds'] / row['seconds']:.2f}x" if dense else "n/a",
            f"{dense['flops_per_token'] / row['flops_per_token']:.2f}x" if dense and ours else "n/a",
            f"{theirs['seconds'] / row['seconds']:.2f}x" if theirs else "n/a",
        ]
        body.append(cells)
    head = ["attention", "tokens/s", "over dense", "by operations", "over transformers"]
    return [table(head, body, "lrrrr")]


def step_plot(rows: list[Row], path: Path) -> None:
    """A step's speed over dense by length, with its bound dashed: of the settings like the first with the most tokens."""
    most = max(rows, key=lambda row: row["tokens"])
    alike = ("tokens", "experts", "top_k", "threads")
    mine = [row for row in rows if all(row[key] == most[key] for key in alike) and row["flops_per_token"]]
    dense = {row["N"]: row for row in mine if row["contender"] == "dense"}
    with _panels(path, 1, 4.0) as (axis,):
        for colour, mask in enumerate(_unique(row["contender"] for row in mine if row["contender"] != "dense")):
            found = {row["N"]: row for row in mine if row["contender"] == mask and row["N"] in dense}
            lengths = sorted(found)
            for key, style in (("seconds", "-"), ("flops_per_token", "--")):
                ratios = [dense[N][key] / found[N][key] for N in lengths]
                label = mask if key == "seconds" else f"{mask}, by operations"
                axis.plot(lengths, ratios, style, color=f"C{colour}", marker="o" if style == "-" else None, label=label)
        axis.set_xscale("log", base=2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xlabel("sequence length N")
        axis.set_ylabel("speed of a step over dense")
        axis.set_title(
            f"{most['tokens']:,} tokens a step, {most['threads']} threads, experts {most['experts']}/{most['top_k']}"
        )
        axis.legend(fontsize="small")
