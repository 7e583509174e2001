"CORE against an implementation of one item at a time that shares nothing with ours but the model and the tokenizer."
import json
import random
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from nanochat import core
from nanochat.common import UserError
from nanochat.core import (
    CORE_TASKS,
    answer_items,
    draw_core,
    draw_examples,
    draw_items,
    fetch_bundle,
    find_bundle,
    is_right,
    mark_item,
    read_bundle,
    read_items,
    render_item,
    score_core,
    score_core_task,
    summarize_core,
    unpack_bundle,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.likelihood import Score
from nanochat.tokenizer import Tokenizer

CONTEXT = 256


# An implementation for comparison

def reference_texts(item, kind, delimiter, shown):
    "Texts of an item, written out for each kind."
    head = ""
    for e in shown:
        if kind == "multiple_choice":
            head += e["query"] + delimiter + e["choices"][e["gold"]] + "\n\n"
        elif kind == "schema":
            head += e["context_options"][e["gold"]] + delimiter + e["continuation"] + "\n\n"
        else:
            head += e["context"].strip() + delimiter + e["continuation"] + "\n\n"
    if kind == "multiple_choice":
        return [head + item["query"] + delimiter + c for c in item["choices"]]
    if kind == "schema":
        return [head + c + delimiter + item["continuation"] for c in item["context_options"]]
    head += item["context"].strip() + delimiter
    return [head.strip(), head + item["continuation"]]


@torch.no_grad()
def reference_answer(model, tokenizer, data, i, kind, shots, delimiter):
    "Whether item i is right, and by how much the best choice leads."
    shown = [data[j] for j in random.Random(1234 + i).sample([j for j in range(len(data)) if j != i], shots)] if shots else []
    rows = [[tokenizer.bos] + tokenizer.encode(t) for t in reference_texts(data[i], kind, delimiter, shown)]
    n = 0
    if kind == "schema":
        while n < min(map(len, rows)) and len({row[-1 - n] for row in rows}) == 1:
            n += 1
        starts = [len(row) - n for row in rows]
    elif kind == "multiple_choice":
        while n < min(map(len, rows)) and len({row[n] for row in rows}) == 1:
            n += 1
        starts = [n] * len(rows)
    else:
        assert rows[1][: len(rows[0])] == rows[0]
        starts, rows = [len(rows[0])], rows[1:]
    means = []
    for row, start in zip(rows, starts):
        cut = max(0, len(row) - model.config.context)
        row, start = row[cut:], max(1, start - cut)
        logits = model(torch.tensor([row[:-1]]))[0] if len(row) > 1 else torch.zeros(0, model.config.vocab_size)
        answer = torch.tensor(row[start:], dtype=torch.int64)
        losses = torch.nn.functional.cross_entropy(logits[start - 1 :], answer, reduction="none")
        if kind == "language_modeling":
            return bool((logits[start - 1 :].argmax(-1) == answer).all()), 1.0
        means.append(losses.mean().item())
    order = sorted(m for m in means if m == m)
    return means.index(min(means)) == data[i]["gold"], order[1] - order[0] if len(order) > 1 else 1.0


def answers_of_reference(model, tokenizer, task, count):
    with open(task.path, encoding="utf-8") as file:
        data = [json.loads(line) for line in file]
    random.Random(1337).shuffle(data)
    data = data[:count] if count else data
    return [reference_answer(model, tokenizer, data, i, task.kind, task.shots, task.delimiter) for i in range(len(data))]


def learn(model, rows, steps, seed=0):
    "A few steps on the ends of rows, so that the model prefers something."
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02, generator=generator)  # so that tokens it never sees aren't equally likely
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [row[-model.config.context :] for row in rows]
    for _ in range(steps):
        chosen = [rows[i] for i in torch.randint(0, len(rows), (8,), generator=generator).tolist()]
        width = max(map(len, chosen))
        x = torch.tensor([row + [0] * (width - len(row)) for row in chosen])
        y = torch.tensor([row[1:] + [-1] * (width - len(row) + 1) for row in chosen])
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# A bundle of our own

HOMES = {"fish": "lake", "bird": "tree", "cat": "house", "dog": "yard", "cow": "barn", "fox": "forest", "mouse": "hole", "bee": "garden"}


def toy_items(kind, count, seed=0):
    rng, items = random.Random(seed), []
    for _ in range(count):
        names = rng.sample(list(HOMES), 3)
        gold = rng.randrange(2)
        if kind == "multiple_choice":
            items.append({"query": f"The {names[gold]} lives in the", "choices": [HOMES[n] + " of Ann" * (n > "d") for n in names[:2]], "gold": gold})
        elif kind == "schema":
            items.append({"context_options": [f"The {n} saw the {names[2]}, and the {n}" for n in names[:2]], "continuation": f"ran to the {HOMES[names[gold]]}.", "gold": gold})
        else:
            items.append({"context": f" The {names[0]} ran home. Now it is in the  ", "continuation": HOMES[names[0]]})
    return items


