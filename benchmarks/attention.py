"""Attention, forward and backward, under every kind of distance mask: ours against everyone else's.

    python scripts/benchmark.py attention                        # on a GPU all settings, on a CPU the CPU path
    python scripts/benchmark.py attention --quick                # three settings: exclusive and sharing, head_dim 128
    python scripts/benchmark.py attention --settings 1x8x4096 --head-dims 128 --patterns exclusive
    python scripts/benchmark.py attention --missing              # only what is not stored yet, of this commit
    python scripts/benchmark.py attention --report               # only the table and the plot, from the stored results

A correctness gate runs first; a contender that gets it wrong is not timed, and one that fails is a line of the results,
which are stored after every mode of every setting. On a GPU everything is compiled ahead, in processes beside one another.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config

from benchmarks import arguments, contenders, report, timing
from benchmarks.contenders import Attend
from spattn_olmoe import attention, machine
from spattn_olmoe.patterns import Pattern, find_variant

log = logging.getLogger(__name__)


class Setting(NamedTuple):
    B: int
    H: int
    N: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} N{self.N} D{self.D}"


GPU_SHAPES = ["1x8x4096", "8x16x4096", "32x8x1024", "32x16x1024", "1x16x16384", "1x16x65536", "1x16x131072"]
QUICK_SHAPES = ["1x8x4096", "8x16x4096", "1x16x65536"]
CPU_SHAPES = ["1x8x2048"]
PATTERNS = ("exclusive", "sharing", "sliding_window", "gbhalf")
"""What is timed beside dense attention. ``eball`` is the same mask as ``exclusive``, and takes the same time."""
MODES = ("fwd", "bwd", "fwd+bwd")
FLOPS_PER_PAIR = {"fwd": 4, "bwd": 10, "fwd+bwd": 14}
"""Floating-point operations per attended pair and unit of head_dim: two products forward, five backward."""
TENSORS_MOVED = {"fwd": 4, "bwd": 8, "fwd+bwd": 12}
"""Tensors of q's size that must cross memory at least: q k v out; q k v out d_out dq dk dv."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", nargs="+", metavar="BxHxN", help=f"default: {' '.join(GPU_SHAPES)}")
    parser.add_argument("--head-dims", nargs="+", type=int, metavar="D", help="default: 128 64, on a CPU 64")
    arguments.add_patterns(parser, PATTERNS)
    parser.add_argument("--quick", action="store_true", help="three settings: exclusive and sharing, D=128")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for one mode of one setting, all contenders")
    arguments.add_measuring(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, store, and write table and plot. 1 if ours is wrong anywhere."""
    device = args.device or machine.default_device()
    path = (args.out or machine.results_folder(device)) / "attention.json"
    wrong = False
    if not args.report:
        if device == "cpu":
            print("No GPU: this times the CPU path.")
        store = Store(path, machine.describe(device, args.note))
        patterns = PATTERNS[:2] if args.quick else args.patterns
        settings = _settings(args, device)
        if args.missing:
            settings = [setting for setting in settings if not _is_stored(setting, patterns, store)]
        if device == "cuda":
            compile_ahead(settings, patterns, device)
        for setting in settings:
            rows = []
            for rows in measure(setting, patterns, device, args.seconds):
                store.add(setting, rows)
            report.print_setting(setting, report.attention_lines(rows))
            wrong |= any(row["contender"] == "ours" and "error" in row for row in rows)
    for file in report.write(path, report.attention_markdown, report.attention_plot):
        print(f"wrote {file}")
    return int(wrong)


def _is_stored(setting: Setting, patterns: Sequence[str], store: Store) -> bool:
    """Whether there are good times of ours for every mode. What a rival failed at is a result, and not tried again."""
    ours = {(r["setting"], r["pattern"], r["mode"]) for r in store.good_rows() if r["contender"] == "ours"}
    return all((str(setting), pattern, mode) in ours for pattern in patterns for mode in MODES)


def _settings(args: argparse.Namespace, device: str) -> list[Setting]:
    shapes = args.settings or (QUICK_SHAPES if args.quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    dims = args.head_dims or ([64] if device == "cpu" else [128] if args.quick else [128, 64])
    settings = []
    for D in dims:
        for shape in shapes:
            parts = shape.split("x")
            if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
                raise ValueError(f"--settings {shape!r}: must be BxHxN, such as 1x8x4096")
            B, H, N = map(int, parts)
            settings.append(Setting(B, H, N, D))
    return settings


class Store:
    """The result file: runs (machine, versions, commit, command) and rows, each of one run. Saved after every add."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        self.data = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        self.data["runs"].append(run)

    def good_rows(self) -> list[dict[str, Any]]:
        """Rows without an error, of the code and the device of this run."""
        runs = self.data["runs"]
        return [r for r in self.data["rows"] if "error" not in r and machine.same_setup(runs[r["run"]], runs[-1])]

    def add(self, setting: object, rows: list[dict[str, Any]]) -> None:
        """Replace all rows of a setting, which is known by what it prints."""
        kept = [row for row in self.data["rows"] if row["setting"] != str(setting)]
        self.data["rows"] = kept + [row | {"run": len(self.data["runs"]) - 1} for row in rows]
        used = sorted({row["run"] for row in self.data["rows"]})
        runs = [self.data["runs"][i] for i in used]
        rows = [row | {"run": used.index(row["run"])} for row in self.data["rows"]]
        machine.write_json(self.path, {"runs": runs, "rows": rows})


AHEAD = 120
"""Seconds that compiling ahead may take. What is not compiled by then is compiled when it is measured."""


def compile_ahead(settings: Sequence[Setting], patterns: Sequence[str], device: str) -> None:
    """Measure every mask once, in processes beside one another, and forget the times.

    What is compiled there is found on the disk by the process that measures: one after another it would take it longer
    than a short measurement.
    """
    tasks = [(setting, pattern, device) for setting in settings for pattern in patterns]
    if tasks:
        # As many of the largest setting fit into the memory of a GPU. One that does not is compiled later.
        with multiprocessing.get_context("spawn").Pool(min(len(tasks), os.cpu_count() or 1, 8)) as pool:
            compiled = pool.starmap_async(_compile, tasks, chunksize=1)
            compiled.wait(AHEAD)
            if not (compiled.ready() and compiled.successful()):
                log.warning("not everything could be compiled ahead: it is compiled where it is measured")


def _compile(setting: Setting, pattern: str, device: str) -> None:
    """Make all calls of a measurement. What fails here fails there again, and is reported."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no processes of its own
    for _ in measure(setting, [pattern], device, 0):
        pass


def measure(setting: Setting, patterns: Sequence[str], device: str, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Rows of one setting so far, after each mode: every contender and pattern, timed in turns."""
    # A backward pass is timed again and again on one graph. A compiled one would take its tensors for its own results.
    torch._functorch.config.donated_buffer = False
    B, H, N, D = setting
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    entrants: list[tuple[str, str, Pattern, Attend]] = []
    rows: list[dict[str, Any]] = []

    def enter(label: str, pattern: Pattern, found: dict[str, Attend], missing: dict[str, str]) -> None:
        small, _ = _at_gate(label, pattern, device)
        for name, attend in found.items():
            error = gate(small.get(name), label, H, D, dtype, device)
            if error:
                missing = missing | {name: error}
            else:
                entrants.append((label, name, pattern, attend))
        for name, reason in missing.items():
            rows.append({"setting": str(setting), "pattern": label, "contender": name, "error": reason})

    enter("dense", find_variant("dense").build(H, N), *contenders.dense(device, N, H))
    for label in patterns:
        pattern = find_variant(label).build(H, N)
        enter(label, pattern, *contenders.banded(device, pattern, N))

    xs = [torch.randn(B, N, H, D, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    d_out = torch.randn_like(xs[0])

    def started(mode: str, entrant: tuple[str, str, Pattern, Attend]) -> timing.Call | None:
        """A contender's call, which has run twice, as it may spoil itself; where it does not run, its error is a row."""
        label, name, _, attend = entrant
        try:
            call = _call(mode, attend, xs, d_out)
            call()
            call()
        except Exception as error:  # out of memory, a limit on the length: a result like any other
            message = f"{mode}: {type(error).__name__}: {str(error)[:200]}"
            rows.append({"setting": str(setting), "pattern": label, "contender": name, "error": message})
            return None
        return call

    entrants = [entrant for entrant in entrants if started("fwd+bwd", entrant)]
    peaks = {}
    if device == "cuda":
        peaks = {entrant[:2]: timing.peak_bytes(_both(entrant[3], xs, d_out)) for entrant in entrants}
    for mode in MODES:
        calls = {f"{e[0]}/{e[1]}": call for e in entrants if (call := started(mode, e))}
        times = timing.take_turns(calls, device, seconds * max(1, len(calls) // 3))
        del calls
        gc.collect()
        for label, name, pattern, _ in entrants:
            found = times.get(f"{label}/{name}")
            if found is None:
                continue
            row = {"setting": str(setting), "pattern": label, "contender": name, "mode": mode, **found._asdict()}
            rows.append(row | _derived(setting, pattern, mode, found.ms, device) | {"peak": peaks.get((label, name))})
        yield rows


GATE_LENGTH = 512


def _at_gate(label: str, pattern: Pattern, device: str) -> tuple[dict[str, Attend], dict[str, str]]:
    """The same contenders at the length of the gate."""
    if label == "dense":
        return contenders.dense(device, GATE_LENGTH, pattern.n_heads)
    return contenders.banded(device, find_variant(label).build(pattern.n_heads, GATE_LENGTH), GATE_LENGTH)


def gate(attend: Attend | None, label: str, H: int, D: int, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with a contender's output or gradients, against the reference in float64; None if nothing."""
    if attend is None:
        return "did not start at the length of the correctness gate"
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, GATE_LENGTH, H, D
    xs = [torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(4)]
    pattern = find_variant(label).build(H, GATE_LENGTH)
    exact = [x.double().requires_grad_() for x in xs[:3]]
    q, k, v = exact
    expected_out = attention(q, k, v, pattern, impl="reference")
    expected = (expected_out, *torch.autograd.grad(expected_out, exact, xs[3].double()))
    try:
        inputs = [x.requires_grad_() for x in xs[:3]]
        out = attend(*inputs)
        actual = (out, *torch.autograd.grad(out, inputs, xs[3]))
    except Exception as error:  # whatever a rival raises is its result
        return f"{type(error).__name__}: {str(error)[:200]}"
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        off = (a.double() - e).abs().max().item() / max(1.0, e.abs().max().item())
        if not off <= TOLERANCE[dtype]:
            return f"wrong: {name} is off by {off:.1e} of its largest entry"
    return None


def _both(attend: Attend, xs: list, d_out: torch.Tensor) -> timing.Call:
    return lambda: torch.autograd.grad(attend(*xs), xs, d_out)


def _call(mode: str, attend: Attend, xs: list, d_out: torch.Tensor) -> timing.Call:
    if mode == "fwd+bwd":
        return _both(attend, xs, d_out)
    if mode == "bwd":
        out = attend(*xs)
        return lambda: torch.autograd.grad(out, xs, d_out, retain_graph=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attend(*xs)

    return forward


def _derived(setting: Setting, pattern: Pattern, mode: str, ms: float, device: str) -> dict[str, Any]:
    """TFLOP/s of attended pairs, and the share of what operations and bytes allow."""
    B, H, N, D = setting
    flops = FLOPS_PER_PAIR[mode] * B * D * pattern.attended_pairs(N)
    bound = machine.bound(device)
    share: float | str = "n/a"
    if bound:
        moved = TENSORS_MOVED[mode] * B * N * H * D * 2
        share = max(flops / bound.flops, moved / bound.bytes) / (ms / 1e3)
    return {"tflops": flops / ms / 1e9, "share_of_bound": share}
