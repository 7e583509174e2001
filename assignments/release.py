"""`make release`: builds what students get of each assignment, and tries it before they do.

A source notebook has references in place of solutions (`# from nanochat.bpe.merge_pair`) and hidden tests. This program puts
the package's functions in, has the examiner mark that solution and the stripped notebook, makes sure that nothing leaks, lets
nbgrader make the student's version and note its cells, and packs `course/NAME.zip`. One that fails keeps its last zip.
"""
import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from leaks import check_secrets
from sources import QUIET, build_source, cells_of, dump, kind_of, points_of, render_adapters, solve, strip, text_of

from nanochat.common import UserError, atomic_dir, atomic_write, format_seconds, sha256_file
from nanochat.grading import open_gradebook, write_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from build_site import Site, digest, reach, read_imports, say  # noqa: E402

SOURCE, COURSE = ROOT / "assignments" / "source", ROOT / "assignments" / "course"
ASSIGNMENTS = [path.parent.name for path in sorted(SOURCE.glob("a[0-9]-*/*.ipynb")) if path.stem == path.parent.name]
LARGEST = 1_000_000  # bytes of a data file
OURS = ("README.md", "adapters.py", "check_environment.py", "test_adapters.py")  # what we put beside the notebook
README = """# {name}

{total} points: {tests} by tests, {manual} by hand. `python` is the one that nanochat is installed in.

1. `python check_environment.py` says whether everything is here, and how to mend what isn't.
2. `python -m jupyter lab {name}.ipynb` opens the notebook. Write where it says YOUR CODE HERE or YOUR ANSWER HERE; add cells
   wherever you like, but don't delete, copy or split those that are there: they are marked by their names.
3. Run the test cells as you go. One that says nothing has passed; when you hand in, tests that you don't see are run as well.
4. If you prefer files, write the functions in `adapters.py`, or import them there from files of your own. `python -m pytest` runs the
   tests on them and skips what isn't written yet. In the notebook, cells then say `from adapters import {function}`.
   A file doesn't know the notebook's names: import what you use, and copy constants and helpers from the given cells above the function.
5. Before you hand in, restart the kernel, run all cells, and save.

Hand in `{name}.ipynb` under this name, and `adapters.py` with the files that it imports if your notebook uses it.
"""


# Trying and packing


def check_points(notebook: dict) -> tuple[float, float]:  # by tests, by hand
    "The points of an assignment. Raises `UserError` unless they are 100 in all."
    tests, manual = points_of(notebook, "test"), points_of(notebook, "manual")
    if tests + manual != 100:
        raise UserError(f"its points are {tests:g} by tests and {manual:g} by hand, {tests + manual:g} in all: make them 100")
    return tests, manual


def check_ids(notebook: dict) -> None:
    "Raise `UserError` unless each cell has an id of its own, which is also nbgrader's."
    ids = [cell["id"] for cell in notebook["cells"]]
    for cell in notebook["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id", cell["id"])
        if cell["id"] != name or not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name) or ids.count(name) > 1:
            raise UserError(f"cell {cell['id']}: make its id unique, of small letters, digits and hyphens, and the same as its grade_id {name}")
        if "nbgrader" in cell["metadata"] and not kind_of(cell):
            raise UserError(f"cell {cell['id']} is neither locked nor solution, test or manual: set its type in JupyterLab's panel of nbgrader")


def try_out(source: Any, student: Any, files: dict[str, bytes]) -> float:  # seconds that the solution took
    "Have the solution marked, which must earn every point of the tests, and what students get, which must earn none."
    from nanochat.examine import examine

    solved, empty = (examine(source, dump(made).encode(), files, trust=True) for made in (solve(student, source), student))
    if lost := [mark for mark in solved.marks if mark.points != mark.most]:
        raise UserError(f"its own solution fails {lost[0].id}: {lost[0].message}")
    if [mark.id for mark in solved.marks] != [cell["id"] for cell in cells_of(source, "test")] or len(empty.marks) != len(solved.marks):
        raise UserError("not every test was run: look for a cell that ends the kernel")
    if free := [mark for mark in empty.marks if mark.points]:
        raise UserError(f"{free[0].id} gives {free[0].points:g} points for nothing: let it call what it tests")
    if notes := [note for note in (*solved.notes, *empty.notes) if "this machine" not in note]:
        raise UserError(f"the examiner says: {notes[0]}")
    return solved.seconds


