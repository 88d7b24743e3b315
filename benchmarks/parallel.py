"""Training under every parallel layout against one rank: loss, gradient norm and load-balancing loss, step by step.

No time is measured. Gloo processes on this machine's CPU train the tiny float32 model of ``tiny.py`` for five optimiser
steps under each layout that is let through, and write the largest relative difference from one rank; layouts that are
refused are written with their reason. Also measured: what the default granularity of the load-balancing loss adds, and runs
that are stopped and resume under another layout and on another number of ranks.

    python scripts/benchmark.py parallel               # about ten minutes on two cores
    python scripts/benchmark.py parallel --stack ddp   # OLMoDDP's layouts only; what is stored of v1's stays
    python scripts/benchmark.py parallel --report      # the tables of docs/parallelism.md again, from the stored results
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from olmo_core.exceptions import OLMoConfigurationError

from benchmarks import layouts
from benchmarks.layouts import DDP_LAYOUTS, IN_BFLOAT16, KEYS, LAYOUTS, MICROBATCH, REFUSED, difference, rounded
from benchmarks.tiny import tiny
from spattn_olmoe import machine
from spattn_olmoe.model.stack import Stack
from spattn_olmoe.patterns import VARIANTS
from spattn_olmoe.patterns.head_order import imbalance
from spattn_olmoe.tables import table
from spattn_olmoe.train.layout import check_layout

RESULT = Path(__file__).parent / "results" / "cpu" / "parallel.json"
PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"
KINDS = ("sharing", "dense")
LOCAL_BATCH = ("model.block.feed_forward_moe.lb_loss_granularity=local_batch", *VARIANTS["sharing"].overrides)
LOCAL = {  # by number of ranks; the first is what the others are compared with
    1: {"fsdp": (), "fsdp, microbatches twice as long": (MICROBATCH,)},
    2: {name: LAYOUTS[2][name] for name in ("fsdp", "hsdp+ep", "fsdp+tp", "fsdp+ulysses")},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stack", choices=list(Stack), help="measure the layouts of this one only")
    parser.add_argument("--report", action="store_true", help="write the tables from the stored results")


def run(args: argparse.Namespace) -> int:
    data = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if not args.report:
        if args.stack != Stack.ddp:
            data |= {"run": machine.describe("cpu"), **measure()}
        if args.stack != Stack.v1:
            data["ddp"] = {"run": machine.describe("cpu"), **measure_ddp()}
        machine.write_json(RESULT, data)
    if not {"run", "ddp"} <= data.keys():
        raise ValueError(f"{RESULT} does not hold the layouts of both stacks: run the benchmark first")
    PAGE.write_text(filled(PAGE.read_text(), data))
    print(f"{RESULT}\n{PAGE}")
    return 0


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Rows of v1's tables."""
    with tempfile.TemporaryDirectory() as folder:
        resumed = layouts.Resumed(Path(folder) / "resumed")
        curves: dict[int, dict[str, layouts.Curve]] = {}
        for n_ranks, names in LAYOUTS.items():
            runs: dict[str, dict[str, Any]] = {
                f"{kind} {name}": {"overrides": [*VARIANTS[kind].overrides, *overrides]}
                for kind in KINDS
                for name, overrides in names.items()
            }
            for name, overrides in LOCAL.get(n_ranks, {}).items():
                runs[f"local {name}"] = {"overrides": [*LOCAL_BATCH, *overrides]}
            curves[n_ranks] = layouts.train(
                Path(folder) / str(n_ranks), n_ranks, {**runs, **resumed.runs(n_ranks)}, timeout=3000
            )
        last = layouts.train(Path(folder) / "last", 1, resumed.last(), timeout=600)
    rows = [
        {
            "ranks": n_ranks,
            "layout": name,
            "attention": kind,
            **_against(curves[1], f"{kind} fsdp", found, f"{kind} {name}"),
        }
        for n_ranks, found in curves.items()
        for name in LAYOUTS[n_ranks]
        for kind in KINDS
    ]
    local = [
        {"ranks": n_ranks, "layout": name, **_against(curves[1], "local fsdp", curves[n_ranks], f"local {name}")}
        for n_ranks, names in LOCAL.items()
        for name in names
    ]
    resumed_rows = [
        {"run": name, **dict(zip(KEYS, value, strict=True))}
        for name, value in resumed.differences(curves, last).items()
    ]
    return {"layouts": rows, "refused": refused(), "local_batch": local, "resumed": resumed_rows}


