"""The training benchmark: one real setup on a CPU, what it makes of memory that is too small, and its report."""

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import report, training  # noqa: E402
from benchmarks.training import MASKS, Setting  # noqa: E402
from benchmarks.training_step import Job, judge  # noqa: E402
from spattn_olmoe import machine  # noqa: E402
from spattn_olmoe.model.flops import flops_per_token  # noqa: E402
from spattn_olmoe.patterns import VARIANTS  # noqa: E402
from spattn_olmoe.train import load_experiment  # noqa: E402

TINY = ("model.d_model=32", "model.n_layers=2", "model.block.feed_forward_moe.hidden_size=16")


def test_a_setup_is_measured_in_a_process_of_its_own():
    overrides = (*VARIANTS["sharing"].overrides, *TINY)
    result = training._run(Job("quickstart.yaml", 64, overrides, 2, 2, 1, "cpu"), limit=300)
    assert "error" not in result, result
    assert result["tokens"] == 2 * 2 * 64 and result["layers"] == 2
    assert result["tokens_per_second"] == pytest.approx(256 / result["ms"] * 1e3)
    assert 0 < result["attention_share"]
    assert result["attention_kernel"] == "cpu" and result["peak"] > 2**20
    assert result["mfu"] is None and result["mfu_as_if_dense"] is None  # a CPU has no known peak
    assert result["losses"][-1] < result["losses"][0]  # it trains
    config = load_experiment(ROOT / "configs/quickstart.yaml", [*overrides, "dataset.sequence_length=64"])
    flops = flops_per_token(config.model_with_attention().build(init_device="meta"), 64)
    assert result["flops_per_token"] == {"total": flops.total, "attention": flops.attention, "dense": flops.dense}
    profile = result["profile"]
    assert profile["layers_run"] == 4 and profile["products"]["aten::mm"] > 0
    assert profile["loops_over_experts"] and not profile["waits_in_every_layer"]  # as it is on a CPU


def test_a_setup_that_takes_too_long_is_stopped():
    result = training._run(Job("quickstart.yaml", 64, TINY, 1, 1, 1, "cpu"), limit=0.2)
    assert result == {"error": "took more than 0 s"}


def test_a_profile_is_judged_by_layers_and_experts():
    good = {
        "layers_run": 8,
        "experts": 64,
        "waits": {"cudaStreamSynchronize": 3, "aten::item": 60},
        "copies_to_host": 1,
    }
    good["products"] = {"aten::_grouped_mm": 72, "aten::mm": 96}
    assert judge(good) == {"waits_in_every_layer": False, "loops_over_experts": False}
    assert judge(good | {"copies_to_host": 8})["waits_in_every_layer"]
    assert judge(good | {"waits": {"cudaStreamSynchronize": 24}})["waits_in_every_layer"]
    assert judge(good | {"products": {"aten::mm": 8 * 64 * 3}})["loops_over_experts"]


def fitting(layers_that_fit, asked):
    """Setups of which those with more layers do not fit; a third of the time for bands."""

    def run(job, limit):
        (layers,) = [int(x.split("=")[1]) for x in job.overrides if x.startswith("model.n_layers=")]
        asked.append(layers)
        sharing = "attention.local_sharing=true" in job.overrides
        if layers > (layers_that_fit - 1 if sharing else layers_that_fit):
            return {"out_of_memory": "CUDA out of memory"}
        ms = 30.0 if "attention.type=standard" in job.overrides else 10.0
        return {
            "ms": ms,
            "attention_ms": ms / 10,
            "attention_share": 0.4,
            "tokens_per_second": 1e6 / ms,
            "mfu": 0.25,
            "mfu_as_if_dense": 0.5,
            "peak": 2**30,
            "layers": layers,
            "attention_kernel": "k",
        }

    return run


