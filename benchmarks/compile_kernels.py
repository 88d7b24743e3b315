"""Compile the fused kernels ahead of time, on a machine without a GPU, and print what the assembler makes of them.

    python scripts/benchmark.py compile_kernels --capability 80 90 100 --dtype bf16 --head-dim 64 128

prints one JSON object a line: registers, stack (bytes of spilled registers a thread), shared memory, tensor-core
instructions, how many instructions a warp needs for a tile, and whether ptxas made each ``wgmma`` wait for the one before.
``--config BM BN WARPS STAGES`` tries another configuration than the shipped one. No GPU is touched.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spattn_olmoe.kernels.triton.backward import dkdv_kernel, dq_kernel
from spattn_olmoe.kernels.triton.decode import decode_kernel, merge_kernel
from spattn_olmoe.kernels.triton.forward import forward_kernel
from spattn_olmoe.kernels.triton.schedule import STRETCHES
from spattn_olmoe.kernels.triton.tile_sizes import Config, config, decode_config, generation, padded

KERNELS = {
    "forward": forward_kernel,
    "dq": dq_kernel,
    "dkdv": dkdv_kernel,
    "decode": decode_kernel,
    "merge": merge_kernel,
}
_ELEMENT = {"bf16": ("*bf16", 2), "fp16": ("*fp16", 2), "fp32": ("*fp32", 4)}
_IN_FLOAT32 = ("lse_ptr", "delta_ptr", "partial_ptr")
_IN_INT32 = ("plan_ptr", "doc_start_ptr", "doc_end_ptr", "start_ptr", "leftpad_ptr", "intervals_ptr")
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide)."""


def compile_kernel(
    kernel: str,
    capability: int,
    dtype: str,
    head_dim: int,
    *,
    docs: bool = False,
    heads: int = 16,
    group: int = 1,
    tile: Config | None = None,
    multiply: str = "ieee",
) -> dict[str, Any]:
    """Compile one kernel and return its configuration and resources; ``ptx`` holds the assembly.

    :param kernel: ``forward``, ``dq``, ``dkdv``, ``decode`` or ``merge``; ``capability``: 90 for sm_90.
    :param docs: with documents; for decoding, with padding.
    :param group: query heads per key/value head; ``tile``: in place of the shipped configuration.
    :param multiply: of float32: ``ieee`` or ``tf32``.
    """
    pointer, itemsize = _ELEMENT[dtype]
    d_pad = padded(head_dim)
    if kernel in ("decode", "merge"):
        tile = decode_config(d_pad)
    elif tile is None:
        name = "dkdv_grouped" if kernel == "dkdv" and group > 1 else kernel
        tile = config(name, generation(divmod(capability, 10)), itemsize, d_pad)
    constants = {
        "H": heads, "GROUP": group, "D": head_dim, "D_PAD": d_pad, "BM": tile.BM, "BN": tile.BN,
        "SLOTS": 1 << ((STRETCHES + 2) * heads - 1).bit_length(), "DOCS": docs, "PRECISION": multiply,
        "SPLITS": 8, "PADDED": docs,
    }  # fmt: skip
    if not docs:
        constants |= {"doc_start_ptr": None, "doc_end_ptr": None, "leftpad_ptr": None}
    function = KERNELS[kernel]
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else _type(name, pointer) for name in function.arg_names},
        constexprs=constants,
        attrs=dict(_divisible_by_16(function.arg_names, constants)),
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return {
        "kernel": kernel,
        "capability": capability,
        "dtype": dtype,
        "head_dim": head_dim,
        "docs": docs,
        "group": group,
        **tile._asdict(),
        **_machine_code(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "tcgen05": compiled.asm["ptx"].count("tcgen05.mma"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
        "ptx": compiled.asm["ptx"],
    }


def _type(name: str, pointer: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in _IN_FLOAT32 else "*i32" if name in _IN_INT32 else pointer
    return "fp32" if name.startswith("scale") else "i32"


def _divisible_by_16(names: list[str], constants: dict[str, Any]) -> Iterator[tuple[tuple[int], list]]:
    """Pointers and strides, as of any tensor whose head_dim is a multiple of 16."""
    for index, name in enumerate(names):
        if name not in constants and ("stride" in name or name.endswith("_ptr")):
            yield (index,), [["tt.divisibility", 16]]


def _machine_code(cubin: bytes) -> dict[str, Any]:
    """What ``cuobjdump`` reads from the machine code.

    ``registers``, and ``stack`` in bytes. ``loop``: instructions of the loop over tiles, the mask's included. ``serialized``:
    every ``wgmma`` is waited for before the next one begins, which is what ptxas does (and warns of, as C7510 to C7515)
    where it cannot tell that nothing else touches the accumulators meanwhile. It costs more than a spill.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(what, file.name) for what in ("--dump-resource-usage", "--dump-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no line of registers: {usage!r}")
    lines = re.findall(r"^ +/\*([0-9a-f]{4,})\*/ +(.*?);", code, flags=re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in lines]
    products = [at for at, text in instructions if re.search(r"\b(HGMMA|HMMA|UTCHMMA)\b", text)]
    jumps = [(int(to[1], 16), at) for at, text in instructions if (to := re.search(r"\bBRA\b.*0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if any(first <= at <= last for at in products)]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "loop": max((sum(first <= at <= last for at, _ in instructions) for first, last in loops), default=0),
        "serialized": code.count("WARPGROUP.DEPBAR") >= code.count("HGMMA") > 0,
    }


def _cuobjdump(what: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), what, file], capture_output=True, text=True, check=True).stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=["forward", "dq", "dkdv"])
    parser.add_argument("--capability", nargs="+", type=int, default=[90])
    parser.add_argument("--dtype", nargs="+", choices=_ELEMENT, default=["bf16"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[128])
    parser.add_argument("--docs", action="store_true", help="with documents")
    parser.add_argument("--group", type=int, default=1, help="query heads per key/value head")
    parser.add_argument("--config", nargs="+", type=int, help="BM BN WARPS STAGES, of one or several configurations")


def run(args: argparse.Namespace) -> int:
    numbers = args.config or []
    if len(numbers) % 4:
        raise ValueError(
            f"--config {' '.join(map(str, numbers))}: each configuration is four numbers, BM BN WARPS STAGES"
        )
    tiles: list[Config | None] = [Config(*numbers[i : i + 4]) for i in range(0, len(numbers), 4)] or [None]
    for choice in product(args.capability, args.dtype, args.head_dim, args.kernel, tiles):
        capability, dtype, head_dim, kernel, tile = choice
        report = compile_kernel(kernel, capability, dtype, head_dim, docs=args.docs, group=args.group, tile=tile)
        print(json.dumps({key: value for key, value in report.items() if key != "ptx"}), flush=True)
    return 0
