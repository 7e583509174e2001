"""What stands around the package: README, site, Makefile, settings."""
import json
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from in_step import render_readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb"))


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == render_readme(ROOT)


def test_the_map_lists_every_notebook():
    text = "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"])
    rows = re.findall(r"^\| \[[^]]+\]\((\d\d_\w+\.ipynb)\) \|", text, re.M)
    assert rows == [name for name in NOTEBOOKS if name != "index.ipynb"]
    assert {f"labs/{path.name}" for path in (ROOT / "nbs/labs").glob("*.ipynb")} <= set(re.findall(r"\]\((labs/\w+\.ipynb)\)", text))


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if re.match(r"5[1-467]", n)])
def test_stage_notebooks_have_one_parameters_cell_of_literals(name):
    cells = [c for c in json.loads((ROOT / "nbs" / name).read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1
    for line in "".join(cells[0]["source"]).splitlines():
        assert re.fullmatch(r'\w+ = (None|\{\}|"\w+"|\d+)', line), line


def test_makefile_prints_its_plan():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for target in ("run", "test", "lab", "site", "export", "release"):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_settings_name_the_packages_that_are_imported():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    required = {re.split(r"[<>=]", name)[0] for name in config["DEFAULT"]["requirements"].split()}
    roots = {re.match(r"(?:from|import) (\w+)", line)[1] for path in (ROOT / "nanochat").glob("*.py") for line in path.read_text().splitlines()
             if re.match(r"(?:from|import) \w+", line)}
    ours = {"numpy": "pandas", "pyarrow": "datasets", "IPython": "jupyterlab", "regex": "tiktoken", "yaml": "datasets",
            "pydantic": "fastapi", "starlette": "fastapi"}  # these come with
    import sys
    for root in roots - set(sys.stdlib_module_names) - {"nanochat"}:
        assert ours.get(root, root) in required, root


def test_the_project_speaks_of_itself_only():
    words = re.compile(r"/work/|pypi\.org|files\.pythonhosted|/opt/wheels|registry\.npmjs")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        if Path(file).suffix in (".py", ".md", ".ipynb", ".ini", ".yml", ".toml", ".txt", "") and file != "tests/test_frame.py":
            assert not words.search((ROOT / file).read_text(encoding="utf-8", errors="ignore")), file
