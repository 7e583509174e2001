"""Building what students get: a tiny assignment with a mistake of each kind."""
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "assignments"))
import release  # noqa: E402
import sources  # noqa: E402

import nanochat.examine as real_examine  # noqa: E402
from nanochat.common import UserError  # noqa: E402
from nanochat.grading import grade_all  # noqa: E402
from nanochat.submission import ROLES  # noqa: E402

NAME = "a9-tiny"
FLAGS = {kind: flags for flags, kind in ROLES.items()}

MERGE = '''def merge_pair(
    ids: tuple[int, ...],  # token ids
    pair: tuple[int, int],  # two neighbours
    new: int = FIRST,  # the id that replaces them
) -> tuple[int, ...]:  # shorter by one for each occurrence
    "Replace every occurrence of a pair, from left to right."
    ### BEGIN SOLUTION
    # from nanochat.bpe.merge_pair
    ### END SOLUTION'''
LONGEST = '''def longest(
    words: list[str],  # at least one
) -> Counter:  # word -> its length, for the longest
    "The longest word, counted."
    ### BEGIN SOLUTION
    found = max(words, key=len)
    ### END SOLUTION
    return Counter({found: len(found)})'''
TEST_MERGE = '''assert merge_pair((1, 2, 1, 2), (1, 2), 9) == (9, 9), "merge_pair((1, 2, 1, 2), (1, 2), 9) must be (9, 9)"
### BEGIN HIDDEN TESTS
overlapping = merge_pair((7, 7, 7), (7, 7), 8)
assert overlapping == (8, 7), f"three sevens must become (8, 7), not {overlapping}: go from left to right"
### END HIDDEN TESTS'''
CELLS = [
    ("", "title", "# Tiny", 0),
    ("locked", "setup", 'from collections import Counter\n\nfrom nanochat.examine import begin\n\nbegin("a9-tiny", builds=["nanochat.bpe"])\nFIRST = 256', 0),
    ("solution", "merge-pair", MERGE, 0),
    ("test", "test-merge", TEST_MERGE, 40),
    ("solution", "longest", LONGEST, 0),
    ("test", "test-longest", 'assert longest(["a", "bcd"]) == {"bcd": 3}, "the longest of a and bcd is bcd"', 30),
    ("manual", "explain", "Because no merge of later ones may come first.", 30),
]