def measure_ddp() -> dict[str, list[dict[str, Any]]]:
    """Every layout of the stack ``ddp``: in float32 against v1 on one rank, and some in bfloat16 against one rank in it."""
    with tempfile.TemporaryDirectory() as folder:
        stacks = layouts.BothStacks(Path(folder))
        curves = {n: stacks.train(n, tuple(names), IN_BFLOAT16[n], timeout=3000) for n, names in DDP_LAYOUTS.items()}

    def rows(one: str, tried: Mapping[int, Iterable[str]], run: Callable[[str], str] = str) -> list[dict[str, Any]]:
        return [
            {"ranks": n, "layout": name, **_against(curves[1], one, curves[n], run(name))}
            for n, names in tried.items()
            for name in names
        ]

    return {"layouts": rows("v1", DDP_LAYOUTS), "bfloat16": rows(rounded("ddp"), IN_BFLOAT16, rounded)}


def _against(
    one: dict[str, layouts.Curve], name: str, others: dict[str, layouts.Curve], other: str
) -> dict[str, float]:
    return dict(zip(KEYS, difference(one[name], others[other]), strict=True))


def refused() -> list[dict[str, Any]]:
    """The layouts that are refused, with the reason a user reads."""
    rows = []
    for name, (n_ranks, overrides) in REFUSED.items():
        try:
            check_layout(tiny(*overrides), n_ranks)
        except (ValueError, OLMoConfigurationError) as reason:
            rows.append({"layout": name, "reason": str(reason)})
    return rows


# ---- the tables ------------------------------------------------------------------------------------------------------


def filled(page: str, data: dict[str, Any]) -> str:
    """The page with its tables made anew, each between two comments that name it."""
    for name, text in {
        "layouts": _layouts(data["layouts"]),
        "ddp": _differences(data["ddp"]["layouts"], ("ranks", "layout")),
        "bfloat16": _differences(data["ddp"]["bfloat16"], ("ranks", "layout")),
        "refused": table(["layout", "error message"], [[row["layout"], row["reason"]] for row in data["refused"]], "l"),
        "local_batch": _differences(data["local_batch"], ("ranks", "layout")),
        "resumed": _differences(data["resumed"], ("run",)),
        "head_order": head_order_table(),
    }.items():
        begin, end = f"<!-- {name}: made by scripts/benchmark.py parallel -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{PAGE} has no place for the table {name!r}: {begin.strip()} ... {end.strip()}")
        page = before + begin + text + end + after
    return page


def _layouts(rows: list[dict[str, Any]]) -> str:
    head = ["ranks", "layout", *(f"{key}, {kind}" for kind in KINDS for key in KEYS)]
    body = []
    for ranks, layout in dict.fromkeys((row["ranks"], row["layout"]) for row in rows):
        mine = {row["attention"]: row for row in rows if (row["ranks"], row["layout"]) == (ranks, layout)}
        body.append([str(ranks), layout, *(f"{mine[kind][key]:.0e}" for kind in KINDS for key in KEYS)])
    return table(head, body, "rlr")


def _differences(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    body = [[*(str(row[name]) for name in names), *(f"{row[key]:.0e}" for key in KEYS)] for row in rows]
    return table([*names, *KEYS], body, "l" * len(names) + "r")


def head_order_table() -> str:
    """The busiest rank's attended pairs over the mean, natural order and balanced: arithmetic, not measured."""
    degrees = (2, 4, 8)
    body = []
    for H, N in ((8, 1024), (16, 4096)):
        for label in ("exclusive", "sharing"):
            orders = [
                VARIANTS[label].build(H, N, head_order=order).attended_pairs_per_head()
                for order in ("natural", "balanced")
            ]
            cells = [", ".join(f"{imbalance(pairs, d):.3f}" for pairs in orders) for d in degrees]
            body.append([f"{H}, {N}", label, *cells])
    head = ["heads, band length", "attention", *(f"{d} ranks: natural, balanced" for d in degrees)]
    return table(head, body, "llr")
