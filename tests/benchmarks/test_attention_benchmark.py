"""The benchmark itself: its gate, its arithmetic, its files. Run small, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import attention as benchmark  # noqa: E402
from benchmarks import contenders, report, timing  # noqa: E402
from spattn_olmoe import machine  # noqa: E402
from spattn_olmoe.kernels import flex  # noqa: E402
from spattn_olmoe.patterns import VARIANTS  # noqa: E402


def test_the_gate_lets_the_right_attention_through_and_names_what_is_wrong():
    pattern = VARIANTS["exclusive"].build(4, benchmark.GATE_LENGTH)
    found, missing = contenders.banded("cpu", pattern, benchmark.GATE_LENGTH)
    assert set(found) == {"ours", "sdpa masked"} and not missing
    check = {"label": "exclusive", "H": 4, "D": 16, "dtype": torch.float32, "device": "cpu"}
    assert all(benchmark.gate(attend, **check) is None for attend in found.values())
    dense = contenders.dense("cpu", 512, 4)[0]["sdpa is_causal"]
    assert benchmark.gate(dense, **check | {"label": "dense"}) is None
    assert "wrong: out is off by" in benchmark.gate(dense, **check)

    def detached(q, k, v):
        return found["ours"](q, k, v.detach()) + 0 * v

    assert "wrong: dv is off by" in benchmark.gate(detached, **check)
    assert "TypeError" in benchmark.gate(lambda q: q, **check)
    assert "did not start" in benchmark.gate(None, **check)


def test_operations_and_bounds_are_those_of_the_design(monkeypatch):
    """B1 H8 N4096 D128 exclusive, forward: bound by memory, 7.0 microseconds of an H200."""
    setting = benchmark.Setting(1, 8, 4096, 128)
    pattern = VARIANTS["exclusive"].build(8, 4096)
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200")
    row = benchmark._derived(setting, pattern, "fwd", 0.0140, "cuda")
    assert row["share_of_bound"] == pytest.approx(0.5, rel=0.01)
    assert row["tflops"] == pytest.approx(4 * 128 * 4096 * 4097 / 2 / 0.0140e-3 / 1e12)
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA Unheard Of")
    assert benchmark._derived(setting, pattern, "fwd", 1.0, "cuda")["share_of_bound"] == "n/a"


def test_every_call_is_timed_as_often_and_the_median_is_one_of_the_times():
    calls = {"a": lambda: torch.ones(10).sum(), "b": lambda: torch.ones(1000).sum()}
    times = timing.take_turns(calls, "cpu", seconds=0.0, rounds=(7, 9))
    assert {timing_.rounds for timing_ in times.values()} == {7}
    assert all(t.p20 <= t.ms <= t.p80 for t in times.values())


def test_the_store_replaces_a_setting_and_keeps_the_others_with_their_runs(tmp_path):
    path = tmp_path / "gpu" / "attention.json"
    first, second = benchmark.Setting(1, 8, 64, 16), benchmark.Setting(1, 8, 128, 16)
    store = benchmark.Store(path, {"command": "one"})
    for setting in (first, second):
        store.add(setting, [{"setting": str(setting), "ms": 1.0}])
    again = benchmark.Store(path, {"command": "two"})
    again.add(second, [{"setting": str(second), "ms": 2.0}])
    data = json.loads(path.read_text())
    assert [(row["setting"], row["ms"], data["runs"][row["run"]]["command"]) for row in data["rows"]] == [
        (str(first), 1.0, "one"),
        (str(second), 2.0, "two"),
    ]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs the benchmark on a small setting, and tells the masks that it measured."""
    code = {"commit": "a" * 40, "changed": False}
    here, measure, found = machine.describe("cpu"), benchmark.measure, []
    monkeypatch.setattr(machine, "describe", lambda device, note=None: here | code)

    def watched(setting, patterns, *args):
        found.append(str(setting))
        return measure(setting, patterns, *args)

    monkeypatch.setattr(benchmark, "measure", watched)

    def run(*more):
        found.clear()
        parser = __import__("argparse").ArgumentParser()
        benchmark.add_arguments(parser)
        line = "--device cpu --settings 1x2x128 --head-dims 16 --patterns exclusive --seconds 0 --missing --out"
        run.status = benchmark.run(parser.parse_args([*line.split(), str(tmp_path), *more]))
        return len(found)

    run.code, run.file = code, tmp_path / "attention.json"
    return run


def test_missing_is_what_has_an_error_or_no_row_or_is_of_another_commit(measured):
    assert measured() == 1 and measured.status == 0
    assert measured() == 0
    assert measured("--patterns", "exclusive", "sharing") == 1
    for change in ({"commit": "b" * 40}, {"changed": True}):
        measured.code.update(change)
        assert measured() == 1
    assert measured() == 1  # what was measured with changes counts for nothing
    measured.code["changed"] = False
    assert measured() == 1 and measured() == 0
    data = json.loads(measured.file.read_text())
    data["rows"] = [row for row in data["rows"] if row["mode"] != "bwd"]
    measured.file.write_text(json.dumps(data))
    assert measured() == 1


def with_rival(monkeypatch, make):
    """One contender more under every mask."""
    banded = contenders.banded

    def more(device, pattern, T):
        found, missing = banded(device, pattern, T)
        return found | {"rival": make(pattern)}, missing

    monkeypatch.setattr(contenders, "banded", more)


