"""Training on several ranks is training on one, and layouts that cannot be are refused.

Runs go through the trainer as ``scripts/train.py`` builds it, on gloo and in float32, several in one launch for each number of
ranks. These are some of the layouts; ``python scripts/benchmark.py parallel`` trains all of them.
"""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from olmo_core.distributed.parallel import PipelineSchedule, PipelineScheduleType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.train.train_module.transformer.pipeline.pipeline_schedule import CustomPipelineStage

from benchmarks import parallel
from benchmarks.layouts import (
    DDP_LAYOUTS,
    LAYOUTS,
    REFUSED,
    Resumed,
    difference,
    ep,
    hsdp,
    recomputing,
    tp,
    train,
    ulysses,
)
from benchmarks.tiny import T, tiny
from spattn_olmoe.model.fingerprint import FILE_NAME, Fingerprint
from spattn_olmoe.patterns import VARIANTS
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import with_order_of

TESTED = {  # by the number of ranks and the attention
    (2, "sharing"): ("ddp", "hsdp+ep", "fsdp+tp", "ddp+ulysses", "hsdp+ep, recomputing modules"),
    (2, "dense"): ("fsdp+tp", "fsdp+ulysses"),
    (4, "sharing"): ("hsdp+ep 2x2", "hsdp+tp 2x2", "fsdp+ulysses+tp 1x2x2"),
}
FORGETTING = ("fsdp+tp", "fsdp+ulysses")
AUTO = "attention.head_order=auto"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    return Resumed(tmp_path_factory.mktemp("resumed"), ("hsdp+ep", "fsdp+tp"))


@pytest.fixture(scope="module")
def curves(tmp_path_factory, resumed):
    """All runs by number of ranks, with one launch for each, and under 0 what goes on on 1 rank in the end."""

    def launch(n_ranks: int) -> dict:
        runs = {}
        for kind in ("exclusive", "sharing", "dense"):
            overrides = VARIANTS[kind].overrides
            names = ["fsdp"] if n_ranks == 1 else TESTED.get((n_ranks, kind), ())
            runs.update({f"{kind} {name}": {"overrides": [*overrides, *LAYOUTS[n_ranks][name]]} for name in names})
            for name in FORGETTING if n_ranks == 2 and kind == "sharing" else ():
                forgetting = {"overrides": [*overrides, *LAYOUTS[2][name]], "forget": True}
                runs[f"{kind} {name} forgetting"] = forgetting
        if n_ranks == 2:
            runs["auto"] = {"overrides": [*VARIANTS["sharing"].overrides, *tp(2), AUTO]}
        if n_ranks == 1:
            runs["natural"] = {"overrides": [*VARIANTS["sharing"].overrides, AUTO]}
        return train(tmp_path_factory.mktemp(f"ranks{n_ranks}"), n_ranks, {**runs, **resumed.runs(n_ranks)})

    found = {n_ranks: launch(n_ranks) for n_ranks in LAYOUTS}
    return {**found, 0: train(tmp_path_factory.mktemp("last"), 1, resumed.last())}


CASES = [(n_ranks, kind, name) for (n_ranks, kind), names in TESTED.items() for name in names]


@pytest.mark.parametrize(("n_ranks", "kind", "layout"), CASES, ids=lambda x: str(x))
def test_losses_and_gradient_norm_are_those_of_one_rank(curves, n_ranks, kind, layout):
    one, several = curves[1][f"{kind} fsdp"], curves[n_ranks][f"{kind} {layout}"]
    assert len(several) == 5
    assert max(difference(one, several)) < 1e-5


@pytest.mark.parametrize("layout", FORGETTING)
def test_ranks_that_forget_which_heads_they_hold_train_another_model(curves, layout):
    """What the test above would miss if heads did not matter."""
    assert max(difference(curves[1]["sharing fsdp"], curves[2][f"sharing {layout} forgetting"])) > 1e-3


