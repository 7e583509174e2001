"""Thirty students and what they hand in: right, wrong, half, broken and hostile. The same for the same seed."""
import json
import random
import re
import zlib
from dataclasses import dataclass, field

from nanochat.submission import make_cell, strip_text

NAME = "a0-merges"
SECRET = "never-shown"  # stands in every hidden test's source, and in none of its messages
POINTS = {"test-count": 3, "test-count-short": 2, "test-merge": 4, "test-merge-overlap": 3, "test-best": 3, "test-encode": 5}
HAND = 5  # points for the answer in words

GIVEN = f'''from nanochat.examine import begin

begin("{NAME}", builds=["nanochat.bpe"])'''
HEADS = {
    "count-pairs": 'def count_pairs(\n    ids: list[int],  # tokens\n) -> dict[tuple[int, int], int]:  # how often each two neighbours occur\n    "Count neighbours."\n',
    "merge-pair": 'def merge_pair(\n    ids: list[int],\n    pair: tuple[int, int],  # two neighbours\n    new: int,  # the id that replaces them\n'
                  ') -> list[int]:\n    "Replace every occurrence of a pair, from left to right."\n',
    "best-pair": 'def best_pair(\n    counts: dict[tuple[int, int], int],\n) -> tuple[int, int]:  # of several, the smallest\n    "Find the most frequent pair."\n',
    "encode": 'def encode(\n    text: str,\n    merges: list[tuple[tuple[int, int], int]],  # in the order in which they were learned\n) -> list[int]:\n    "Turn text into tokens."\n',
}
BODIES = {  # of each function several that are right; the first is the assignment's own
    "count-pairs": [
        "    counts = {}\n    for pair in zip(ids, ids[1:]):\n        counts[pair] = counts.get(pair, 0) + 1\n    return counts",
        "    from collections import Counter\n\n    return dict(Counter(zip(ids[:-1], ids[1:])))",
        "    counts = {}\n    for i in range(len(ids) - 1):\n        pair = ids[i], ids[i + 1]\n        if pair not in counts:\n            counts[pair] = 0\n        counts[pair] += 1\n    return counts",
    ],
    "merge-pair": [
        "    out, i = [], 0\n    while i < len(ids):\n        if tuple(ids[i : i + 2]) == tuple(pair):\n            out.append(new)\n            i += 2\n        else:\n            out.append(ids[i])\n            i += 1\n    return out",
        "    merged = []\n    skip = False\n    for left, right in zip(ids, [*ids[1:], None]):\n        if skip:\n            skip = False\n        elif (left, right) == tuple(pair):\n            merged.append(new)\n            skip = True\n        else:\n            merged.append(left)\n    return merged",
        "    result = list(ids)\n    position = 0\n    while position + 1 < len(result):\n        if result[position] == pair[0] and result[position + 1] == pair[1]:\n            del result[position + 1]\n            result[position] = new\n        position += 1\n    return result",
    ],
    "best-pair": [
        "    most = max(counts.values())\n    return min(pair for pair, count in counts.items() if count == most)",
        "    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[0][0]",
        "    best = None\n    for pair in sorted(counts):\n        if best is None or counts[pair] > counts[best]:\n            best = pair\n    return best",
    ],
    "encode": [
        '    ids = list(text.encode("utf-8"))\n    for pair, new in merges:\n        ids = merge_pair(ids, pair, new)\n    return ids',
        '    from functools import reduce\n\n    return reduce(lambda ids, merge: merge_pair(ids, merge[0], merge[1]), merges, [byte for byte in text.encode()])',
        '    ids = [int(b) for b in bytes(text, "utf8")]\n    k = 0\n    while k < len(merges):\n        (left, right), token = merges[k]\n        ids = merge_pair(ids, (left, right), token)\n        k = k + 1\n    return ids',
    ],
}
TESTS = {
    "test-count": ('assert count_pairs([1, 2, 1, 2]) == {(1, 2): 2, (2, 1): 1}, f"count_pairs([1, 2, 1, 2]) gave {count_pairs([1, 2, 1, 2])}; the pair 1, 2 occurs twice"', ""),
    "test-count-short": ("", 'assert count_pairs([7]) == {} and count_pairs([]) == {}, "one token has no neighbour: count_pairs([7]) should be empty"'),
    "test-merge": ('assert list(merge_pair([1, 2, 3, 1, 2], (1, 2), 9)) == [9, 3, 9], "merge_pair([1, 2, 3, 1, 2], (1, 2), 9) should be [9, 3, 9]"',
                   'assert list(merge_pair([3, 1], (1, 2), 9)) == [3, 1], "the last token must stay when nothing follows it"'),
    "test-merge-overlap": ("", 'assert list(merge_pair([1, 1, 1], (1, 1), 9)) == [9, 1], "pairs are found from left to right: 1 1 1 becomes 9 1"'),
    "test-best": ('assert tuple(best_pair({(1, 2): 3, (0, 5): 1})) == (1, 2), "the pair with the largest count is (1, 2)"',
                  'assert tuple(best_pair({(4, 0): 2, (1, 9): 2})) == (1, 9), "of pairs with equal counts the smallest is wanted"'),
    "test-encode": ('assert list(encode("aba", [((97, 98), 256)])) == [256, 97], "encode(\'aba\') with the merge of a and b should be [256, 97]"',
                    'assert list(encode("abab", [((97, 98), 256), ((256, 256), 257)])) == [257], "later merges may use what earlier ones made"\n'
                    'assert list(encode("\\u00e9", [])) == [195, 169], "text is taken as UTF-8: one letter may be two bytes"'),
}


