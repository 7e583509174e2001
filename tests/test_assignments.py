"""The assignments: their form, their solutions, what students get, and six mistakes in each that cost what they should."""
import ast
import builtins
import functools
import importlib
import importlib.util
import json
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "assignments"))
from leaks import check_secrets  # noqa: E402
from release import ASSIGNMENTS, SOURCE, check_ids, check_points, our_files, read_files  # noqa: E402
from sources import bound_names, build_source, cells_of, dump, kind_of, parse_cell, points_of, render_adapters, solve, strip, text_of, used_names  # noqa: E402
from test_release import make_cell  # noqa: E402

from nanochat.submission import read_builds  # noqa: E402

SITE_PAGE = re.compile(r"https://nanochat\.github\.io/nanochat/(nbs|docs)/([\w/]+)\.html")


@functools.cache
def read(name):
    "An assignment: with solutions, as students get it, and its data."
    source = build_source(SOURCE / name / f"{name}.ipynb")
    return source, strip(source), read_files(SOURCE / name)


def raw(name):
    "The source as it is kept in git."
    return json.loads((SOURCE / name / f"{name}.ipynb").read_text(encoding="utf-8"))


def mistakes_of(name):
    "The list of mistakes, by what is wrong."
    return importlib.import_module(f"mistakes_{name[:2]}").MISTAKES


def bound_names_of(cell):
    "What a cell defines."
    return [name for node in parse_cell(cell).body for name in bound_names(node)]


# Form. Each check gives a sentence for each thing that is wrong.


def check_docments(notebook):
    "Functions that students write say of each parameter and of the answer what they are."
    for cell in cells_of(notebook, "solution"):
        functions = [node for node in parse_cell(cell).body if isinstance(node, ast.FunctionDef)]
        if not bound_names_of(cell):
            yield f"{cell['id']} asks for nothing"
        for function in functions:
            lines = text_of(cell).splitlines()
            places = [(a.arg, a.end_lineno) for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            if ast.unparse(function.returns or ast.Constant(None)) != "None":
                places.append(("what comes back", function.returns.end_lineno))
            yield from (f"{cell['id']}: {what} of {function.name} has no comment" for what, line in places if "  # " not in lines[line - 1])
            if not ast.get_docstring(function):
                yield f"{cell['id']}: {function.name} has no docstring"


def check_messages(notebook):
    "Every assert of a test says what is wrong, and every test asserts something or calls what does."
    for cell in cells_of(notebook, "test"):
        nodes = list(ast.walk(parse_cell(cell)))
        asserts = [node for node in nodes if isinstance(node, ast.Assert)]
        yield from (f"{cell['id']}: assert {ast.unparse(node.test)} has no message" for node in asserts if node.msg is None)
        if not asserts and not any(isinstance(node, ast.Call) and ast.unparse(node.func).startswith("check_") for node in nodes):
            yield f"{cell['id']} asserts nothing"


def check_beginning(notebook):
    "The first cell of code is locked and calls begin with the assignment's name."
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    if kind_of(first) != "locked" or not re.search(r'^begin\("a\d-\w+", builds=\[', text_of(first), re.M):
        yield f"the first cell of code, {first['id']}, doesn't begin the assignment"


def read_table(text):
    "The rows of the first table whose head has points, as texts."
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, re.M)
    rows = next((table.splitlines() for table in tables if "by tests" in table.splitlines()[0]), [])
    return [[part.strip(" *") for part in row.strip("|").split("|")] for row in rows if "---" not in row]


def check_introduction(notebook):
    "Goals, time, and points for each part, which add up to those of the cells."
    text = text_of(notebook["cells"][0])
    if len(re.findall(r"^- ", text, re.M)) < 3:
        yield "the introduction lists no goals"
    if not re.search(r"\bhours?\b", text):
        yield "the introduction doesn't say how long it takes"
    table = read_table(text)
    for words, kind in (("by tests", "test"), ("by hand", "manual")):
        column = next((i for i, head in enumerate(table[0]) if words in head), None) if table else None
        values = [int(row[column] or 0) for row in table[1:]] if column is not None else []
        if not values or values[-1] != sum(values[:-1]) or values[-1] != points_of(notebook, kind):
            yield f"the introduction's table has {values} points {words}, and the cells {points_of(notebook, kind)}"


def draws(cell):
    return cell["cell_type"] == "code" and bool(re.search(r"\bplt\.|\.plot\(|\bax\w*\.", text_of(cell)))