def test_the_types_and_the_orders_differ_from_each_other(curves):
    ours = curves[1]
    for one, other in (
        ("exclusive fsdp", "sharing fsdp"),
        ("dense fsdp", "sharing fsdp"),
        ("natural", "sharing fsdp"),
    ):
        assert max(difference(ours[one], ours[other])) > 1e-3


# ---- the order of heads ----------------------------------------------------------------------------------------------


def test_heads_are_balanced_by_themselves_where_ranks_share_them(curves):
    assert max(difference(curves[1]["sharing fsdp"], curves[2]["auto"])) < 1e-5
    for layout, order in ((tp(2), [0, 3, 1, 2]), (ulysses(2), [0, 3, 1, 2]), (hsdp(2), "natural")):
        model = tiny(*VARIANTS["exclusive"].overrides, *layout).model_with_attention()
        assert model.block.sequence_mixer.pattern["head_order"] == order


@pytest.mark.parametrize("here", [(), tp(2)], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("there", [(), tp(2)], ids=["of one rank", "of two ranks"])
def test_a_run_goes_on_with_the_order_of_its_checkpoint(tmp_path, there, here):
    saved = Fingerprint.of(tiny(*VARIANTS["exclusive"].overrides, *there).model_with_attention())
    (tmp_path / FILE_NAME).write_text(saved.to_json())
    config = tiny(*VARIANTS["exclusive"].overrides, *here)
    assert Fingerprint.of(with_order_of(config, str(tmp_path)).model_with_attention()) == saved
    assert with_order_of(config, None) == config
    stated = tiny(*VARIANTS["exclusive"].overrides, *here, "attention.head_order=[3,2,1,0]")
    assert with_order_of(stated, str(tmp_path)) == stated
    other = tiny("attention.type=gbhalf", *here)
    assert with_order_of(other, str(tmp_path)).model_with_attention() == other.model_with_attention()


# ---- another layout, another number of ranks --------------------------------------------------------------------------


def test_a_run_goes_on_under_another_layout_as_if_unbroken(curves, resumed):
    """The same batches in the same order: another batch's loss is 1e-2 away, as the second assertion sees to."""
    found = resumed.differences(curves, curves[0])
    assert len(found) == 3
    for name, differences in found.items():
        assert max(differences) < 1e-5, name
    losses = [step[0] for step in curves[1]["unbroken"]]
    assert len(losses) == 8
    assert min(abs(a - b) / a for a, b in pairwise(losses)) > 1e-4


# ---- the documentation -----------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_measured():
    data = json.loads(parallel.RESULT.read_text())
    page = parallel.PAGE.read_text()
    assert parallel.filled(page, data) == page
    assert data["refused"] == parallel.refused()
    for rows, layouts in ((data["layouts"], LAYOUTS), (data["ddp"]["layouts"], DDP_LAYOUTS)):
        assert {(row["ranks"], row["layout"]) for row in rows} == {(n, name) for n in layouts for name in layouts[n]}
    exact = data["layouts"] + data["resumed"] + data["ddp"]["layouts"]
    assert max(max(row[key] for key in parallel.KEYS) for row in exact) < 1e-5


def test_pipelines_add_nothing_to_what_bfloat16_rounds():
    rows = {row["layout"]: row for row in json.loads(parallel.RESULT.read_text())["ddp"]["bfloat16"]}
    for pipeline, without in (
        ("pipeline+ddp 2x2", "ddp"),
        ("pipeline+ep 2x2", "ddp+ep 2x2"),
        ("pipeline+ulysses 2x2", "ddp+ulysses 2x2"),
        ("pipeline+ep+ulysses, V", "ddp+ep+ulysses, experts over 2"),
    ):
        assert all(abs(rows[pipeline][key] - rows[without][key]) < 1e-5 for key in parallel.KEYS), pipeline


# ---- pipelines, which OLMo-core cannot run ----------------------------------------------------------------------------


ACCEPTED = (PipelineScheduleType.custom_interleaved_1F1B, PipelineScheduleType.custom_1F1B_V)


@pytest.mark.parametrize("schedule", [schedule for schedule in PipelineScheduleType if schedule not in ACCEPTED])
def test_olmo_core_refuses_all_schedules_but_two(schedule):
    with pytest.raises((OLMoConfigurationError, NotImplementedError), match=r"not (supported|implemented)"):
        PipelineSchedule(model_parts=[], stages=[], pp_mesh=None, schedule_name=schedule)


def test_the_stages_of_the_other_two_reject_the_loss_they_are_handed():
    """The train module's hook turns the last stage's output into its loss; the stage wants the output."""
    loss = torch.ones((), requires_grad=True)
    stage = SimpleNamespace(is_first=True, is_last=True, stage_outputs={}, fwd_cache={})
    for output, accepted in ((LMOutputWithLoss(None, loss, loss, None), True), (loss.unsqueeze(0), False)):
        stage.forward_maybe_with_nosync = lambda *args, output=output: output
        if accepted:
            CustomPipelineStage.forward_one_chunk(stage, 0, (loss,))
        else:
            with pytest.raises(AssertionError, match="must be LMOutputWithLoss"):
                CustomPipelineStage.forward_one_chunk(stage, 0, (loss,))


# ---- layouts that cannot be ------------------------------------------------------------------------------------------

NOT_SET = ("train_module.dp_config=null",)
TP, ULYSSES, HSDP, EP = tp(2), ulysses(2), hsdp(2), ep(2)
UNFIT = {
    "tp beyond the ranks": (3, TP, ["tp_config.degree=2", "3 ranks", "multiple of 2"]),
    "tp of zero": (2, ["train_module.tp_config.degree=0"], ["tp_config.degree=0"]),
    "tp and ulysses beyond the ranks": (2, [*TP, *ULYSSES], ["cp_config.degree=2", "1 ranks", "multiple of 4"]),
    "no data parallelism": (2, NOT_SET, ["dp_config is not set", "2 ranks", "fsdp"]),
    "tp without data parallelism": (1, [*NOT_SET, "train_module.tp_config.degree=1"], ["dp_config must be set"]),
    "ranks that do not divide the batch": (3, [], ["global_batch_size=128", "3 data-parallel ranks", "96"]),
    "too many ranks for the batch": (8, [], ["global_batch_size=128", "8 data-parallel ranks", "256"]),
    "microbatch beyond a rank's share": (
        4,
        [f"train_module.rank_microbatch_size={2 * T}"],
        ["rank_microbatch_size=64", "32 tokens", "4 data-parallel ranks"],
    ),
    "heads that tp does not divide": (
        2,
        [*TP, "model.block.sequence_mixer.n_heads=1"],
        ["tp_config.degree=2", "n_heads=1"],
    ),
    "key heads that tp does not divide": (
        2,
        [*TP, "model.block.sequence_mixer.n_kv_heads=1"],
        ["tp_config.degree=2", "n_kv_heads=1"],
    ),
    "heads that ulysses does not divide": (
        4,
        [*TP, *ULYSSES, "model.block.sequence_mixer.n_heads=2"],
        ["cp_config.degree=2", "n_heads=2"],
    ),
    "a length that ulysses does not divide": (
        6,
        [
            "train_module.cp_config.degree=3",
            "train_module.cp_config.uly={}",
            "model.block.sequence_mixer.n_heads=3",
            "model.d_model=48",
        ],
        ["cp_config.degree=3", f"sequence_length={T}"],
    ),
    "experts that ep does not divide": (
        3,
        [
            "train_module.dp_config.name=hsdp",
            "train_module.dp_config.shard_degree=3",
            "train_module.ep_config.degree=3",
            "data_loader.global_batch_size=192",
        ],
        ["ep_config.degree=3", "num_experts=4"],
    ),
    "experts that tp does not divide": (
        2,
        [*TP, "model.block.feed_forward_moe.num_experts=3"],
        ["tp_config.degree=2", "num_experts=3"],
    ),
    "ep of another degree than hsdp": (
        4,
        [
            "train_module.dp_config.name=hsdp",
            "train_module.dp_config.shard_degree=4",
            "train_module.ep_config.degree=2",
        ],
        ["ep_config.degree=2", "shard_degree=4"],
    ),
    "hsdp beyond the ranks": (
        2,
        ["train_module.dp_config.name=hsdp", "train_module.dp_config.shard_degree=3"],
        ["shard_degree=3", "2 "],
    ),
    "hsdp of fewer replicas and shards than ranks": (
        4,
        [*HSDP, "train_module.dp_config.num_replicas=1"],
        ["shard_degree=2 x num_replicas=1", "4 data-parallel ranks", "num_replicas=null"],
    ),
    "hsdp of more replicas and shards than ranks": (
        4,
        [
            "train_module.dp_config.name=hsdp",
            "train_module.dp_config.shard_degree=4",
            "train_module.dp_config.num_replicas=2",
        ],
        ["shard_degree=4 x num_replicas=2", "4 data-parallel ranks"],
    ),
    "hsdp by nodes that share their ranks": (
        16,  # of 8 a node
        [
            "train_module.dp_config.name=hsdp",
            "train_module.cp_config.degree=16",
            "train_module.cp_config.uly={}",
            "model.block.sequence_mixer.n_heads=16",
            "model.d_model=256",
        ],
        ["name=hsdp", "2 nodes", "1 data-parallel ranks", "shard_degree"],
    ),
    "a shard degree without hsdp": (
        4,
        ["train_module.dp_config.shard_degree=2"],
        ["dp_config.shard_degree=2 does nothing", "dp_config.name=fsdp", "hsdp"],
    ),
    "replicas without hsdp": (
        4,
        ["train_module.dp_config.name=ddp", "train_module.dp_config.num_replicas=2"],
        ["dp_config.num_replicas=2 does nothing", "dp_config.name=ddp", "hsdp"],
    ),
}


SAID = {
    "ddp+tp": ["ddp", "tp_config", "use fsdp"],
    "fsdp+ep": ["ep_config", "hsdp"],
    "hsdp+ep+tp": ["ep_config", "tp_config"],
    "hsdp+ep+ulysses": ["ep_config", "cp_config"],
    "fsdp+ring": ["cp_config.ring", "cp_config.uly"],
    "fsdp+pipeline": ["pp_config", "use fsdp"],
    "fsdp+pipeline+tp": ["pp_config", "use fsdp"],
    "hsdp+pipeline": ["pp_config", "use fsdp"],
    "recomputing everything": ["mode=full", "twice", "selected_modules"],
    "recomputing blocks": ["mode=selected_blocks", "twice", "selected_modules"],
    "recomputing ops": ["mode=selected_ops", "twice", "selected_modules"],
    "recomputing routers": ["modules=", "router", "blocks.*.feed_forward_moe.experts"],
    "recomputing within a budget": ["mode=budget", "compile_model=true"],
    "fsdp+ulysses, recomputing attention": ["modules=", "blocks.0.attention", "cp_config"],
}
CANNOT = {**UNFIT, **{name: (*REFUSED[name], said) for name, said in SAID.items()}}
assert SAID.keys() == REFUSED.keys()


@pytest.mark.parametrize(("n_ranks", "overrides", "said"), CANNOT.values(), ids=CANNOT.keys())
def test_a_layout_that_cannot_be_is_refused(n_ranks, overrides, said):
    with pytest.raises(ValueError) as caught:
        check_layout(tiny(*overrides), n_ranks)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


FITTING = [(n, overrides) for n, layouts in LAYOUTS.items() for overrides in layouts.values()]
FITTING += [
    (1, NOT_SET),
    (1, [*recomputing("budget", "activation_memory_budget=0.5"), "train_module.compile_model=true"]),
]


@pytest.mark.parametrize(("n_ranks", "overrides"), FITTING)
def test_a_layout_that_trains_is_let_through(n_ranks, overrides):
    check_layout(tiny(*overrides), n_ranks)
