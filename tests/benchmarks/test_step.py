"""A step against transformers, and decoding, as their commands measure them: small and real."""

import json
import subprocess
import sys

from benchmarks import report
from benchmarks.forked import environment
from benchmarks.tiny_run import ROOT


def run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/benchmark.py"), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_step_of_every_contender_and_its_report(tmp_path):
    path = tmp_path / "step.json"
    run("step", "--lengths", "32", "--tokens", "64", "--rounds", "1", "--results", str(path))
    rows = {row["contender"]: row for row in json.loads(path.read_text())["rows"]}
    assert [name.split()[0] for name in rows] == ["dense", "sharing", "exclusive", "sliding_window", "transformers"]
    assert rows["exclusive"]["flops_per_token"] < rows["sharing"]["flops_per_token"] < rows["dense"]["flops_per_token"]
    for row in rows.values():
        assert row["tokens"] == 64 and row["tokens_per_second"] == 64 / row["seconds"]
    text = path.with_suffix(".md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert path.with_suffix(".svg").exists()


def test_decoding_behind_a_short_context(tmp_path):
    path = tmp_path / "decoding.json"
    run("decoding", "--contexts", "64", "--rounds", "1", "--patterns", "dense", "exclusive", "--results", str(path))
    dense, exclusive = json.loads(path.read_text())["rows"]
    assert dense["over_dense"] == 1
    assert dense["cache_bytes"] == exclusive["cache_bytes"] == 4 * 2 * (64 + 8) * 512 * 4  # layers, k and v, float32


def test_the_report_is_that_of_its_results():
    path = ROOT / "benchmarks/results/cpu/step.json"
    assert report.step_markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
