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
    listed = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]))
    assert listed == [name for name in NOTEBOOKS if name != "index.ipynb"]


def test_the_site_lists_every_notebook_and_nothing_else():
    listed = re.findall(r"nbs/(\w+\.ipynb)", (ROOT / "_quarto.yml").read_text().split("contents:", 1)[1])
    assert sorted(listed) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_clean_and_their_links_resolve(name):
    notebook = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "stored outputs"
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\(([\w/.-]+\.(?:ipynb|md|qmd|png))\)", "".join(cell["source"])):
                assert (ROOT / "nbs" / link).exists(), f"{name} links to {link}"


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if re.match(r"5[1-467]", n)])
def test_stage_notebooks_have_one_parameters_cell_of_literals(name):
    cells = [c for c in json.loads((ROOT / "nbs" / name).read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1
    for line in "".join(cells[0]["source"]).splitlines():
        assert re.fullmatch(r'\w+ = (None|\{\}|"\w+"|\d+)', line), line


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", text)):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    from typer.main import get_command

    from nanochat.cli import app
    for command, options in re.findall(r"`nanochat (\w+)([^`]*)`", text):
        known = {option for p in get_command(app).commands[command].params for option in p.opts}
        assert set(re.findall(r"--[\w-]+", options)) <= known, command


def test_makefile_prints_its_plan():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for target in ("run", "test", "lab", "export"):
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
