"""Time tile configurations of the fused kernels on this GPU, one kernel at a time, the others as shipped.

    python scripts/benchmark.py tune --setting 8x16x4096 --head-dim 128 --pattern exclusive

Prints one line a configuration, fastest first. What is fastest goes by hand into ``SHIPPED`` in
``spattn_olmoe/kernels/triton/tile_sizes.py``, if it does not spill there (``python scripts/benchmark.py compile_kernels``).
"""

from __future__ import annotations

import argparse
from itertools import product
from unittest.mock import patch

import torch

from benchmarks import arguments, timing
from spattn_olmoe import attention
from spattn_olmoe.patterns import find_variant

MODES = {"forward": "fwd", "dq": "bwd", "dkdv": "bwd"}
_QUERIES = [
    *((128, 64, 8, stages) for stages in (2, 3, 4)),
    *((64, 64, 4, stages) for stages in (2, 3, 4)),
    *((128, 32, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
]
CANDIDATES = {
    "forward": _QUERIES,
    "dq": _QUERIES,
    "dkdv": [(BM, *keys, stages) for BM, keys, stages in product((64, 32), ((128, 8), (64, 4), (64, 8)), (2, 3))],
}
"""BM, BN, warps, stages. Others spill a good part of their registers at head_dim 128, as compiling ahead of time shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", default="8x16x4096", metavar="BxHxN")
    parser.add_argument("--kv-heads", type=int, help="default: as many as query heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--pattern", type=arguments.named_mask, default="exclusive", metavar="NAME", help="a named mask"
    )
    parser.add_argument("--kernel", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one kernel, all configurations")


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU to tune for")
    from spattn_olmoe.kernels.triton.tile_sizes import SHIPPED, Config, config, generation_of, padded

    B, H, N = map(int, args.setting.split("x"))
    pattern = find_variant(args.pattern).build(H, N)
    G = args.kv_heads or H
    q, k, v = (
        torch.randn(B, N, heads, args.head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads in (H, G, G)
    )
    d_out = torch.randn_like(q)
    generation = generation_of(q.device)
    for kernel in args.kernel:
        entry = "dkdv_grouped" if kernel == "dkdv" and G < H else kernel
        shipped = config(entry, generation, 2, padded(args.head_dim))
        table = SHIPPED[generation][2]

        def call_with(tile: Config, table=table, entry=entry, mode=MODES[kernel]) -> timing.Call:
            def call() -> None:
                with patch.dict(table, {entry: {256: tile}}):
                    out = attention(q, k, v, pattern, impl="triton")
                    if mode == "bwd":
                        torch.autograd.grad(out, (q, k, v), d_out)

            return call

        calls = {}
        for tile in sorted({shipped, *(Config(*candidate) for candidate in CANDIDATES[kernel])}):
            try:
                call_with(tile)()
                calls[str(tuple(tile))] = call_with(tile)
            except Exception as error:  # more shared memory than there is, above all
                print(f"{kernel} {tuple(tile)}: {type(error).__name__}: {str(error)[:80]}")
        times = timing.take_turns(calls, "cuda", args.seconds)
        print(f"{kernel} (forward{' and backward' if MODES[kernel] == 'bwd' else ''}; shipped: {tuple(shipped)})")
        for label, found in sorted(times.items(), key=lambda item: item[1].ms):
            print(f"  {found.ms:9.4f} ms  {label}")
    return 0
