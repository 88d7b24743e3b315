"""What the memory model counts against what PyTorch keeps and what ranks hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tiny_run import ROOT
from spattn_olmoe.cluster import Layout, memory
from spattn_olmoe.cluster.memory import Shape, _casts, checkpoint_bytes, kept_per_token
from spattn_olmoe.model.flops import flops_per_token
from spattn_olmoe.model.remedies import apply_remedies, cpu_passes
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.config import ExperimentConfig
from spattn_olmoe.train.layout import RECOMPUTABLE

T, TOKENS, VOCAB = 64, 256, 512
SMALL = [
    "model.d_model=128",
    "model.n_layers=3",
    f"model.vocab_size={VOCAB}",
    "model.block.sequence_mixer.n_heads=4",
    "model.block.feed_forward_moe.num_experts=8",
    "model.block.feed_forward_moe.hidden_size=96",
    "model.block.feed_forward_moe.router.top_k=2",
    "attention.type=standard",
    "attention.impl=sdpa",  # it keeps what the fused kernels keep: q, k, v, its output and a number per row
    f"dataset.sequence_length={T}",
    f"data_loader.global_batch_size={TOKENS}",
    f"train_module.rank_microbatch_size={TOKENS}",
    "trainer.max_duration.value=10",
    "trainer.max_duration.unit=steps",
]
RECOMPUTE = [
    "train_module.ac_config.mode=selected_modules",
    f"train_module.ac_config.modules=[{','.join(f'blocks.*.{part}' for part in RECOMPUTABLE)}]",
]


def small(*overrides: str) -> ExperimentConfig:
    return load_experiment(ROOT / "configs/base/olmoe.yaml", [*SMALL, *overrides])


def build(config: ExperimentConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the CPU, with the config's checkpointing, as OLMo-core's train module prepares it."""
    apply_remedies()
    torch.manual_seed(0)
    model = config.model_with_attention().build(init_device="cpu")
    model.init_weights(max_seq_len=T, device=torch.device("cpu"))
    if (ac := config.train_module.ac_config) is not None:
        model.apply_activation_checkpointing(ac.mode, modules=ac.modules)
    return model.to(dtype).train()


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(
        ids, labels=ids, loss_reduction="sum", return_logits=False, loss_div_factor=torch.tensor(float(TOKENS))
    ).loss


def bytes_kept(model: torch.nn.Module) -> int:
    """Bytes of all that one forward pass leaves for the backward pass, weights left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return x

    ids = torch.randint(0, VOCAB, (TOKENS // T, T))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of(model, ids)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [[], RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_those_that_autograd_keeps(dtype, recompute, monkeypatch):
    """As a GPU keeps them: in float32 a CPU computes norms, rotations and the loss otherwise, and keeps a sixth less."""
    apply_remedies()
    monkeypatch.setattr(cpu_passes, "_served", lambda *_: False)
    config = small(*recompute, *(["train_module.dp_config.param_dtype=null"] if dtype == torch.float32 else []))
    shape = Shape.of(config)
    rotary = 8 * T * shape.query // shape.heads
    predicted = (
        TOKENS * (sum(kept_per_token(shape, Layout.of(config, 1)).values()) + 4 * VOCAB) + rotary + _casts(shape)
    )
    assert predicted == pytest.approx(bytes_kept(build(config, dtype)), rel=0.02)


def test_recomputing_changes_neither_loss_nor_gradients():
    ids = torch.randint(0, VOCAB, (TOKENS // T, T), generator=torch.Generator().manual_seed(1))
    results = []
    for overrides in ([], RECOMPUTE):
        model = build(small("train_module.dp_config.param_dtype=null", *overrides), torch.float32)
        loss = loss_of(model, ids)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    (loss, gradients), (again, recomputed) = results
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


def test_flops_are_those_of_a_counted_run():
    """The reference computes all T x T pairs; less those, and plus what norms multiply, it is the formula."""
    config = small("attention.impl=reference", "attention.type=spattention", "train_module.dp_config.param_dtype=null")
    model = build(config, torch.float32)
    flops = flops_per_token(model, T)
    shape = Shape.of(config)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, torch.randint(0, VOCAB, (TOKENS // T, T))).backward()
    all_pairs = 12 * (shape.query // shape.heads) * shape.heads * shape.layers * T
    norms = 6 * shape.count(
        "q_norm", "k_norm", "lm_head.norm"
    )  # OLMo-core counts these, and no product is made of them
    assert counter.get_total_flops() / TOKENS == pytest.approx(
        flops.total - flops.attention - norms + all_pairs, rel=1e-3
    )
    assert flops.attention < 0.5 * all_pairs


def test_states_are_shared_out():
    """Weights, gradients and moments: 16 bytes a parameter, over the ranks that share a copy, and rows rounded up."""
    config = small()
    parameters = Shape.of(config).count("")
    one = Layout.of(config, 1)

    def states(layout: Layout) -> float:
        parts = memory(config, layout).moments["the optimiser's step"]
        return sum(parts[part] for part in ("weights", "gradients", "optimiser"))

    assert states(one) == 16 * parameters
    assert states(replace(one, ranks=4, shard_degree=4)) == pytest.approx(4 * parameters, rel=0.01)
    assert states(replace(one, ranks=4, data_parallel="hsdp", shard_degree=2)) == pytest.approx(
        8 * parameters, rel=0.01
    )
    assert states(replace(one, ranks=4, context=2, shard_degree=2)) == pytest.approx(4 * parameters, rel=0.01)
    experts = Shape.of(config).count(".experts.")
    ep = replace(one, ranks=4, data_parallel="hsdp", shard_degree=2, expert=2)  # experts: over both dimensions
    assert states(ep) == pytest.approx(16 * ((parameters - experts) / 2 + experts / 4), rel=0.01)
    ddp = replace(one, ranks=4, data_parallel="ddp", shard_degree=1)
    assert states(ddp) == 8 * parameters  # everything in bfloat16


def test_a_checkpoint_holds_weights_and_moments():
    config = small("train_module.dp_config.param_dtype=null")
    model = build(config, torch.float32)
    optimiser = config.train_module.optim.build(model)
    loss_of(model, torch.randint(0, VOCAB, (TOKENS // T, T))).backward()
    optimiser.step()
    state = [x for per_weight in optimiser.state.values() for x in per_weight.values() if x.numel() > 1]
    assert sum(x.numel() * x.element_size() for x in [*model.parameters(), *state]) == checkpoint_bytes(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_module.ac_config.mode=full", "selected_modules"),
        ("train_module.ac_config={mode: selected_modules, modules: [blocks.*.feed_forward_moe.router]}", "router"),
        ("train_module.autocast_precision=bfloat16", "autocast_precision"),
        ("model.block.name=moe_reordered_norm", "moe_reordered_norm"),
    ],
)
def test_what_is_not_modelled_is_said(override: str, said: str):
    config = small(override)
    with pytest.raises(ValueError, match=said):
        memory(config, Layout.of(config, 1))
