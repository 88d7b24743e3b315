"""What each table takes: runs, configs, costs, and the same start for all."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from benchmarks.tiny import tiny
from spattn_olmoe.commands import ROOT
from spattn_olmoe.evaluation.suites import SUITES
from spattn_olmoe.machine import ASSUMED_MFU, GPUS
from spattn_olmoe.paper import loss_by_tokens
from spattn_olmoe.paper.runs import SCALES, TABLES, config_key, cost, runs_of
from spattn_olmoe.paper.same_start import check_same_start, hash_weights
from spattn_olmoe.paper.train_and_evaluate import run_command, suite_command
from spattn_olmoe.patterns import VARIANTS
from spattn_olmoe.settings import read


def plan(table: str, scale: str, seeds: int = 1, **kwargs):
    return runs_of(TABLES[table], SCALES[scale], seeds=seeds, out=Path("out"), **kwargs)


@pytest.mark.parametrize("table", TABLES)
def test_paper_scale_is_the_shipped_configs(table):
    runs = plan(table, "paper")
    printed = {method for method, _, _ in SUITES[table].paper}
    assert {method for _, method in TABLES[table].rows} == printed
    assert len(runs) == len(TABLES[table].models) * len(TABLES[table].variants)
    for run in runs:
        config = run.experiment()  # checks every key
        assert run.config.parent == ROOT / "configs" and run.config.stem.startswith(run.model)
        assert (config.init_seed, config.data_loader.seed) == (12536, 34521)
        assert run_command(run, SCALES["paper"])[:3] == ["torchrun", "--standalone", "--nproc_per_node=gpu"]
        assert ["--suite", table] == suite_command(run, SCALES["paper"], table)[4:6]
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs)


def test_seeds_change_weights_and_order_and_nothing_else():
    first, second = plan("table3", "cpu", seeds=2, variants=["eball"])
    a, b = (run.experiment().as_config_dict() for run in (first, second))
    assert (b["init_seed"], b["data_loader"]["seed"]) == (a["init_seed"] + 1, a["data_loader"]["seed"] + 1)
    for section, key in (
        ("data_loader", "seed"),
        ("trainer", "save_folder"),
        ("dataset", "work_dir"),
        ("data_loader", "work_dir"),
    ):
        assert a[section].pop(key) != b[section].pop(key)
    del a["trainer"]["callbacks"], b["trainer"]["callbacks"]  # they name the save folder too
    assert a["model"].pop("init_seed") + 1 == b["model"].pop("init_seed")
    assert a.pop("init_seed") + 1 == b.pop("init_seed")
    assert a == b


def test_a_key_names_what_training_depends_on():
    (run,) = plan("table3", "cpu", variants=["eball"])
    (elsewhere,) = runs_of(TABLES["table1"], SCALES["cpu"], seeds=1, out=Path("there"), variants=["eball"])
    (longer,) = plan("table3", "cpu", variants=["eball"], overrides=["trainer.max_duration.value=7"])
    assert run.key == elsewhere.key != longer.key and run.folder != elsewhere.folder
    plain = {"trainer": {"save_folder": "a", "callbacks": {}, "x": 1}, "dataset": {}, "data_loader": {}}
    other = copy.deepcopy(plain)
    tracker = {"_CLASS_": "spattn_olmoe.train.wandb.WandB", "enabled": False}
    other["trainer"] |= {"save_folder": "b", "callbacks": {"wandb": tracker, "lm_evaluator": None}}
    assert config_key(plain) == config_key(other)
    other["trainer"]["x"] = 2
    assert config_key(plain) != config_key(other)


SCHEDULE = (
    "trainer.callbacks.batches._CLASS_=olmo_core.train.callbacks.BatchSizeSchedulerCallback",
    "trainer.callbacks.batches.batch_sizes=[1024,2048]",
    "trainer.callbacks.batches.schedule=[{value: 0, unit: steps}, {value: 10, unit: steps}]",
)


def test_callbacks_that_change_what_comes_out_are_part_of_the_key():
    def key(*overrides: str) -> str:
        return plan("table3", "cpu", variants=["eball"], overrides=overrides)[0].key

    plain = key()
    assert plain == key("trainer.callbacks.checkpointer.ephemeral_save_interval=7", "trainer.callbacks.wandb=null")
    assert plain == key("trainer.callbacks.lm_evaluator.enabled=true")
    scheduled = key(*SCHEDULE)
    assert len({plain, scheduled, key(*SCHEDULE[:1], "trainer.callbacks.batches.batch_sizes=[1024,4096]")}) == 3
    # The curve is the result there: a run of a table, which has none, is another one.
    constant = ["train_module.scheduler.alpha_f=1.0"]
    masks = ("dense", "eball")
    studied, _ = loss_by_tokens.plan(SCALES["cpu"].config, masks, seeds=1, out=Path("out"), overrides=constant)
    (alike,) = plan("table3", "cpu", variants=["dense"], overrides=constant)
    assert studied.key != alike.key


@pytest.mark.parametrize(
    "name", ["reproduce/cpu", "reproduce/cpu_long", "reproduce/gpu", "1b7b_spattn", "table2_bigbird"]
)
def test_the_callbacks_of_shipped_configs_are_in_no_key(name):
    resolved = read(ROOT / "configs" / f"{name}.yaml")
    assert resolved["trainer"]["callbacks"]
    key = config_key(resolved)
    resolved["trainer"]["callbacks"] = {}
    assert config_key(resolved) == key


def test_costs_are_tokens_times_flops():
    (run,) = plan("table3", "gpu", variants=["dense"])
    found = cost(run)
    assert found.tokens == 800 * 65536
    # 6 a multiplied parameter and 12 a head dimension for each attended pair, by hand from the config
    d, layers, T = 512, 8, 1024
    active = layers * (4 * d * d + 2 * d + 32 * d + 4 * 3 * d * 512 + 2 * d) + d * 50304 + d
    pairs = 12 * layers * d * (T + 1) / 2
    assert found.flops / found.tokens == pytest.approx(6 * active + pairs, rel=2e-3)
    hours = 3 * sum(cost(r).gpu_hours for r in plan("table3", "gpu"))
    assert 0.3 < hours < 0.5  # "about 25 minutes"
    assert found.gpu_hours == pytest.approx(found.flops / (GPUS["h200"].flops * ASSUMED_MFU) / 3600)


def test_all_types_start_from_the_same_weights():
    def weights(variant: str, seed: int) -> str:
        config = tiny(*VARIANTS[variant].overrides, f"init_seed={seed}")
        model = config.model_with_attention().build(init_device="meta")
        model.init_weights(max_seq_len=32, device=torch.device("cpu"))
        return hash_weights([model])

    assert len({weights(variant, 3) for variant in VARIANTS}) == 1
    assert weights("eball", 3) != weights("eball", 4)


def test_a_different_start_is_refused():
    start = {"weights": "a" * 64, "order": "b" * 64, "data": "c" * 64}
    results = [{"run": f"m-{v}-seed0", "model": "m", "seed": 0, "start": dict(start)} for v in ("x", "y")]
    check_same_start(results)
    for part in start:
        changed = copy.deepcopy(results)
        changed[1]["start"][part] = "d" * 64
        with pytest.raises(ValueError, match=rf"m-y-seed0 and m-x-seed0 started from different {part}"):
            check_same_start(changed)
        changed[1]["seed"] = 1  # another seed may
        check_same_start(changed)


def test_a_dry_run_says_what_it_would_launch(reproduce, tmp_path):
    code, out, _ = reproduce("table2", "--scale", "paper", "--dry-run")
    assert code == 0
    assert len(re.findall(r"^torchrun .*scripts/train.py --config configs/table2_", out, re.MULTILINE)) == 7
    assert out.count("scripts/evaluate.py") == 7 and out.count("1,572,864,000 tokens") == 7
    assert "11,010,048,000 tokens" in out and "GPU-hours at 25% (assumed, not measured)" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_minutes_states_minutes(reproduce):
    code, out, _ = reproduce("table3", "--scale", "gpu", "--seeds", "1", "--variants", "dense", "--dry-run")
    assert code == 0 and "GPU-hours" not in out
    assert re.search(r"^# gpu-dense-seed0: 52,428,800 tokens, 2e\+16 FLOPs, 1\.3 GPU-minutes$", out, re.MULTILINE)
    assert "; 1.3 GPU-minutes at 25% (assumed, not measured)" in out


ONE = ("--seeds", "1", "--variants", "eball")

BAD = {
    "no seeds": (["table3", "--seeds", "0"], "--seeds: '0' must be a whole number"),
    "no jobs": (["table3", "--jobs", "0"], "--jobs: '0' must be a whole number"),
    "unknown mask": (["table3", "--variants", "eball,sharng"], "'sharng' is not a mask; did you mean 'sharing'"),
    "two masks": (["table3", "--variants", "spattention"], "name one of exclusive, sharing"),
    "unknown key": (["table3", *ONE, "--dry-run", "model.n_layer=2"], "n_layers"),
    "not in steps": (
        ["table3", *ONE, "--dry-run", "trainer.max_duration.unit=epochs", "trainer.max_duration.value=1"],
        "steps",
    ),
    "a config that is not there": (["table3", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "the appendix at another scale": (["appendix_a", "--scale", "gpu"], "analyze_heads.py"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line(what, reproduce, tmp_path):
    words, needle = BAD[what]
    code, _, err = reproduce(*words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and needle in errors[0] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("scale", ["paper", "gpu"])
def test_a_scale_that_needs_a_gpu_says_so(scale, reproduce, tmp_path):
    code, _, err = reproduce("table1", "--scale", scale)
    assert code == 2 and "needs a GPU" in err and "--dry-run" in err
