"""What OLMo-core 3.0.0 gets wrong for these models, and what is put right: one module each, all applied at once.

Every remedy names what is wrong without it, and refuses to touch another release. A test per remedy fails as soon as
OLMo-core no longer needs it.
"""

from . import (
    cancellation,
    cpu_moe,
    cpu_passes,
    ddp_optimizer_dtypes,
    ddp_permutation,
    ddp_without_cuda,
    expert_gradients,
    expert_loop,
    grouped_gemm,
    held_out_loss,
    late_metrics,
    router_gradients,
    unpickling,
)
from .release import TESTED_RELEASE

REMEDIES = (
    cpu_moe,
    cpu_passes,
    expert_loop,
    grouped_gemm,
    expert_gradients,
    router_gradients,
    held_out_loss,
    cancellation,
    late_metrics,
    unpickling,
    ddp_permutation,
    ddp_without_cuda,
    ddp_optimizer_dtypes,
)


def apply_remedies() -> None:
    """Apply every remedy; doing it again changes nothing.

    :raises ValueError: OLMo-core is not the release they were written against.
    """
    for remedy in REMEDIES:
        remedy.apply()


__all__ = ["REMEDIES", "TESTED_RELEASE", "apply_remedies"]
