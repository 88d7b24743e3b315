"""Some of the inputs of ``python -m benchmarks.fuzz``: none may end in a traceback, hang, run code or touch other files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz import cases, guard
from benchmarks.fuzz.material import Material, preload, published_model

INPUTS = 2 * len(cases.MAKERS)


@pytest.fixture(scope="module")
def material(tiny_yaml: Path, tiny_data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    preload()
    return Material(tiny_yaml, tiny_data, trained, published_model(tmp_path_factory.mktemp("published")))


@pytest.mark.parametrize("first", range(0, INPUTS, 16))
def test_no_input_is_more_than_refused(first: int, material: Material, tmp_path: Path) -> None:
    for number in range(first, first + 16):
        folder = tmp_path / str(number)
        command = cases.make(number, material, folder)
        end = guard.run(command, folder)
        assert not end.fault, f"input {number}: {command}: {end.fault}\n{end.output}"


def test_the_guard_sees_what_must_not_be(tmp_path: Path, material: Material) -> None:
    scripts = {
        "imported evilmod": "import evilmod",
        "ran os.system": "import os; os.system('true')",
        "wrote": f"open({str(tmp_path / 'elsewhere')!r}, 'w')",
        "changed": f"import os; os.remove({str(tmp_path / 'precious')!r})",
        "traceback": "1 / 0",
        "status": "raise SystemExit(3)",
        "lines": "raise SystemExit(2)",
    }
    (tmp_path / "precious").write_text("x")
    for number, (fault, code) in enumerate(scripts.items()):
        folder = tmp_path / str(number)
        cases.make(0, material, folder)
        (folder / "s.py").write_text(code)
        assert fault in guard.run([str(folder / "s.py")], folder).fault
