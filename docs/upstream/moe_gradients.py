"""Gradients of OLMo-core 3.0.0's dropless MoE under expert and tensor parallelism, against FSDP.

torchrun --nproc-per-node=2 docs/upstream/moe_gradients.py
"""

import olmo_core.distributed.parallel as parallel
import torch
import torch.distributed as dist
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.moe.loss import MoELoadBalancingLossGranularity
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.ops import moe as ops
from olmo_core.optim import AdamWConfig
from olmo_core.train import prepare_training_environment, teardown_training_environment
from olmo_core.train.train_module import transformer as tm


def scatter(x, indices, bin_ids, weights, bins, top_k):
    x = x.index_select(0, indices.long().argsort())
    return (x if weights is None else x * weights[:, None]).view(-1, top_k, x.shape[-1]).sum(1)


# OLMo-core's Triton kernels need a GPU; these are the same two operations on a CPU.
ops.gather = lambda x, indices, bin_ids, bins, top_k: x.index_select(0, indices.long() // top_k)
ops.scatter = scatter


def gradients(layout):
    parallel._WORLD_MESH = None  # one mesh a process; here each layout has its own
    config = TransformerConfig.llama_like_moe(
        d_model=32, vocab_size=64, n_layers=2, n_heads=4, num_experts=4, top_k=2, expert_hidden_size=32, dropless=True
    )
    config.block.feed_forward_moe.lb_loss_granularity = MoELoadBalancingLossGranularity.instance
    module = tm.TransformerTrainModuleConfig(
        rank_microbatch_size=32, max_sequence_length=32, optim=AdamWConfig(), **layout
    )
    model = module.build(config.build(init_device="meta")).model
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    if "tp_config" not in layout:
        ids = ids[dist.get_rank()][None]  # a sequence for each rank; with tensor parallelism both have both
    model(
        ids, labels=ids.roll(-1, 1), loss_reduction="sum", loss_div_factor=ids.numel(), return_logits=False
    ).loss.backward()
    moe = model.blocks["1"].feed_forward_moe
    return moe.experts.mlp.w1.grad.full_tensor(), moe.router.weight.grad


prepare_training_environment(seed=0, backend="gloo")
fsdp = tm.TransformerDataParallelConfig(name=DataParallelType.fsdp)
hsdp = tm.TransformerDataParallelConfig(name=DataParallelType.hsdp, shard_degree=2)
experts, router = gradients({"dp_config": fsdp})
ep, _ = gradients({"dp_config": hsdp, "ep_config": tm.TransformerExpertParallelConfig(degree=2)})
_, tp = gradients({"dp_config": fsdp, "tp_config": tm.TransformerTensorParallelConfig(degree=2)})
router, parts = router.full_tensor(), [torch.empty_like(tp.to_local()) for _ in range(2)]
dist.all_gather(parts, tp.to_local().contiguous())
if dist.get_rank() == 0:
    print(f"expert gradient, ep over fsdp:        {float((ep * experts).sum() / (experts * experts).sum()):.6f}")
    share = [f"{float(part @ router / (router @ router)):.4f}" for part in parts]
    print(f"router gradient, each tp rank over fsdp: {' and '.join(share)}")
    print(f"their sum less fsdp's, relative:      {float((sum(parts) - router).norm() / router.norm()):.1e}")
teardown_training_environment()
