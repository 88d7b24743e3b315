"""Each remedy is still needed, is right, and refuses another release of OLMo-core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from olmo_core.nn.moe.router import MoELinearRouter

from benchmarks import forked
from benchmarks.tiny import BASE, ROOT, TINY, on_ranks, tiny
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.remedies import (
    REMEDIES,
    cpu_moe,
    ddp_permutation,
    expert_gradients,
    expert_loop,
    grouped_gemm,
    held_out_loss,
    release,
)

from .remedy_worker import EXPERTS, ROUTER

# ---- the release -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_another_release_is_left_alone(monkeypatch, remedy):
    monkeypatch.setattr(release, "VERSION", "3.0.1")
    with pytest.raises(ValueError) as caught:
        remedy.apply()
    message = str(caught.value)
    for words in (remedy.__name__, "3.0.0", "3.0.1", "pip install ai2-olmo-core==3.0.0"):
        assert words in message


def test_the_page_names_every_remedy():
    page = (ROOT / "docs/olmo_core_bugs.md").read_text()
    assert not [remedy for remedy in REMEDIES if f"`{remedy.__name__.rpartition('.')[2]}`" not in page]


def test_applying_twice_is_applying_once():
    apply_remedies()
    before = DroplessMoEMLP.gmm, DroplessMoEMLP.apply_ep, MoELinearRouter.get_expert_logits, cpu_moe.ops.gather
    apply_remedies()
    after = DroplessMoEMLP.gmm, DroplessMoEMLP.apply_ep, MoELinearRouter.get_expert_logits, cpu_moe.ops.gather
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert cpu_moe._cuda_gather is not cpu_moe.gather
    assert expert_gradients._stock_apply_ep is not expert_gradients.apply_ep
    assert all(cls.eval_batch is not stock for cls, stock in held_out_loss.STOCK.items())


# ---- dropless MoE on a CPU -------------------------------------------------------------------------------------------

MOE = """
import sys, torch
from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
if sys.argv[1] == "remedied":
    from spattn_olmoe.model import apply_remedies
    apply_remedies()
config = MoEConfig(name=MoEType.dropless, num_experts=4, hidden_size=8, router=MoERouterConfig(top_k=2))
moe = config.build(16)
for p in moe.parameters():
    torch.nn.init.normal_(p)
try:
    moe(torch.randn(1, 8, 16)).sum().backward()
    print("RESULT trained")
except Exception as error:
    print("RESULT", type(error).__name__)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its kernels exist, and fail in other ways")
def test_stock_dropless_moe_fails_on_a_cpu():
    stock, remedied = (forked.run("-c", MOE, which, cwd=ROOT) for which in ("stock", "remedied"))
    assert "RESULT trained" in remedied.stdout, remedied.stderr
    assert "RESULT " in stock.stdout, stock.stderr
    assert "RESULT trained" not in stock.stdout, "OLMo-core no longer needs the remedy for dropless MoE on a CPU"


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gather_and_scatter_are_a_loop_over_tokens(top_k, weighted):
    generator = torch.Generator().manual_seed(top_k)
    N, E, d = 13, 5, 6
    x = torch.randn(N, d, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(N * top_k, dtype=torch.float64, generator=generator, requires_grad=True)
    experts = torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(N)]).flatten()
    indices = experts.argsort(stable=True).int()  # place -> assignment, grouped by expert
    bins = experts.bincount(minlength=E).cumsum(0).int()
    scale = torch.arange(1, E + 1, dtype=torch.float64)  # each expert multiplies by its number

    placed = cpu_moe.gather(x, indices, experts.sort().values.int(), bins, top_k)
    done = placed * scale[experts.sort().values, None]
    out = cpu_moe.scatter(done, indices, experts.sort().values.int(), weights if weighted else None, bins, top_k)

    rows = []
    for token in range(N):
        row = torch.zeros(d, dtype=torch.float64)
        for choice in range(top_k):
            assignment = token * top_k + choice
            row = row + (weights[assignment] if weighted else 1) * scale[experts[assignment]] * x[token]
        rows.append(row)
    expected = torch.stack(rows)

    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    pull = torch.randn(N, d, dtype=torch.float64, generator=generator)
    leaves = [x, weights] if weighted else [x]
    found = torch.autograd.grad((out * pull).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad((expected * pull).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_dropless_moe_is_the_sum_over_each_tokens_experts(top_k):
    apply_remedies()
    moe_config = tiny(f"model.block.feed_forward_moe.router.top_k={top_k}").model.block.feed_forward_moe
    moe = moe_config.build(32).double().eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 9, 32, dtype=torch.float64)
    out = moe(x)
    found = torch.autograd.grad((out * weight).sum(), [x, *moe.parameters()])
    expected = token_by_token(moe, x, top_k)
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *moe.parameters()])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def token_by_token(moe, x, top_k):
    """SwiGLU of every chosen expert, one token at a time, weighted with the router's probabilities."""
    mlp, E = moe.experts.mlp, 4
    w1, w2, w3 = (w.view(E, -1, 32) for w in (mlp.w1, mlp.w2, mlp.w3))
    router = moe.router.weight.view(E, 32)
    rows = []
    for token in x.view(-1, 32):
        probabilities = (router.float() @ token.float()).softmax(-1)  # the router computes in float32
        row = torch.zeros(32, dtype=x.dtype)
        for e in probabilities.topk(top_k).indices.tolist():
            hidden = F.silu(w1[e] @ token) * (w3[e] @ token)
            row = row + probabilities[e] * (hidden @ w2[e])
        rows.append(row)
    return torch.stack(rows).view(x.shape)


