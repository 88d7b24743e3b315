"""The page of runs side by side, from real runs, opened in a real browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.tiny_run import run_training
from spattn_olmoe.paper.loss_curves import LOSS
from spattn_olmoe.paper.page import RunData, _curves, group, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
REPORT_ERRORS = "<script>window.onerror = m => { document.documentElement.setAttribute('data-error', m) }</script>"


@pytest.fixture(scope="module")
def runs(tiny_yaml, tmp_path_factory):
    """Two seeds of exclusive bands and a dense run, 3 steps each."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {"a": ("eball", 1), "b": ("eball", 2), "dense": ("standard", 1)}
    for name, (kind, seed) in wanted.items():
        words = [f"attention.type={kind}", f"init_seed={seed}", f"trainer.save_folder={folder / name}"]
        done = run_training(tiny_yaml, *words, "trainer.max_duration.value=3", cwd=folder)
        assert done.returncode == 0, done.stderr
    return [folder / name for name in wanted]


def test_seeds_of_a_type_are_one_group(runs):
    groups = group([RunData.read(run) for run in runs])
    assert {name: len(own) for name, own in groups.items()} == {"eball": 2, "dense": 1}


def test_groups_whose_folders_are_called_alike_are_all_there(runs, tmp_path):
    data = RunData.read(runs[0])
    alike = [
        dataclasses.replace(data, folder=Path(folder), config={"lr": lr})
        for lr, folder in enumerate(("x/low/run", "x/high/run", "y/high/run"))
    ]
    groups = group(alike)
    assert {name: [run.folder for run in own] for name, own in groups.items()} == {
        f"eball ({run.folder})": [run.folder] for run in alike
    }
    assert list(group(alike[:2])) == ["eball (low/run)", "eball (high/run)"]
    assert list(group([alike[0], dataclasses.replace(alike[1], folder=Path("other"))])) == [
        "eball (run)",
        "eball (other)",
    ]


def test_a_curve_of_many_steps_is_read_once():
    class Counted(int):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    n = 2000
    metrics = {Counted(step): {LOSS: 1.0 / step} for step in range(1, n + 1)}
    run = RunData(Path("run"), metrics, [], {})
    assert "1999" in _curves({"a": [run, run]}, lambda key: key == LOSS, "nats")
    assert Counted.compared < 100 * n  # each step with every other would be n * n / 2


def test_the_page_holds_the_figures_of_the_runs(runs, tmp_path):
    page = write(runs, tmp_path / "page.html").read_text()
    assert "http" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.S)  # plotly's own text aside
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line["train/CE loss"] for line in lines if "train/CE loss" in line][-1]
        assert f"<td>{last:.4f}</td>" in page
    assert "<td>init_seed</td>" in page and page.count("<img") == 2
    assert "<h2>Held-out loss by position" not in page  # nobody measured it


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it_without_an_error(runs, tmp_path):
    path = write(runs, tmp_path / "page.html")
    path.write_text(path.read_text().replace("<head>", f"<head>{REPORT_ERRORS}", 1))
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=300)
    shown = html.unescape(done.stdout)
    assert "data-error" not in shown.split("<head", 1)[0]
    assert shown.count('class="main-svg"') >= 2 and "eball, 2 seeds" in shown  # drawn: only a script makes these


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        write([tmp_path], tmp_path / "page.html")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="attention type is not known"):
        write([tmp_path], tmp_path / "page.html")
    (tmp_path / "attention.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"attention\.json: is nested more than 100 deep"):
        write([tmp_path], tmp_path / "page.html")


def test_text_from_files_is_text(runs, tmp_path):
    evil = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(runs[0], evil)
    page = write([evil, runs[2]], tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recall.json", {"types": {"eball": {"seeds": "x"}}}, "seeds is 'x', not a mapping"),
        ("recall.json", {"types": {"eball": {"seeds": {}}}}, "eball has no seed"),
        ("recall.json", {"types": {"eball": {"seeds": {"0": {"curve": []}}}}}, "eball has no seed"),
        ("heads.json", {"checkpoints": {"a": {"entropy": "x"}}}, "entropy is 'x', not a number"),
        ("step3/evaluation/loss.json", {"checkpoints": [{"loss": []}]}, "has no 'checkpoints"),
        ("attention.json", {"layers": 5}, "attention.json"),
    ],
)
def test_files_of_another_structure_are_one_line(runs, tmp_path, name, content, said):
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        write([folder], tmp_path / "page.html", recall=path if path.stem == "recall" else None)
