"""The machine that estimates are made for: data-sheet figures of GPUs, and every assumption about what is reached of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..train.progress import PEAK_FLOPS

GPUS_PER_NODE = 8
"""GPUs that NVLink connects, as in NVIDIA's HGX and DGX machines."""


@dataclass(frozen=True)
class GPU:
    """One GPU of a node of eight.

    :param name: what it is called here.
    :param memory: bytes.
    :param flops: dense bfloat16 operations a second.
    :param hbm: bytes of memory a second.
    :param nvlink: bytes a second to the other GPUs of its node, one direction.
    :param network: bytes a second to other nodes, one direction: one network adapter a GPU.
    :param source: where the figures stand.
    """

    name: str
    memory: float
    flops: float
    hbm: float
    nvlink: float
    network: float
    source: str


GPUS = {
    "h100": GPU(
        "H100", 80e9, PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM data sheet; DGX H100: 8 x 400 Gb/s"
    ),
    "h200": GPU(
        "H200", 141e9, PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM data sheet; DGX H200: 8 x 400 Gb/s"
    ),
    "a100": GPU(
        "A100",
        80e9,
        PEAK_FLOPS["A100"],
        2.04e12,
        300e9,
        25e9,
        "NVIDIA A100 80GB SXM data sheet; DGX A100: 8 x 200 Gb/s",
    ),
    "b200": GPU(
        "B200", 180e9, PEAK_FLOPS["B200"], 8.0e12, 900e9, 50e9, "NVIDIA DGX B200 data sheet, an eighth; 8 x 400 Gb/s"
    ),
}


@dataclass(frozen=True)
class Assumption:
    """A figure that nobody measured for this model on this machine, and why it is what it is."""

    value: float
    means: str
    source: str


ASSUMPTIONS = {
    "memory": Assumption(
        0.90, "share of a GPU's memory that tensors may fill", "CUDA context, NCCL buffers, fragmentation: assumption"
    ),
    "imbalance": Assumption(
        1.25, "rows of the busiest expert-parallel rank, of an even share", "assumption; 1 without expert parallelism"
    ),
    "projections": Assumption(
        0.50, "of peak FLOP/s, in dense matrix products", "assumption; large ones alone reach 0.80 on an H200"
    ),
    "experts": Assumption(0.30, "of peak FLOP/s, in the experts' grouped products", "assumption"),
    "attention": Assumption(
        0.33,
        "of peak FLOP/s, in the tiles that attention visits",
        "assumption: 0.26 to 0.48 expected of Triton on Hopper",
    ),
    "hbm": Assumption(
        0.85, "of memory bandwidth, in what is no matrix product", "assumption; copies reach 0.90 on an H200"
    ),
    "traffic": Assumption(
        6.0, "bytes read and written for each byte that a backward pass keeps", "assumption, without torch.compile"
    ),
    "links": Assumption(0.75, "of NVLink's and the network's bandwidth, in collectives", "assumption"),
    "latency": Assumption(20e-6, "seconds a collective takes for each doubling of its ranks", "assumption"),
    "other": Assumption(0.05, "of a step: launching, data, logging, waiting for the slowest rank", "assumption"),
}
"""Every figure of the estimates that is no data sheet's and no count. Change them here after a measurement."""


def assumed(name: str) -> float:
    """The value of an assumption."""
    return ASSUMPTIONS[name].value
