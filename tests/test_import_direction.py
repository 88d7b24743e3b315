"""patterns <- kernels <- model: masks and attention work without OLMo-core."""

import subprocess
import sys

import pytest

CODE = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(sorted(name for name in sys.modules if name.split(".")[0] in {unwanted!r} or name.startswith({above!r})))
"""


@pytest.mark.parametrize(
    ("package", "above"),
    [("spattn_olmoe.patterns", "spattn_olmoe.model"), ("spattn_olmoe.kernels", "spattn_olmoe.model")],
)
def test_no_module_of_it_imports_olmo_core(package, above):
    pytest.importorskip("olmo_core")  # else the import would fail, not be missed
    code = CODE.format(package=package, unwanted=("olmo_core", "transformers", "matplotlib"), above=above)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
