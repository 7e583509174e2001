"""Source notebooks of assignments: their cells, the solutions that they refer to, and what students get of them."""
import ast
import copy
import importlib
import inspect
import json
import logging
import re
import textwrap
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.submission import bound_names, parse_code, read_builds
from nanochat.submission import read_role as kind_of

QUIET = logging.getLogger("nanochat.assignments")  # for nbgrader, whose failures we say in a sentence
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False
SITE = "https://nanochat.github.io/nanochat"
LINK = re.compile(r"\]\((?:\.\./)+((?:nbs|docs)/[\w/]+)\.(?:ipynb|qmd)")
REFERENCE = re.compile(r"^([ \t]+)# from (nanochat\.[\w.]+)[ \t]*$", re.M)


def text_of(cell: dict) -> str:
    "A cell's text; JSON may have it as a list of lines."
    return "".join(cell["source"])


def cells_of(notebook: dict, *kinds: str) -> list[dict]:
    "The cells of these kinds, in order."
    return [cell for cell in notebook["cells"] if kind_of(cell) in kinds]


def parse_cell(cell: dict) -> ast.Module:
    "The code of a cell, without magics; nothing for text."
    return parse_code(text_of(cell) if cell["cell_type"] == "code" else "")


def points_of(notebook: dict, kind: str) -> int | float:  # "test" or "manual"
    "Points of all cells of a kind."
    return sum(cell["metadata"]["nbgrader"]["points"] for cell in cells_of(notebook, kind))


# Solutions


def parameter_names(function: ast.FunctionDef) -> list[str]:
    "In order; a variable number of arguments by its name."
    a = function.args
    return [p.arg for p in (*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg]))]


def find_function(name: str) -> tuple[str, ast.FunctionDef]:  # its source and that, parsed
    "A function or method of the package by its dotted name. Raises `UserError`."
    module, _, path = name.removeprefix("nanochat.").partition(".")
    try:
        found = importlib.import_module(f"nanochat.{module}")
        for part in path.split("."):
            found = inspect.getattr_static(found, part)
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(found, "__func__", found))))
        source = re.sub(r"^( *from )\.(\w+ import )", r"\1nanochat.\2", source, flags=re.M)  # nbdev makes imports relative
    except (ImportError, AttributeError, TypeError):
        raise UserError(f"the package has no function {name}: correct the name after '# from'") from None
    function = ast.parse(source).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise UserError(f"{name} is not a function: name one after '# from'")
    return source, function


def take_body(name: str, wanted: list[str]) -> str:  # not indented
    "What a function of the package does: its lines after the docstring. Raises `UserError` if its parameters have other names."
    source, function = find_function(name)
    if parameter_names(function) != wanted:
        raise UserError(f"{name} has the parameters ({', '.join(parameter_names(function))}) and the cell's function ({', '.join(wanted)}): use the same names")
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    lines, start = source.splitlines(), first.lineno - 1
    while re.match(r"\s*(#|$)", lines[start - 1]):  # comments above the first statement
        start -= 1
    body = textwrap.dedent("\n".join(lines[start:])).strip("\n")
    if list(map(ast.dump, ast.parse(body).body)) != [ast.dump(node) for node in function.body if node.lineno >= first.lineno]:
        raise UserError(f"{name} can't be moved: write its body on lines of its own, and its long texts without line breaks")
    return body


def inline(code: str) -> str:
    "Replace each `# from nanochat.module.name` by the body of that function."
    def replace(match: re.Match) -> str:
        line = code[: match.start()].count("\n") + 1
        above = [f for f in ast.walk(ast.parse(code)) if isinstance(f, ast.FunctionDef) and f.lineno < line and f.col_offset < len(match[1])]
        if not above:
            raise UserError(f"'# from {match[2]}' stands in no function: put it into the one it completes")
        return textwrap.indent(take_body(match[2], parameter_names(max(above, key=lambda f: f.lineno))), match[1])
    return REFERENCE.sub(replace, code)


def build_source(
    path: Path,  # a source notebook
) -> Any:  # nbformat's notebook, hidden tests kept
    "A notebook with its solutions, and with links to the site. Raises `UserError` with the cell's name."
    from nbformat.v4 import reads

    notebook = reads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":  # where students open it, there is no repository around it
            cell["source"] = LINK.sub(rf"]({SITE}/\1.html", cell["source"])
    for cell in cells_of(notebook, "solution", "manual"):
        try:
            cell["source"] = inline(cell["source"])
        except (UserError, SyntaxError) as error:
            raise UserError(f"cell {cell['id']}: {error}") from None
    return notebook


