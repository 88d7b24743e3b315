"""Gradients of experts and router under each layout, with and without the remedies, on two ranks.

torchrun remedy_worker.py OUT.pt
"""

from __future__ import annotations

import sys

import olmo_core.distributed.parallel as parallel
import torch
import torch.distributed as dist
from olmo_core.train import prepare_training_environment, teardown_training_environment

from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.remedies import cpu_moe
from spattn_olmoe.train import load_experiment

ROUTER, EXPERTS = "blocks.1.feed_forward_moe.router.weight", "blocks.0.feed_forward_moe.experts.mlp.w"


def gradients(base: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of one batch of two sequences: every rank takes one, or with tensor parallelism both."""
    parallel._WORLD_MESH = None  # OLMo-core allows one mesh a process; here each layout has its own
    config = load_experiment(base, overrides)
    torch.manual_seed(0)
    model = config.train_module.build(config.model_with_attention().build(init_device="meta")).model
    ids = torch.randint(2, config.model.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    if config.train_module.tp_config is None:
        ids = ids[dist.get_rank()][None]
    labels = ids.roll(-1, 1)
    out = model(ids, labels=labels, loss_reduction="sum", loss_div_factor=labels.numel(), return_logits=False)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if name == ROUTER or name.startswith(EXPERTS)}
    assert len(grads) == 4
    locals_ = [torch.empty_like(grads[ROUTER].to_local()) for _ in range(dist.get_world_size())]
    dist.all_gather(locals_, grads[ROUTER].to_local())
    whole = {name: grad.full_tensor() for name, grad in grads.items()}
    return {**whole, "router by rank": torch.stack(locals_)}


def main() -> None:
    base, out, *common = sys.argv[1:]
    layouts = {
        "fsdp": [],
        "ep": [
            "train_module.dp_config.name=hsdp",
            "train_module.dp_config.shard_degree=2",
            "train_module.ep_config.degree=2",
        ],
        "tp": ["train_module.tp_config.degree=2"],
    }
    prepare_training_environment(seed=0, backend="gloo")
    found = {}
    cpu_moe.apply()  # without it nothing runs here at all
    for layout in ("ep", "tp"):
        found[f"stock {layout}"] = gradients(base, [*common, *layouts[layout]])
    apply_remedies()
    for layout, overrides in layouts.items():
        found[layout] = gradients(base, [*common, *overrides])
    if dist.get_rank() == 0:
        torch.save(found, out)
    teardown_training_environment()


if __name__ == "__main__":
    main()