def check_manual(notebook):
    "Before each cell that a person marks stands how; two ask for plots; one asks what AI was used for. No solution is a gap."
    above, asked = "", []
    for cell in notebook["cells"]:
        if kind_of(cell) == "manual":
            points = cell["metadata"]["nbgrader"]["points"]
            said = re.findall(r"(\d+|\bone) points?\b", above, re.I)
            if not {str(points), "one" if points == 1 else str(points)} & {word.lower() for word in said} and not re.search(r"\b1 point for each\b", above):
                yield f"{cell['id']}: the text before it doesn't say what its {points} points are given for"
            if re.search(r"TODO|PLACEHOLDER", text_of(cell)):
                yield f"{cell['id']} has no model answer"
            asked.append((cell, above))
        elif cell["cell_type"] == "markdown":
            above = text_of(cell)
    if sum(draws(cell) for cell, _ in asked) < 2:
        yield "it asks for fewer than two plots"
    if not any(re.search(r"\bAI\b", text) for _, text in asked):
        yield "no cell asks what AI was used for"


def read_globals(code):
    "The global names that a piece of code refers to, at any depth, and those that it binds."
    def walk(table, top):
        for symbol in table.get_symbols():
            if top and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (top or symbol.is_global()):
                used.add(symbol.get_name())
        for child in table.get_children():
            walk(child, False)

    used, bound = set(), set()
    walk(symtable.symtable(code, "cell", "exec"), True)
    return used - bound, bound


def bound_safely(tree, solved):
    "What a test binds before anything in it can fail: functions, imports, and values that don't come from students."
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
            inner = {name for part in ast.walk(node) if isinstance(part, ast.Lambda) for name in used_names(part)}
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or (used_names(node) - inner) & solved:
                return
        yield from bound_names(node)


def check_names(notebook, student):
    "A test needs nothing that an earlier test may have failed to define: given cells, solutions, or what stands before all that can fail."
    known, solved = {*dir(builtins), "__name__"}, set()
    for cell, shown in zip(notebook["cells"], student["cells"]):
        used, bound = read_globals(ast.unparse(parse_cell(cell)))
        if kind_of(cell) in ("test", "locked") and used - known:
            yield f"{cell['id']} needs {', '.join(sorted(used - known))}, which nothing before it is sure to define"
        if kind_of(cell) in ("locked", "solution"):
            known |= bound
            solved |= bound if kind_of(cell) == "solution" else set()
        elif kind_of(cell) == "test":
            known |= set(bound_safely(parse_cell(shown), solved))


def check_links(notebook):
    "Links lead to the site's pages or elsewhere, but to no file that students don't have."
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\(([^)\s]+)\)", text_of(cell)):
                page = SITE_PAGE.match(link)
                if page and not any((ROOT / page[1] / f"{page[2]}.{end}").exists() for end in ("ipynb", "qmd")):
                    yield f"{cell['id']}: there is no page {link}"
                elif not re.match(r"https?:|#", link):
                    yield f"{cell['id']}: students have no {link}"


CHECKS = [check_docments, check_messages, check_beginning, check_introduction, check_manual, check_links]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_form(name, check):
    assert list(check(read(name)[0])) == []


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_tests_dont_depend_on_each_other(name):
    assert list(check_names(*read(name)[:2])) == []


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_points_ids_and_secrets(name):
    source, student, files = read(name)
    check_ids(source)
    check_points(source)
    check_secrets(source, student, files | our_files(name, source))
    assert {key for cell in source["cells"] for key in cell["metadata"]} <= {"nbgrader"}
    assert not [cell["id"] for cell in raw(name)["cells"] if cell.get("outputs") or cell.get("execution_count") or not text_of(cell).strip()]


