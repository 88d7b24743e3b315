"""Decoding through the KV cache on a CPU: tokens/s by the length of the context, masks in turns, in one process.

    python scripts/benchmark.py decoding
    python scripts/benchmark.py decoding --contexts 1024 65536

The model is the quickstart's with d_model 512, its band length that of the context. The cache holds random numbers, for time
does not depend on them. Every mask keeps the whole cache: a head of a band may need any key later.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT
from spattn_olmoe.errors import quiet, whole
from spattn_olmoe.patterns import find_variant
from spattn_olmoe.tables import table

MASKS = ("dense", "sharing", "exclusive", "sliding_window")
TOKENS = 8
"""Tokens of one round of one mask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", nargs="+", type=whole(64, 2**20), metavar="N", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rounds", type=whole(1, 1000), default=5)
    arguments.add_patterns(parser, MASKS)
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / "decoding.json")


def run(args: argparse.Namespace) -> int:
    from spattn_olmoe.model import apply_remedies

    quiet()
    apply_remedies()
    rows = [row for N in args.contexts for row in measure(args.patterns, N, args.rounds)]
    machine.write_json(args.results, {"machine": machine.describe("cpu"), "rows": rows})
    print("\n".join(lines(rows)), args.results, sep="\n")
    return 0


def measure(masks: list[str], N: int, rounds: int) -> list[dict[str, Any]]:
    """The least seconds of a token after a context of ``N`` tokens."""
    decoders = {mask: decoder(mask, N) for mask in masks}
    least = dict.fromkeys(masks, float("inf"))
    for _ in range(rounds):
        for mask, (decode, _) in decoders.items():
            start = time.perf_counter()
            decode()
            least[mask] = min(least[mask], (time.perf_counter() - start) / TOKENS)
    return [
        {
            "context": N,
            "attention": mask,
            "tokens_per_second": 1 / least[mask],
            "over_dense": least["dense"] / least[mask] if "dense" in least else None,
            "cache_bytes": decoders[mask][1],
        }
        for mask in masks
    ]


def decoder(mask: str, N: int) -> tuple[Callable[[], None], int]:
    """A call that decodes :data:`TOKENS` tokens after ``N``, and the bytes of its cache."""
    from spattn_olmoe.train import load_experiment

    words = [*find_variant(mask).overrides, "model.d_model=512", f"dataset.sequence_length={N}"]
    config = load_experiment(ROOT / "configs/quickstart.yaml", words)
    model = config.model_with_attention().build(init_device="cpu").eval()
    caches: list[Any] = []
    for block in model.blocks.values():
        attention: Any = block.attention
        attention.init_kv_cache_manager(1, N + TOKENS)
        caches.append(attention.kv_cache_manager)
        for tensor in (caches[-1].k_cache, caches[-1].v_cache):
            tensor.normal_()
    token = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def decode() -> None:
        for cache in caches:
            cache.cache_seqlens.fill_(N)
        for _ in range(TOKENS):
            model(token)

    decode()
    return decode, sum(x.nbytes for cache in caches for x in (cache.k_cache, cache.v_cache))


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the results."""
    body = [
        [
            f"{row['context']:,}",
            row["attention"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['over_dense']:.2f}x" if row["over_dense"] else "n/a",
            f"{row['cache_bytes'] / 2**20:,.0f}",
        ]
        for row in rows
    ]
    return [table(["context", "attention", "tokens/s", "over dense", "cache, MiB"], body, "rlrrr")]
