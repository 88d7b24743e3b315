"""Plans: layouts that train, in the words that start them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks import forked
from benchmarks.tiny_run import ROOT
from spattn_olmoe.cluster import Layout, memory, plan
from spattn_olmoe.cluster.launch import check_memory
from spattn_olmoe.cluster.memory import USABLE
from spattn_olmoe.cluster.profile import Profile
from spattn_olmoe.commands import train_command
from spattn_olmoe.machine import GPUS, gpu_hours
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import check

LARGE = ROOT / "configs/1b7b_spattn.yaml"


@pytest.mark.parametrize(("gpus", "gpu"), [(4, "b200"), (16, "h100"), (64, "a100"), (1024, "h200"), (16384, "b200")])
def test_the_overrides_give_a_layout_that_trains_and_fits(gpus: int, gpu: str):
    found = plan(load_experiment(LARGE), gpus, gpu)
    config = load_experiment(LARGE, found.overrides)
    check(config)
    check_layout(config, gpus)
    layout = Layout.of(config, gpus)
    assert layout == found.best.layout
    assert memory(config, layout).peak == found.best.memory.peak <= GPUS[gpu].memory * USABLE
    assert found.best.layout.parallelisms == min(c.layout.parallelisms for c in found.fitting)
    alike = [c for c in found.fitting if replace(c.layout, microbatch=1) == replace(layout, microbatch=1)]
    assert layout.microbatch == max(c.layout.microbatch for c in alike)
    assert found.tokens == 25000 * 4194304
    assert found.gpu_hours == gpu_hours(found.tokens * found.flops.total, gpu)


def test_every_fitting_layout_is_written_and_read_alike():
    config = load_experiment(LARGE)
    kinds = {c.layout.overrides(config)[1] + str(c.layout): c.layout for c in plan(config, 16, "h200").fitting}
    assert any(layout.expert > 1 for layout in kinds.values()) and any(layout.recomputed for layout in kinds.values())
    for layout in list(kinds.values())[::5]:
        assert Layout.of(load_experiment(LARGE, layout.overrides(config)), 16) == layout
        assert Layout.of(layout.apply(config), 16) == layout


@pytest.mark.parametrize(("gpus", "nodes", "shard"), [(64, None, 8), (64, 16, 4), (12, None, 6), (4, None, 4)])
def test_hsdp_without_degrees_is_a_replica_a_node_wherever_it_is_asked(gpus: int, nodes: int | None, shard: int):
    """On a login node OLMo-core's own answer would be one replica in all: the memory of a GPU would be too small."""
    config = load_experiment(LARGE, ["train_module.dp_config.name=hsdp"])
    layout = Layout.of(config, gpus, nodes)
    assert (layout.shard_degree, layout.replicas) == (shard, gpus // shard)
    given = load_experiment(
        LARGE, ["train_module.dp_config.name=hsdp", f"train_module.dp_config.num_replicas={gpus // shard}"]
    )
    assert Layout.of(given, gpus) == layout


def test_the_launcher_s_profile_says_how_many_nodes_there_are(monkeypatch: pytest.MonkeyPatch):
    config = load_experiment(LARGE, ["train_module.dp_config.name=hsdp", "train_module.rank_microbatch_size=4096"])
    site = Profile(kind="slurm", nodes=16, gpus_per_node=4, cores_per_node=32, gpu="h100")
    by_node = memory(config, Layout.of(config, 64, 16)).peak
    assert (
        by_node > memory(config, Layout.of(config, 64)).peak
    )  # a copy over four GPUs takes more of each than one over eight
    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=by_node / USABLE - 1))
    with pytest.raises(ValueError, match="needs an estimated"):
        check_memory(site, config)


def test_a_layout_of_the_config_is_taken_back_where_another_is_chosen():
    config = load_experiment(LARGE, ["train_module.tp_config.degree=8"])
    found = plan(config, 16, "h200")
    assert "train_module.tp_config=null" in found.overrides


@pytest.mark.parametrize(
    ("gpus", "gpu", "words"),
    [
        (24, "h100", ["--gpus 24", "1024 sequences", "16 GPUs", "global_batch_size=4227072"]),
        (1, "h100", ["--gpus 1", "no layout fits", "of the 72.0 GB", "more GPUs"]),
        (0, "h100", ["--gpus 0", "at least 1"]),
        (8, "v100", ["--gpu v100", "h100, h200, a100, b200"]),
    ],
)
def test_what_cannot_be_planned_is_one_line_with_a_remedy(gpus: int, gpu: str, words: list[str]):
    with pytest.raises(ValueError) as caught:
        plan(load_experiment(LARGE), gpus, gpu)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_command_prints_the_plan_and_the_command_that_starts_it():
    command = (str(ROOT / "scripts/plan.py"), "--config", str(LARGE), "--gpus", "16", "--gpu", "h100")
    done = forked.run(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("OLMO_SHARED_FS=1 torchrun --nnodes=2 --nproc_per_node=8") and str(LARGE) in last
    assert " --shutdown-timeout=540 scripts/train.py" in last
    overrides = last.split(str(LARGE))[1].split()
    check_layout(load_experiment(LARGE, overrides), 16)
    for words in ("6,919,161,856", "7,215,698,688", "83.0 GB", "days"):
        assert words in done.stdout


def test_every_line_that_starts_several_machines_shares_the_folder_and_gives_time_to_save():
    """Without the one, OLMo-core refuses to save on the second machine; without the other, torchrun kills after 30 seconds."""
    (timeout,) = re.findall(r"--shutdown-timeout=\d+", (ROOT / "scripts/launch/slurm.sbatch").read_text())
    pages = "".join((ROOT / f"docs/{page}.md").read_text() for page in ("cluster", "running")).replace("\\\n", "")
    lines = re.findall(r"^.*torchrun --nnodes=.*$", pages, flags=re.MULTILINE)
    lines.append(" ".join(train_command("x.yaml", [], ranks=8, nodes=2)))
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("OLMO_SHARED_FS=1 torchrun ") and f" {timeout} " in line, line