def read_files(folder: Path) -> dict[str, bytes]:
    "An assignment's data, which lies beside its notebook. Raises `UserError`."
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")) or path.name == f"{folder.name}.ipynb":
            continue
        if path.is_dir() or path.suffix == ".ipynb" or path.name in OURS or path.stat().st_size > LARGEST:
            raise UserError(f"{path.name} can't be released: leave only files of at most {LARGEST // 10**6} MB beside the notebook, with other names than ours")
        files[path.name] = path.read_bytes()
    return files


def our_files(name: str, notebook: dict) -> dict[str, bytes]:
    "What we put beside the notebook."
    from nanochat import __version__

    tests, manual = check_points(notebook)
    functions = re.findall(r'NotImplementedError\("(\w+) is not written yet', adapters := render_adapters({name: notebook}))
    here = {file: (ROOT / "assignments" / file).read_text(encoding="utf-8") for file in ("check_environment.py", "test_adapters.py")}
    texts = here | {"adapters.py": adapters, "README.md": README.format(name=name, total=tests + manual, tests=tests, manual=manual, function=functions[0])}
    texts["check_environment.py"] = texts["check_environment.py"].replace('MADE_WITH = ""', f'MADE_WITH = "{__version__}"', 1)
    return {file: text.encode() for file, text in texts.items()}