# What students get


def strip(notebook: Any) -> Any:
    "The notebook that students get: nbgrader takes solutions and hidden tests out, locks cells and adds checksums. Raises `UserError`."
    from nbgrader.converters import GenerateAssignment
    from nbgrader.nbgraderformat import ValidationError

    made, resources = copy.deepcopy(notebook), {}
    try:
        for preprocessor in GenerateAssignment().preprocessors:
            if preprocessor.__name__ not in ("IncludeHeaderFooter", "SaveCells"):  # the latter writes gradebook.db
                made, resources = preprocessor(log=QUIET).preprocess(made, resources)
    except (RuntimeError, ValidationError) as error:
        raise UserError(f"nbgrader says: {error}") from None
    return made


def solve(student: Any, source: dict) -> Any:
    "The notebook of a student who has written what stands in the source."
    made, texts = copy.deepcopy(student), {cell["id"]: text_of(cell) for cell in cells_of(source, "solution", "manual")}
    for cell in made["cells"]:
        cell["source"] = texts.get(cell["id"], cell["source"])
    return made


def dump(notebook: dict) -> str:
    "A notebook as it is stored: keys in order, and the same bytes each time."
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def normalise(notebook: dict) -> dict:
    "A source notebook as it is kept in git: no outputs, ids that are nbgrader's, nothing else in the metadata."
    for cell in notebook["cells"]:
        cell["metadata"] = {key: cell["metadata"][key] for key in ("nbgrader",) if key in cell["metadata"]}
        cell["id"] = cell["metadata"].get("nbgrader", {}).get("grade_id") or cell["id"]
        cell["source"] = text_of(cell).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    notebook["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return notebook


def used_names(node: ast.AST) -> set[str]:
    "What a piece of code refers to."
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def stub(code: str, function: ast.FunctionDef) -> str:
    "A function's signature and docstring, and a body that says that there is none."
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    return "\n".join([*code.splitlines()[first : function.body[0].end_lineno], f'    raise NotImplementedError("{function.name} is not written yet")'])


def write_plainly(value: Any) -> str:  # empty for what is more than a plain value
    "A constant as Python reads it."
    try:
        return text if ast.literal_eval(text := repr(value)) == value else ""
    except (ValueError, SyntaxError):
        return ""


def given_for(notebook: dict, names: set[str]) -> tuple[set[str], list[str]]:  # imports, and other statements
    "What locked cells have that functions need. A constant of a module that students write themselves comes as its value; a function of one stays behind."
    builds, imports, others = read_builds(notebook), set(), []
    for cell in reversed(cells_of(notebook, "locked")):
        for node in reversed(parse_cell(cell).body):
            found = bound_names(node) & names
            if found and isinstance(node, ast.ImportFrom) and node.module in builds:
                values = {name: write_plainly(getattr(importlib.import_module(node.module), name)) for name in sorted(found)}
                others[:0] = [f"{name} = {value}" for name, value in values.items() if value]
            elif found and isinstance(node, (ast.Import, ast.ImportFrom)):
                start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                imports |= {start + ast.unparse(alias) for alias in node.names if (alias.asname or alias.name).split(".")[0] in found}
            elif found:
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
                others.insert(0, "\n".join(text_of(cell).splitlines()[first : node.end_lineno]))
                names = names | used_names(node)
    return imports, others


def render_adapters(notebooks: dict[str, dict]) -> str:  # of these assignments, by name
    "adapters.py: the functions that the assignments ask for, unwritten."
    imports, groups = set(), []
    for name, notebook in notebooks.items():
        functions = [(text_of(cell), node) for cell in cells_of(notebook, "solution") for node in parse_cell(cell).body if isinstance(node, ast.FunctionDef)]
        wanted, others = given_for(notebook, set().union(*(used_names(node) for _, node in functions)))
        imports |= wanted
        groups += [f"# {name}", *others, *(stub(code, node) for code, node in functions)]
    doc = '"""Thin functions between the tests and your own files: write each here, or import yours and call it; then `python -m pytest`."""'
    return "\n\n\n".join(["\n".join([doc, *sorted(imports)]), *groups]) + "\n"