TOY = {"toy_choice": ("multiple_choice", 2, 25), "toy_schema": ("schema", 1, 50), "toy_story": ("language_modeling", 2, 0)}


def write_bundle(folder, count=24, tasks=TOY):
    entries, rows = [], ["Eval Task,Task Category,Random baseline"]
    for name, (kind, shots, percent) in tasks.items():
        path = folder / "eval_data" / "some_kind" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in toy_items(kind, count)))
        entries.append({"label": name, "dataset_uri": f"some_kind/{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
                       | ({"continuation_delimiter": "\nAnswer: "} if kind == "multiple_choice" else {}))
        rows.append(f"{name},toys,{percent}")
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    return folder


def toy_model(context=96):
    texts = [text for kind, *_ in TOY.values() for item in toy_items(kind, 40, seed=1) for text in reference_texts(item, kind, " ", toy_items(kind, 2, seed=2))]
    tokenizer = Tokenizer.train(texts, 320)
    model = GPT(GPTConfig(320, 2, 32, 2, 2, context)).init_weights(0)
    return learn(model, [[tokenizer.bos, *tokenizer.encode(text)] for text in texts], 60), tokenizer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_model(), read_bundle(write_bundle(tmp_path_factory.mktemp("bundle")))


def test_toy_answers_are_the_references(toy):
    (model, tokenizer), tasks = toy
    for task in tasks:
        right, cut = answer_items(model, tokenizer, task)
        expected = answers_of_reference(model, tokenizer, task, 0)
        assert [r for r, (_, lead) in zip(right, expected) if lead > 1e-4] == [e for e, lead in expected if lead > 1e-4]
        assert 0 < sum(right) < len(right) == 24, task.name
    assert cut == 0


@pytest.mark.parametrize("context", [16, 24, 96])
def test_batches_and_windows_change_nothing(toy, monkeypatch, context):
    (trained, tokenizer), tasks = toy
    model = GPT(GPTConfig(320, 2, 32, 2, 2, context))
    model.load_state_dict(trained.state_dict())
    whole = [answer_items(model, tokenizer, task, batch=32) for task in tasks]
    assert [answer_items(model, tokenizer, task, batch=1) for task in tasks] == whole
    monkeypatch.setattr(core, "WINDOW", 7)
    assert [answer_items(model, tokenizer, task) for task in tasks] == whole
    assert (sum(cut for _, cut in whole) > 0) == (context < 96)
    for task, (right, _) in zip(tasks, whole):
        expected = answers_of_reference(model, tokenizer, task, 0)
        assert [r for r, (_, lead) in zip(right, expected) if lead > 1e-4] == [e for e, lead in expected if lead > 1e-4]


RANK = """
import json, os, sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_core import toy_model
from nanochat.common import get_ranks
from nanochat.core import read_bundle, score_core
torch.set_num_threads(1)
ranks = get_ranks()
if ranks.world > 1: dist.init_process_group("gloo")
result = score_core(*toy_model(), read_bundle(Path(sys.argv[2])), batch=8, ranks=ranks)
with open(f"{sys.argv[2]}/{ranks.world}_{ranks.rank}.json", "w") as file: json.dump(result, file)
if ranks.world > 1: dist.destroy_process_group()
"""


def test_two_processes_give_the_same_numbers(tmp_path):
    write_bundle(tmp_path)
    (tmp_path / "rank.py").write_text(RANK)
    for count in (1, 2):
        run_ranks(count, tmp_path / "rank.py", Path(__file__).parent, tmp_path)
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert one == first == second and len(one[1]) == 3


# The real tasks

@pytest.fixture(scope="module")
def real(real_data):
    "The tasks, and a model that has read a little of them."
    tasks = read_bundle(real_data / "eval_bundle")
    texts = {task.name: [render_item(task, item)[-1] for item in read_items(task)[:300]] for task in tasks}
    tokenizer = Tokenizer.train([text for some in texts.values() for text in some], 1024)
    torch.manual_seed(0)
    model = GPT(GPTConfig(1024, 2, 64, 2, 2, CONTEXT)).init_weights(0)
    rows = [[tokenizer.bos, *tokenizer.encode(text)] for name in ("bigbench_cs_algorithms", "bigbench_dyck_languages", "copa") for text in texts[name]]
    return learn(model, rows, 60), tokenizer, tasks


def test_the_bundle_is_what_we_think(real):
    for task in real[2]:
        assert CORE_TASKS[task.name] == task.shots and 0 <= task.baseline < 1 and len(read_items(task)) > task.shots


def test_real_answers_are_the_references(real):
    model, tokenizer, tasks = real
    ties = written = 0
    for task in tasks:
        right, _ = answer_items(model, tokenizer, task, 50)
        expected = answers_of_reference(model, tokenizer, task, 50)
        assert len(right) == len(expected)
        for i, (mine, (theirs, lead)) in enumerate(zip(right, expected)):
            ties += lead <= 1e-4
            assert mine == theirs or lead <= 1e-4, f"{task.name}, item {i}"
        written += sum(right) if task.kind == "language_modeling" else 0
    assert ties < 20 and written > 0


# Parts

@given(st.integers(1, 30), st.data())
def test_examples_are_drawn_from_the_others(count, data):
    index, shots = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    others = [i for i in range(count) if i != index]
    assert draw_examples(list(range(count)), index, shots) == random.Random(1234 + index).sample(others, shots)


rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=4)