def outcomes(rows, contender):
    return [row.get("mode") or row["error"] for row in rows if row["contender"] == contender]


SETTING = benchmark.Setting(1, 2, 512, 16)


def test_the_backward_pass_of_compiled_flexattention_is_timed_again_and_again(monkeypatch):
    monkeypatch.setattr(
        torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None
    )  # it has none on a CPU
    compiled = flex.compiled("aot_eager_decomp_partition")

    def rival(pattern):
        def attend(q, k, v):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            mask = flex.mask_of_call(pattern, q, k)
            return compiled(*heads_first, block_mask=mask, scale=0.25, enable_gqa=False).transpose(1, 2)

        return attend

    with_rival(monkeypatch, rival)
    *_, rows = benchmark.measure(SETTING, ["exclusive"], "cpu", 0)
    assert outcomes(rows, "rival") == outcomes(rows, "ours") == list(benchmark.MODES)


@pytest.mark.parametrize("mode", benchmark.MODES)
def test_a_contender_that_fails_is_a_row_and_the_others_are_timed(monkeypatch, mode):
    """It fails at the full size alone: in the forward pass without gradients, in backward for a second time, in both."""

    def rival(pattern):
        attend = contenders._sdpa(mask=pattern.dense_mask(pattern.band_length)[None])

        def fails(q, k, v):
            full = q.shape[0] > 1
            if full and (mode == "fwd+bwd" or (mode == "fwd" and not torch.is_grad_enabled())):
                raise RuntimeError("out of something")
            out = attend(q, k, v)
            if full and mode == "bwd" and out.requires_grad:
                backward = []
                out.register_hook(lambda grad: backward.append(0) or (1 / 0 if len(backward) == 2 else None))
            return out

        return fails

    with_rival(monkeypatch, rival)
    *stored, rows = benchmark.measure(SETTING._replace(B=2), ["exclusive"], "cpu", 0)
    assert outcomes(rows, "ours") == list(benchmark.MODES) and len(stored) == 2
    message = "ZeroDivisionError: division by zero" if mode == "bwd" else "RuntimeError: out of something"
    others = [] if mode == "fwd+bwd" else [m for m in benchmark.MODES if m != mode]
    assert set(outcomes(rows, "rival")) == {f"{mode}: {message}", *others}


def test_every_mode_is_stored_as_soon_as_it_is_measured(measured, monkeypatch):
    take_turns = timing.take_turns

    def killed(calls, *args):
        if measured.file.exists():
            raise KeyboardInterrupt
        return take_turns(calls, *args)

    monkeypatch.setattr(timing, "take_turns", killed)
    with pytest.raises(KeyboardInterrupt):
        measured()
    assert {row["mode"] for row in json.loads(measured.file.read_text())["rows"]} == {"fwd"}


def test_compiling_ahead_runs_what_is_measured_in_other_processes(caplog):
    benchmark.compile_ahead([], ["exclusive"], "cpu")
    benchmark.compile_ahead([SETTING], ["exclusive"], "cpu")
    assert not caplog.records
    benchmark.compile_ahead([SETTING], ["no such mask"], "cpu")
    assert "not everything could be compiled ahead" in caplog.text


def test_the_command_stores_results_with_their_machine_and_reports_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "results_folder", lambda device: tmp_path)
    parser = __import__("argparse").ArgumentParser()
    benchmark.add_arguments(parser)
    line = "--device cpu --settings 1x2x256 --head-dims 16 --patterns exclusive gbhalf --seconds 0"
    assert benchmark.run(parser.parse_args(line.split())) == 0
    assert "this times the CPU path" in capsys.readouterr().out
    data = json.loads((tmp_path / "attention.json").read_text())
    (run,) = data["runs"]
    assert run["versions"]["torch"] == torch.__version__ and run["commit"] and run["command"].startswith("python ")
    timed = {(row["pattern"], row["contender"], row["mode"]) for row in data["rows"]}
    names = [("dense", "sdpa is_causal")] + [(p, c) for p in ("exclusive", "gbhalf") for c in ("ours", "sdpa masked")]
    assert timed == {(*name, mode) for name in names for mode in benchmark.MODES}
    table = (tmp_path / "attention.md").read_text()
    ours = next(r for r in data["rows"] if (r["pattern"], r["contender"], r["mode"]) == ("gbhalf", "ours", "bwd"))
    rival = next(r for r in data["rows"] if (r["contender"], r["mode"]) == ("sdpa is_causal", "bwd"))
    assert f"| gbhalf | bwd | {ours['ms']:.3g} |" in table
    assert f"{rival['ms'] / ours['ms']:.2f}x" in table
    assert (tmp_path / "attention.svg").read_text().startswith("<?xml")
    before = table
    assert report.write(tmp_path / "attention.json", report.attention_markdown, report.attention_plot)
    assert (tmp_path / "attention.md").read_text() == before


def test_the_command_line_refuses_what_it_does_not_understand():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "attention", "--settings", "8x4096"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 2
    assert "--settings '8x4096': must be BxHxN" in run.stderr


def test_a_mask_that_is_not_known_is_one_line_with_the_nearest(capsys):
    parser = __import__("argparse").ArgumentParser()
    benchmark.add_arguments(parser)
    for word, meant in (("sharng", "did you mean 'sharing'"), ("spattention", "name one of exclusive, sharing")):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--patterns", word])
        assert stop.value.code == 2 and meant in capsys.readouterr().err
