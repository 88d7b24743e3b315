"""No layer waits for the GPU: a forward and backward pass that never asks for a value runs on tensors that have none."""

from pathlib import Path

import pytest
import torch
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from torch._subclasses.fake_tensor import FakeTensorMode

from spattn_olmoe import build_pattern
from spattn_olmoe.kernels import cached, cached_attention, dispatch
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.remedies import grouped_gemm
from spattn_olmoe.train import load_experiment

pytest.importorskip("triton")

CONFIG = Path(__file__).parents[2] / "configs" / "1b7b_spattn.yaml"


def step_without_values(config):
    """A forward and backward pass of a model in bfloat16, on fake tensors; how many parameters have a gradient."""
    with FakeTensorMode():
        model = config.model_with_attention().build(init_device="meta")
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16))
        assert not list(model.buffers())
        ids = torch.zeros(2, 4096, dtype=torch.long)
        model.train()
        model(ids, labels=ids, loss_reduction="sum", return_logits=False).loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
    return sum(gradient is not None for gradient in gradients), len(gradients)


@pytest.mark.parametrize("sharing", ["true", "false"])
def test_no_layer_asks_for_a_value_as_a_gpu_computes_it(sharing, monkeypatch):
    """The fused kernels and the grouped product of experts, which a CPU cannot run but whose shapes it can follow."""
    apply_remedies()
    monkeypatch.setattr(dispatch, "triton_unsuitable", lambda *_: None)
    config = load_experiment(
        CONFIG, ["model.n_layers=2", "attention.impl=triton", f"attention.local_sharing={sharing}"]
    )
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):  # the loop over experts asks for their shares
        step_without_values(config)
    monkeypatch.setattr(
        DroplessMoEMLP, "gmm", lambda _, x, w, sizes, trans_b=False: grouped_gemm.grouped_product(x, w, sizes, trans_b)
    )
    with_gradient, parameters = step_without_values(config)
    assert with_gradient == parameters > 20


def test_decoding_asks_for_no_value(monkeypatch):
    """Lengths and padding of the sequences stay on the device."""
    pattern = build_pattern("spattention", n_heads=8, band_length=4096, local_sharing=True)
    monkeypatch.setattr(cached, "triton_unsuitable", lambda *_: None)
    with FakeTensorMode():
        q, cache = torch.empty(3, 1, 8, 64, device="cuda"), torch.empty(3, 4096, 2, 64, device="cuda")
        start, leftpad = torch.empty(2, 3, dtype=torch.long, device="cuda")
        out = cached_attention(q, cache, cache, pattern, start=start, leftpad=leftpad, impl="triton")
        assert out.shape == q.shape
