"""What is handed out: the wheel by itself, the citation, and CI's own files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from benchmarks.tiny_run import ROOT
from spattn_olmoe import __version__

USE = """
import sys
sys.path += sys.argv[1:]
import torch, spattn_olmoe
from spattn_olmoe import attention, build_pattern
q, k, v = torch.randn(3, 1, 64, 4, 16)
out = attention(q, k, v, build_pattern("spattention", n_heads=4, band_length=64))
print(spattn_olmoe.__file__, tuple(out.shape))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, made from a copy of what they are made of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "spattn_olmoe", source / "spattn_olmoe", ignore=shutil.ignore_patterns("__pycache__"))
    out = source / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return out


def test_a_wheel_and_its_sources_are_fit_to_publish(dist: Path):
    names = sorted(file.name for file in dist.iterdir())
    assert names == [f"spattn_olmoe-{__version__}-py3-none-any.whl", f"spattn_olmoe-{__version__}.tar.gz"]
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("PASSED") == 2, checked.stdout


def installed_with(name: str) -> set[str]:
    """The packages that pip installs with one, as far as they are installed here, by their normalised names."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    return found


def test_attention_in_the_wheel_needs_torch_alone(dist: Path, tmp_path: Path):
    """In an environment that holds torch, what pip installs with torch, and the wheel."""
    site, wheel = tmp_path / "site", tmp_path / "wheel"
    site.mkdir()
    for name in installed_with("torch"):
        files = metadata.files(name) or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).exists() or (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    assert (site / "torch").exists() and not (site / "omegaconf").exists() and not (site / "olmo_core").exists()
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        archive.extractall(wheel)
    assert (wheel / "spattn_olmoe/py.typed").is_file()
    command = [sys.executable, "-I", "-S", "-c", USE, str(wheel), str(site)]  # without the packages of this environment
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{wheel}/spattn_olmoe/__init__.py (1, 64, 4, 16)\n"


def test_the_citation_names_the_paper_and_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (__version__, "Apache-2.0")
    (paper,) = cited["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2511.09596"}] and len(paper["authors"]) == 8


def test_ci_runs_what_a_contributor_runs():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest and oldest[1] in job["strategy"]["matrix"]["python"]
