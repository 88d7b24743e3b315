"""The paper's two speed claims on this machine: attention alone, and tokens per second of a training step.

    python scripts/reproduce.py throughput

"Computational Efficiency Analysis" of arXiv 2511.09596 times attention, forward and backward, at batch 1, 8 heads,
N = 4096, D = 128, and its Table 2 training throughput. Both are measured here against dense attention by the fastest
kernel on the machine, with attention's share of a step, which links the two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import attention, training
from spattn_olmoe import machine
from spattn_olmoe.tables import table

SETTING = attention.Setting(B=1, H=8, N=4096, D=128)
PAPER_ATTENTION = 2.0  # "approximately", the mask is not named
PAPER_TOKENS = {"dense": 3214, "sharing": 6167}  # Table 2, four A100
MASKS = ("exclusive", "sharing")
MODE = "fwd+bwd"
SECONDS = 1.5  # for one mode of all kinds of attention


def steps(device: str) -> list[training.Setting]:
    """The training steps that are timed: Table 2's model on a GPU; a CPU has no room for it and takes the quickstart's."""
    if device == "cuda":
        return [training.Setting("table2", 1024, compiled) for compiled in (False, True)]
    return [training.Setting("quickstart", 1024, False)]


def main(args: argparse.Namespace) -> None:
    """Measure both, and write ``throughput.json`` and ``throughput.md``; meanwhile ``attention.json`` and ``training.json``.

    :param args: of ``scripts/reproduce.py``.
    :raises ValueError: ours is not correct here, or nothing can be compared.
    """
    device = machine.default_device()
    out = args.out or Path("runs") / "reproduce" / args.scale
    settings = steps(device)
    if device == "cpu":
        print(
            "No GPU: this times the CPU path, in float32, and the quickstart's model in place of Table 2's.", flush=True
        )
    print(f"attention: {SETTING}; training steps: {', '.join(map(str, settings))}", flush=True)
    if args.dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    store = attention.Store(out / "attention.json", machine.describe(device))
    for rows in attention.measure(SETTING, MASKS, device, SECONDS):
        store.add(SETTING, rows)
    if wrong := [row["error"] for row in rows if row["contender"] == "ours" and "error" in row]:
        raise ValueError(f"ours is not correct and was not timed: {wrong[0]}")
    training.measure(settings, attention.Store(out / training.FILE, machine.describe(device)), device)
    stored = json.loads((out / training.FILE).read_text())["rows"]
    wanted = {str(setting) for setting in settings}
    results = {
        "format": "spattn_olmoe throughput 1",
        "machine": machine.describe(device),
        "attention": rows,
        "training": [row for row in stored if row["setting"] in wanted],
    }
    machine.write_json(out / "throughput.json", results)
    (out / "throughput.md").write_text(markdown(results))
    print(out / "throughput.json", out / "throughput.md", sep="\n")


def markdown(results: dict[str, Any]) -> str:
    """The report."""
    about = results["machine"]
    lines = [
        "# Throughput",
        "",
        f"{machine.as_line(about)}. Load average {about['load_average'][0]} at the end.",
        "",
        *_attention_table(results["attention"]),
    ]
    for setting in dict.fromkeys(row["setting"] for row in results["training"]):
        lines += _both([row for row in results["training"] if row["setting"] == setting], results["attention"])
    return "\n".join(lines) + "\n"


def _ms(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _timed(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Milliseconds of forward and backward by pattern and contender."""
    return {(row["pattern"], row["contender"]): row["ms"] for row in rows if row.get("mode") == MODE}


def fastest_dense(rows: list[dict[str, Any]]) -> tuple[str, float]:
    """The fastest dense attention, and its milliseconds."""
    dense = {contender: ms for (pattern, contender), ms in _timed(rows).items() if pattern == "dense"}
    if not dense:
        raise ValueError("no dense attention could be timed: there is nothing to compare with")
    name = min(dense, key=dense.__getitem__)
    return name, dense[name]


def _attention_table(rows: list[dict[str, Any]]) -> list[str]:
    name, baseline = fastest_dense(rows)
    body = [[*key, _ms(ms), f"{baseline / ms:.2f}x"] for key, ms in _timed(rows).items()]
    missing = [f"- not timed: {r['pattern']}, {r['contender']}: {r['error']}" for r in rows if "error" in r]
    return [
        f"## Attention, forward and backward: {SETTING}",
        "",
        table(["mask", "kernel", "ms", f"{name} (fastest dense) / this"], body, "llr"),
        "",
        *missing,
        f"The paper: approximately {PAPER_ATTENTION:.0f}x, over a dense baseline that it does not name; its text says that all "
        "types of Table 2 are computed by FlexAttention.",
        "",
    ]


def _both(rows: list[dict[str, Any]], attention_rows: list[dict[str, Any]]) -> list[str]:
    """Both ratios of one training setting, and attention's share of its step."""
    _, baseline = fastest_dense(attention_rows)
    times = _timed(attention_rows)
    timed = {row["attention"]: row for row in rows if "ms" in row}
    lines = [f"## Training step: {rows[0]['setting']}", ""]
    lines += [f"- not timed: {row['attention']}: {row['error']}" for row in rows if "error" in row]
    if "dense" not in timed:
        return [*lines, ""]
    dense = timed["dense"]
    head = ["", "tokens/s", "attention's share", f"attention alone, {SETTING}", "attention alone, this model", "step"]
    body = []
    for name, row in timed.items():
        alone = baseline if name == "dense" else times.get((name, "ours"))
        cells = [name, f"{row['tokens_per_second']:,.0f}", f"{row['attention_share']:.1%}"]
        cells.append("n/a" if alone is None else f"{baseline / alone:.2f}x")
        body.append([*cells, *(f"{dense[key] / row[key]:.2f}x" for key in ("attention_ms", "ms"))])
    printed = PAPER_TOKENS["sharing"] / PAPER_TOKENS["dense"]
    share = dense["attention_share"]
    return [
        *lines,
        table(head, body),
        "",
        f"{dense['layers']} of {dense['of_layers']} layers. Ratios are the dense step's or attention's time by this one's. Dense "
        f"attention is {share:.1%} of the step here, so that attention that took no time at all would make the step "
        f"{1 / (1 - share):.2f} times as fast. The paper's Table 2: {PAPER_TOKENS['dense']:,} and "
        f"{PAPER_TOKENS['sharing']:,} tokens/s on four A100, {printed:.2f}x.",
        "",
    ]
