"""docs/findings.md says what the result files say, and reports are what their results give."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import throughput
from spattn_olmoe.evaluation import loss
from spattn_olmoe.paper import appendix, conversion, loss_by_tokens, report
from spattn_olmoe.paper.comparison import Comparison
from spattn_olmoe.paper.recall import report as recall_report
from spattn_olmoe.paper.runs import SCALES
from spattn_olmoe.paper.same_start import check_same_start

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "findings.md"
RESULTS = ROOT / "benchmarks" / "results" / "reproduce" / "cpu"


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "results").glob("*.json"))]


def test_the_report_of_table_3_is_that_of_its_runs(runs):
    assert len(runs) == 18
    check_same_start(runs)
    order = ["gbhalf", "eball", "sliding_window", "sharing", "dense", "exclusive"]
    comparisons = Comparison.of(sorted(runs, key=lambda r: (r["seed"], order.index(r["variant"]))))
    text = report.markdown("table3", comparisons, SCALES["cpu"].scope, {})
    assert text == (RESULTS / "table3.md").read_text()


def test_the_report_of_the_appendix_is_that_of_its_results():
    results = json.loads((RESULTS / "appendix_a.json").read_text())
    assert appendix.markdown(results) == (RESULTS / "appendix_a.md").read_text()


def test_the_report_of_throughput_is_that_of_its_results():
    results = json.loads((RESULTS / "throughput.json").read_text())
    assert throughput.markdown(results) == (RESULTS / "throughput.md").read_text()


@pytest.mark.parametrize("folder", ["", "recall_2500"])
def test_the_report_of_recall_is_that_of_its_results(folder):
    results = json.loads((RESULTS / folder / "recall.json").read_text())
    assert recall_report.markdown("recall", results) == (RESULTS / folder / "recall.md").read_text()


def test_the_report_of_conversion_is_that_of_its_results():
    results = json.loads((RESULTS / "conversion.json").read_text())
    assert conversion.markdown(results) == (RESULTS / "conversion.md").read_text()


def test_the_report_of_loss_by_tokens_is_that_of_its_results():
    results = json.loads((RESULTS / "loss_by_tokens.json").read_text())
    assert loss_by_tokens.markdown(results) == (RESULTS / "loss_by_tokens.md").read_text()


@pytest.mark.parametrize(
    "name", ["longer/sharing/loss", "longer/dense/loss", "longer/following/loss", "repeats/loss_by_repeat"]
)
def test_reports_of_held_out_loss_are_those_of_their_results(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert loss.markdown(results).strip() == (RESULTS / f"{name}.md").read_text().strip()


def sections() -> list[tuple[list[str], str]]:
    """Each section of the page: the files of results that it links to, and its text."""
    found = []
    for text in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE):
        links = re.findall(r"\]\((\.\./benchmarks/results/[^)]+\.md)\)", text)
        found.append(([(PAGE.parent / link).read_text() for link in links], text))
    return found


def test_every_table_is_a_result_files():
    tables = 0
    for sources, text in sections():
        if not sources:  # words alone: the next test sees to it
            continue
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
            assert any(table in source for source in sources), f"in no file that its section links to:\n{table}"
            tables += 1
    assert tables >= 5


def test_every_decimal_is_a_result_files():
    """Figures in running text too: those with a decimal point are in a file that their section links to."""
    for sources, text in sections():
        words = re.sub(r"\(https?://[^)]*\)|arXiv \S+", "", text)
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)", words):
            assert any(number in source for source in sources), f"{number} is in no file that its section links to"


# ---- the README's speeds ---------------------------------------------------------------------------------------------


def readme_table(corner: str) -> dict[str, list[str]]:
    """A table of the README by the text of its first cell: the cells of every row."""
    (table,) = re.findall(
        rf"^\| {corner} \|.*\n\|[-:|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in cells}


def test_the_readmes_steps_against_transformers_are_the_results():
    rows = json.loads((ROOT / "benchmarks/results/cpu/step.json").read_text())["rows"]
    table = readme_table("over transformers")
    assert len(table) == 4
    for name, cells in table.items():
        N, threads = re.fullmatch(r"N = (\d+), (one|two) threads?", name).groups()
        step = {"N": int(N), "tokens": 4096, "experts": 8, "threads": ["one", "two"].index(threads) + 1}
        mine = [row for row in rows if step.items() <= row.items()]
        theirs = min(row["seconds"] for row in mine if row["contender"].startswith("transformers"))
        for mask, cell in zip(("dense", "sharing", "exclusive"), cells, strict=True):
            (ours,) = [row["seconds"] for row in mine if row["contender"] == mask]
            assert cell == f"{theirs / ours:.2f}x", (name, mask)


def test_the_readmes_speeds_by_length_are_the_results():
    results = ROOT / "benchmarks/results/cpu"
    steps = {
        (row["N"], row["contender"]): row["seconds"]
        for row in json.loads((results / "step.json").read_text())["rows"]
        if row["tokens"] == 16384
    }
    tokens = {
        (row["context"], row["attention"]): row["over_dense"]
        for row in json.loads((results / "decoding.json").read_text())["rows"]
    }
    table = readme_table("over dense")
    assert {int(name.removeprefix("N = ")) for name in table} == {N for N, _ in steps} | {N for N, _ in tokens}
    for name, cells in table.items():
        N = int(name.removeprefix("N = "))
        wanted = [
            steps[N, "dense"] / steps[N, mask] if (N, mask) in steps else None for mask in ("sharing", "exclusive")
        ]
        wanted += [tokens.get((N, mask)) for mask in ("sharing", "exclusive")]
        assert cells == ["" if ratio is None else f"{ratio:.2f}x" for ratio in wanted], name