def make_notebook(cells):
    return {"cells": cells, "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}


def make_source():
    "The assignment, with solutions and hidden tests."
    cells = [make_cell("markdown", "# Merges", "title"), make_cell("code", GIVEN, "setup", "locked")]
    for name, own in (("count-pairs", ("test-count", "test-count-short")), ("merge-pair", ("test-merge", "test-merge-overlap")),
                      ("best-pair", ("test-best",)), ("encode", ("test-encode",))):
        cells.append(make_cell("code", f"{HEADS[name]}    ### BEGIN SOLUTION\n{BODIES[name][0]}\n    ### END SOLUTION", name, "solution"))
        for test in own:
            seen, hidden = TESTS[test]
            hidden = hidden and f"### BEGIN HIDDEN TESTS\nnote = '{SECRET}'\n{hidden}\n### END HIDDEN TESTS"
            cells.append(make_cell("code", "\n".join(filter(None, [seen, hidden])), test, "test", POINTS[test]))
    cells.append(make_cell("markdown", "What does one merge cost?\n\n### BEGIN SOLUTION\nOne pass over all tokens.\n### END SOLUTION", "explain", "manual", HAND))
    return make_notebook(cells)


def make_submission(texts, answer="One pass over all the tokens, so O(n)."):
    "The released notebook with somebody's functions in it."
    book = make_source()
    for cell in book["cells"]:
        given = strip_text(cell)
        cell["source"] = answer if cell["id"] == "explain" else texts.get(cell["id"], given)
    return book


def sign(name):
    "A word that no other student's page may show."
    return f"{name}-{zlib.crc32(name.encode())}"


def place_of(book, name):
    return next(i for i, cell in enumerate(book["cells"]) if cell["metadata"].get("nbgrader", {}).get("grade_id") == name)


@dataclass
class Student:
    "What one student hands in, and what it should be worth."

    name: str
    data: bytes
    lost: set[str] = field(default_factory=set)  # tests that must fail
    files: dict[str, bytes] = field(default_factory=dict)
    answer: str | None = "text"  # None: nothing to be marked by hand
    stamp: str | None = "2027-01-29 20:00:00.000000 UTC"
    note: str = ""  # a part of what the marks must say about it

    def points(self):
        return {test: 0 if test in self.lost else points for test, points in POINTS.items()}


ALL = set(POINTS)
UNANSWERED = "What does one merge cost?\n\nYOUR ANSWER HERE"
NOTHING = "    return None"
MISTAKES = [  # one each: the function, what it should be, what it is, the tests that it costs
    ("count-pairs", "+ 1", "+ 2", {"test-count"}),
    ("count-pairs", "zip(ids, ids[1:])", "[(ids[0], ids[0]), *zip(ids, ids[1:])][1:]", {"test-count-short"}),
    ("merge-pair", "while i < len(ids):", "while i < len(ids) - 1:", {"test-merge", "test-merge-overlap", "test-encode"}),
    ("merge-pair", "i += 2", "i += 2 if pair[0] != pair[1] else 1", {"test-merge-overlap", "test-encode"}),
    ("best-pair", "min(pair", "max(pair", {"test-best"}),
    ("encode", "in merges:", "in merges[:1]:", {"test-encode"}),
    ("encode", '"utf-8"', '"latin-1"', {"test-encode"}),
]


UNUSUAL = {  # right, and unlike all others: what is copied
    "count-pairs": "    seen = dict()\n    last = len(ids) - 1\n    for number, token in enumerate(ids):\n        if number < last:\n            key = token, ids[number + 1]\n            seen.setdefault(key, []).append(number)\n    return {key: len(places) for key, places in seen.items()}",
    "merge-pair": "    todo, done = list(reversed(ids)), []\n    while todo:\n        first = todo.pop()\n        if todo and [first, todo[-1]] == list(pair):\n            todo.pop()\n            first = new\n        done += [first]\n    return done",
    "best-pair": "    order = sorted((-number, pair) for pair, number in counts.items())\n    return order[0][1]",
    "encode": "    row = [*text.encode()]\n    for number in range(len(merges)):\n        pair, new = merges[number]\n        if len(row) > 1:\n            row = merge_pair(row, pair, new)\n    return row",
}
DISGUISE = {"seen": "found", "last": "end", "number": "where", "token": "what", "key": "pair_of", "places": "spots", "todo": "queue", "done": "ready", "first": "head", "row": "line"}
OWN = {name: HEADS[name] + bodies[0] for name, bodies in BODIES.items()}
WRONG = {name: HEADS[name] + NOTHING for name in HEADS}
KEPT = {"count-pairs": {"test-count", "test-count-short"}, "merge-pair": {"test-merge", "test-merge-overlap"}, "best-pair": {"test-best"}, "encode": {"test-encode"}}
ALWAYS = "class Always(list):\n    __eq__ = lambda self, other: True\n    __hash__ = None\n\n\n"  # equal to everything


def disguise(text):
    "A copy under other names."
    text = re.sub(r"\b(" + "|".join(DISGUISE) + r")\b", lambda match: DISGUISE[match[0]], text)
    return text.replace("    while", "    # go on until nothing is left\n    while")


def write_part(*done):
    return make_submission({cell: OWN[cell] for cell in done}, UNANSWERED)


def lose_all_but(*done):
    return ALL - set().union(*(KEPT[cell] for cell in done))


def make_noise(seed):
    "A picture's beginning, and noise."
    draw = random.Random(seed)
    return b"\x89PNG\r\n\x1a\n" + bytes(draw.randrange(256) for _ in range(2000))


def vary(seed):
    "Right functions, each written in one of several ways."
    draw = random.Random(seed)
    return make_submission({cell: HEADS[cell] + draw.choice(bodies[1:]) for cell, bodies in BODIES.items()})


def make_mistake(number):
    cell, old, new, _ = MISTAKES[number]
    assert OWN[cell].count(old) == 1
    return make_submission(OWN | {cell: OWN[cell].replace(old, new)})


def insert_cell(text):
    "Wrong functions, and a cell before them."
    book = make_submission(WRONG)
    book["cells"].insert(2, make_cell("code", text, "own"))
    return book


def change_tests():
    "Wrong functions, and tests made harmless."
    book = make_submission(WRONG)
    for test in POINTS:
        book["cells"][place_of(book, test)]["source"] = "assert True"
    return book


def lose_metadata():
    "Right functions, without the marks by which cells are known."
    book = make_submission(OWN)
    for name in ("count-pairs", "test-count", "explain"):
        cell = book["cells"][place_of(book, name)]
        cell["metadata"], cell["id"] = {}, f"mine-{name}"
    return book


def write_twice():
    "Right functions, one of them there twice with two texts."
    book = make_submission(OWN)
    twice = make_cell("code", HEADS["best-pair"] + NOTHING, "best-pair", "solution")
    book["cells"].insert(place_of(book, "best-pair"), twice)
    return book


def make_rows(seed):
    "Name, what is handed in, tests that must fail, and what else a `Student` has."
    adapters = {"adapters.py": ("\n\n\n".join(OWN.values()) + "\n").encode()}
    return [
        *((name, vary(f"{seed} {name}"), set(), {}) for name in ("ada", "ben", "cleo", "dan", "eve")),
        *((name, make_mistake(number), MISTAKES[number][3], {}) for number, name in enumerate(("finn", "gwen", "hugo", "iris", "jack", "kim", "lena"))),
        ("milo", write_part("count-pairs"), lose_all_but("count-pairs"), {"answer": None}),
        ("nora", write_part("count-pairs", "best-pair"), lose_all_but("count-pairs", "best-pair"), {"answer": None}),
        ("otto", write_part("merge-pair", "encode"), lose_all_but("merge-pair", "encode"), {"answer": None}),
        ("paula", make_submission(OWN), set(), {"stamp": "2027-01-31 20:00:00.000000 UTC", "note": "2 days late"}),
        ("quinn", make_submission({cell: f"from adapters import {cell.replace('-', '_')}" for cell in HEADS}), set(), {"files": adapters}),
        ("rosa", b"", ALL, {"answer": None, "note": "can't be read"}),
        ("sam", make_noise(seed), ALL, {"answer": None, "note": "can't be read"}),
        ("tara", make_submission({cell: HEADS[cell] + body for cell, body in UNUSUAL.items()}), set(), {}),
        ("ugo", make_submission({cell: disguise(HEADS[cell] + body) for cell, body in UNUSUAL.items()}, "It is linear."), set(), {}),
        ("vera", change_tests(), ALL, {"note": "may not be changed"}),
        ("walt", insert_cell(PATCH), ALL, {}),  # what marks is patched, as far as it can be reached
        ("xena", make_submission({cell: ALWAYS + HEADS[cell] + "    return Always()" for cell in HEADS}), ALL, {}),
        ("yuri", insert_cell(SEARCH), ALL, {}),  # the tests are looked for on the disk
        ("zoe", make_submission(OWN | {"count-pairs": 'for _ in range(1000):\n    print("x" * 1_000_000)\n' + OWN["count-pairs"]}), set(), {}),
        ("abel", make_submission(OWN | {"best-pair": HEADS["best-pair"] + "    while True:\n        pass"}), {"test-best"}, {}),
        ("bela", lose_metadata(), {"test-count", "test-count-short"}, {"answer": None, "note": "count-pairs is missing"}),
        ("cora", write_twice(), {"test-best"}, {"note": "best-pair is there 2 times"}),
        ("dora", make_submission(OWN | {"encode": HEADS["encode"] + "    import os\n    os.kill(os.getpid(), 9)"}), {"test-encode"}, {}),
    ]


def make_class(seed=0):
    "Thirty students; who writes how is drawn from the seed."
    students = []
    for name, book, lost, more in make_rows(seed):
        if isinstance(book, dict):
            if more.get("answer", "text"):
                book["cells"][place_of(book, "explain")]["source"] += f" Signed {sign(name)}."
            book = json.dumps(book).encode()
        students.append(Student(name, book, set(lost), **more))
    assert len(students) == 30, len(students)
    return students


PATCH = """
import builtins, sys
for module in ("nbgrader.utils", "nanochat.examine"):
    try:
        loaded = __import__(module, fromlist=["x"])
        for name in ("determine_grade", "examine", "restore", "grade_all", "rebuild_error", "split_value"):
            setattr(loaded, name, lambda *a, **k: (1000.0, 1000.0))
        loaded.Mark = lambda *a, **k: type("Mark", (), {"points": 1000, "most": 1, "id": "test-count", "message": "", "seconds": 0})()
    except Exception:
        pass
builtins.AssertionError = type("AssertionError", (), {})
sys.excepthook = lambda *a: None
"""
SEARCH = """
import gc, os
found = []
for root in ("/", "..", os.path.expanduser("~"), os.getcwd(), "/proc/self/fd"):
    for folder, _, files in os.walk(root):
        if folder.startswith(("/proc/", "/sys", "/usr", "/lib")) and folder != "/proc/self/fd":
            continue
        for file in files:
            if file.endswith((".ipynb", ".json", ".db")):
                try:
                    found.append(open(os.path.join(folder, file), errors="replace").read())
                except Exception:
                    pass
found += [str(thing) for thing in gc.get_objects() if isinstance(thing, str)]
print([text for text in found if "BEGIN " + "HIDDEN TESTS" in text and "assert list" in text][:3])
"""
