"""The commands of the pages: each is run by a test, or is marked as not run, with the reason."""

from __future__ import annotations

import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_run import ROOT
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import check

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^\s*(\w+=\S+ )*(python3?|bash|torchrun|pip|docker|kubectl|sbatch|mkdocs|git|\.venv/bin/\S+)\s")


def blocks(text: str) -> list[tuple[str, str, str]]:
    """The fenced blocks of a page: the line before, the language and the lines inside."""
    found, lines = [], text.splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        found.append((lines[start - 1], lines[start].removeprefix("```"), "\n".join(lines[start + 1 : end])))
    return found


def commands() -> list[tuple[str, str | None, str]]:
    """Page, mark and text of every block of a page that holds commands."""
    return [
        (page.name, mark[1] if (mark := re.fullmatch("<!-- (.+) -->", before)) else None, body)
        for page in PAGES
        for before, language, body in blocks(page.read_text())
        if language in ("", "bash", "sh") and any(COMMAND.match(line) for line in body.splitlines())
    ]


def dry_runs() -> list[str]:
    """The command lines of all pages that only say what would be done: this test runs them."""
    lines = [line.partition(" #")[0].strip() for page in PAGES for line in page.read_text().splitlines()]
    return sorted({line for line in lines if COMMAND.match(line) and "--dry-run" in line and "..." not in line})


def launches() -> list[str]:
    """The command lines of all pages that train a config of ours, on a number of ranks."""
    lines = [line.partition(" #")[0] for _, _, body in commands() for line in body.replace("\\\n", " ").splitlines()]
    ours = (line for line in lines if line.startswith("torchrun") and "scripts/train.py" in line)
    return sorted(
        {" ".join(line.split()) for line in ours if "nproc" in line and not re.search(r"CONFIG|\.\.\.", line)}
    )


def test_every_command_is_run_by_a_test_or_marked_as_not_run():
    found = commands()
    assert len(found) > 20
    for page, mark, body in found:
        assert mark, f"{page}: neither run by a test nor marked as not run: {body}"
        kind, _, what = mark.partition(": ") if mark.startswith("not run: ") else mark.partition("run by ")
        assert what, f"{page}: a mark without a reason: {mark}"
        if kind == "":
            scripts = re.findall(r"scripts/(?:\w+/)*(\w+)\.", body)
            text = (ROOT / what).read_text()
            assert scripts and all(script in text for script in scripts), f"{page}: {what} does not run {scripts}"


def test_what_commands_name_is_there():
    for page, _, body in commands():
        for path in re.findall(r"(?<![\w/])((?:scripts|configs|benchmarks|tests|docs)/[\w/.-]*\w)", body):
            ours = not path.endswith("CONFIG.yaml") and "results" not in path
            assert not ours or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("line", dry_runs())
def test_dry_runs_of_the_pages(line: str, monkeypatch, capsys):
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words[script:])
    monkeypatch.syspath_prepend(str(Path(ROOT, "scripts")))
    try:
        runpy.run_path(words[script], run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", launches())
def test_launches_of_the_pages_have_layouts_that_fit_their_ranks(line: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    ranks = math.prod(int(n) for n in re.findall(r"--n(?:nodes|proc.per.node)=(\d+)", line))
    config = load_experiment(words[words.index("--config") + 1], words[words.index("--config") + 2 :])
    check(config)
    check_layout(config, ranks)
