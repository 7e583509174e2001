"""The package's structure: each module stands only on lower-numbered ones, and nothing happens at import."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanochat"


def exported():
    "module -> number of its notebook"
    numbers = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        if match := re.match(r"#\| default_exp (\w+)", first):
            numbers[match[1]] = int(path.name[:2])
    return numbers


NUMBERS = exported()


def imports(path):
    "Modules of this package that a file imports, also inside functions."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nanochat")):
            module = (node.module or "").removeprefix("nanochat").lstrip(".")
            yield from [module] if module else [alias.name for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("nanochat.") for alias in node.names if alias.name.startswith("nanochat."))


@pytest.mark.parametrize("module", NUMBERS)
def test_imports_point_down(module):
    for other in imports(PACKAGE / f"{module}.py"):
        assert NUMBERS[other] < NUMBERS[module], f"{module} ({NUMBERS[module]}) imports {other} ({NUMBERS[other]})"


def test_every_module_has_a_notebook():
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "_modidx"} == set(NUMBERS)


@pytest.mark.parametrize("module", NUMBERS)
def test_nothing_dangerous(module):
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "marshal", "shelve"} & set(names)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if (module, name) == ("sandbox", "exec"):  # its purpose: it runs programs, in a process that is closed in first
                continue
            if (module, name) == ("export", "torch.load"):  # for the public program's checkpoints, by PyTorch's reader that knows tensors only
                assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                continue
            assert name not in ("eval", "exec", "os.system", "torch.load"), f"{name} in {module}"
            assert not any(k.arg == "shell" and getattr(k.value, "value", False) for k in node.keywords), f"shell=True in {module}"
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_imports_are_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run(f"import importlib\nfor m in {sorted(NUMBERS)}: importlib.import_module('nanochat.' + m)") == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["nanochat", "nanochat.common", "nanochat.run", "nanochat.cli", "nanochat.tinyworld"])
def test_light_modules_leave_torch_alone(module):
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False\n"