def make_cell(kind, name, text, points):
    "A cell with nbgrader's metadata; text that begins as a sentence is Markdown."
    sort = "markdown" if re.match(r"# |[A-Z][a-z]+ ", text) else "code"
    cell = {"cell_type": sort, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    if sort == "code":
        cell |= {"outputs": [], "execution_count": None}
    if kind:
        grade, locked, solution = FLAGS[kind]
        cell["metadata"]["nbgrader"] = {"cell_type": sort, "grade": grade, "grade_id": name, "locked": locked, "schema_version": 3, "solution": solution,
                                        "task": False} | ({"points": points} if grade else {})
    return cell


def write_source(folder, changes=None, edit=None):
    "The tiny assignment, with other texts or points for some cells; `edit` changes the JSON."
    cells = [make_cell(kind, name, *(changes or {}).get(name, (text, points))) for kind, name, text, points in CELLS]
    notebook = sources.normalise({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    if edit:
        edit(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.ipynb").write_text(sources.dump(notebook))
    return folder


def fake_examine(source, submitted, files=None, limits=None, student_files=None, trust=False):
    "What the examiner does, without its walls: for these tests alone."
    theirs = {cell["id"]: sources.text_of(cell) for cell in json.loads(submitted)["cells"]}
    names, marks = {"__name__": "__main__"}, []
    for cell in source["cells"]:
        kind = sources.kind_of(cell)
        if cell["cell_type"] != "code":
            continue
        message = ""
        try:
            exec(theirs[cell["id"]] if kind == "solution" else sources.text_of(cell), names)
        except Exception as error:
            message = str(error) or type(error).__name__
        if kind == "test":
            most = cell["metadata"]["nbgrader"]["points"]
            marks.append(types.SimpleNamespace(id=cell["id"], points=0 if message else most, most=most, message=message, seconds=0.1))
    return types.SimpleNamespace(marks=marks, notes=[], seconds=0.2, notebook=source)


class Course:
    "A place with the tiny assignment, and what builds it."

    def __init__(self, folder):
        self.source, self.course = folder / "source" / NAME, folder / "course"
        self.zip = self.course / f"{NAME}.zip"

    def write(self, changes=None, edit=None):
        return write_source(self.source, changes, edit)

    def build(self, **kwargs):
        return release.build_all([NAME], self.source.parent, self.course, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def examiner():
    "The examiner is replaced."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nanochat.examine", types.SimpleNamespace(examine=fake_examine, begin=lambda *_, **__: None))
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "The tiny assignment, built once."
    course = Course(tmp_path_factory.mktemp("first"))
    course.write()
    assert course.build() == []
    return course


@pytest.fixture
def built(first, tmp_path):
    "A copy of the built one."
    shutil.copytree(first.source.parent.parent, tmp_path / "built")
    return Course(tmp_path / "built")


@pytest.fixture
def course(tmp_path):
    "One that isn't built, without files."
    return Course(tmp_path)


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def read_student(path):
    return json.loads(read_zip(path)[f"{NAME}/{NAME}.ipynb"])


def test_a_release(built, capsys):
    course = built
    (course.source / "words.txt").write_text("one two\n")
    assert course.build() == []
    files = read_zip(course.zip)
    assert list(files) == [f"{NAME}/{name}" for name in sorted([f"{NAME}.ipynb", *release.OURS, "words.txt"])]
    text = b"".join(files.values()).decode()
    assert "YOUR CODE HERE" in text and "YOUR ANSWER HERE" in text and "raise NotImplementedError()" in text
    for secret in ("overlapping", "merged.append", "key=len", "Because no merge", "BEGIN SOLUTION", "nanochat.bpe.merge_pair"):
        assert secret not in text
    student = read_student(course.zip)
    assert [cell["id"] for cell in student["cells"]] == [name for _, name, _, _ in CELLS]
    assert all(len(cell["metadata"]["nbgrader"]["checksum"]) == 32 for cell in student["cells"][1:])
    inlined = json.loads((course.course / "source" / NAME / f"{NAME}.ipynb").read_text())
    assert "merged.append(new)" in sources.text_of(inlined["cells"][2]) and "overlapping" in sources.text_of(inlined["cells"][3])
    assert re.search(rf"^{NAME} +70 +30 +0\.2$", capsys.readouterr().out, re.M)


def test_a_release_of_the_real_examiner_can_be_graded(course, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanochat.examine", real_examine)
    course.write()
    assert course.build() == []
    assert "configure_nbgrader" in (course.course / "nbgrader_config.py").read_text()
    folder = tmp_path / "submitted" / "ann" / NAME
    folder.mkdir(parents=True)
    solved = sources.solve(read_student(course.zip), json.loads((course.course / "source" / NAME / f"{NAME}.ipynb").read_text()))
    (folder / f"{NAME}.ipynb").write_text(sources.dump(solved))
    grade_all(tmp_path / "submitted", course.course, trust=True)
    (row,) = csv.DictReader((course.course / "marks.csv").read_text().splitlines())
    assert row["student"] == "ann" and float(row["tests"]) == 70


def test_the_gradebook_knows_the_cells(built):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{built.course / 'gradebook.db'}") as gradebook:
        assert gradebook.find_assignment(NAME).max_score == 100
        assert "overlapping" in gradebook.find_source_cell("test-merge", NAME, NAME).source  # hidden tests come back when it is marked


def test_the_same_bytes_elsewhere_and_nothing_without_a_change(built, course, capsys):
    before, dated = built.zip.read_bytes(), built.zip.stat().st_mtime_ns
    assert built.build() == [] and f"{NAME}: as it was" in capsys.readouterr().out
    assert built.zip.stat().st_mtime_ns == dated
    course.write()
    assert course.build() == [] and course.zip.read_bytes() == before
    built.zip.write_bytes(before[:-1])  # damaged
    assert built.build() == [] and built.zip.read_bytes() == before
    assert built.build(force=True) == [] and "as it was" not in capsys.readouterr().out


def test_what_a_release_depends_on(built, monkeypatch):
    keys = [release.key_of(built.source)]
    (built.source / "words.txt").write_text("one")
    keys.append(release.key_of(built.source))
    built.write({"explain": ("Another answer.", 30)})
    keys.append(release.key_of(built.source))
    whole = Path.read_bytes
    for module, counts in (("bpe.py", True), ("examine.py", (ROOT / "nanochat/examine.py").exists()), ("test_adapters.py", True), ("gpt.py", False)):
        monkeypatch.setattr(Path, "read_bytes", lambda path, module=module: whole(path) + b" " * (path.name == module))
        assert (release.key_of(built.source) != keys[-1]) is counts, module
    assert len({*keys}) == 3


def change_inside(old, new, text=MERGE):
    assert old in text
    return text.replace(old, new), 0


def outputs(notebook):
    notebook["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "merged.append(new)"}]


def metadata(notebook):
    notebook["cells"][3]["metadata"]["answer"] = "overlapping"


def nbgrader_metadata(notebook):
    notebook["cells"][3]["metadata"]["nbgrader"]["hint"] = "overlapping"


def notebook_metadata(notebook):
    notebook["metadata"]["hidden"] = "overlapping"


def attachment(notebook):
    notebook["cells"][0]["attachments"] = {"a.txt": {"text/plain": "b3ZlcmxhcHBpbmc="}}


def another_id(notebook):
    notebook["cells"][3]["id"] = "test-merging"


def twice(notebook):
    notebook["cells"][4]["id"] = notebook["cells"][4]["metadata"]["nbgrader"]["grade_id"] = "merge-pair"


FAILURES = {
    "missing name": ({"merge-pair": change_inside("bpe.merge_pair", "bpe.merge_pairs")}, None, "cell merge-pair: the package has no function nanochat.bpe.merge_pairs"),
    "missing module": ({"merge-pair": change_inside("nanochat.bpe", "nanochat.bp")}, None, "no function nanochat.bp.merge_pair"),
    "module alone": ({"merge-pair": change_inside("bpe.merge_pair", "bpe")}, None, "no function nanochat.bpe:"),
    "constant": ({"merge-pair": change_inside("bpe.merge_pair", "bpe.SPLIT_PATTERN")}, None, "no function nanochat.bpe.SPLIT_PATTERN"),
    "class": ({"merge-pair": change_inside("bpe.merge_pair", "common.Ranks")}, None, "nanochat.common.Ranks is not a function"),
    "renamed parameter": ({"merge-pair": change_inside("new: int", "token: int")}, None, "has the parameters (ids, pair, new) and the cell's function (ids, pair, token)"),
    "outside of a function": ({"merge-pair": ("### BEGIN SOLUTION\nif True:\n    # from nanochat.bpe.merge_pair\n    pass\n### END SOLUTION", 0)}, None, "stands in no function"),
    "points": ({"test-merge": (TEST_MERGE, 41)}, None, "its points are 71 by tests and 30 by hand, 101 in all: make them 100"),
    "wrong solution": ({"longest": change_inside("max(", "min(", LONGEST)}, None, "its own solution fails test-longest: the longest of a and bcd is bcd"),
    "free points": ({"test-longest": ("assert True, 'nothing'", 30)}, None, "test-longest gives 30 points for nothing"),
    "no end": ({"test-merge": (TEST_MERGE.replace("### END HIDDEN TESTS", ""), 40)}, None, "No end hidden tests statement found"),
    "another end": ({"test-merge": (TEST_MERGE.replace("### END", "## END"), 40)}, None, "cell test-merge shows something else than its source"),
    "told in the text": ({"title": ("# Tiny\n\nTry `merge_pair((7, 7, 7), (7, 7), 8)`:\n\n    " + "\n    ".join(TEST_MERGE.splitlines()[2:4]), 0)}, None,
                         "cell title shows what is secret in cell test-merge: 'overlapping = merge_pair"),
    "metadata": ({}, metadata, "cell test-merge carries answer"),
    "nbgrader's metadata": ({}, nbgrader_metadata, "nbgrader says: Notebook failed to validate"),
    "notebook's metadata": ({}, notebook_metadata, "metadata of its own"),
    "attachment": ({}, attachment, "cell title carries attachments"),
    "another id": ({}, another_id, "cell test-merging: make its id unique"),
    "an id twice": ({}, twice, "merge-pair"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_a_sentence_and_the_last_zip_stays(built, capsys, what):
    course, before = built, built.zip.read_bytes()
    changes, edit, sentence = FAILURES[what]
    course.write(changes, edit)
    assert course.build() == [NAME]
    said = capsys.readouterr().out
    assert sentence in said and "; the last zip stays\n" in said and "(of the last good build)" in said, said
    assert course.zip.read_bytes() == before


def test_outputs_are_taken_out(built):
    course = built
    course.write(edit=outputs)
    assert course.build() == [] and b"merged.append" not in course.zip.read_bytes()


@pytest.mark.parametrize("file", ["notes.ipynb", "adapters.py", "large.bin", "folder"])
def test_files_that_cannot_be_released(course, capsys, file):
    course.write()
    if file == "folder":
        (course.source / file).mkdir()
    else:
        (course.source / file).write_bytes(bytes(1_000_001 if file == "large.bin" else 1))
    assert course.build() == [NAME] and f"{file} can't be released" in capsys.readouterr().out and not course.zip.exists()


def test_hidden_files_stay_and_data_can_leak_too(built, capsys):
    course = built
    (course.source / ".ipynb_checkpoints").mkdir()
    (course.source / ".ipynb_checkpoints" / f"{NAME}-checkpoint.ipynb").write_text("overlapping")
    assert course.build(force=True) == [] and b"overlapping" not in course.zip.read_bytes()
    (course.source / "tests.txt").write_text("   " + "\n".join(TEST_MERGE.splitlines()[2:4]))
    assert course.build() == [NAME] and "tests.txt shows what is secret in cell test-merge" in capsys.readouterr().out


# Killed, interrupted, called from the command line


PROGRAM = """
import sys, time, types
sys.path[:0] = {paths!r}
import release, test_release
def wait(*arguments, **keywords):
    print("examining", flush=True)
    time.sleep(60)
sys.modules["nanochat.examine"] = types.SimpleNamespace(examine=test_release.fake_examine, begin=lambda *_, **__: None)
import nbgrader.converters
if {place!r} == "examine":
    sys.modules["nanochat.examine"].examine = wait
elif {place!r} == "generate":
    nbgrader.converters.GenerateAssignment.start = wait
else:
    release.pack = wait
raise SystemExit(release.build_all([{name!r}], release.Path({source!r}), release.Path({course!r})))
"""


@pytest.mark.parametrize("place", ["examine", "generate", "pack"])
def test_killed_anywhere_the_last_zip_stays_and_the_next_build_is_whole(built, place):
    before = built.zip.read_bytes()
    built.write({"explain": ("Another answer.", 30), "title": ("# Tiny, and changed", 0)})
    code = PROGRAM.format(paths=[str(ROOT / "assignments"), str(ROOT / "tests"), str(ROOT)], place=place, name=NAME, source=str(built.source.parent), course=str(built.course))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert any(line == "examining\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert built.zip.read_bytes() == before
    assert built.build() == [] and "# Tiny, and changed" in sources.text_of(read_student(built.zip)["cells"][0])
    assert not [path.name for path in built.course.rglob(".*")], "nothing is left over"


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own
def test_a_course_with_submissions_refuses_other_cells(built, capsys):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{built.course / 'gradebook.db'}") as gradebook:
        gradebook.add_student("ada")
        gradebook.add_submission(NAME, "ada")
    built.write({"title": ("# Tiny, and changed", 0)})
    assert built.build() == []  # text may change
    before = built.zip.read_bytes()
    built.write(edit=lambda notebook: notebook["cells"].append(make_cell("manual", "more", "And more.", 0)))
    assert built.build() == [NAME] and built.zip.read_bytes() == before
    assert "nbgrader says: RuntimeError: Cannot add or remove cells" in capsys.readouterr().out


def test_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(release, "ASSIGNMENTS", ["a1-tokenizer"])
    monkeypatch.setattr(sys, "argv", ["release.py", "a7-nothing"])
    assert release.main() == 2 and capsys.readouterr().out == "there is no assignment a7-nothing; choose from a1-tokenizer\n"


# Solutions


def test_bodies_of_functions_and_methods():
    for name in ("nanochat.bpe.merge_pair", "nanochat.attention.rotary_tables", "nanochat.costs.predict_run", "nanochat.gpt.GPT.forward"):
        body = sources.take_body(name, sources.parameter_names(sources.find_function(name)[1]))
        assert body and not body.startswith(('"', "'", " ")) and "from ." not in body


def test_comments_and_imports_come_with_the_body(monkeypatch):
    module = types.ModuleType("nanochat.stand_in")
    file = ROOT / "nanochat" / "stand_in.py"
    text = '''def work(
    x,  # a number
):
    "Say it."
    # first a reason
    from .bpe import merge_pair

    return merge_pair, x  # and this


class Box:
    @staticmethod
    def lift(a, *rest, b=1, **others):
        "Lift."
        if a:
            # deep
            return b
        return rest


def long():
    "Long."
    return """
  not indented
"""
'''
    import linecache

    linecache.cache[str(file)] = (len(text), None, text.splitlines(keepends=True), str(file))
    exec(compile(text, str(file), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "nanochat.stand_in", module)
    module.__file__ = str(file)
    assert sources.take_body("nanochat.stand_in.work", ["x"]) == "# first a reason\nfrom nanochat.bpe import merge_pair\n\nreturn merge_pair, x  # and this"
    cell = 'def lift(a, *rest, b=1, **others):\n    "Lift."\n    ### BEGIN SOLUTION\n    # from nanochat.stand_in.Box.lift\n    ### END SOLUTION'
    assert sources.inline(cell).splitlines()[3:8] == ["    if a:", "        # deep", "        return b", "    return rest", "    ### END SOLUTION"]
    with pytest.raises(UserError, match="the cell's function .a, b.: use the same names"):
        sources.take_body("nanochat.stand_in.Box.lift", ["a", "b"])


def test_links_lead_to_the_site():
    text = "See [10](../../../nbs/10_bpe.ipynb#merging) and [a page](../../../docs/laptop.qmd), [this](#here)."
    assert sources.LINK.sub(rf"]({sources.SITE}/\1.html", text) == (
        "See [10](https://nanochat.github.io/nanochat/nbs/10_bpe.html#merging) and [a page](https://nanochat.github.io/nanochat/docs/laptop.html), [this](#here).")


def test_a_source_comes_into_its_form():
    notebook = {"cells": [make_cell("test", "test-merge", TEST_MERGE, 40)], "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5}
    cell = notebook["cells"][0]
    wanted = sources.dump(sources.normalise(json.loads(json.dumps(notebook))))
    cell |= {"id": "0a1b2c3d", "outputs": [{"output_type": "stream"}], "execution_count": 3, "source": TEST_MERGE}
    cell["metadata"] |= {"collapsed": True, "editable": False, "tags": ["x"]}
    assert sources.dump(sources.normalise(notebook)) == wanted


# Functions in files


ADAPTERS = '''"""Thin functions between the tests and your own files: write each here, or import yours and call it; then `python -m pytest`."""
from collections import Counter


# a9-tiny


FIRST = 256


def merge_pair(
    ids: tuple[int, ...],  # token ids
    pair: tuple[int, int],  # two neighbours
    new: int = FIRST,  # the id that replaces them
) -> tuple[int, ...]:  # shorter by one for each occurrence
    "Replace every occurrence of a pair, from left to right."
    raise NotImplementedError("merge_pair is not written yet")


def longest(
    words: list[str],  # at least one
) -> Counter:  # word -> its length, for the longest
    "The longest word, counted."
    raise NotImplementedError("longest is not written yet")
'''


@pytest.fixture
def unzipped(built, tmp_path):
    "What a student has unpacked; and what runs pytest there."
    with zipfile.ZipFile(built.zip) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / NAME
    begin = 'import sys, types\nsys.modules["nanochat.examine"] = types.SimpleNamespace(begin=lambda *_, **__: None)\n'
    (folder / "conftest.py").write_text(begin)

    def run(*arguments):
        done = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *arguments], cwd=folder, capture_output=True, text=True)
        return done.stdout
    return folder, run


def test_adapters_are_unwritten_functions(unzipped):
    folder, run = unzipped
    assert (folder / "adapters.py").read_text() == ADAPTERS
    said = run("-v")
    assert re.search(r"^test_adapters\.py::test_cell\[test-merge\] SKIPPED", said, re.M) and "2 skipped" in said
    assert re.search(r"^SKIPPED .* merge_pair is not written yet$", said, re.M)


def test_written_functions_are_tested_with_the_cells_own_words(unzipped):
    folder, run = unzipped
    text = ADAPTERS.replace('raise NotImplementedError("merge_pair is not written yet")', "return (9, 9)")
    (folder / "mine.py").write_text("def find(words):\n    return {words[0]: 3}\n")
    (folder / "adapters.py").write_text(text.replace('raise NotImplementedError("longest is not written yet")', "import mine\n    return mine.find(words)"))
    said = run()
    assert "1 failed, 1 passed" in said and "the longest of a and bcd is bcd" in said and "Traceback" not in said
    (folder / "mine.py").write_text("def find(words):\n    return words.length\n")
    said = run("-k", "test-longest")
    assert "mine.py:2: AttributeError" in said and "1 failed, 1 deselected" in said


def test_tests_share_names_in_order_and_alone(built, tmp_path):
    built.write({"test-merge": ("shared = 5\n" + TEST_MERGE, 40), "test-longest": ('assert longest(["a" * shared])["aaaaa"] == 5, "five"', 30)})
    assert built.build() == []
    with zipfile.ZipFile(built.zip) as archive:
        archive.extractall(tmp_path)
    solved = ADAPTERS.replace('raise NotImplementedError("longest is not written yet")', "return Counter({max(words, key=len): len(max(words, key=len))})")
    (tmp_path / NAME / "adapters.py").write_text(solved)
    (tmp_path / NAME / "conftest.py").write_text('import sys, types\nsys.modules["nanochat.examine"] = types.SimpleNamespace(begin=lambda *_, **__: None)\n')
    for arguments, outcome in (((), "1 passed, 1 skipped"), (("-k", "longest"), "1 passed, 1 deselected")):
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=tmp_path / NAME, capture_output=True, text=True)
        assert outcome in done.stdout


def test_the_suite_leaves_the_runner_alone():
    assert (ROOT / "pytest.ini").read_text().splitlines()[1] == "testpaths = tests"


# The environment


def look(*flags, path="", version=""):
    text = (ROOT / "assignments" / "check_environment.py").read_text().replace('MADE_WITH = ""', f'MADE_WITH = "{version}"')
    done = subprocess.run([sys.executable, *flags, "-"], input=text.replace("__file__", "'check_environment.py'"), capture_output=True, text=True,
                          env={"PYTHONPATH": path, "PATH": ""})
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_environment_of_nothing():
    code, said = look("-I", "-S")
    assert code == 1 and "no  nanochat    is not here\n      git clone" in said and "torch" not in said and len(said.splitlines()) < 15


def test_the_environment_of_today(tmp_path):
    code, said = look(version="0.0.1", path=str(ROOT))
    assert code == 1 and re.search(r"no  nanochat    [\d.]+, another than the 0\.0\.1 of this assignment\n      in the directory nanochat: git pull && make setup", said)
    assert re.search(r"ok  torch       2", said) and re.search(r"ok  jupyterlab  4", said)
    (tmp_path / "torch.py").write_text("raise OSError('a broken library')")
    code, said = look(path=str(tmp_path))
    assert code == 1 and re.search(r"no  torch       is not here\n      \S+ -m pip install torch", said)
