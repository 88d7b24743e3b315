"""Training on several ranks is training on one, and layouts that cannot be are refused.

Runs go through the trainer as ``scripts/train.py`` builds it, on gloo and in float32. The load-balancing loss is taken per
sequence: OLMo-core's default takes it over what a rank happens to hold, which is another loss for every layout. Adam's
epsilon is large, so that its quotients of tiny gradients do not blow rounding up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from olmo_core.exceptions import OLMoConfigurationError

from spattn_olmoe.olmo.experiment import check_layout

from .tiny import BASE, TINY, T, run_overrides, tiny, torchrun, write_data, write_json

WORKER = Path(__file__).with_name("parallel_worker.py")
SMOOTH = ["model.block.feed_forward_moe.lb_loss_granularity=instance", "train_module.optim.eps=1.0e-3"]
TP = ["train_module.tp_config.degree=2"]
ULYSSES = ["train_module.cp_config.degree=2", "train_module.cp_config.uly={}"]
HSDP = ["train_module.dp_config.name=hsdp", "train_module.dp_config.shard_degree=2"]
EP = [*HSDP, "train_module.ep_config.degree=2"]
DDP = ["train_module.dp_config.name=ddp"]

ATTENTION = {
    "exclusive": ["attention.type=spattention", "attention.local_sharing=false"],
    "sharing": ["attention.type=spattention", "attention.local_sharing=true"],
    "standard": ["attention.type=standard"],
}
LAYOUTS = {  # by the number of ranks
    1: {"fsdp": []},
    2: {"fsdp": [], "ddp": DDP, "tp": TP, "ulysses": ULYSSES, "hsdp+ep": EP},
    4: {"fsdp+tp": TP, "fsdp+ulysses": ULYSSES, "tp+ulysses": [*TP, *ULYSSES], "hsdp+ep": EP, "hsdp+tp": [*HSDP, *TP]},
}
KEYS = ("CE loss", "gradient norm")


def train(folder: Path, n_ranks: int, runs: dict[str, tuple[list[str], bool]]) -> dict[str, list[list[float]]]:
    """Loss and gradient norm of each step of each run; a run is overrides, and whether ranks forget their head offset."""
    data = write_data(folder / "data")
    tasks = [
        {
            "name": name,
            "base": str(BASE),
            "overrides": [
                *TINY,
                *SMOOTH,
                "trainer.no_checkpoints=true",
                *run_overrides(folder / str(i), data),
                *overrides,
            ],
            "forget": forget,
        }
        for i, (name, (overrides, forget)) in enumerate(runs.items())
    ]
    write_json(folder / "runs.json", tasks)
    torchrun(n_ranks, WORKER, str(folder / "runs.json"), str(folder / "out.json"))
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """All runs, with one launch for each number of ranks."""

    def launch(n_ranks: int) -> dict[str, list[list[float]]]:
        types = ["exclusive"] if n_ranks == 4 else ATTENTION
        runs = {
            f"{kind} {layout}": ([*ATTENTION[kind], *overrides], False)
            for kind in types
            for layout, overrides in LAYOUTS[n_ranks].items()
        }
        if n_ranks == 2:
            for kind in types:
                for layout in ("tp", "ulysses"):
                    runs[f"{kind} {layout} forgetting"] = ([*ATTENTION[kind], *LAYOUTS[2][layout]], True)
        return train(tmp_path_factory.mktemp(f"ranks{n_ranks}"), n_ranks, runs)

    return {n_ranks: launch(n_ranks) for n_ranks in LAYOUTS}


CASES = [(2, kind, layout) for kind in ATTENTION for layout in LAYOUTS[2]] + [(4, "exclusive", x) for x in LAYOUTS[4]]


def difference(one, other) -> float:
    assert len(one) == len(other) == 3
    return max(abs(a - b) / abs(a) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("n_ranks", "kind", "layout"), CASES, ids=lambda x: str(x))
def test_loss_and_gradient_norm_are_those_of_one_rank(curves, n_ranks, kind, layout):
    assert difference(curves[1][f"{kind} fsdp"], curves[n_ranks][f"{kind} {layout}"]) < 1e-5


@pytest.mark.parametrize("layout", ["tp", "ulysses"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_ranks_that_forget_which_heads_they_hold_train_another_model(curves, kind, layout):
    """What the test above would miss if heads did not matter, and what dense attention does not need."""
    gone = difference(curves[1][f"{kind} fsdp"], curves[2][f"{kind} {layout} forgetting"])
    assert gone < 1e-5 if kind == "standard" else gone > 1e-3


def test_the_types_differ_from_each_other(curves):
    ours = curves[1]
    assert difference(ours["exclusive fsdp"], ours["sharing fsdp"]) > 1e-3
    assert difference(ours["standard fsdp"], ours["sharing fsdp"]) > 1e-3


# ---- layouts that cannot be ------------------------------------------------------------------------------------------

NOT_SET = ["train_module.dp_config=null"]
RING = ["train_module.cp_config.degree=2", "train_module.cp_config.ring={}"]
REFUSED = {
    "tp beyond the ranks": (3, TP, ["tp_config.degree=2", "3 ranks", "multiple of 2"]),
    "tp of zero": (2, ["train_module.tp_config.degree=0"], ["tp_config.degree=0"]),
    "tp and ulysses beyond the ranks": (2, [*TP, *ULYSSES], ["cp_config.degree=2", "1 ranks", "multiple of 4"]),
    "no data parallelism": (2, NOT_SET, ["dp_config is not set", "2 ranks", "fsdp"]),
    "tp without data parallelism": (1, [*NOT_SET, "train_module.tp_config.degree=1"], ["dp_config must be set"]),
    "ddp with tp": (2, [*DDP, *TP], ["ddp", "tp_config", "use fsdp"]),
    "ranks that do not divide the batch": (3, [], ["global_batch_size=128", "3 data-parallel ranks", "96"]),
    "too many ranks for the batch": (8, [], ["global_batch_size=128", "8 data-parallel ranks", "256"]),
    "microbatch beyond a rank's share": (
        4,
        [f"train_module.rank_microbatch_size={2 * T}"],
        ["rank_microbatch_size=64", "32 tokens", "4 data-parallel ranks"],
    ),
    "ring": (2, RING, ["cp_config.ring", "cp_config.uly"]),
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
    "ep without hsdp": (2, ["train_module.ep_config.degree=2"], ["ep_config", "hsdp"]),
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
    "ep with tp": (4, [*EP, *TP], ["ep_config", "tp_config"]),
    "ep with ulysses": (4, [*EP, *ULYSSES], ["ep_config", "cp_config"]),
}


@pytest.mark.parametrize(("n_ranks", "overrides", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_layout_that_cannot_be_is_refused(n_ranks, overrides, said):
    with pytest.raises(OLMoConfigurationError) as caught:
        check_layout(tiny(*overrides), n_ranks)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


FITTING = [(n, overrides) for n, layouts in LAYOUTS.items() for overrides in layouts.values()]


@pytest.mark.parametrize(("n_ranks", "overrides"), [*FITTING, (1, NOT_SET)])
def test_a_layout_that_trains_is_let_through(n_ranks, overrides):
    check_layout(tiny(*overrides), n_ranks)
