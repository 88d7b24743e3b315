"""What the stack ``ddp`` cannot do is refused in a line before anything is built; what it does otherwise is stated."""

from __future__ import annotations

import pytest
from rich.console import Console

from benchmarks.tiny import tiny
from spattn_olmoe.train import ddp
from spattn_olmoe.train.dry_run import run_table
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import check

DDP = (
    "stack=ddp",
    "train_module.dp_config.name=ddp",
    "train_module.dp_config.param_dtype=bfloat16",
    "model.n_layers=4",
)
EP = "train_module.ep_config.degree=2"
V_PIPELINE = "train_module.pp_config={degree: 2, schedule: Custom1F1BV}"
ULYSSES = "train_module.cp_config={degree: 2, uly: {}}"

REFUSED = {
    "stack=v2": "must be v1 or ddp",
    "train_module.dp_config.name=fsdp": "set train_module.dp_config.name=ddp, or use stack=v1",
    "train_module.dp_config.name=hsdp": "neither FSDP nor HSDP",
    "train_module.dp_config=null": "train_module.dp_config.name is not set",
    "train_module.dp_config.param_dtype=null": "computes in bfloat16",
    "train_module.tp_config.degree=2": "has no tensor parallelism",
    "train_module.cp_config={degree: 2, ring: {}}": "use Ulysses",
    "train_module.ac_config.mode=full": "ddp.recompute_each_block=true",
    "train_module.optim.type=skip_step_adamw": "has AdamW only",
    "train_module.max_grad_norm=null": "max_grad_norm is not set",
    "train_module.autocast_precision=bfloat16": "train_module.autocast_precision",
    "train_module.pp_config.degree=2": "runs CustomInterleaved1F1B and Custom1F1BV only",
    "train_module.pp_config={degree: 4, schedule: Custom1F1BV}": "model.n_layers=4: use at most 2 ranks",
    "train_module.ep_config.degree=3": "train_module.ep_config.degree=3 does not divide",
    "trainer.callbacks.checkpointer.save_async=true": "saves synchronously only",
    "ddp.ep.path=sync_2d": "must be sync_1d or",
    "ddp.ep.schedule=tbo": "ddp.ep: EP schedule='tbo' is not yet supported",
    "ddp.expert_path=sync_1d": "ddp.expert_path is not a key of DDPOptions",
    "model.block.feed_forward_moe.name=default": "must be dropless for stack=ddp",
}


def checked(*overrides: str, ranks: int = 2):
    """As ``scripts/train.py`` checks a config."""
    config = tiny(*DDP, *overrides)
    check(config)
    check_layout(config, ranks)
    return config


@pytest.mark.parametrize("override", REFUSED)
def test_what_it_cannot_do_is_refused_in_a_line(override):
    with pytest.raises(ValueError) as caught:
        checked(override)
    message = str(caught.value)
    assert REFUSED[override] in message and "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [((), 1), ((EP,), 2), ((ULYSSES,), 2), ((EP, ULYSSES), 2), ((V_PIPELINE,), 2), ((V_PIPELINE, EP), 4)],
    ids=str,
)
def test_what_it_can_do_is_let_through(overrides, ranks):
    config = checked(*overrides, ranks=ranks)
    module = ddp.train_module(config)
    assert module.optim.check_nan_inf_grad is False
    assert (module.pp_config is None) or module.pp_config.use_custom_stage_implementation


def test_layouts_that_ranks_do_not_divide_are_refused():
    for overrides, ranks, words in (
        ((V_PIPELINE,), 3, "train_module.pp_config.degree=2 does not divide the 3 ranks"),
        (("train_module.ep_config.degree=4", "model.block.feed_forward_moe.num_experts=6"), 4, "num_experts=6"),
        (("train_module.ep_config.degree=4",), 2, "degree=4 does not divide the 2 ranks"),
        ((V_PIPELINE, "data_loader.global_batch_size=160"), 2, "the 5 microbatches of a rank's batch"),
        (("trainer.callbacks.lm_evaluator.enabled=true", V_PIPELINE), 2, "lm_evaluator.enabled=false"),
    ):
        with pytest.raises(ValueError, match=r"^(train_module|data_loader|trainer)") as caught:
            checked(*overrides, ranks=ranks)
        assert words in str(caught.value)


def test_ways_of_exchanging_tokens_that_need_cuda_are_refused_without_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = checked(EP, "ddp.ep.path=rowwise_nvshmem")
    with pytest.raises(ValueError, match=r"ddp\.ep\.path=rowwise_nvshmem needs CUDA: set ddp\.ep\.path=sync_1d"):
        ddp.check_machine(config)
    ddp.check_machine(checked(EP))


@pytest.mark.parametrize(("path", "words"), [("sync_1d", "every token reaches"), ("deepep_v2", "MAY DROP TOKENS")])
def test_the_dry_run_states_whether_tokens_may_be_dropped(path, words):
    console = Console(width=200)
    with console.capture() as printed:
        console.print(run_table(checked(EP, f"ddp.ep.path={path}")))
    text = printed.get()
    assert words in text and "load balancing 0.0025, router z 0.00025: the config's over 4 layers" in text
