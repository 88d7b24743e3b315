"""What the pages in docs/ say, run."""

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spattn_olmoe import attention, build_pattern, trust
from spattn_olmoe.patterns import VARIANTS, registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def code_blocks(page: str) -> dict[str, str]:
    """The Python blocks of a page that begin with a file name in a comment, by that name."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    named = {m[1]: block for block in blocks if (m := re.match(r"# (\S+\.py)\n", block))}
    assert named, f"{page} has no code"
    return named


@pytest.fixture
def registry_copy(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def page_modules(tmp_path, monkeypatch, registry_copy):
    """The page's files in an importable folder, trusted as ``--trust`` on a command line does."""
    names = ("doubling_windows", "my_masks")
    monkeypatch.setattr(trust, "_trusted", {*trust._trusted, *names})
    for path, block in code_blocks("adding_an_attention_type.md").items():
        (tmp_path / Path(path).name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def test_examples_of_the_masks_page():
    failed, tried = doctest.testfile(str(DOCS / "masks.md"), module_relative=False, verbose=False)
    assert tried >= 10
    assert failed == 0


def percents(row: str) -> list[str]:
    return re.findall(r"[\d.]+ %", row)


def test_figures_of_the_masks_page():
    text = (DOCS / "masks.md").read_text()
    shapes = ((8, 1024), (16, 4096))
    for name in ("exclusive", "sharing"):
        (row,) = [line for line in text.splitlines() if re.match(rf"\| `{name}` \| [\d.]+ % \| [\d.]+ % \|$", line)]
        patterns = [VARIANTS[name].build(H, N) for H, N in shapes]
        dense = [VARIANTS["dense"].build(H, N).attended_pairs() for H, N in shapes]
        assert percents(row) == [f"{100 * p.attended_pairs() / n:.1f} %" for p, n in zip(patterns, dense, strict=True)]
    for H, N in shapes:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `eball` | {H} | {N} |")]
        for name in ("eball", "exclusive", "gbhalf"):
            p = VARIANTS[name].build(H, N)
            assert percents(row) == [f"{100 * p.dead_rows(T) / (H * T):.1f} %" for T in (100, 256, 512, N)]


def test_figures_of_bands_of_equal_area():
    _, _, text = (DOCS / "masks.md").read_text().partition("## Bands of equal area")
    for name in ("exclusive", "equal_area", "sharing", "equal_area_sharing"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        expected = []
        for H, N in ((8, 1024), (16, 4096)):
            pattern, dense = VARIANTS[name].build(H, N), VARIANTS["dense"].build(H, N).attended_pairs()
            pairs = pattern.attended_pairs_per_head()
            dead = f"{100 * pattern.dead_rows() / (H * N):.1f} %" if pattern.dead_rows() else "0"
            expected += [f"{100 * sum(pairs) / dense:.1f} %", f"{max(pairs) / (sum(pairs) / H):.2f}", dead]
        assert row.strip("| ").split(" | ")[1:] == expected


def test_links_and_pictures_of_the_pages_exist():
    for page in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            known = target.startswith("https://") or (page.parent / target.partition("#")[0]).exists()
            assert known, f"{page.name}: {target}"


def test_one_place_in_readme_and_one_in_kernels_says_that_no_gpu_has_timed_this():
    words = re.compile(
        r"No\s+GPU\s+has\s+(been\s+)?(timed|measured)|[Nn]obody\s+has\s+run|No GPU was used|on a GPU yet"
    )
    found = {page.name: len(words.findall(page.read_text())) for page in [*DOCS.glob("*.md"), ROOT / "README.md"]}
    assert {name: n for name, n in found.items() if n} == {"README.md": 1, "kernels.md": 1}


def test_the_map_names_every_page_and_every_folder():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
    packages = [path.parent for path in (ROOT / "spattn_olmoe").glob("*/__init__.py")]
    for folder in packages:
        assert f"`spattn_olmoe/{folder.name}`" in index, folder.name


def undocumented(path: Path) -> Iterator[str]:
    """The public functions, classes and methods of a module without a docstring. A method may be its base's."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name
        bases = {ast.unparse(base) for base in getattr(node, "bases", ())} - {"NamedTuple", "ABC", "Protocol"}
        for method in node.body if isinstance(node, ast.ClassDef) and not bases else ():
            public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
            if public and not ast.get_docstring(method):
                yield f"{node.name}.{method.name}"


def test_every_public_name_is_documented_on_its_rooms_page():
    """A page shows a room with its modules, a new one too, and whatever is public in them and has a docstring."""
    package = ROOT / "spattn_olmoe"
    rooms = sorted(path.parent.name for path in package.glob("*/__init__.py"))
    assert sorted(page.stem for page in DOCS.glob("api/*.md")) == sorted(["common", *rooms])
    for room in rooms:
        whole = f"::: spattn_olmoe.{room}\n    options:\n      show_submodules: true\n"
        assert whole in (DOCS / "api" / f"{room}.md").read_text()
    common = re.findall(r"^::: spattn_olmoe\.(\S+)$", (DOCS / "api" / "common.md").read_text(), re.MULTILINE)
    assert common == sorted(path.stem for path in package.glob("*.py") if path.name != "__init__.py")
    nav, start = (ROOT / "mkdocs.yml").read_text(), (DOCS / "api.md").read_text()
    assert all(f"- api/{room}.md" in nav and f"(api/{room}.md)" in start for room in ["common", *rooms])
    missing = {str(path): names for path in sorted(package.rglob("*.py")) if (names := list(undocumented(path)))}
    assert not missing


@pytest.mark.parametrize(
    ("name", "options"), [("doubling_windows.doubling_windows", {"shortest": 3}), ("my_masks.half_dilated", {})]
)
def test_the_new_types_attend_alike_in_every_implementation(name, options, page_modules):
    T = 200
    pattern = build_pattern(name, n_heads=4, band_length=T, **options)
    dense = pattern.dense_mask()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    if name.startswith("doubling"):
        assert torch.equal(dense, torch.stack([(distance >= 0) & (distance < 3 * 2**h) for h in range(4)]))
        assert pattern.intervals[:, 0].tolist() == [[0, 3], [0, 6], [0, 12], [0, 24]]
    else:
        even = (distance >= 0) & (distance % 2 == 0)
        assert torch.equal(dense, torch.stack([distance >= 0, even] * 2))
        assert pattern.intervals is None
    assert pattern.attended_pairs() == int(dense.sum())

    q, k, v, w = (torch.randn(1, T, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    results = []
    for impl in ("reference", "cpu"):
        out = attention(q, k, v, pattern, impl)
        results.append((out, *torch.autograd.grad((out * w).sum(), (q, k, v))))
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)
    with torch.no_grad():
        torch.testing.assert_close(attention(*(x.detach() for x in (q, k, v)), pattern, "flex"), results[0][0])


def test_a_bad_option_of_the_new_type_is_one_line(page_modules):
    with pytest.raises(ValueError, match=r"^attention\.shortest=0: must be a whole number of at least 1$"):
        build_pattern("doubling_windows.doubling_windows", n_heads=4, band_length=50, shortest=0)


MEMBER = """
from dataclasses import asdict
from pathlib import Path

from spattn_olmoe.paper import masks
from spattn_olmoe.paper.runs import SCALES, TABLES, runs_of
from spattn_olmoe.patterns import available_patterns, available_variants, find_variant
from spattn_olmoe.train.config import load_experiment
from spattn_olmoe.train.dry_run import dry_run

assert "doubling_windows" in available_patterns() and "doubling_windows" in available_variants()
masks.save(masks.draw(find_variant("doubling_windows").build(4, 32)), "drawn.png")
(run,) = runs_of(TABLES["table1"], SCALES["paper"], seeds=1, out=Path("out"), variants=["doubling_windows"])[:1]
assert run.name.endswith("-doubling_windows-seed0")
dry_run(run.experiment())
"""


def test_one_new_file_is_a_new_type(tmp_path):
    """The page as it stands, in a copy of the package: the type is listed, drawn, reproduced and dry-run."""
    pytest.importorskip("olmo_core")
    files = code_blocks("adding_an_attention_type.md")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("spattn_olmoe", "configs", "tests/patterns"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    path = "spattn_olmoe/patterns/doubling_windows.py"
    (tmp_path / path).write_text(files[path])
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", MEMBER], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn.png").exists()
    assert "doubling_windows" in done.stdout and "attended pairs" in done.stdout
    # The tests that run over all masks run over it.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/patterns",
        "-k",
        "doubling_windows",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 5
