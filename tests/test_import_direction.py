"""Rooms import one way, whether at the top of a module or within a function, and no import runs in a circle."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "spattn_olmoe"
ROOMS = ("common", "patterns", "data", "kernels", "serving", "model", "train", "evaluation", "cluster", "paper")
"""A room imports itself and those before it. ``common``: the modules at the package's root."""

MAY_NOT = {
    "serving": {"data", "kernels"},  # is copied into exported models, which are served without this package
    "evaluation": {"train"},
    "cluster": {"evaluation"},
    "kernels": {"data"},
    "data": {"patterns"},
}
"""Rooms side by side."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (PACKAGE, "benchmarks", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def room_of(module: str) -> str:
    first = module.split(".")[1] if "." in module else ""
    return first if (ROOT / PACKAGE / first).is_dir() and first else "common"


def imported(module: str) -> Iterator[str]:
    """Every module of this repository that a module imports, functions and TYPE_CHECKING included."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                own = f"{base}.{alias.name}"
                yield own if own in MODULES else base


def names_of(module: str) -> set[str]:
    return {name for name in imported(module) if name in MODULES and name not in (PACKAGE, module)}


IN_PACKAGE = [module for module in MODULES if module.split(".")[0] == PACKAGE]


def test_every_room_has_a_place_in_the_order():
    assert {room_of(module) for module in IN_PACKAGE} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_before_it(room):
    before = {*ROOMS[: ROOMS.index(room) + 1]} - MAY_NOT.get(room, set())
    wrong = {
        f"{module} imports {name}"
        for module in IN_PACKAGE
        if room_of(module) == room and module != PACKAGE  # which hands on three names of rooms, on first use
        for name in names_of(module)
        if not name.startswith(PACKAGE) or room_of(name) not in before
    }
    assert not wrong


def test_no_import_runs_in_a_circle():
    graphlib.TopologicalSorter({module: names_of(module) for module in MODULES if module != PACKAGE}).prepare()


def test_benchmarks_and_scripts_need_no_tests_and_scripts_import_none_of_each_other():
    for module in MODULES.keys() - set(IN_PACKAGE):
        names = set(imported(module))
        assert not {name for name in names if name.split(".")[0] == "tests"}, module
        assert not {name for name in names if name.split(".")[0] == "scripts"}, module


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    from ..train import run", {"spattn_olmoe.train.run"}),
        ("import spattn_olmoe.paper.runs", {"spattn_olmoe.paper.runs"}),
        ("if TYPE_CHECKING:\n    from ..cluster.memory import memory", {"spattn_olmoe.cluster.memory"}),
        ("from . import cpu, flex", {"spattn_olmoe.kernels.cpu", "spattn_olmoe.kernels.flex"}),
    ],
)
def test_every_way_to_import_is_seen(source, found, tmp_path, monkeypatch):
    path = tmp_path / "new.py"
    path.write_text(source)
    monkeypatch.setitem(MODULES, "spattn_olmoe.kernels.new", path)
    assert names_of("spattn_olmoe.kernels.new") == found


WHAT_IS_LOADED = """
import importlib, pkgutil, sys
for name in {packages!r}:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
print(sorted(name for name in sys.modules if name.split(".")[0] in {unwanted!r}))
import spattn_olmoe.paper.loss_curves, spattn_olmoe.paper.page
print("olmo_core" in sys.modules)
"""


def test_masks_attention_and_pages_work_without_olmo_core():
    """Which takes seconds to import."""
    pytest.importorskip("olmo_core")  # else the import would fail, not be missed
    packages = ("spattn_olmoe.patterns", "spattn_olmoe.kernels")
    code = WHAT_IS_LOADED.format(packages=packages, unwanted=("olmo_core", "transformers", "matplotlib"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "False"]
