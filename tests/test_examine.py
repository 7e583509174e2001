"""The examiner: hostile notebooks cost their own points and no others, and nothing that is in them changes what tests see."""
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from nbformat import from_dict, validate

import nanochat.examine as examine_module
from nanochat.common import UserError
from nanochat.examine import ExamLimits, Outputs, examine, read_done, readable_paths
from nanochat.sandbox import find_mode
from nanochat.submission import MOST_CELLS, MOST_FILE, find_built_import, make_cell, read_builds, restore, show_plainly, strip_text
from nanochat.values import DTYPES, join_message, join_value, split_value

FAST = ExamLimits(cell_seconds=2, call_seconds=1, seconds=30, memory=2**29, output_characters=2000, picture_bytes=100_000)
STUB = "# YOUR CODE HERE\n    raise NotImplementedError()"


def make(text, role="", name="", points=0, kind="code"):
    "A cell of a notebook."
    return make_cell(kind, text, name or f"free-{abs(hash(text))}", role, points)


def book(*cells):
    return from_dict({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def solve(signature, body):
    return f"def {signature}:\n    ### BEGIN SOLUTION\n    {body}\n    ### END SOLUTION\n"


SOURCE = book(
    make('from nanochat.examine import begin\nbegin("a0-test", builds=["nanochat.bpe", "nanochat.tokenizer"])', "locked", "setup"),
    make("# Doubling", kind="markdown"),
    make(solve("double(x)", "return x + x"), "solution", "double"),
    make("assert double(2) == 4, 'double(2) is 4'\n### BEGIN HIDDEN TESTS\n"
         "assert double('plugh-marker') == 'plugh-markerplugh-marker', 'texts, too'\n### END HIDDEN TESTS\n", "test", "test-double", 5),
    make(solve("other(x)", "return [x]"), "solution", "other"),
    make("assert other(3) == [3], 'a list'", "test", "test-other", 3),
    make("Why?", "manual", "why", 2, "markdown"))


def submit(double="def double(x): return x + x", other="def other(x): return [x]", extra=None):
    "A student's file."
    notebook = copy.deepcopy(SOURCE)
    for cell in notebook.cells:
        cell.source = strip_text(cell)
    notebook.cells[2].source, notebook.cells[4].source = double, other
    if extra:
        notebook.cells.insert(5, from_dict(make(extra)))
    return json.dumps(notebook).encode()


def points(examined):
    return {mark.id: mark.points for mark in examined.marks}


def find(examined, name):
    return next(cell for cell in examined.notebook.cells if cell.id == name)


def shown(examined, name="double"):
    cell = find(examined, name)
    return "".join(o.get("text", "") + o.get("evalue", "") + o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", []))


def family():
    "All processes that descend from this one."
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [(int(pid), int(parent), args) for pid, parent, args in (line.split(None, 2) for line in listed)]
    found = {os.getpid()}
    for _ in range(6):
        found |= {pid for pid, parent, args in rows if parent in found and not args.startswith("ps ")}
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    "No process and no file is left behind by any test of this file."
    if find_mode() == "guards" and not os.environ.get("CI"):
        pytest.skip("this machine allows no namespaces")
    before = family()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("nanochat-")]
    assert family() <= before


def test_a_solution_and_a_blank():
    good, blank = examine(SOURCE, submit(), limits=FAST), examine(SOURCE, json.dumps(SOURCE).encode().replace(b"return x + x", b"pass"), limits=FAST)
    assert points(good) == {"test-double": 5, "test-other": 3} and not good.notes and all(m.message == "" for m in good.marks)
    assert points(blank) == {"test-double": 0, "test-other": 3} and blank.marks[0].message == "AssertionError: double(2) is 4"
    validate(good.notebook)
    assert [m.most for m in good.marks] == [5, 3] and 0 < good.seconds < 60


WRONG = "def double(x): return 0\n"
# what it is, the cell, points for double, part of the message; the other test must always pass
HOSTILE = [
    ("wrong", WRONG, 0, "double(2) is 4"),
    ("raises", "def double(x): raise KeyError('nope')", 0, "KeyError: 'nope'"),
    ("its own error", "class E(ValueError): pass\ndef double(x): raise E('mine')", 0, "ValueError: E: mine"),
    ("an error without text", "class E(Exception):\n    def __str__(self): return 1 / 0\ndef double(x): raise E", 0, ""),
    ("syntax", "def double(x:", 0, "there is no double"),
    ("replaces the checks of Python", "import builtins\nbuiltins.AssertionError = builtins.Warning = type('E', (Exception,), {})\n" + WRONG, 0, "double(2)"),
    ("hides exceptions", "import sys\nsys.excepthook = sys.settrace = lambda *a: None\n" + WRONG, 0, "double(2)"),
    ("patches the package", "import nanochat.examine as e\ne.rebuild_error = e.find_built_import = e.Mark = lambda *a, **k: None\n"
     "e.TestWorker.run_cell = lambda *a, **k: {'error': None}\n" + WRONG, 0, "double(2)"),
    ("always equal", "class S(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef double(x): return S()", 0, "double(2)"),
    ("always equal, no text", "class S:\n    def __eq__(self, other): return True\ndef double(x): return S()", 0, "type S can't be handed over"),
    ("a number that is equal", "class I(int):\n    def __eq__(self, other): return True\ndef double(x): return I(7)", 0, "double(2)"),
    ("an endless cell", "def double(x): return x + x\nwhile True: pass", 5, ""),
    ("an endless function", "def double(x):\n    while True: pass", 0, "double was stopped after 1 s"),
    ("deaf to its alarm", "import signal, time\ndef double(x):\n    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n    time.sleep(99)", 0, "double didn't end within 3 s"),
    ("catches everything", "import time\ndef double(x):\n    while True:\n        try: time.sleep(9)\n        except BaseException: pass", 0, "double didn't end"),
    ("os._exit in a cell", "import os\nos._exit(0)", 0, "there is no double"),
    ("os._exit in a function", "import os\ndef double(x): os._exit(0)", 0, "double ended the process"),
    ("sys.exit in a cell", "import sys\ndef double(x): return x + x\nsys.exit(0)", 5, ""),
    ("sys.exit in a function", "import sys\ndef double(x): sys.exit(0)", 0, "SystemExit"),
    ("crashes", "import ctypes\ndef double(x): ctypes.string_at(0)", 0, "double ended the process"),
    ("stops itself", "import os, signal\ndef double(x): os.kill(os.getpid(), signal.SIGSTOP)", 0, "double didn't end"),
    ("kills its parent", "import os\ndef double(x): os.kill(os.getppid(), 9)", 0, "PermissionError"),
    ("kills everything", "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\ndef double(x): return x + x", 5, ""),
    ("closes its pipes", "import os\nos.closerange(0, 99)\ndef double(x): return x + x", 0, ""),
    ("writes into all pipes", "import os\ndef double(x):\n    for n in range(3, 64):\n        try: os.write(n, b'V' * 99)\n        except OSError: pass", 0, "wrote into"),
    ("announces 2**63 bytes", "import os\ndef double(x):\n    for n in range(3, 64):\n        try: os.write(n, b'V' + b'\\x7f' * 8)\n        except OSError: pass", 0,
     "wrote into"),
    ("forks", "import os\nos.fork()\ndef double(x): return x + x", 5, ""),
    ("forks in a function", "import os\ndef double(x):\n    os.fork()\n    return x + x", 5, ""),
    ("a fork bomb", "import os\ndef double(x):\n    while True: os.fork()", 0, ""),
    ("a thread without end", "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\ndef double(x): return x + x", 5, ""),
    ("1 GB of output", "for _ in range(1000): print('x' * 10**6)\ndef double(x):\n    print('y' * 10**7)\n    return x + x", 5, ""),
    ("1 GB past Python", "import os\nfor _ in range(1000): os.write(1, b'x' * 10**6)\ndef double(x): return x + x", 5, ""),
    ("fills the disk", "with open('big', 'wb') as f:\n    while True: f.write(bytes(10**6))\n", 0, "there is no double"),
    ("fills the memory", "x = []\ndef double(y):\n    while True: x.append(bytearray(10**7))", 0, "MemoryError"),
    ("returns 100 MB", "def double(x): return 'x' * 10**8", 0, "100 MB"),
    ("an integer of a million digits", "def double(x): return 10**1_000_000", 0, "bits is too large"),
    ("an integer of 10,000 digits", "def double(x): return 10**10_000", 0, "double(2)"),
    ("a list in itself", "l = []\nl.append(l)\ndef double(x): return l", 0, "contains itself"),
    ("deep lists", "def double(x):\n    l = []\n    for _ in range(100_000): l = [l]\n    return l", 0, "levels of lists"),
    ("a list of itself twice", "l = []\nfor _ in range(49): l = [l, l]\ndef double(x): return l", 0, ""),
    ("a generator", "def double(x): yield x", 0, "type generator can't be handed over"),
    ("NaN", "def double(x): return float('nan')", 0, "double(2)"),
    ("half a character", "print('\\ud800', '\\x1b[31mred', '\\0')\ndef double(x): raise ValueError('\\ud800\\0')", 0, "ValueError: ?"),
    ("network", "import socket\ndef double(x): socket.create_connection(('127.0.0.1', 22), 1)", 0, "OSError"),
    ("shell", "def double(x): return x + x\n!cat /etc/passwd", 5, ""),
    ("imports what it should build", "from nanochat.bpe import merge_pair\ndef double(x): return x + x", 0, "there is no double"),
    ("imports it by name", "import importlib as i\nm = i.import_module('nanochat.' + 'bpe')\ndef double(x): return x + x", 0, "there is no double"),
    ("imports it when called", "def double(x):\n    m = __import__('nanochat.' + 'bpe')\n    return x + x", 0, "is what you build in this assignment"),
    ("imports it in exec", "exec('import nanochat.' + 'tokenizer')\ndef double(x): return x + x", 0, "there is no double"),
    ("imports it from where it was handed on", "from nanochat.conversation import Tokenizer as double", 0, "there is no double"),
    ("takes what was handed on", "import nanochat.conversation as m\ndouble = m.Tokenizer", 0, "nanochat.tokenizer is what you build"),
    ("imports it as its neighbour", "__package__ = 'nanochat'\nfrom .bpe import merge_pair\ndef double(x): return x + x", 0, "there is no double"),
]


@pytest.mark.parametrize("text, expected, message", [pytest.param(*row[1:], id=row[0]) for row in HOSTILE])
def test_each_costs_its_own_points(text, expected, message):
    examined = examine(SOURCE, submit(text), limits=FAST)
    assert points(examined) == {"test-double": expected, "test-other": 3}, examined.marks
    assert message in examined.marks[0].message and examined.seconds < 25
    assert not any(word in text for word in ("bpe", "tokenizer", "Tokenizer")) or "is what you build" in shown(examined) + examined.marks[0].message
    validate(examined.notebook)
    written = json.dumps(examined.notebook)
    assert "plugh" not in written and "plugh" not in "".join(examined.notes) and len(written) < 40_000
    written.encode()


SEARCH = """
import gc, os, re, sys
def search():
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals)
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (str, bytes, list, tuple, dict, set)):
            yield from (text for text in (thing if not isinstance(thing, (str, bytes)) else [thing]) if isinstance(text, str))
    for top in ('/tmp', os.path.dirname(nanochat.__file__) + '/..', '/root', '/home', '/proc'):
        for folder, _, names in os.walk(top):
            if '/lib/python' not in folder:
                yield from (open(os.path.join(folder, name), errors='ignore').read(10**6) for name in names)
import nanochat
found = [text[:300] for text in search() if re.search('plugh-marker(?=plugh)', text)]
print(len(found), os.environ)
def double(x): return x + x
"""


def test_who_breaks_their_own_process_gains_nothing():
    for code in ("from IPython import get_ipython\nget_ipython().run_cell = lambda *a, **k: None\n", "import builtins\nbuiltins.isinstance = lambda *a: True\n",
                 "import json\njson.dumps = lambda *a: 'x'\n", "import signal\nsignal.setitimer = None\n", "import builtins\nbuiltins.len = None\n",
                 "import sys\nsys.modules.clear()\n", "del __builtins__\nglobals().clear()\n"):
        assert points(examine(SOURCE, submit(code + WRONG), limits=FAST))["test-double"] == 0, code


def test_hidden_tests_are_nowhere_to_be_found(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "xyzzy")
    (tmp_path / "tests.ipynb").write_text(json.dumps(SOURCE))
    limits = ExamLimits(cell_seconds=50)
    examined = examine(SOURCE, submit(SEARCH), limits=limits)
    assert points(examined)["test-double"] == 5
    assert shown(examined).startswith("0 environ") and "xyzzy" not in shown(examined)
    planted = shown(examine(SOURCE, submit(SEARCH), {}, limits, {"mine.txt": b"plugh-markerplugh-marker"}))
    assert not planted.startswith("0 ") and "environ" in planted  # the search finds what is there


def test_the_student_sees_the_package_and_nothing_beside_it():
    package = Path(examine_module.__file__).parent
    code = f"import os\nprint(os.listdir({str(package.parent)!r}), os.listdir('.'), os.path.exists('/home'), os.getuid())\ndef double(x): return x + x"
    text = shown(examine(SOURCE, submit(code), {"data.txt": b"1"}, FAST, {"adapters.py": b"x = 1"}))
    if "site-packages" not in str(package):
        inside = [name for name in (".venv",) if Path(sys.prefix).resolve() == package.parent / name]  # a virtual environment is where Python's library is
        assert text.startswith(f"{[*inside, 'nanochat']} ") and (package.parent / "tests").exists()
    assert "'adapters.py'" in text and "'data.txt'" in text and "False" in text and not text.endswith(" 0\n")
    assert str(package) in readable_paths()[0] and str(package.parent) not in readable_paths()[0]


FORGE = """
import gc
from nanochat.values import Wire, join_message, join_value
wire = next(thing for thing in gc.get_objects() if isinstance(thing, Wire))
"""


@pytest.mark.parametrize("text, expected", [
    (FORGE + "for _ in range(9): wire.send(b'V', join_value({'value': 4}))\ndef double(x): return 0", 0),
    (FORGE + "wire.send(b'D', join_message({'outputs': [], 'error': None, 'late': False}))\ndef double(x): return 0", 0),
    (FORGE + "wire.send(b'D', join_message({'outputs': [{'name': 'html', 'text': '<script>'}], 'error': 3}))\ndef double(x): return 0", 0),
    (FORGE + "def double(x):\n    wire.send(b'D', join_message({'error': None}))\n    return 0", 0),
    (FORGE + "def double(x):\n    wire.send(b'V', b'')\n    return 0", 0),
    (FORGE + "import nanochat.values as e\ne.pack = lambda *a: {'tensor': ['float32', [10**6, 10**6]]}\ndef double(x): return 0", 0)])
def test_forged_messages(text, expected):
    examined = examine(SOURCE, submit(text, other="import importlib, nanochat.examine\nimportlib.reload(nanochat.examine)\ndef other(x): return [x]"), limits=FAST)
    assert points(examined)["test-double"] == expected and len(examined.marks) == 2
    assert "script" not in json.dumps([c.get("outputs") for c in examined.notebook.cells])


@pytest.mark.parametrize("payload", [
    b"", b"\0\0\0\5[1, 2", b"\xff\xff\xff\xff{}", join_message([]), join_message({"value": {"list": []}}), join_message({"value": {}}),
    join_message({"value": {"a": 1, "b": 2}}), join_message({"value": {"int": "1" * 10**5}}), join_message({"value": {"int": "zz"}}),
    join_message({"value": {"int": 3}}), join_message({"value": {"bytes": -1}}), join_message({"value": {"bytes": 10**18}}),
    join_message({"value": {"bytes": 4}}, b"abc"), join_message({"value": 1}, b"left over"), join_message({"value": {"dict": [[[], 1]]}}),
    join_message({"value": {"dict": 3}}), join_message({"value": {"tensor": ["float32", [2, 2]]}}, bytes(15)),
    join_message({"value": {"tensor": ["float32", [2, 2]]}}, bytes(17)), join_message({"value": {"tensor": ["float32", [-1, -4]]}}, bytes(16)),
    join_message({"value": {"tensor": ["float32", [2.0, 2]]}}, bytes(16)), join_message({"value": {"tensor": ["float32", [True, 4]]}}, bytes(16)),
    join_message({"value": {"tensor": ["object", [1]]}}, bytes(8)), join_message({"value": {"array": ["O", [1]]}}, bytes(8)),
    join_message({"value": {"tensor": ["float32", [1] * 99]}}, bytes(4)), join_message({"value": {"tensor": ["float32", [0, 10**15]]}}),
    join_message({"value": {"array": ["float32", "22"]}}, bytes(16)), join_message({"value": {"tensor": ["manual_seed", [1]]}}, bytes(4)),
    (len(b"[" * 10**5)).to_bytes(4, "big") + b"[" * 10**5, join_message({"value": {"tuple": 3}}), join_message({"value": {"exec": "1"}})])
def test_no_lie_gets_through(payload):
    with pytest.raises(ValueError, match="no plain value"):
        split_value(payload)


def test_values_cross_unchanged():
    import numpy
    import torch

    class Text(str):
        pass

    values = {"none": None, "true": True, "int": -(2**70), "float": 0.1 + 0.2, "inf": float("-inf"), "text": "a\ud800\0\u00e4", "bytes": b"\0\xff",
              "list": [1, [2.0, (True, None)]], "dict": {1: "a", (2, "b"): [], None: {b"k": 1.5}}, "empty": [(), [], {}, "", b""]}
    back = split_value(join_value(values))
    assert back == values and repr(back) == repr(values)
    assert type(split_value(join_value({"text": Text("a")}))["text"]) is str
    for dtype in DTYPES:
        tensor = (torch.arange(6).reshape(2, 3) % 2).to(getattr(torch, dtype))
        for value in (tensor, tensor.T, tensor[0, 1], tensor[:0], tensor.clone().requires_grad_(tensor.is_floating_point())):
            got = split_value(join_value({"value": value}))["value"]
            assert got.dtype == value.dtype and got.shape == value.shape and torch.equal(got, value.detach()) and not got.requires_grad
        if dtype != "bfloat16":
            array = numpy.array([[0, 1], [1, 0]]).astype(dtype)
            for value in (array, array.T[:, 1], array[:0], array[0, 1]):
                got = split_value(join_value({"value": value}))["value"]
                assert type(got) is type(value) and got.dtype == value.dtype and got.shape == value.shape and numpy.array_equal(got, value)
    assert torch.isnan(split_value(join_value({"value": torch.tensor([float("nan")])}))["value"]).all()
    lie = split_value(join_message({"value": {"tensor": ["bool", [2]]}}, b"\x07\x00"))["value"]
    assert lie.view(torch.uint8).tolist() == [1, 0]


TORCH = book(
    make("import torch\nfrom nanochat.examine import begin\nbegin('a0-torch', builds=['nanochat.gpt'])", "locked", "setup"),
    *[cell for name in "abcdef" for cell in (
        make(solve(f"{name}(x)", "return x * 2"), "solution", name),
        make(f"x = torch.arange(3.0)\nassert torch.allclose({name}(x), 2 * x), '{name} doubles'", "test", f"test-{name}", 1))])


def test_tensors():
    bodies = {"a": "def a(x): return x * 2", "b": "torch.allclose = torch.equal = torch.Tensor.__eq__ = lambda *a, **k: True\ndef b(x): return x",
              "c": "def c(x): return x * float('nan')", "d": "def d(x): return torch.zeros(40_000, 1000)", "e": "def e(x): return x.mul_(2).requires_grad_()",
              "f": "import nanochat.gpt\ndef f(x): return x * 2"}
    notebook = copy.deepcopy(TORCH)
    for cell in notebook.cells:
        cell.source = bodies.get(cell.id, cell.source)
    examined = examine(TORCH, json.dumps(notebook).encode(), limits=ExamLimits(seconds=300))
    assert points(examined) == {"test-a": 1, "test-b": 0, "test-c": 0, "test-d": 0, "test-e": 1, "test-f": 0}
    messages = [mark.message for mark in examined.marks]
    assert "b doubles" in messages[1] and "160 MB" in messages[3] and "there is no f" in messages[5]
    assert any("imports nanochat.gpt" in note for note in examined.notes)


def test_outputs():
    code = ("import sys\nprint('out')\nprint('err', file=sys.stderr)\nfrom IPython.display import HTML, display\ndisplay(HTML('<script>alert(1)</script>'))\n"
            "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n%time 3")
    cell = find(examine(SOURCE, submit(extra=code), limits=ExamLimits()), "extra-2")
    assert cell.source == code and "script" not in json.dumps(cell.outputs)
    assert [o.get("name") or list(o.data) for o in cell.outputs][:2] == ["stdout", "stderr"] and "out\n" in cell.outputs[0].text
    assert ["image/png"] in [list(o.data) for o in cell.outputs if o.output_type == "display_data"] and cell.outputs[-1].data["text/plain"] == "3"


def test_outputs_are_bounded():
    picture = {"name": "picture", "text": "iVBORw0KGgo" + "A" * (10**6 + 1)}
    done = {"outputs": [{"name": "stdout", "text": "x" * 10**5}] * 50 + [picture] * 2, "error": None}
    assert len(json.dumps(read_done(b"D", join_message(done), FAST)["outputs"])) < 3000
    small = {"name": "picture", "text": "iVBORw0KGgoA"}
    assert read_done(b"D", join_message({"outputs": [small], "error": None}), FAST)["outputs"][0].data == {"image/png": "iVBORw0KGgoA"}
    for lie in ({"outputs": [small | {"text": "not base64"}]}, {"outputs": [small | {"text": 3}]}, {"outputs": [{"name": "value", "text": []}]},
                {"outputs": 3}, {"error": 3}, {"error": {"names": []}}, []):
        with pytest.raises(examine_module.Stopped):
            read_done(b"D", join_message({"outputs": [], "error": None} | lie if lie else []), FAST)
    assert read_done(b"D", join_message({"outputs": [small | {"text": "PHN2Zz4="}], "error": None}), FAST)["outputs"] == []  # it isn't a PNG
    outputs = Outputs(FAST)
    for _ in range(9):
        outputs.add_data({"image/png": b"\x89PNG" + bytes(20_000)})
    assert len(outputs.items) == 3


def test_an_error_shows_the_students_lines():
    cell = find(examine(SOURCE, submit("def double(x):\n    half = x\n    return half.no\n"), limits=FAST), "test-double")
    error = cell.outputs[0]
    assert error.output_type == "error" and error.traceback == ["double, line 3: return half.no", "AttributeError: 'int' object has no attribute 'no'"]
    assert cell.source == "assert double(2) == 4, 'double(2) is 4'"


def test_nbgrader_reads_the_marks():
    utils = pytest.importorskip("nbgrader.utils")
    cells = examine(SOURCE, submit(WRONG), limits=FAST).notebook.cells
    assert [utils.determine_grade(c) for c in cells if c.metadata.get("nbgrader", {}).get("points") and c.cell_type == "code"] == [(0, 5), (3, 3)]


def test_a_hanging_cell_runs_once():
    "After a new start the cells before are run again, but not one that hung."
    exam = examine_module.Examination(FAST, [], {}, {}, False)
    try:
        cells = [{"name": f"cell{n}", "code": code, "is_locked": False} for n, code in enumerate(("x = 1", "y = 1\nwhile True: pass", "z = x + y"))]
        assert [bool(exam.run_student(cell)["error"]) for cell in cells] == [False, True, False]  # what it did before it hung is still there
        assert exam.done[0] == [cells[0], cells[2]]
        exam.disconnect(0)
        last = {"name": "last", "code": "assert x == 1", "is_locked": False}
        assert exam.run_student(last)["error"] is None and exam.done[0] == [cells[0], cells[2], last]
    finally:
        exam.close()


def test_time_in_all():
    limits = ExamLimits(cell_seconds=9, call_seconds=9, seconds=2)
    examined = examine(SOURCE, submit("def double(x):\n    while True: pass"), limits=limits)
    assert points(examined) == {"test-double": 0, "test-other": 0} and "no time left" in examined.marks[1].message and examined.seconds < 15


def test_tests_that_hang_or_crash():
    "What a student's value does to the tests' own process costs that test."
    source = copy.deepcopy(SOURCE)
    for name, code in (("hangs", "while True: pass"), ("crashes", "import os\nos._exit(1)"), ("after", "assert double(1) == 2 and given == 1")):
        source.cells.append(from_dict(make(code, "test", name, 1)))
    source.cells[0].source += "\ngiven = 1"
    examined = examine(source, json.dumps(source).encode(), limits=FAST)
    assert points(examined) == {"test-double": 5, "test-other": 3, "hangs": 0, "crashes": 0, "after": 1}
    assert "didn't end within" in examined.marks[2].message and "ended the process" in examined.marks[3].message


def test_a_new_process_of_the_tests_has_what_tests_defined():
    source = copy.deepcopy(SOURCE)
    for name, code in (("defines", "from math import floor\nhalf = [0.5]\ndef twice(f, x): return f(f(x))\nlater = lambda: double(1)\nassert True\nlost = 1"),
                       ("ends", "own = 7\nimport os\nos._exit(1)"), ("uses", "assert twice(double, floor(half[0] + 1)) == 4 and own == 7 and later() == 2"), ("lacks", "assert lost")):
        source.cells.append(from_dict(make(code, "test", name, 1)))
    examined = examine(source, json.dumps(source).encode(), limits=FAST)
    assert points(examined) == {"test-double": 5, "test-other": 3, "defines": 1, "ends": 0, "uses": 1, "lacks": 0}


def test_a_test_that_swallows_errors_fails_when_the_process_has_ended():
    source = copy.deepcopy(SOURCE)
    source.cells[3].source = "try:\n    double(1)\nexcept Exception:\n    pass"
    assert points(examine(source, submit("import os\ndef double(x): os._exit(0)"), limits=FAST))["test-double"] == 0
    assert points(examine(source, submit("def double(x): raise ValueError"), limits=FAST))["test-double"] == 5


def test_names_that_are_no_functions():
    source = copy.deepcopy(SOURCE)
    source.cells[2].source = "A, B = 1, [2]\ndouble = None"
    source.cells[3].source = "assert (A, B, double(3)) == (1, [2], 6)"
    assert points(examine(source, submit("A, B = 1, [2]\ndouble = lambda x: x + x"), limits=FAST))["test-double"] == 5
    examined = examine(source, submit("A, B = 1, object()\ndouble = lambda x: x + x"), limits=FAST)
    assert points(examined)["test-double"] == 0 and "NameError" in examined.marks[0].message


# restore

def broken(**changes):
    "A student's file with cells changed: id -> function of the cell, or None to delete it."
    notebook = json.loads(submit())
    cells = []
    for cell in notebook["cells"]:
        change = changes.get(cell["id"].replace("-", "_"), "keep")
        cells += [cell] if change == "keep" else [] if change is None else change(cell)
    return json.dumps(notebook | {"cells": cells}).encode()


@pytest.mark.parametrize("submitted, expected, note", [
    (broken(double=None), {"test-double": 0, "test-other": 3}, "double is missing"),
    (broken(test_double=None), {"test-double": 5, "test-other": 3}, "test-double is missing"),
    (broken(setup=None), {"test-double": 5, "test-other": 3}, "setup is missing"),
    (broken(test_double=lambda c: [c | {"source": "pass"}]), {"test-double": 5, "test-other": 3}, "test-double may not be changed"),
    (broken(double=lambda c: [c, c]), {"test-double": 5, "test-other": 3}, "2 times; one is enough"),
    (broken(double=lambda c: [c, c | {"source": "def double(x): return 1"}]), {"test-double": 0, "test-other": 3}, "none of them counts"),
    (broken(double=lambda c: [{"cell_type": "markdown", "id": "double", "metadata": c["metadata"], "source": "a text"}]),
     {"test-double": 0, "test-other": 3}, "has become a markdown cell"),
    (broken(double=lambda c: [c | {"metadata": {}}]), {"test-double": 5, "test-other": 3}, ""),
    (broken(double=lambda c: [c | {"metadata": {}, "id": "x"}]), {"test-double": 0, "test-other": 3}, "double is missing"),
    (broken(double=lambda c: [c | {"outputs": 3, "metadata": {"nbgrader": 3}}]), {"test-double": 5, "test-other": 3}, ""),
    (broken(double=lambda c: [c, 3, None, [], {}, {"cell_type": "code", "source": {}}]), {"test-double": 5, "test-other": 3}, "5 of the file's cells can't be read"),
    (b"\xef\xbb\xbf" + submit(), {"test-double": 5, "test-other": 3}, ""),
    (b"", {"test-double": 0, "test-other": 0}, "can't be read"),
    (b"{", {"test-double": 0, "test-other": 0}, "isn't a notebook"),
    (b"\xff\xfe", {"test-double": 0, "test-other": 0}, "isn't a notebook"),
    (b"[" * 10**6, {"test-double": 0, "test-other": 0}, "isn't a notebook"),
    (b"9" * 10**6, {"test-double": 0, "test-other": 0}, "has no cells"),
    (b'{"cells": {}}', {"test-double": 0, "test-other": 0}, "has no cells"),
    (b" " * (MOST_FILE + 1), {"test-double": 0, "test-other": 0}, "clear the outputs")])
def test_damaged_files(submitted, expected, note):
    notebook, notes = restore(SOURCE, submitted)
    assert any(note in text for text in notes) if note else notes == []
    validate(notebook)
    given = [c.metadata.nbgrader.grade_id for c in notebook.cells if "nbgrader" in c.metadata]
    assert given == ["setup", "double", "test-double", "other", "test-other", "why"] and "plugh" not in json.dumps(notebook)
    if sum(expected.values()) in (0, 3, 5):  # the others are restored to what other tests examine
        assert points(examine(SOURCE, submitted, limits=FAST)) == expected


def test_version_3():
    cells = [{"cell_type": "code", "input": c["source"], "language": "python", "outputs": [], "metadata": c["metadata"]} if c["cell_type"] == "code" else c
             for c in json.loads(submit())["cells"]]
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": [{"cell_type": "heading", "level": 1, "source": "Mine"}, *cells]}]}
    examined = examine(SOURCE, json.dumps(old).encode(), limits=FAST)
    assert sum(points(examined).values()) == 8 and "version 3" in examined.notes[0]


def test_cells_of_their_own_stay_where_they_stood():
    notebook = json.loads(submit(extra="mine = 1"))
    notebook["cells"].append(make("last <b>words</b> <script>", kind="markdown"))
    notebook["cells"] += [make(f"x = {n}") for n in range(500)]
    restored, notes = restore(SOURCE, json.dumps(notebook).encode())
    texts = [cell.source for cell in restored.cells]
    assert texts.index("mine = 1") == 5 and "last <\u200bb>words<\u200b/b> <\u200bscript>" in texts and len(texts) == 6 + MOST_CELLS
    assert texts[1] == "# Doubling" and "more than 400" in notes[-1]


LINKS = [r"[g](javascript\:alert(1))", "[h][r]\n\n[r]: javascript\\:alert(1)", "[i](&#106;avascript:alert(1))", "[j](JaVaScRiPt&colon;alert(1))", "[k](<javascript:alert(1)>)",
         "<javascript:alert(1)>", "[l](data:text/html;base64,PHNjcmlwdD4=)", "[m](\x01javascript:alert(1))", "[n]:\n  javascript:alert(1)\n\n[n]", "![o](vbscript:x)",
         "[p](https://a.b/\"onmouseover=alert(1))", "[q](https://a](javascript:alert(1))", "[[s](#x)](javascript:alert(1))", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>",
         "[t]: javascript:alert(1)\n\n[u][t]", "[v]: <javascript:alert(1)>\n\n[v]", "> [w]: javascript:alert(1)\n\n[w]", "- [y](\njavascript:alert(1))", "[z]\u200b(javascript:x)",
         "&lt;script>alert(1)</script>", "```<img src=x>\nx\n```", "| a<b |\n|--|\n| [a](javascript&colon;b) |", "$\\href{javascript:alert(1)}{x}$"]


@pytest.mark.parametrize("text", LINKS)
def test_what_students_write_runs_nowhere(text):
    "In the page that nbconvert makes, no link leads elsewhere than to the web or into the page, and no attribute or element is theirs."
    from html.parser import HTMLParser

    mistune = pytest.importorskip("nbconvert.filters.markdown_mistune")
    notebook = json.loads(submit())
    notebook["cells"].append(make(text, kind="markdown"))
    cell = restore(SOURCE, json.dumps(notebook).encode())[0].cells[-1]
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Reader().feed(mistune.markdown2html_mistune(cell.source))
    assert not {tag for tag, _ in found} & {"script", "svg", "iframe", "img"} and not [name for _, attrs in found for name in attrs if name.startswith("on")]
    assert all((attrs.get("href") or "#").startswith(("https://", "#")) for _, attrs in found) and "\\href" not in cell.source


def test_our_own_text_stays_as_it_is():
    source, hint = copy.deepcopy(SOURCE), "<details><summary>Hint</summary>[a file](data.txt)</details>"
    source.cells.insert(1, from_dict(make(hint, name="hint", kind="markdown")))
    notebook = json.loads(json.dumps(source))
    notebook["cells"].append(make(hint + " and more", kind="markdown"))
    cells = restore(source, json.dumps(notebook).encode())[0].cells
    assert cells[1].source == hint and cells[-1].source.startswith("<\u200bdetails>")


def test_what_students_write_looks_the_same():
    for text in ("x<y and $a<b$", "[a page](https://example.org) and [a place](#here)", "`a[0](1)`", "a < b", "$\\frac{1}{2}$"):
        assert show_plainly(text).replace("\u200b", "") == text
    assert show_plainly("[a page](https://example.org)\n\n[r]: http://a.b") == "[a page](https://example.org)\n\n[r]: http://a.b"


def test_a_large_file_is_read_quickly():
    notebook = json.loads(submit())
    notebook["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x" * 15 * 10**6}]
    start = time.perf_counter()
    restored, notes = restore(SOURCE, json.dumps(notebook).encode())
    assert not notes and restored.cells[2].outputs == [] and time.perf_counter() - start < 10
    assert "200 MB" in restore(SOURCE, b"x" * 200_000_000)[1][0]


# imports of what students build

@pytest.mark.parametrize("code", ["import nanochat.bpe", "import nanochat.bpe as x", "from nanochat.bpe import merge_pair", "from nanochat import bpe",
                                  "def f():\n    from nanochat.bpe import x", "import importlib\nimportlib.import_module('nanochat.bpe')", "__import__('nanochat.bpe')",
                                  "from importlib import import_module\nimport_module(name='nanochat.bpe')", "%matplotlib inline\nimport os, nanochat.bpe",
                                  "import nanochat\nnanochat.bpe.merge_pair", "import sys\nsys.modules['nanochat.bpe'].merge_pair"])
def test_the_search_finds_imports(code):
    assert find_built_import(code, ["nanochat.gpt", "nanochat.bpe"]) == "nanochat.bpe"


@pytest.mark.parametrize("code", ["import nanochat.common", "from nanochat import tokenizer", "x = 'import nanochat.bpe'", "# import nanochat.bpe", "import nanochat.bper",
                                  "bpe.merge_pair", "(" * 10**5, "-" * 10**5 + "1", "x" + ".a" * 10**4, "\0", "def f(:", "[" * 90 + "]" * 90])
def test_the_search_finds_no_more(code):
    assert find_built_import(code, ["nanochat.bpe"]) is None


def test_locked_cells_and_tests_may_import_it():
    source = copy.deepcopy(SOURCE)
    source.cells[0].source += "\nfrom nanochat.bpe import *\ndef helper():\n    import nanochat.bpe\n    return 1"
    source.cells[3].source = "import nanochat.bpe\nassert double(1) == 2"
    submitted = json.loads(json.dumps(source))
    submitted["cells"][2]["source"] = "def double(x): return x + helper()"
    assert points(examine(source, json.dumps(submitted).encode(), limits=FAST)) == {"test-double": 5, "test-other": 3}
    assert read_builds(source) == ["nanochat.bpe", "nanochat.tokenizer"]


@pytest.mark.parametrize("code, note", [
    ("from nanochat.bpe import *\ndef double(x): return x + x", "adapters.py imports nanochat.bpe"),
    ("import importlib\nm = importlib.import_module('nanochat.' + 'bpe')\ndef double(x): return x + x", ""),
    ("def double(x):\n    m = __import__('nanochat.' + 'bpe')\n    return x + x", ""),
    ("from nanochat.conversation import Tokenizer as double", ""),
    ("#" * 10**6 + "\ndef double(x): return x + x", "a file may have 1 MB")])
def test_files_of_students_may_not_import_it(code, note):
    examined = examine(SOURCE, submit("from adapters import double"), limits=FAST, student_files={"adapters.py": code.encode()})
    assert points(examined) == {"test-double": 0, "test-other": 3}
    assert note in "".join(examined.notes) and bool(note) == bool(examined.notes)
    if not note:
        assert "is what you build in this assignment" in shown(examined) + examined.marks[0].message


def test_files_of_students_may_import_the_rest():
    files = {"adapters.py": b"from helpers import twice\nimport nanochat.conversation\ndef double(x): return twice(x)", "helpers.py": b"import math\ndef twice(x): return x + x", "\udcff.py": b"\xff"}
    examined = examine(SOURCE, submit("from adapters import double"), limits=FAST, student_files=files)
    assert points(examined) == {"test-double": 5, "test-other": 3} and not examined.notes
    many = {f"{n}.txt": bytes(10**6) for n in range(40)}
    examined = examine(SOURCE, submit(), limits=FAST, student_files=many)
    assert sum(points(examined).values()) == 8 and len(examined.notes) == 35


LIVE = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for _ in range(2):
    shell.run_cell("from nanochat.examine import begin\\nbegin('a0-test', builds=['nanochat.bpe'])")
for code in ("import nanochat.bpe", "x = 1", "import nanochat.bpe  # a test", "%time from nanochat import bpe"):
    result = shell.run_cell(code)
    print("ANSWER", repr(code), type(result.error_before_exec).__name__)
"""


def test_begin_refuses_in_a_live_notebook(tmp_path):
    folder = tmp_path / "live"
    folder.mkdir()
    (folder / "a0-test.ipynb").write_text(json.dumps(book(make("import nanochat.bpe  # a test", "test", "t", 1))))
    env = {**os.environ, "PYTHONPATH": str(Path(examine_module.__file__).parent.parent), "IPYTHONDIR": str(tmp_path / "ipython")}
    run = subprocess.run([sys.executable, "-c", LIVE], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert [line for line in run.stdout.splitlines() if line.startswith("ANSWER")] == [
        "ANSWER 'import nanochat.bpe' InputRejected", "ANSWER 'x = 1' NoneType", "ANSWER 'import nanochat.bpe  # a test' NoneType",
        "ANSWER '%time from nanochat import bpe' InputRejected"], run.stdout + run.stderr
    assert "nanochat.bpe is what you build in a0-test" in run.stdout and "Traceback" not in run.stdout


# the machine

def test_without_namespaces_it_refuses(monkeypatch):
    monkeypatch.setattr(examine_module, "find_mode", lambda: "guards")
    with pytest.raises(UserError, match="trust=True"):
        examine(SOURCE, submit())
    trusted = examine(SOURCE, submit(), limits=FAST, trust=True)
    assert sum(points(trusted).values()) == 8 and "limits on time and memory only" in trusted.notes[-1]
    assert points(examine(SOURCE, submit("def double(x):\n    while True: pass"), limits=FAST, trust=True)) == {"test-double": 0, "test-other": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process when its parent is killed")
def test_both_processes_die_with_us(tmp_path):
    code = ("import sys\nfrom pathlib import Path\nfrom nbformat import from_dict\nimport json\nfrom nanochat.examine import examine\n"
            "examine(from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]).read_bytes())")
    (tmp_path / "source").write_text(json.dumps(SOURCE))
    (tmp_path / "submitted").write_bytes(submit("import time\ntime.sleep(50)"))
    before = family()
    ours = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "submitted")], env={**os.environ, "TMPDIR": str(tmp_path)})
    end = time.time() + 20
    while len(family() - before) < 5 and time.time() < end:
        time.sleep(0.1)
    started = family() - before
    assert len(started) == 5  # itself, the tests, and three of the sandbox
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    end = time.time() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in started) and time.time() < end:
        time.sleep(0.1)
    assert not [pid for pid in started if os.path.exists(f"/proc/{pid}")]
    for path in tmp_path.glob("nanochat-*"):
        for file in path.rglob("*"):
            assert not file.is_file() or "ipython" in str(file).lower() or file.stat().st_size < 10**6
        subprocess.run(["rm", "-rf", str(path)], check=True)


def test_a_file_of_the_assignment_reaches_both():
    source = copy.deepcopy(SOURCE)
    source.cells[3].source = "assert double(2) == open('data/numbers.txt').read()"
    text = "def double(x): return open('data/numbers.txt').read()"
    assert points(examine(source, submit(text), {"data/numbers.txt": b"4 5"}, FAST))["test-double"] == 5
    assert points(examine(source, submit("import adapters\ndef double(x): return adapters.y"), {"data/numbers.txt": b"4"}, FAST, {"adapters.py": b"y = '4'"}))["test-double"] == 5