@given(rows)
def test_marks(rows):
    rows = [[9, *row] for row in rows]
    for text, row in zip(mark_item("multiple_choice", rows), rows):
        assert text.ids == row and all(r[: text.start] == rows[0][: text.start] for r in rows)
    ends = [text.ids[text.start :] for text in mark_item("schema", rows)]
    assert all(end == ends[0] for end in ends) or len(set(map(tuple, rows))) == 1
    assert len(mark_item("language_modeling", [rows[0], rows[0] + [1]])) == 1


@pytest.mark.parametrize("counts, choice", [((0, 3, 3), 0), ((3, 0, 3), 2), ((0, 0, 0), 0)])
def test_an_answer_of_which_nothing_counts(counts, choice):
    scores = [Score(-1.0 * n * (3 - i), n, False) for i, n in enumerate(counts)]
    assert is_right("multiple_choice", {"gold": choice}, scores)


def record(name, centered=0.5, count=100):
    return {"task": name, "kind": "schema", "shots": 0, "accuracy": centered, "low": centered - 0.1, "high": centered + 0.1, "baseline": 0.0,
            "centered": centered, "count": count, "cut": 0}


def test_only_all_tasks_are_called_core():
    records = [record(name, i / 22) for i, name in enumerate(CORE_TASKS)]
    whole, part = summarize_core(records), summarize_core(records[4:])
    assert whole["name"] == "CORE" and abs(whole["score"] - sum(i / 22 for i in range(22)) / 22) < 1e-12
    assert part["name"] == "partial score over 18 of 22 tasks" and "CORE" not in part["name"]
    assert abs((whole["high"] - whole["low"]) / 2 - 0.1 / 22**0.5) < 1e-12
    assert "CORE" not in summarize_core([record("mine")])["name"]
    assert summarize_core([*records[:21], record("mine")])["name"] == "partial score over 21 of 22 tasks"


def test_figure():
    import matplotlib
    matplotlib.use("Agg")
    axes = draw_core([record(name) for name in CORE_TASKS]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()][1] == "jeopardy (0)"
    assert len(axes.patches) == 22 and axes.collections


def test_records(toy):
    (model, tokenizer), tasks = toy
    seen = []
    summary, records = score_core(model, tokenizer, tasks, max_items=10, on_task=seen.append)
    assert seen == records and [r["count"] for r in records] == [10] * 3
    assert set(records[0]) == {"task", "type", "shots", "accuracy", "low", "high", "baseline", "centered", "count", "cut"}
    for r in records:
        assert r["low"] <= r["accuracy"] <= r["high"] and abs(r["centered"] - (r["accuracy"] - r["baseline"]) / (1 - r["baseline"])) < 1e-12
    assert score_core_task(model, tokenizer, tasks[0], 10) == records[0]


# What people get wrong

GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ("[]", "not a JSON object"), ('{"query": "q", "choices": ["a", "b"]}', "no gold"),
    (json.dumps(GOOD | {"gold": 2}), "gold is 2"), (json.dumps(GOOD | {"gold": -1}), "gold is -1"), (json.dumps(GOOD | {"gold": True}), "gold is True"),
    (json.dumps(GOOD | {"choices": ["a"]}), "fewer than two"), (json.dumps(GOOD | {"choices": "ab"}), "fewer than two"), ('{"query": 1, "gold": 0}', "no choices"),
])
def test_bad_lines(tmp_path, line, message):
    task = read_bundle(write_bundle(tmp_path))[0]
    task.path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"toy_choice.jsonl, line 2.*{message.replace('line 2: ', '')}.*nanochat fetch core"):
        read_items(task)