def pack(name: str, files: dict[str, bytes]) -> bytes:
    "A zip whose bytes depend on nothing but its files: no dates, and no compression, which differs between machines."
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for file, data in sorted(files.items()):
            info = zipfile.ZipInfo(f"{name}/{file}", (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)
    return target.getvalue()


@contextlib.contextmanager
def working_folder(course: Path) -> Iterator[Path]:  # empty, and removed at the end
    "A folder for what isn't finished; what a killed build has left in it goes first."
    folder = course / ".building"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def make_gradebook(folder: Path, target: Path) -> None:
    "Make gradebook.db if there is none, whole or not at all."
    if not target.exists():
        open_gradebook(folder).close()
        os.replace(folder / "gradebook.db", target)


def generate(name: str, notebook: Any, files: dict[str, bytes], course: Path) -> Any:  # the student's notebook
    "Have nbgrader make the release and note its cells in gradebook.db; then put source and release into the course. Raises `UserError`."
    from nbformat.v4 import reads
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory
    from nbgrader.utils import capture_log

    write_settings(course)
    with working_folder(course) as folder:
        make_gradebook(folder, course / "gradebook.db")
        (folder / "source" / name).mkdir(parents=True)
        for file, data in (files | {f"{name}.ipynb": dump(notebook).encode()}).items():
            (folder / "source" / name / file).write_bytes(data)
        place = CourseDirectory(root=str(folder), db_url=f"sqlite:///{course / 'gradebook.db'}", assignment_id=name, log=QUIET)
        done = capture_log(GenerateAssignment(coursedir=place, force=True, log=QUIET))
        if not done["success"]:
            lines = [line for line in done["log"].splitlines() if re.match(r"\s*\w+(Error|Exception|Entry): ", line)]
            raise UserError(f"nbgrader says: {(lines or [done['log'] or done['error']])[-1].strip()}")
        made = reads((folder / "release" / name / f"{name}.ipynb").read_text(encoding="utf-8"))
        for step in ("source", "release"):
            with atomic_dir(course / step / name) as target:
                shutil.copytree(folder / step / name, target, dirs_exist_ok=True)
    return made


def key_of(folder: Path) -> str:
    "A hash of all that a zip is made of: the assignment's files, our own, the package's modules that it uses, and versions."
    site = Site(ROOT)
    codes = [text_of(cell) for cell in json.loads((folder / f"{folder.name}.ipynb").read_text(encoding="utf-8"))["cells"]]
    named = {*re.findall(r"# from nanochat\.(\w+)\.", "\n".join(codes)), "examine", *(name for code in codes for name in read_imports(code, "nanochat"))}
    modules = [ROOT / "nanochat" / f"{name}.py" for name in sorted(reach(named, site.imported))]
    ours = sorted(path for path in (ROOT / "assignments").glob("*.py") if path.name != "adapters.py")
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return digest([site.machine, importlib.metadata.version("nbgrader"), *(part for path in (*files, *ours, *modules) for part in (path.name, path.read_bytes()))])


def read_record(name: str, course: Path) -> dict:  # empty if there is none
    "What the last good build of an assignment has written down."
    file = course / "built" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def is_fresh(folder: Path, course: Path) -> bool:
    "Whether the zip that is there is the one that would be made."
    name, record = folder.name, read_record(folder.name, course)
    made = [course / f"{name}.zip", course / "gradebook.db", *(course / step / name / f"{name}.ipynb" for step in ("source", "release"))]
    return all(path.exists() for path in made) and record.get("key") == key_of(folder) and record["zip"] == sha256_file(made[0])


def build(folder: Path, course: Path) -> dict:  # what is written down: key, zip, points, seconds
    "Build an assignment; nothing is written before all is known to be well. Raises `UserError`."
    name, key = folder.name, key_of(folder)
    source, files = build_source(folder / f"{name}.ipynb"), read_files(folder)
    check_ids(source)
    tests, manual = check_points(source)
    student, beside = strip(source), files | our_files(name, source)
    check_secrets(source, student, beside)
    seconds = try_out(source, student, files)
    if dump(generate(name, source, files, course)) != dump(student):
        raise UserError("nbgrader made another notebook than the one that was tried: look for settings of nbgrader in your home directory")
    data = pack(name, beside | {f"{name}.ipynb": dump(student).encode()})
    atomic_write(course / f"{name}.zip", data)
    record = {"key": key, "zip": sha256_file(course / f"{name}.zip"), "tests": tests, "manual": manual, "seconds": seconds}
    atomic_write(course / "built" / f"{name}.json", json.dumps(record) + "\n")
    return record


def build_all(names: Iterable[str], source: Path, course: Path, force: bool = False) -> list[str]:  # those that failed
    "Build what has changed, and print a line for each assignment and a table of all."
    failed, rows = [], []
    for name in names:
        start, folder = time.perf_counter(), source / name
        try:
            if not force and is_fresh(folder, course):
                say(f"{name}: as it was")
            else:
                say(f"{name}: its solution and what students get are examined")
                build(folder, course)
                say(f"{name}: {course / f'{name}.zip'}, {format_seconds(time.perf_counter() - start)}")
        except UserError as error:
            say(f"{name}: {error}" + ("; the last zip stays" if (course / f"{name}.zip").exists() else ""))
            failed.append(name)
        rows.append((name, read_record(name, course)))
    say(f"\n{'assignment':<16} {'points by tests':>15} {'by hand':>8} {'seconds':>8}")
    for name, record in rows:
        numbers = f"{record['tests']:>15g} {record['manual']:>8g} {record['seconds']:>8.1f}" if record else f"{'not built':>15}"
        say(f"{name:<16} {numbers}" + " (of the last good build)" * (name in failed and bool(record)))
    return failed


def main() -> int:  # exit code
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=ASSIGNMENTS, help="assignments; all if none is named")
    parser.add_argument("--all", action="store_true", help="build them whether or not something has changed")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ASSIGNMENTS):
        say(f"there is no assignment {min(unknown)}; choose from {', '.join(ASSIGNMENTS) or 'none'}")
        return 2
    return int(bool(build_all(arguments.names, SOURCE, COURSE, arguments.all)))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        say("interrupted; the zips that are there are whole")
        raise SystemExit(130) from None