def test_experts_without_tokens_get_no_gradient():
    apply_remedies()
    moe = tiny().model.block.feed_forward_moe.build(32).eval()
    with torch.no_grad():
        moe.router.weight.zero_().view(4, 32)[:2] = 1.0
    moe(torch.rand(1, 8, 32)).sum().backward()  # positive, so the first two experts take every token
    grad = moe.experts.mlp.w1.grad.view(4, -1)
    assert (grad[:2] != 0).any(-1).all()
    assert (grad[2:] == 0).all()


# ---- the grouped product ---------------------------------------------------------------------------------------------


def looped(x, w, sizes, trans_b):
    parts = [rows @ (w[e].T if trans_b else w[e]) for e, rows in enumerate(x.split(sizes))]
    return torch.cat(parts)


def grouped_mm_runs(dtype) -> bool:
    try:
        x, w = torch.ones(16, 16, dtype=dtype), torch.ones(2, 16, 16, dtype=dtype)
        F.grouped_mm(x, w, offs=torch.tensor([8, 16], dtype=torch.int32))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", [[3, 0, 8, 5], [16, 0, 0, 0], [0, 0, 0, 16]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_grouped_product_is_the_loop(dtype, sizes, trans_b):
    if not grouped_mm_runs(dtype):
        pytest.skip(f"grouped_mm does not run in {dtype} on this CPU")
    torch.manual_seed(0)
    x = torch.randn(16, 32).to(dtype).requires_grad_()
    w = torch.randn(4, *((24, 32) if trans_b else (32, 24))).to(dtype).requires_grad_()
    weight = torch.randn(16, 24).to(dtype)
    out = grouped_gemm.grouped_product(x, w, torch.tensor(sizes), trans_b)
    expected = looped(x, w, sizes, trans_b)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 2e-2}
    torch.testing.assert_close(out, expected, **tolerance)
    found = torch.autograd.grad((out * weight).sum(), [x, w])
    wanted = torch.autograd.grad((expected * weight).sum(), [x, w])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_olmo_core_still_loops_over_experts():
    """Once it takes grouped_mm by itself, ours can go."""
    source = Path(__import__("olmo_core.nn.moe.mlp", fromlist=["mlp"]).__file__).read_text()
    assert "grouped_mm" not in source


# ---- the stack ddp without CUDA and TransformerEngine ----------------------------------------------------------------

DDP_STEP = """
import os, sys, torch
from benchmarks.tiny import T, VOCAB, tiny
from spattn_olmoe.model.remedies import REMEDIES
from spattn_olmoe.train import ddp

def step():
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    config = tiny("stack=ddp", "train_module.dp_config.name=ddp", "train_module.dp_config.param_dtype=bfloat16")
    module = ddp.train_module(config).build(ddp.model(config).build(init_device="meta"))
    ids = torch.randint(2, VOCAB, (2, T))
    module.model(ids, labels=ids, loss_reduction="sum", loss_div_factor=ids.numel(), return_logits=False).loss.backward()
    module.model.finalize_grad_reduce()
    before = module.model.embeddings.weight.clone()
    module.optim.step()
    return not torch.equal(before, module.model.embeddings.weight)

for without in sys.argv[2:]:
    if os.fork() == 0:
        for remedy in REMEDIES:
            if not remedy.__name__.endswith("." + without):
                remedy.apply()
        sys.argv[1] += without
        try:
            print("RESULT", without, "trained" if step() else "stood still", flush=True)
        except Exception as error:
            print("RESULT", without, type(error).__name__, error, flush=True)
        os._exit(0)
    os.wait()
"""
SYMPTOMS = {
    "nothing": "trained",
    "ddp_permutation": "TypeError 'NoneType' object is not callable",
    "ddp_without_cuda": "AssertionError batch_size_per_expert expected to be on GPU",
    "ddp_optimizer_dtypes": "AssertionError Expect fp32 param",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its streams exist, and fail in other ways")
def test_a_step_of_the_stack_ddp_needs_each_remedy(tmp_path):
    done = forked.run("-c", DDP_STEP, str(tmp_path / "store"), *SYMPTOMS, cwd=ROOT)
    found = dict(line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert found.keys() == SYMPTOMS.keys(), done.stderr
    for without, symptom in SYMPTOMS.items():
        assert symptom in found[without], f"OLMo-core no longer needs {without}"


@pytest.mark.parametrize("top_k", [1, 3])
def test_permutation_and_its_inverse_are_a_loop_over_tokens(top_k):
    generator = torch.Generator().manual_seed(top_k)
    N, E, d = 13, 5, 6
    x = torch.randn(N, d, generator=generator, requires_grad=True)
    weights = torch.rand(N, top_k, generator=generator, requires_grad=True)
    experts = torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(N)])
    rows, places = ddp_permutation.moe_permute(
        inp=x, routing_map=experts.int(), num_out_tokens=N * top_k, map_type="index"
    )
    scale = 1 + experts.flatten().sort(stable=True).values[:, None].float()  # each expert multiplies by its number
    out = ddp_permutation.moe_unpermute(
        inp=rows * scale, row_id_map=places, merging_probs=weights, restore_shape=x.shape
    )
    expected = sum(weights[:, k, None] * (1 + experts[:, k, None].float()) * x for k in range(top_k))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        ddp_permutation.moe_unpermute(inp=rows, row_id_map=places), x.repeat_interleave(top_k, 0)
    )
    found = torch.autograd.grad(out.square().sum(), [x, weights], retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), [x, weights]), strict=True):
        torch.testing.assert_close(one, other)


