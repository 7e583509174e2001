"""`python -m pytest` runs the test cells of the notebook beside this file on the functions in adapters.py.

What adapters.py doesn't have yet is skipped, so that red means wrong. Some tests are only run when you hand in.
"""
import ast
import json
import linecache
import os
import re
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # no windows

import adapters  # noqa: E402
import pytest  # noqa: E402

HERE = Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("a[0-9]-*.ipynb")) or sorted(HERE.glob("source/*/a[0-9]-*.ipynb"))
LEFT_OUT = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS[ \t]*$|^%[^\n]*$", re.M | re.S)
KINDS = {(False, True, False): "locked", (False, False, True): "solution", (True, True, False): "test"}


@cache
def read_cells(path: Path) -> list[tuple[str, str, str]]:  # (kind, name, code), in order
    "The named code cells of a notebook."
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code" and "nbgrader" in c["metadata"]]
    metas = [c["metadata"]["nbgrader"] for c in cells]
    return [(KINDS.get((m["grade"], m["locked"], m["solution"]), ""), m["grade_id"], LEFT_OUT.sub("", "".join(c["source"]))) for c, m in zip(cells, metas)]


def find_defined(code: str) -> set[str]:
    "The functions that a cell defines."
    return {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}


def run_cell(path: Path, name: str, code: str, names: dict) -> None:
    "Run a cell; a traceback shows its lines."
    file = f"{path.stem}, cell {name}"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    exec(compile(code, file, "exec"), names)


class Session:
    "A notebook whose functions are those of adapters.py. Its given cells and its tests share their names, as in JupyterLab."

    def __init__(self, path: Path):
        self.path, self.done = path, 0
        solved = [find_defined(code) for kind, _, code in read_cells(path) if kind == "solution"]
        self.names = {"__name__": "__main__", **{name: vars(adapters)[name] for name in set().union(*solved) if name in vars(adapters)}}

    def run_test(self, test: str) -> None:
        "Run a test, and before it what stands above and was not run yet; other tests are silent."
        cells = read_cells(self.path)
        end = [name for _, name, _ in cells].index(test)
        for kind, name, code in cells[self.done : end]:
            with nullcontext() if kind == "locked" else suppress(Exception):
                if kind in ("locked", "test") or kind == "solution" and not find_defined(code):  # values, such as measured ones
                    run_cell(self.path, name, code, self.names)
        self.done = max(self.done, end + 1)
        run_cell(self.path, test, cells[end][2], self.names)


start_session = cache(Session)
TESTS = [(path, name) for path in NOTEBOOKS for kind, name, _ in read_cells(path) if kind == "test"]
IDS = [name if len(NOTEBOOKS) == 1 else f"{path.stem}/{name}" for path, name in TESTS]


@pytest.mark.parametrize("path, name", TESTS, ids=IDS)
def test_cell(path, name, monkeypatch):
    monkeypatch.chdir(path.parent)  # where the data files are
    message = ""
    try:
        start_session(path).run_test(name)
    except NotImplementedError as error:
        if not str(error).endswith("is not written yet"):
            raise
        pytest.skip(str(error))
    except AssertionError as error:
        message = str(error) or f"{name} failed without a word"
    if message:
        pytest.fail(message, pytrace=False)
