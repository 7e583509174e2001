"""What students may not see: solutions and hidden tests are looked for in all that a zip will hold."""
import re

from sources import text_of

from nanochat.common import UserError
from nanochat.submission import HIDDEN, SOLUTION, read_role, strip_text

PARTS = {"cell_type", "id", "metadata", "source", "outputs", "execution_count", "nbgrader",  # of a cell, and of nbgrader's metadata
         "deletable", "editable", "checksum", "grade", "grade_id", "locked", "points", "schema_version", "solution", "task"}


def secret_lines(cell: dict) -> list[list[str]]:
    "The lines of a cell's solutions and hidden tests, without indentation."
    parts = [match[match.lastindex] for pattern in (SOLUTION, HIDDEN) for match in re.finditer(pattern, text_of(cell))]
    if read_role(cell) in ("solution", "manual") and not re.search(SOLUTION, text_of(cell)):
        parts.append(text_of(cell))
    return [[line.strip() for line in part.splitlines() if line.strip()] for part in parts]


def telling(lines: list[str], length: int = 3) -> set[str]:
    "Each few neighbouring lines, or all of fewer, if they are long enough to tell something."
    runs = {"\n".join(lines[i : i + length]) for i in range(max(1, len(lines) - length + 1))}
    return {run for run in runs if len(run) >= 40}


def check_secrets(source: dict, student: dict, files: dict[str, bytes]) -> None:
    "Raise `UserError` if a zip would show a part of a solution or of a hidden test, anywhere."
    if set(student["metadata"]) - {"kernelspec", "language_info"} or [c["id"] for c in student["cells"]] != [c["id"] for c in source["cells"]]:
        raise UserError("the notebook has metadata of its own, or other cells than its source: make export brings the source in order")
    for cell, made in zip(source["cells"], student["cells"]):
        stray = {*made, *made["metadata"], *made["metadata"].get("nbgrader", {})} - PARTS
        if stray or made.get("outputs") or made.get("execution_count"):
            raise UserError(f"cell {cell['id']} carries {', '.join(sorted(stray)) or 'outputs'}, which may tell a solution: make export takes them out")
        if text_of(made).strip() != strip_text(cell).strip():
            raise UserError(f"cell {cell['id']} shows something else than its source without solutions and hidden tests: correct its ### lines")
    texts = {f"cell {cell['id']}": text_of(cell) for cell in student["cells"]} | {name: data.decode(errors="replace") for name, data in files.items()}
    lines = {name: "\n".join(line.strip() for line in text.splitlines() if line.strip()) for name, text in texts.items()}
    for cell in source["cells"]:
        for run in set().union(*map(telling, secret_lines(cell))):
            if shown := [name for name, text in lines.items() if run in text]:
                raise UserError(f"{shown[0]} shows what is secret in cell {cell['id']}: {run.splitlines()[0]!r}")