def test_layers_are_halved_for_all_attention_types_until_all_fit(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "_run", fitting(2, asked))
    *_, rows = training._measure_setting(Setting("quickstart", 512, False), "cpu", 1, 10)
    assert asked == [4, 2, 2, 2, 1, 1, 1]
    assert [(row["attention"], row["layers"], row["of_layers"]) for row in rows] == [(a, 1, 4) for a in MASKS]
    monkeypatch.setattr(training, "_run", fitting(0, asked))
    ((row,),) = training._measure_setting(Setting("quickstart", 512, False), "cpu", 1, 10)
    assert row["error"] == "out of memory with one layer"


def arguments(*line):
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    return parser.parse_args(line)


@pytest.fixture
def code(monkeypatch):
    """What :func:`machine.describe` finds of the code, whatever state this checkout is in; a test may change it."""
    code = {"commit": "a" * 40, "changed": False}
    here = machine.describe("cpu")
    monkeypatch.setattr(machine, "describe", lambda device, note=None: here | code)
    return code


def test_missing_is_what_has_an_error_or_no_row_or_is_of_another_commit(tmp_path, monkeypatch, code):
    asked, broken = [], []
    fits = fitting(9, asked)
    monkeypatch.setattr(
        training,
        "_run",
        lambda job, limit: fits(job, limit) if len(asked) not in broken else asked.append(0) or {"error": "no"},
    )
    line = ("--device", "cpu", "--lengths", "512", "--missing", "--out", str(tmp_path / "out"))

    def measured():
        before = len(asked)
        training.run(arguments(*line))
        return len(asked) - before

    broken.append(1)  # of three masks the second
    assert measured() == 3
    assert measured() == 3
    assert measured() == 0
    code["commit"] = "b" * 40
    assert measured() == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"training.json", "training.md", "training.svg"}


def test_every_mask_is_stored_as_soon_as_it_is_measured(tmp_path, monkeypatch, code):
    asked = []
    fits = fitting(9, asked)

    def killed(job, limit):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return fits(job, limit)

    monkeypatch.setattr(training, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run(arguments("--device", "cpu", "--lengths", "512", "--out", str(tmp_path)))
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["dense", "exclusive"]


def test_results_are_kept_and_reported(tmp_path, monkeypatch, code, capsys):
    monkeypatch.setattr(machine, "results_folder", lambda device: tmp_path)
    asked = []
    monkeypatch.setattr(training, "_run", fitting(9, asked))
    assert training.run(arguments("--device", "cpu", "--lengths", "512")) == 0
    assert training.run(arguments("--device", "cpu", "--lengths", "512", "1024", "--missing")) == 0
    assert len(asked) == 6  # 512 was not measured again
    data = json.loads((tmp_path / "training.json").read_text())
    assert {row["setting"] for row in data["rows"]} == {"quickstart N512", "quickstart N1024"}
    assert data["runs"][0]["commit"]
    table = (tmp_path / "training.md").read_text()
    assert "| exclusive | k | 100,000 | 3.00x | 3.00x | 40.0% | 25.0% | 50.0% | 1.00 | 4 of 4 | n/a | n/a |" in table
    assert (tmp_path / "training.svg").read_text().startswith("<?xml")
    assert report.write(tmp_path / "training.json", report.training_markdown, report.training_plot)
    assert (tmp_path / "training.md").read_text() == table
    assert "some 2 M parameters" in capsys.readouterr().out


def test_the_gpu_measures_both_models_at_every_length_compiled_and_not():
    settings = training._settings(arguments(), "cuda")
    assert len(settings) == len(set(settings)) == 2 * 4 * 2
    assert {(s.model, s.N) for s in training._settings(arguments("--quick"), "cuda")} == {
        ("0p25b1p75b", 1024),
        ("1b7b", 4096),
    }
    with pytest.raises(ValueError, match="at least 1"):
        training._settings(arguments("--lengths", "0"), "cuda")
    for setting in settings:  # every config is there and takes the overrides
        job = training._job(setting, "exclusive", 2, "cuda", 8)
        config = load_experiment(ROOT / "configs" / job.config, [*job.overrides, f"dataset.sequence_length={job.N}"])
        assert config.model.n_layers == 2 and config.train_module.compile_model == setting.compiled
        assert job.sequences * job.N == max(16384, job.N)
