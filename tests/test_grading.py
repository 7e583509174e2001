"""Grading a class: thirty submissions from the folder to the marks, through the command line, with a kill in between."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import pytest
import submissions as made

from nanochat import grading, intake
from nanochat.common import UserError
from nanochat.submission import MOST_FILE, make_cell, restore

NANOCHAT = Path(sys.executable).with_name("nanochat")
NAME = made.NAME
MOST = sum(made.POINTS.values()) + made.HAND


def write_class(folder, students):
    for student in students:
        own = folder / student.name / NAME
        own.mkdir(parents=True)
        (own / f"{NAME}.ipynb").write_bytes(student.data)
        for name, data in student.files.items():
            (own / name).write_bytes(data)
        if student.stamp:
            (own / "timestamp.txt").write_text(student.stamp)


class Course:
    "A course directory, thirty submissions, and the command that grades them."

    def __init__(self, root):
        self.root, self.course, self.submitted = root, root / "course", root / "submitted"
        self.students = made.make_class()
        (self.course / "source" / NAME).mkdir(parents=True)
        (self.course / "source" / NAME / f"{NAME}.ipynb").write_text(json.dumps(made.make_source()))
        (root / "course.json").write_text(json.dumps({"due": {NAME: "2027-01-29T23:59:59-06:00"}, "late_days": 1, "penalty_per_day": 0.1,
                                                      "limits": {"call_seconds": 4, "cell_seconds": 30, "seconds": 120}}))
        write_class(self.submitted, self.students)
        (self.submitted / "notes.txt").write_text("not a submission")
        file = self.submitted / "ben" / NAME / f"{NAME}.ipynb"
        (file.parent / "timestamp.txt").unlink()
        os.utime(file, (1800000000, 1800000000))  # 15 January 2027
        rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", f"{NAME} (4711)"], ["    Points Possible", "", "", "", "", "25"]]
        rows += [["=cmd|x!A1, Ada" if s.name == "ada" else f"Doe, {s.name.title()}", str(100 + i), f"u{i}", s.name, "001", ""] for i, s in enumerate(self.students)]
        with open(root / "roster.csv", "w", newline="") as file:
            csv.writer(file).writerows([*rows, ["Late, Comer", "999", "u999", "latecomer", "001", ""]])

    def command(self):
        return [str(NANOCHAT), "grade", str(self.submitted), "--course", str(self.course), "--workers", "2", "--roster", str(self.root / "roster.csv")]

    def grade(self):
        done = subprocess.run(self.command(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def marks(self):
        return pd.read_csv(self.course / "marks.csv").set_index("student")

    def page(self, name):
        return (self.course / "feedback" / name / NAME / f"{NAME}.html").read_text()


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    "The class, graded by a command that was killed on its way and typed again."
    made_course = Course(tmp_path_factory.mktemp("class"))
    before = {path: path.read_bytes() for path in made_course.submitted.rglob("*") if path.is_file()}
    process = subprocess.Popen(made_course.command(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("   7 of"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    made_course.kept = {path: path.stat().st_mtime_ns for path in (made_course.course / "examined").glob("*.json")}
    made_course.printed = made_course.grade()
    assert before == {path: path.read_bytes() for path in made_course.submitted.rglob("*") if path.is_file()}, "the submissions were changed"
    return made_course


def test_it_goes_on_after_a_kill(graded):
    assert len(graded.kept) >= 7  # seven submissions; and the solution
    assert {path: path.stat().st_mtime_ns for path in graded.kept} == graded.kept
    assert f"submissions: 30, {len(graded.kept) - 1} of them examined before" in graded.printed


@pytest.mark.parametrize("student", made.make_class(), ids=lambda s: s.name)
def test_every_mark(graded, student):
    row = graded.marks().loc[student.name]
    assert {test: row[test] for test in made.POINTS} == student.points(), row["notes"]
    earned = sum(student.points().values())
    penalty = 0.1 * MOST if student.name == "paula" else 0
    assert (row["tests"], row["late penalty"], row["total"]) == (earned, penalty, earned - penalty)
    assert student.note in str(row["notes"])
    assert ("to be marked by hand" in str(row["notes"])) == (student.answer is not None)


def test_canvas_gets_the_totals(graded):
    with open(graded.course / "canvas.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", f"{NAME} (4711)"] and rows[1] == ["    Points Possible", "", "", "", "", f"{MOST}"]
    got, marks = {row[3]: row for row in rows[2:]}, graded.marks()
    assert len(got) == 31 and got["latecomer"][5] == "" and got["ada"][0] == "'=cmd|x!A1, Ada"
    assert {name: float(row[5]) for name, row in got.items() if name != "latecomer"} == dict(marks["total"])


def test_feedback_shows_messages_and_no_tests(graded):
    signatures = {s.name: made.sign(s.name) for s in graded.students if s.answer}
    for student in graded.students:
        page = graded.page(student.name)
        assert made.SECRET not in page and "BEGIN HIDDEN TESTS" not in page, student.name
        assert {name for name, word in signatures.items() if word in page} <= {student.name}
    assert "the last token must stay when nothing follows it" in graded.page("hugo")
    assert "IndexError" in graded.page("gwen")
    assert "2 days late, 1 of them from the budget; 10% of the points are taken off" in graded.page("paula")
    assert "is missing and was put back" in graded.page("bela")
    assert f"{MOST - made.HAND} of {MOST - made.HAND} points by tests; {made.HAND} are given by hand (1 answer is not marked yet)" in graded.page("ada")


def test_the_summary_is_drawn_and_said(graded):
    assert (graded.course / f"summary-{NAME}.png").read_bytes().startswith(b"\x89PNG")
    lost = {test: sum(test in s.lost for s in graded.students) for test in made.POINTS}
    hardest = max(lost, key=lambda test: lost[test])
    assert f"{lost[hardest]} students" in graded.printed.partition(f"  {hardest}")[2].partition("\n")[0]
    assert "notes.txt: neither STUDENT/ASSIGNMENT/FILE" in graded.printed


def test_copies_are_found(graded):
    table = pd.read_csv(graded.course / f"similarity-{NAME}.csv")
    pairs = {(row["first"], row["second"]): row for _, row in table.iterrows()}
    assert pairs["tara", "ugo"]["similarity"] > 0.9 and "merge-pair" in pairs["tara", "ugo"]["cells"]
    assert ("paula", "the package") in pairs and ("tara", "the package") not in pairs
    assert "adapters.py" in pairs["quinn", "the package"]["cells"]
    assert not {("ada", "tara"), ("hugo", "tara"), ("paula", "tara")} & set(pairs)


def test_a_second_run_keeps_marks_by_hand_and_does_only_what_is_new(graded):
    from nanochat.grading import open_gradebook

    with open_gradebook(graded.course) as gradebook:
        grade = gradebook.find_grade("explain", NAME, NAME, "ada")
        grade.manual_score, grade.needs_manual_grade = 4, False
        gradebook.find_comment("explain", NAME, NAME, "ada").manual_comment = "Good, and why?"
        gradebook.db.commit()
    again = made.make_class()[0].data  # milo hands in once more, now everything
    (graded.submitted / "milo" / NAME / f"{NAME}.ipynb").write_bytes(again)
    pages = {s.name: (graded.course / "feedback" / s.name / NAME / f"{NAME}.html").stat().st_mtime_ns for s in graded.students}
    printed = graded.grade()
    assert "29 of them examined before; 1 to examine" in printed or "30 of them examined before" in printed  # ada's notebook, byte by byte
    marks = graded.marks()
    assert marks.loc["ada", "by hand"] == 4 and marks.loc["ada", "total"] == MOST - 1 and "marked by hand" not in str(marks.loc["ada", "notes"])
    assert marks.loc["milo", "tests"] == MOST - made.HAND
    assert "Good, and why?" in graded.page("ada")
    now = {s.name: (graded.course / "feedback" / s.name / NAME / f"{NAME}.html").stat().st_mtime_ns for s in graded.students}
    assert {name for name in now if now[name] != pages[name]} == {"ada", "milo"}


def test_marks_by_hand_survive_a_new_examination(graded):
    "When a hidden test is corrected, everything is examined again; here one student's result is thrown away instead."
    state = grading.read_state(graded.course)
    state[NAME]["ada"]["graded"] = ""
    grading.write_state(graded.course, state)
    graded.grade()
    row = graded.marks().loc["ada"]
    assert row["by hand"] == 4 and "marked by hand" not in str(row["notes"])


def test_a_changed_answer_is_looked_at_again(graded):
    "Even if the first attempt was killed after it had written the restored notebook."
    places = [graded.submitted / "ada" / NAME / f"{NAME}.ipynb", graded.course / "restored" / "ada" / NAME / f"{NAME}.ipynb"]
    for place in places:
        book = json.loads(place.read_text())
        next(cell for cell in book["cells"] if cell["metadata"].get("nbgrader", {}).get("grade_id") == "explain")["source"] = "Something else."
        place.write_text(json.dumps(book))
    graded.grade()
    row = graded.marks().loc["ada"]
    assert row["by hand"] == 4 and "1 answer to be marked by hand" in row["notes"] and "Something else." in graded.page("ada")
    assert f"points by tests, 4 of {made.HAND} by hand" in graded.page("ada")


# The parts


def examine_at_once(job, running):
    "In the place of `run_job`: all points without an examination, or a reason for who is called broken."
    if job.submission.student == "broken":
        return "it broke"
    book, notes = restore(json.loads(job.assignment.source), grading.read_submission(job.submission)[0])
    marks = [{"id": name, "points": points, "most": points, "message": "", "seconds": 0} for name, (points, hand) in job.assignment.cells().items() if not hand]
    job.path.parent.mkdir(exist_ok=True)
    job.path.write_text(json.dumps({"notebook": book, "marks": marks, "notes": notes, "seconds": 1, "files": {}}))
    return ""


def refuse():
    raise PermissionError(13, "Permission denied")


def test_one_student_stops_nobody(tmp_path, monkeypatch, capsys):
    course, finish = tmp_path / "course", grading.finish_notebook
    write_files(tmp_path, {f"course/source/{NAME}/{NAME}.ipynb": json.dumps(made.make_source()).encode(), "course/course.json": b'{"due": {"a9": "2027-01-29T23:59:59-06:00"}}'})
    for name in ("ann", "broken", "odd", "unread"):
        write_files(tmp_path / "in", {f"{name}/{NAME}/{NAME}.ipynb": json.dumps(made.make_submission({}, f"by {name}")).encode()})
    monkeypatch.setattr(grading, "run_job", examine_at_once)
    monkeypatch.setattr(grading, "finish_notebook", lambda result, source: finish(result, source) | ({"nbformat": 99} if "by odd" in str(result) else {}))
    monkeypatch.setattr(grading, "read_upload", lambda upload: refuse() if "unread" in upload.name else intake.read_upload(upload))
    marks = grading.grade_all(tmp_path / "in", course).set_index("student")
    assert marks.loc["ann", "tests"] == MOST - made.HAND and marks.loc[["broken", "odd", "unread"], "total"].isna().all()
    assert "it broke" in marks.loc["broken", "notes"] and "nbgrader refuses" in marks.loc["odd", "notes"] and "Permission denied" in marks.loc["unread", "notes"]
    monkeypatch.setattr(grading, "run_job", lambda *_: pytest.fail("what has failed is not tried again"))
    marks = grading.grade_all(tmp_path / "in", course).set_index("student")
    printed = capsys.readouterr().out
    assert "it broke" in marks.loc["broken", "notes"] and "a9 is no assignment" in printed and f"{NAME} has no due date" in printed
    (course / "gradebook.db").unlink()  # as the message about other cells advises
    assert grading.grade_all(tmp_path / "in", course).set_index("student").loc["ann", "tests"] == MOST - made.HAND


def test_marks_of_an_older_source():
    from types import SimpleNamespace

    grades = [SimpleNamespace(name=name, score=2, needs_manual_grade=False, manual_score=None) for name in ("kept", "gone")]
    row = grading.add_up(SimpleNamespace(grades=grades, late_submission_penalty=None), {"kept": (3.0, False), "new": (5.0, False)}, intake.Lateness(), [])
    assert (row["tests"], row["most"]) == (2, 8) and "marked before new was added" in row["notes"]




def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_a_hostile_archive(tmp_path):
    link = zipfile.ZipInfo("mallory/a1/link.ipynb")
    link.external_attr = 0o120777 << 16
    good = "doealice_1_2_a1.ipynb"
    archive = write_zip(tmp_path / "all.zip", [("../../evil_1_2_a1.ipynb", b"x"), ("/etc/passwd_1_2_a1.ipynb", b"x"), ("C:\\x_1_2_a1.ipynb", b"x"), (link, b"/etc/passwd"),
                                               ("big_9_9_a1.ipynb", bytes(MOST_FILE + 1)), (good, b"{}"), ("__MACOSX/doealice_1_2_a1.ipynb", b"junk")])
    found, lost = intake.collect(archive, ["a1"])
    assert [(s.student, s.notebook.name) for s in found] == [("doealice_1", good)] and len(lost) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.zip"]  # nothing was unpacked
    (tmp_path / "no.zip").write_bytes(b"PK, but no zip file")
    with pytest.raises(UserError, match="not a zip file"):
        intake.collect(tmp_path / "no.zip", ["a1"])


def test_a_member_that_lies_about_its_size(tmp_path):
    path = write_zip(tmp_path / "all.zip", [("a_1_2_a1.ipynb", bytes(3 * MOST_FILE))])
    raw = path.read_bytes()
    true, lie = (3 * MOST_FILE).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    path.write_bytes(raw.replace(true, lie))
    found, _ = intake.collect(path, ["a1"])
    try:
        assert len(intake.read_upload(found[0].notebook)) <= MOST_FILE + 1
    except OSError as error:
        assert "damaged in the archive" in str(error)


def write_files(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_names_of_canvas(tmp_path):
    write_files(tmp_path, {"doealice_11_501_a1.ipynb": b"old", "doealice_11_502_a1-1.ipynb": b"newer", "doealice_11_503_a1-10.ipynb": b"newest", "doealice_11_504_adapters-2.py": b"pass",
                           "roebob_LATE_12_505_a1 (1).ipynb": b"bob", "roebob_LATE_12_510_timestamp.txt": b"2020-01-01 00:00:00 UTC", "twobooks_13_506_x.ipynb": b"",
                           "twobooks_13_507_y.ipynb": b"", "renamed_14_508_my homework.ipynb": b"me", "other_15_509_a2.ipynb": b"of another week"})
    found, lost = intake.collect(tmp_path, ["a1", "a2"], "a1")
    by_student = {s.student: s for s in found}
    assert set(by_student) == {"doealice_11", "roebob_12", "renamed_14"} and len(lost) == 4
    alice, bob = by_student["doealice_11"], by_student["roebob_12"]
    assert intake.read_upload(alice.notebook) == b"newest" and set(alice.files) == {"adapters.py"} and alice.late is False and bob.late is True
    assert bob.stamp is None and any("timestamp.txt" in sentence for sentence in lost)  # he can't say himself when he came
    with pytest.raises(UserError, match="--assignment"):
        intake.collect(tmp_path, ["a1", "a2"])


@pytest.mark.parametrize("top", ["", "class/"])
def test_nobody_hands_in_for_somebody_else(tmp_path, top):
    write_files(tmp_path, {f"{top}{name}": b"x" for name in ("victim/a1/a1.ipynb", "mallory/a1/a1.ipynb", "mallory/a1/x/victim/a1/a1.ipynb", "mallory/a1/dave_99_1_a1.ipynb",
                                                             "mallory/victim/a1/a1.ipynb", "eve_1_2_a1.ipynb")})
    found, lost = intake.collect(tmp_path, ["a1", "a2"])
    assert [(s.student, s.notebook.name) for s in found] == [("mallory", f"{top}mallory/a1/a1.ipynb"), ("victim", f"{top}victim/a1/a1.ipynb")]
    assert len(lost) == 4


def test_large_and_unreadable_files(tmp_path):
    write_files(tmp_path, {"ann/a1/a1.ipynb": b"{}", "ann/a1/big.py": bytes(10**6 + 1), "ann/a1/small.py": b"pass", **{f"ann/a1/m{i}.py": bytes(10**6) for i in range(6)}})
    (odd := tmp_path / "bea" / "a1").mkdir(parents=True)
    (odd / "a1.ipynb").write_bytes(b"{}")
    os.mkfifo(odd / "pipe.py")
    (Path(os.fsdecode(os.fsencode(odd) + b"/\xff.py"))).write_bytes(b"pass")
    found, lost = intake.collect(tmp_path, ["a1"])
    assert len(found[0].files) == 5 and "big.py" not in found[0].files and len(found[0].notes) == 3 and "1.0 MB" in found[0].notes[0]
    assert not found[1].files and len(lost) == 2 and all(sentence.encode() for sentence in lost)
    archive = write_zip(tmp_path / "x.zip", [("ann/a1/a1.ipynb", b"text" * 1000)])
    data = archive.read_bytes()
    archive.write_bytes(data.replace(data[50:60], b"x" * 10))
    with pytest.raises(OSError):
        intake.read_upload(intake.collect(archive, ["a1"])[0][0].notebook)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret.ipynb").write_text("{}")
    (tmp_path / "in" / "eve" / "a1").mkdir(parents=True)
    (tmp_path / "in" / "eve" / "a1" / "a1.ipynb").symlink_to(tmp_path / "secret.ipynb")
    found, lost = intake.collect(tmp_path / "in", ["a1"])
    assert not found and "a link" in lost[0]


@pytest.mark.parametrize("name", ["../x", "=1+1", "..", "a b", "x" * 200, "-rf", "a/b", "<b>"])
def test_names_become_harmless_and_stay_apart(name):
    safe = intake.safe_name(name)
    assert re.fullmatch(r"\w[\w.@-]{0,70}", safe) and safe != intake.safe_name(name + "!")


def test_times():
    utc = timezone.utc
    for text, hour in (("2027-01-29 12:00:00.5 UTC", 12), ("2027-01-29T12:00:00-06:00", 18), ("2027-07-01 12:00:00 America/Chicago", 17), ("2027-01-29 12:00", 12)):
        assert intake.read_stamp(text).hour == hour and intake.read_stamp(text).tzinfo == utc
    assert [intake.read_stamp(text) for text in ("", "yesterday", "2027-13-01 12:00:00", "2027-01-01 12:00:00 Nowhere/Land", "2027-01-01 12:00:00 ../x", "0001-01-01 00:00:00 +0500")] == [None] * 6
    due = datetime(2027, 1, 29, 12, tzinfo=utc)
    upload = intake.Upload("a.ipynb", due + timedelta(days=3), 1, lambda: None)
    for late, when, days in ((None, upload.time, 3), (False, due, 0), (True, upload.time, 3)):
        assert intake.find_time(intake.Submission("a", "a1", upload, late=late), due)[0] == when
        assert intake.charge_late_days(intake.LatePolicy({"a1": due}), "a", {"a1": when})["a1"].days == days
    early = intake.Upload("a.ipynb", due - timedelta(days=3), 1, lambda: None)
    when, note = intake.find_time(intake.Submission("a", "a1", early, late=True), due)
    assert when > due and "Canvas says late" in note
    when, note = intake.find_time(intake.Submission("a", "a1", early, late=True), due, extended=True)
    assert when == early.time and "extension" in note


def test_late_days_over_a_term():
    start = datetime(2027, 1, 29, 23, 59, 59, tzinfo=timezone(timedelta(hours=-6)))
    due = {f"a{i}": start + timedelta(weeks=i) for i in range(4)}
    policy = intake.LatePolicy(due, late_days=3, penalty_per_day=0.25, end=due["a3"] + timedelta(days=2), extensions={"ill": {"a0": due["a0"] + timedelta(days=5)}})
    second, day = timedelta(seconds=1), timedelta(days=1)
    times = {"a0": due["a0"], "a1": due["a1"] + second, "a2": due["a2"] + 3 * day, "a3": due["a3"] + 2 * day + second}
    got = intake.charge_late_days(policy, "x", times)
    assert [(x.days, x.free, x.penalty) for x in (got[name] for name in sorted(got))] == [(0, 0, 0), (1, 1, 0), (3, 2, 0.25), (3, 0, 1.0)]
    assert intake.describe_lateness(got["a3"]) == "handed in after the hard end of the course, so nothing counts"
    assert [intake.describe_lateness(got[name]) for name in ("a0", "a1", "a2")] == ["", "1 day late, 1 of them from the budget", "3 days late, 2 of them from the budget; 25% of the points are taken off"]
    assert intake.charge_late_days(policy, "x", {"a0": policy.end + day, "a1": due["a1"] + second})["a1"].free == 1  # what is closed spends nothing
    assert intake.charge_late_days(policy, "ill", {"a0": due["a0"] + 5 * day})["a0"].days == 0
    assert intake.charge_late_days(policy, "x", {"a2": times["a2"], "a1": times["a1"]})["a1"].free == 1  # the order in which they are given doesn't matter


@pytest.mark.parametrize("text, words", [('{"due": {"a1": "2027-01-29T23:59:59"}}', "offset"), ('{"due": {"a1": "Friday"}}', "offset"), ("{", "can't be read"),
                                         ('{"deadline": {}}', "no rule"), ('{"penalty_per_day": 10}', "penalty_per_day is 10"), ('{"limits": {"patience": 3}}', "no rule"), ("[]", "can't be read")])
def test_rules_that_are_wrong(tmp_path, text, words):
    (tmp_path / "course.json").write_text(text)
    with pytest.raises(UserError, match=words):
        intake.read_policy(tmp_path / "course.json", ["seconds"])


def test_the_course_has_rules_for_all_assignments():
    path = Path(__file__).resolve().parent.parent / "assignments" / "course.json"
    rules = intake.read_policy(path)
    assert not rules.find_strangers(rules.due, []) and len(rules.find_strangers(["a1-tokenizer", "a9"], [])) == 4
    assert list(rules.due) == ["a1-tokenizer", "a2-transformer", "a3-training", "a4-scale"] and list(rules.due.values()) == sorted(rules.due.values())
    assert rules.end > max(rules.due.values()) and 0 < rules.penalty_per_day < 1 and rules.late_days


def test_no_script_of_a_student_reaches_the_grader():
    source = made.make_source()
    answer = "<script>alert(1)</script> [x](javascript:alert(1)) <img src=x onerror=alert(1)> a < b"
    book = made.make_submission({}, answer)
    book["cells"].append(make_cell("markdown", answer, "mine"))
    book, _ = restore(source, json.dumps(book).encode())
    cell = make_cell("code", "1", "shown")
    cell["outputs"] = [{"output_type": "display_data", "data": {"text/html": "<script>", "image/png": '"><script>', "image/svg+xml": "<svg onload=x>"}, "metadata": {}},
                       {"output_type": "execute_result", "data": {"text/html": "<script>", "text/plain": "1"}, "metadata": {}, "execution_count": 1}]
    book["cells"].append(cell)
    text = json.dumps(grading.finish_notebook({"notebook": book, "marks": [], "notes": [], "seconds": 1}, source))
    assert not re.search(r"<[a-z/!]|\]\(javascript:", text) and text.count("a < b") == 2 and "text/plain" in text


def test_our_own_text_keeps_its_html():
    source = made.make_source()
    source["cells"].insert(0, make_cell("markdown", "<details>A hint</details>", "hint"))
    book, _ = restore(source, json.dumps({**source, "cells": [*source["cells"], make_cell("markdown", "<details>mine</details>", "mine")]}).encode())
    texts = [cell["source"] for cell in grading.finish_notebook({"notebook": book, "marks": [], "notes": []}, source)["cells"]]
    assert "<details>A hint</details>" in texts and "<details>mine</details>" not in texts


def test_a_page_runs_nothing():
    head = '<html><head><meta charset="utf-8"/><script src="https://cdnjs.cloudflare.com/x.js"></script></head>'
    page = grading.close_page(head + '<body><a href="javascript:alert(1)" onclick="x()">a</a><a href="#top">b</a><a href="https://x.org">c</a><img src="data:image/svg+xml,x"/>'
                              '<img src="data:image/png;base64,AA"/><script>alert(1)</script><iframe srcdoc="x"></iframe></body></html>')
    body = page.partition("</head>")[2]
    assert "script" not in body and "onclick" not in body and "iframe" not in body and "svg" not in body
    assert 'href="#top"' in body and 'href="https://x.org"' in body and "data:image/png;base64,AA" in body
    assert page.index("Content-Security-Policy") < page.index("<script") and "unsafe-inline" not in page


def test_a_test_that_never_ran_is_failed_in_the_notebook_too():
    cell = make_cell("code", "assert True", "test-count", "test", 3)
    mark = {"id": "test-count", "points": 0.0, "most": 3.0, "message": "TimeoutError: no time left", "seconds": 0}
    book = grading.finish_notebook({"notebook": made.make_notebook([cell]), "marks": [mark], "notes": []}, made.make_source())
    assert book["cells"][0]["outputs"][0]["evalue"] == "TimeoutError: no time left" and made.SECRET not in book["cells"][0]["source"]
    cell = make_cell("code", "assert True", "test-best", "test", 3)
    book = grading.finish_notebook({"notebook": made.make_notebook([cell]), "marks": [], "notes": []}, made.make_source())
    assert made.SECRET in book["cells"][0]["source"]  # the person who marks sees the test as it is


def test_results_depend_on_everything(tmp_path):
    from dataclasses import replace

    for name in ("examine", "bpe"):
        (tmp_path / f"{name}.py").write_text("x = 1")
    settings, assignment = grading.ExamSettings(tmp_path, {}, False, grading.hash_package(tmp_path)), grading.Assignment("a1", "{}", {"data.txt": b"1"})
    (tmp_path / "bpe.py").write_text("x = 2")  # what hidden tests take as their reference
    given = [(settings, assignment, b"book", {}), (settings, assignment, b"other", {}), (settings, replace(assignment, source="{ }"), b"book", {}),
             (settings, replace(assignment, files={"data.txt": b"2"}), b"book", {}), (settings, assignment, b"book", {"adapters.py": b""}),
             (replace(settings, limits={"seconds": 9}), assignment, b"book", {}), (settings, replace(assignment, files={}), b"book", {"data.txt": b"1"}),
             (replace(settings, trust=True), assignment, b"book", {}), (replace(settings, package=grading.hash_package(tmp_path)), assignment, b"book", {})]
    keys = [grading.hash_examination(*one) for one in given]
    assert len(set(keys)) == len(keys) and keys[0] == grading.hash_examination(settings, assignment, b"book", {})


def test_only_one_at_a_time(tmp_path):
    with grading.lock_course(tmp_path), pytest.raises(UserError, match="at work in"), grading.lock_course(tmp_path):
        pass
    with grading.lock_course(tmp_path):
        pass


def test_a_roster_that_is_none(tmp_path):
    (tmp_path / "x.csv").write_text("name,mail\n")
    with pytest.raises(UserError, match="no columns Student and ID"):
        grading.read_roster(tmp_path / "x.csv")
    with pytest.raises(UserError, match="can't be read"):
        grading.read_roster(tmp_path / "none.csv")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_formulas_are_defused(tmp_path, text):
    grading.write_table(tmp_path / "x.csv", pd.DataFrame({"student": [text], "total": [-1.5]}))
    assert list(csv.reader(open(tmp_path / "x.csv", newline="")))[1] == [f"'{text}", "-1.5"]


def test_mistakes_of_the_instructor(tmp_path):
    with pytest.raises(UserError, match="make release"):
        grading.grade_all(tmp_path, tmp_path / "course")
    course = tmp_path / "course"
    (course / "source" / NAME).mkdir(parents=True)
    (course / "source" / NAME / f"{NAME}.ipynb").write_text(json.dumps(made.make_source()))
    (empty := tmp_path / "empty").mkdir()
    for handed_in, only, words in ((tmp_path / "nowhere", None, "there is no"), (empty, "a9", "no assignment 'a9'"), (empty, None, "is a submission"),
                                   (tmp_path, None, "has the course directory in it")):
        with pytest.raises(UserError, match=words):
            grading.grade_all(handed_in, course, only)


def test_the_rules_are_found_from_inside_the_course(tmp_path, monkeypatch):
    (tmp_path / "course").mkdir()
    (tmp_path / "course.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "course")
    assert grading.find_rules(Path(".")).exists()
    (tmp_path / "course" / "course.json").write_text("{}")
    assert grading.find_rules(Path(".")).resolve().parent.name == "course"


def test_an_assignment_that_fails_its_own_tests(tmp_path):
    source = json.loads(json.dumps(made.make_source()).replace("counts.get(pair, 0) + 1", "counts.get(pair, 0) + 2"))
    with pytest.raises(UserError, match="doesn't pass its own tests here .*test-count"):
        grading.check_source(grading.ExamSettings(tmp_path, {}, False, ""), grading.Assignment(NAME, json.dumps(source), {}))
    assert not list(tmp_path.glob("*.json"))


def test_without_nbgrader(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nanochat\[grading\]'"):
        grading.need_nbgrader()