def test_bad_files(tmp_path):
    tasks = read_bundle(write_bundle(tmp_path))
    tasks[0].path.write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        read_items(tasks[0])
    tasks[0].path.write_bytes(b'{"query": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        read_items(tasks[0])
    tasks[2].path.write_text('{"context": "a", "continuation": " "}')
    with pytest.raises(UserError, match="line 1: the continuation is empty"):
        read_items(tasks[2])


def test_more_shots_than_items(tmp_path):
    tasks = read_bundle(write_bundle(tmp_path))
    with pytest.raises(UserError, match="toy_choice shows 2 other items.*only 2 in all: --max-per-task 3"):
        draw_items(tasks[0], 2)
    assert len(draw_items(tasks[0], 3)) == 3 and len(draw_items(tasks[0], 1000)) == 24


@pytest.mark.parametrize("file, text", [("core.yaml", "icl_tasks: ["), ("core.yaml", "[]"), ("core.yaml", "icl_tasks:\n- {label: x}"), ("core.yaml", None),
                                        ("eval_meta_data.csv", "Eval Task\nx"), ("eval_meta_data.csv", None)])
def test_damaged_bundles(tmp_path, file, text):
    write_bundle(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="no evaluation bundle.*nanochat fetch core"):
        read_bundle(tmp_path)


def test_unknown_kinds_and_missing_files(tmp_path):
    write_bundle(tmp_path, tasks={"x": ("schema", 0, 50)})
    (tmp_path / "core.yaml").write_text((tmp_path / "core.yaml").read_text().replace("schema", "essay"))
    with pytest.raises(UserError, match="unknown kind 'essay'"):
        read_bundle(tmp_path)
    tasks = read_bundle(write_bundle(tmp_path))
    tasks[1].path.unlink()
    assert [task.name for task in read_bundle(tmp_path)] == ["toy_choice", "toy_story"]
    tasks[0].path.unlink(), tasks[2].path.unlink()
    with pytest.raises(UserError, match="none of the tasks"):
        read_bundle(tmp_path)


def test_where_the_bundle_is(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_TEST_DATA", raising=False)
    with pytest.raises(UserError, match="nanochat fetch core"):
        find_bundle()
    monkeypatch.setenv("NANOCHAT_TEST_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match="nanochat fetch core"):
        find_bundle()
    other = write_bundle(tmp_path / "data" / "eval_bundle")
    assert find_bundle() == other
    own = write_bundle(tmp_path / "base" / "eval_bundle")
    assert find_bundle() == own


# Fetching

@contextmanager
def server(data, code=200):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/bundle.zip"
    finally:
        http.shutdown()


def zip_bundle(tmp_path, *more):
    folder, archive = write_bundle(tmp_path / "made"), tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*"):
            if path.is_file():
                file.write(path, Path("eval_bundle") / path.relative_to(folder))
        file.writestr("__MACOSX/._eval_bundle", "")
        for name in more:
            file.writestr(name, "x")
    return archive


def test_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with server(zip_bundle(tmp_path).read_bytes()) as url:
        monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", url)
        folder = fetch_bundle()
    assert folder == find_bundle() == tmp_path / "base" / "eval_bundle" and len(read_bundle(folder)) == 3
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["eval_bundle"]


def test_fetch_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with server(b"", 404) as url:
        monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", url)
        with pytest.raises(UserError, match="404.*NANOCHAT_EVAL_BUNDLE_URL"):
            fetch_bundle()
    with server(zip_bundle(tmp_path).read_bytes()[:-40]) as url:
        monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", url)
        with pytest.raises(UserError, match="damaged.*delete it"):
            fetch_bundle()
    assert not (tmp_path / "base" / "eval_bundle").exists()


@pytest.mark.parametrize("name", ["../escaped", "eval_bundle/../../escaped", "/escaped", "eval_bundle\\..\\..\\escaped", "C:/escaped"])
def test_names_that_lead_out(tmp_path, name):
    archive = zip_bundle(tmp_path, name)
    with pytest.raises(UserError, match="outside of its folder"):
        unpack_bundle(archive, tmp_path / "in" / "eval_bundle")
    assert not list(tmp_path.rglob("*escaped*")) and not (tmp_path / "in" / "eval_bundle").exists()


def test_damaged_contents_leave_the_old_bundle(tmp_path):
    old = write_bundle(tmp_path / "eval_bundle", tasks={"old": ("schema", 0, 50)})
    archive = zip_bundle(tmp_path)
    data = bytearray(archive.read_bytes())
    place = data.find(b"eval_data") + 60
    data[place : place + 20] = b"\x55" * 20
    archive.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        unpack_bundle(archive, old)
    assert [task.name for task in read_bundle(old)] == ["old"]