# ---- experts one by one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["x and w", "x", "w"])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", [[3, 0, 8, 5], [16, 0, 0, 0], [0, 0, 0, 16], [0, 0, 0, 0]], ids=str)
def test_experts_one_by_one_are_the_loop(sizes, trans_b, wanted):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 7, dtype=torch.float64, requires_grad="x" in wanted)
    w = torch.randn(4, *((5, 7) if trans_b else (7, 5)), dtype=torch.float64, requires_grad="w" in wanted)
    weight = torch.randn(sum(sizes), 5, dtype=torch.float64)
    out = expert_loop.looped_product(x, w, sizes, trans_b)
    expected = looped(x, w, sizes, trans_b)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-13)
    leaves = [t for t in (x, w) if t.requires_grad]
    found = torch.autograd.grad((out * weight).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-13)


WRITTEN = """
import sys, torch
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from tests.model.written import Written
if sys.argv[1] == "remedied":
    from spattn_olmoe.model import apply_remedies
    apply_remedies()

for experts in (8, 64):
    mlp = DroplessMoEMLP(d_model=4, hidden_size=4, num_experts=experts)
    mlp._gmm = None
    x, sizes = torch.randn(1024, 4, requires_grad=True), torch.full((experts,), 1024 // experts)
    with Written() as written:
        mlp(x, sizes).sum().backward()
    print("RESULT", written.numbers)
"""


def test_the_work_of_stock_experts_grows_with_their_square():
    """Numbers written in a step of 1024 rows, by 8 and by 64 experts whose weights are nearly nothing."""
    growth = {}
    for which in ("stock", "remedied"):
        done = forked.run("-c", WRITTEN, which, cwd=ROOT)
        few, many = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RESULT"))
        growth[which] = many / few
    assert growth["remedied"] < 1.5
    assert growth["stock"] > 3, "OLMo-core no longer needs the remedy for many experts"


# ---- gradients on two ranks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients") / "out.pt"
    common = [*TINY, "attention.type=standard", "model.block.feed_forward_moe.lb_loss_granularity=instance"]
    on_ranks(2, Path(__file__).with_name("remedy_worker.py"), str(BASE), str(out), *common)
    return torch.load(out)


EXPERT_WEIGHTS = [f"{EXPERTS}{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("name", EXPERT_WEIGHTS)
def test_stock_expert_parallelism_doubles_experts_gradients(gradients, name):
    torch.testing.assert_close(gradients["stock ep"][name], 2 * gradients["fsdp"][name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [*EXPERT_WEIGHTS, ROUTER])
@pytest.mark.parametrize("layout", ["ep", "tp"])
def test_remedied_gradients_are_those_of_fsdp(gradients, layout, name):
    assert gradients["fsdp"][name].abs().max() > 1e-4
    torch.testing.assert_close(gradients[layout][name], gradients["fsdp"][name], atol=1e-7, rtol=1e-5)


def test_stock_tensor_parallelism_lets_routers_drift_apart(gradients):
    one, other = gradients["stock tp"]["router by rank"]
    assert (one - other).abs().max() > 0.1 * one.abs().max()
    torch.testing.assert_close(one + other, gradients["fsdp"][ROUTER], atol=1e-7, rtol=1e-4)


def test_remedied_routers_stay_together(gradients):
    one, other = gradients["tp"]["router by rank"]
    assert torch.equal(one, other)
