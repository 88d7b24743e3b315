"""The same model in both of OLMo-core's stacks: what it computes, its weights, and what has no place in the new one."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from olmo_core.nn.ddp import OLMoDDPModel
from torch import Tensor

from benchmarks.tiny import LAYERS, VOCAB, T, tiny
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.hf.weights import same_bits
from spattn_olmoe.model.stack import DDPOptions, Stack, ddp_model, require_stack, stack_of
from spattn_olmoe.model.stack_weights import StackWeights
from spattn_olmoe.patterns import VARIANTS

INSTANCE = "model.block.feed_forward_moe.lb_loss_granularity=instance"


def both(*overrides: str):
    """The tiny model of v1 with random weights, and the same one in the stack ``ddp``, both in float32."""
    apply_remedies()
    config = tiny(INSTANCE, *overrides).model_with_attention()
    v1, ddp = config.build(), ddp_model(config, DDPOptions()).build()
    weights = StackWeights.of(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in v1.parameters():
            parameter.normal_(std=0.2, generator=generator)
        ours = dict(v1.named_parameters())
        for name, parameter in ddp.named_parameters():
            parameter.copy_(weights.to_ddp(name, ours.__getitem__))
    return v1, ddp, weights


def losses_and_gradients(model) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(2, VOCAB, (2, T), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    out = model(ids, labels=labels, loss_reduction="sum", loss_div_factor=labels.numel(), return_logits=True)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", ["sharing", "exclusive", "dense", "gbhalf"])
def test_both_stacks_compute_the_same_logits_and_gradients(variant):
    """Gradients are those of all losses: of the router's two as well, which the new stack does not divide by the layers."""
    v1, ddp, weights = both(*VARIANTS[variant].overrides)
    logits, wanted = losses_and_gradients(v1)
    theirs, found = losses_and_gradients(ddp)
    torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(weights.to_v1(name, found.__getitem__), gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_losses_of_routers_are_divided_by_the_layers():
    """As v1 does unless told not to; the weights themselves would train with as many times the losses as there are layers."""
    moe = "model.block.feed_forward_moe"
    divided = ddp_model(tiny().model_with_attention(), DDPOptions()).block.routed_experts_router
    whole = ddp_model(
        tiny(f"{moe}.scale_loss_by_num_layers=false").model_with_attention(), DDPOptions()
    ).block.routed_experts_router
    assert (divided.lb_loss_weight, divided.z_loss_weight) == (0.01 / LAYERS, 0.001 / LAYERS)
    assert (whole.lb_loss_weight, whole.z_loss_weight) == (0.01, 0.001)
    _, ddp, _ = both()
    _, undivided, _ = both(f"{moe}.scale_loss_by_num_layers=false")
    router = "blocks.0.routed_experts_router.weight"
    one, other = (losses_and_gradients(model)[1][router] for model in (ddp, undivided))
    assert (one - other).norm() > 0.01 * one.norm()


def test_shapes_of_the_published_model():
    from spattn_olmoe.train import load_experiment

    config = load_experiment("configs/1b7b_spattn_ddp.yaml")
    assert config.stack == Stack.ddp
    v1 = config.model_with_attention()
    ddp = ddp_model(v1, config.ddp)
    assert ddp.num_params == v1.num_params == 6_919_161_856
    assert ddp.num_active_params == v1.num_active_params
    model = ddp.build(init_device="meta")
    assert isinstance(model, OLMoDDPModel)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == StackWeights.of(v1).ddp
    assert model.num_flops_per_token(4096) == v1.build(init_device="meta").num_flops_per_token(4096)


def test_weights_go_there_and_back_bit_for_bit():
    v1, ddp, weights = both()
    there, back = dict(v1.named_parameters()), dict(ddp.named_parameters())
    assert weights.ddp == {name: tuple(p.shape) for name, p in back.items()}
    for name, tensor in there.items():
        assert same_bits(weights.to_v1(name, lambda n: back[n].flatten()), tensor), name
        assert same_bits(weights.to_v1(name, partial(weights.to_ddp, read=there.__getitem__)), tensor), name
    gate, up = (there[f"blocks.1.feed_forward_moe.experts.mlp.{w}"].view(4, 32, 32) for w in ("w1", "w3"))
    assert torch.equal(back["blocks.1.routed_experts.w_up_gate"][2], torch.cat([up[2], gate[2]]))


@pytest.mark.parametrize(
    "override",
    [
        "model.block.name=moe_reordered_norm",
        "model.block.feed_forward_moe.name=default",
        "model.block.feed_forward_moe.router.bias_gamma=0.1",
        "model.block.feed_forward_moe.capacity_factor=1.2",
        "model.block.dropout=0.1",
        "model.embed_scale=2.0",
        "model.tie_word_embeddings=true",
    ],
)
def test_what_the_new_stack_has_no_place_for_is_refused_by_name(override):
    with pytest.raises(ValueError, match="stack") as caught:
        ddp_model(tiny(override).model_with_attention(), DDPOptions())
    assert override.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_states_its_stack_and_the_other_one_is_refused(tmp_path):
    assert stack_of(str(tmp_path)) == Stack.v1  # older ones state none
    (tmp_path / "config.json").write_text(json.dumps({"stack": "ddp"}))
    assert stack_of(str(tmp_path)) == Stack.ddp
    require_stack(str(tmp_path), Stack.ddp)
    with pytest.raises(ValueError, match=r"stack=ddp but this config has stack=v1: .*convert_stack\.py"):
        require_stack(str(tmp_path), Stack.v1)
    (tmp_path / "config.json").write_text(json.dumps({"stack": "v3"}))
    with pytest.raises(ValueError, match=r"config\.json: stack is 'v3', which is none of v1, ddp"):
        stack_of(str(tmp_path))