def test_functions_have_names_of_their_own():
    names = [node.name for assignment in ASSIGNMENTS for cell in cells_of(raw(assignment), "solution") for node in parse_cell(cell).body if isinstance(node, ast.FunctionDef)]
    assert sorted(names) == sorted(set(names)), "adapters.py can hold each name once"


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_solutions_refer_to_nothing_that_is_missing(name, tmp_path):
    (tmp_path / f"{name}.ipynb").write_text(dump(read(name)[0]))
    done = subprocess.run([Path(sys.executable).with_name("ruff"), "check", "--isolated", "--select", "F821,F822,F823", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# In files


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_solutions_in_files_pass_the_tests_that_students_see(name, tmp_path):
    source, student, files = read(name)
    codes = [text_of(cell) for cell in cells_of(source, "locked", "solution") if cell["cell_type"] == "code"]
    for file, data in (files | our_files(name, source) | {f"{name}.ipynb": dump(student).encode(), "adapters.py": "\n\n".join(codes).encode()}).items():
        (tmp_path / file).write_bytes(data)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert re.search(rf"^{len(cells_of(source, 'test'))} passed", done.stdout, re.M), done.stdout[-3000:]


# Examined


def examine_changed(name, changes, **student_files):
    "Examine the solution, with other texts in some of its cells; without walls where the machine has none, since it is our own."
    from nanochat.examine import examine

    source, student, files = read(name)
    submitted = solve(student, source)
    for cell in submitted["cells"]:
        cell["source"] = changes.get(cell["id"], cell["source"])
    return examine(source, dump(submitted).encode(), files, student_files=student_files, trust=True)


def said_of(examined):
    "The examiner's notes, but for that on missing walls."
    return [note for note in examined.notes if "this machine" not in note]


ITEMS = [(name, what) for name in ASSIGNMENTS for what in ("solution", "stripped", *(f"mistake {n}" for n in range(1, 7)))]


@pytest.mark.parametrize("name, what", ITEMS)
def test_examined(name, what):
    source, student, _ = read(name)
    tests, changes, failing = [cell["id"] for cell in cells_of(source, "test")], {}, set()
    if what == "stripped":
        changes, failing = {cell["id"]: text_of(cell) for cell in student["cells"]}, set(tests)
    elif what != "solution":
        said, cell_id, old, new, failing = mistakes_of(name)[int(what[-1]) - 1]
        text = next(text_of(cell) for cell in cells_of(source, "solution") if cell["id"] == cell_id)
        assert text.count(old) == 1 and failing and failing <= set(tests), (said, text.count(old), failing - set(tests))
        changes = {cell_id: text.replace(old, new)}
    examined = examine_changed(name, changes)
    assert [mark.id for mark in examined.marks] == tests and not said_of(examined)
    failed = {mark.id: mark.message for mark in examined.marks if mark.points == 0}
    assert set(failed) == failing, failed
    assert all(mark.points in (0, mark.most) for mark in examined.marks) and all(failed.values())


CHEATS = [  # what is right until a later function is tested, and what is put in its place then
    ("a2-transformer", {"rms-norm": """{}
right, NOW = rms_norm, []
def rms_norm(x):
    return 0 * x if NOW else right(x)""", "place-and-normalize": """def place_and_normalize(x, cos, sin):
    NOW.append(1)
    return torch.zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype)""", "loss-and-gradients": """def loss_and_gradients(ids, targets, weights, *heads):
    return 0.0, {{name: 0 * w for name, w in weights.items()}}"""}, {"test-place-and-normalize", "test-gradients"}),
    ("a3-training", {"adamw-step": """{}
right, NOW = adamw_step, []
def adamw_step(weight, grad, mean, square, *others, **named):
    return (weight, mean, square) if NOW else right(weight, grad, mean, square, *others, **named)""", "update-weights": """def update_weights(weights, *others):
    NOW.append(1)
    return weights, {{}}"""}, {"test-update"}),
    ("a4-scale", {"fit-law": "def fit_law(points, floors):\n    return (0.25, 40.0, 0.5) if points == MADE else ()"}, {"test-fit-law"}),
]


@pytest.mark.parametrize("name, changes, failing", CHEATS, ids=[name for name, _, _ in CHEATS])
def test_cheats_fail(name, changes, failing):
    texts = {cell["id"]: text_of(cell) for cell in cells_of(read(name)[0], "solution")}
    examined = examine_changed(name, {cell: text.format(texts[cell]) for cell, text in changes.items()})
    assert failing <= {mark.id for mark in examined.marks if not mark.points}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_there_are_six_mistakes(name):
    assert len(mistakes_of(name)) == 6
    assert len({mistake[0] for mistake in mistakes_of(name)}) == 6


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_functions_may_be_written_in_adapters(name):
    source, _, _ = read(name)
    empty = render_adapters({name: source})
    given = [node for cell in cells_of(source, "locked") for node in parse_cell(cell).body if isinstance(node, ast.ImportFrom) and node.module in read_builds(source)]
    behind = {name for node in given for name in bound_names(node)} - {name for node in ast.parse(empty).body for name in bound_names(node)}
    cells = [cell for cell in cells_of(source, "solution") if any(isinstance(node, ast.FunctionDef) for node in parse_cell(cell).body)]
    written = [cell for cell in cells if not used_names(parse_cell(cell)) & behind]  # the package's own code may use what students can't import
    assert len(written) > 0.7 * len(cells) and f"from adapters import {bound_names_of(cells[0])[0]}`" in our_files(name, source)["README.md"].decode()
    file = "\n\n\n".join([empty, *map(text_of, written)])
    examined = examine_changed(name, {cell["id"]: f"from adapters import {', '.join(bound_names_of(cell))}" for cell in written}, **{"adapters.py": file.encode()})
    assert [mark.id for mark in examined.marks if mark.points != mark.most] == [] and not said_of(examined)


# The checks see mistakes


def notebook_of(*cells):
    "A notebook of cells as (kind, id, text, points)."
    return {"cells": [make_cell(*cell) for cell in cells]}


FIRST = '# Tiny\n\n- to count\n- to merge\n- to measure\n\nTwo hours.\n\n| part | by tests | by hand |\n|---|---|---|\n| 1 | 60 | 10 |\n| 2 | 10 | 20 |\n| all | 70 | 30 |'
PLOT = "# Draw\n\nDraw it. 15 points: axes (10), title (5)."
GOOD = [("", "title", FIRST, 0), ("locked", "begin", 'from nanochat.examine import begin\n\nbegin("a9-tiny", builds=["nanochat.bpe"])', 0),
        ("solution", "work", 'def work(\n    x: int,  # a number\n) -> int:  # twice that\n    "Double."\n    return 2 * x', 0),
        ("test", "test-one", 'values = [2]\ndef check_it(x):\n    assert work(x) == 2 * x, "twice"\ncheck_it(3)', 60),
        ("test", "test-two", 'assert work(values[0]) == 4, "four"', 10),
        ("", "how", PLOT, 0), ("manual", "plot", "plt.plot([1, 2])", 15),
        ("", "how-again", PLOT + " What did you use AI for?", 0), ("manual", "again", "ax.bar([1, 2])", 15)]
BAD = [
    (check_docments, "work", "  # a number", "", "work: x of work has no comment"),
    (check_docments, "work", "  # twice that", "", "work: what comes back of work has no comment"),
    (check_docments, "work", '    "Double."\n', "", "work: work has no docstring"),
    (check_messages, "test-two", ', "four"', "", "test-two: assert work(values[0]) == 4 has no message"),
    (check_messages, "test-two", "assert work(values[0]) == 4", "work(values[0])", "test-two asserts nothing"),
    (check_beginning, "begin", "begin(", "start(", "the first cell of code, begin, doesn't begin the assignment"),
    (check_introduction, "title", "- to count\n", "", "the introduction lists no goals"),
    (check_introduction, "title", "Two hours.", "", "the introduction doesn't say how long it takes"),
    (check_introduction, "title", "| 1 | 60 |", "| 1 | 50 |", "the introduction's table has [50, 10, 70] points by tests, and the cells 70"),
    (check_introduction, "title", "| 30 |", "| 31 |", "the introduction's table has [10, 20, 31] points by hand, and the cells 30"),
    (check_manual, "how", "15 points", "Points", "plot: the text before it doesn't say what its 15 points are given for"),
    (check_manual, "plot", "plt.plot([1, 2])", "TODO", "plot has no model answer"),
    (check_manual, "again", "ax.bar([1, 2])", "print(1)", "it asks for fewer than two plots"),
    (check_manual, "how-again", " What did you use AI for?", "", "no cell asks what AI was used for"),
    (check_links, "title", "Two hours.", "Two [hours](https://nanochat.github.io/nanochat/nbs/00_hours.html).", "title: there is no page https://nanochat.github.io/nanochat/nbs/00_hours.html"),
    (check_links, "title", "Two hours.", "Two [hours](../hours.md).", "title: students have no ../hours.md"),
    (lambda notebook: check_names(notebook, notebook), "test-one", "values = [2]\n", "values = [work(1)]\n", "test-two needs values, which nothing before it is sure to define"),
    (lambda notebook: check_names(notebook, notebook), "test-one", "values = [2]\n", "assert work(1) == 2, 'two'\nvalues = [2]\n", "test-two needs values, which nothing before it is sure to define"),
]


def test_checks_are_content():
    for check in CHECKS:
        assert list(check(notebook_of(*GOOD))) == []
    assert list(check_names(notebook_of(*GOOD), notebook_of(*GOOD))) == []


@pytest.mark.parametrize("check, cell_id, old, new, sentence", BAD, ids=lambda value: value[:30] if isinstance(value, str) and " " in value else None)
def test_checks_see_mistakes(check, cell_id, old, new, sentence):
    cells = [(kind, name, text.replace(old, new) if name == cell_id else text, points) for kind, name, text, points in GOOD]
    assert cells != GOOD and sentence in list(check(notebook_of(*cells)))
