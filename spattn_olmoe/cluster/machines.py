"""Every assumption of the estimates about what is reached of a GPU. What data sheets state is in :mod:`..machine`."""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_NODE = 8
"""GPUs that NVLink connects, as in NVIDIA's HGX and DGX machines."""


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
