"""Tasks, public benchmarks and mixtures: on real data, on odd data, and with the hub out of reach."""
import io
import json
import random
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call_nanochat
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.benchmarks import HUB_DATA, check_program, find_overlaps, hub_task, read_hub
from nanochat.common import UserError
from nanochat.conversation import plain_text, render_conversation
from nanochat.midtrain import conversation_rows
from nanochat.mixtures import identity_task, jsonl_task, load_mixture, load_task, mixture_hash, read_numbers, read_persona
from nanochat.run import PRESETS
from nanochat.tasks import Chain, Example, Task, View, check_letters, check_number, final_number, join_tasks, mix_tasks, spelling_task
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

SIZES = {("arc_easy", "test"): 2376, ("arc_challenge", "test"): 1172, ("gsm8k", "train"): 7473, ("gsm8k", "test"): 1319, ("humaneval", "test"): 164,
         ("mmlu", "test"): 4, ("smoltalk", "train"): 1000, ("smoltalk", "test"): 100}


@pytest.fixture(autouse=True)
def own_base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@given(st.lists(st.lists(st.integers(), max_size=6), max_size=5), st.integers(0, 40), st.integers(1, 5))
def test_views_and_chains_are_sequences(parts, start, step):
    flat = [item for part in parts for item in part]
    chain = Chain(parts)
    assert [chain[i] for i in range(len(chain))] == flat and len(chain) == len(flat)
    view = View(chain, make=str)
    assert list(view) == [str(item) for item in flat]
    assert list(view[start::step]) == [str(item) for item in flat[start::step]] and list(view[::-1][:3]) == [str(item) for item in flat[::-1][:3]]
    if flat:
        assert (chain[-1], view[-1]) == (flat[-1], str(flat[-1]))
    for index in (len(flat), -len(flat) - 1):
        with pytest.raises(IndexError):
            chain[index]
        with pytest.raises(IndexError):
            view[index]


def numbered(name, count):
    return Task(name, View(range(count), make=lambda i: Example([{"role": "user", "content": f"{name}{i}"}])))


def test_shuffles_and_mixtures_are_the_same_everywhere():
    task = numbered("t", 1000)
    assert [e.messages[0]["content"] for e in task.shuffle(7)[:4]] == ["t878", "t857", "t349", "t313"], "another order than on other machines"
    mixed = mix_tasks([task, numbered("u", 10), numbered("u", 10)], 3)
    names = [e.messages[0]["content"] for e in mixed]
    assert len(names) == 1020 and all(names.count(f"u{i}") == 2 for i in range(10)) and len(set(names)) == 1010
    assert sum(name[0] == "u" for name in names[:510]) not in (0, 20), "not mixed"
    assert [e.messages for e in join_tasks([task[:2], task[5:6]])] == [task[i].messages for i in (0, 1, 5)]


def test_sizes_of_the_real_data(real_data):
    for (name, split), size in SIZES.items():
        assert len(read_hub(name, split)) == size, (name, split)


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "mmlu"])
def test_letters_name_the_right_choices(real_data, name):
    rows, task = read_hub(name, "test"), hub_task(name)
    for row, example in zip(rows, task):
        texts = row["choices"]["text"] if "answerKey" in row else row["choices"]
        right = texts[row["choices"]["label"].index(row["answerKey"])] if "answerKey" in row else texts[row["answer"]]
        assert f"\n- {right}={example.answer}\n" in example.question[0]["content"] and example.answer in example.choices
        assert example.messages[1]["content"] == example.answer and task.check(example, example.answer)
        assert not any(task.check(example, letter) for letter in example.choices if letter != example.answer)


def test_gsm8k_is_taken_apart_and_not_changed(real_data):
    agreed = []
    for split in ("train", "test"):
        for row, example in zip(read_hub("gsm8k", split), hub_task("gsm8k", split)):
            parts = example.messages[1]["content"]
            again = "".join({"text": "{}", "python": "<<{}=", "python_output": "{}>>"}[p["type"]].format(p["text"]) for p in parts)
            assert again == row["answer"]
            assert check_number(example, plain_text(parts)) and example.answer == str(final_number(row["answer"]))
            agreed += [calculate(a["text"]) == b["text"] for a, b in zip(parts, parts[1:]) if a["type"] == "python"]
    assert len(agreed) > 25_000 and sum(agreed) / len(agreed) > 0.95


@pytest.mark.parametrize("text, number", [("#### 72", 72), ("#### 1,000", 1000), ("so #### -3.50.", -3.5), ("####5", 5), ("#### $12", 12), ("#### 1\n#### 2", 2),
                                          ("72", None), ("####", None), ("#### x", None), ("#### .", None), ("#### 1e9", 1), ("", None)])
def test_final_numbers(text, number):
    assert final_number(text) == number


@settings(max_examples=500)
@given(st.text("#0123456789.,-$ \nx\u0663", max_size=40))
def test_any_reply_has_a_number_or_none(reply):
    example = Example([], "7")
    assert check_number(example, reply) in (True, False) and not check_number(example, reply.replace("7", "8"))


def test_humaneval_takes_replies_as_they_are_meant(real_data):
    for example in hub_task("humaneval")[:12]:
        prompt, reply = example.question[0]["content"], example.messages[1]["content"]
        body = reply.removeprefix(prompt)
        assert check_program(example, f"Certainly!\n```python\n{reply}\n```\nIt counts.") and check_program(example, body)
        assert not check_program(example, f"```python\n{prompt}    return None\n```")


def test_smoltalk_becomes_conversations(real_data):
    tokenizer = Tokenizer.train(["some text to train a tokenizer with"] * 3, 280)
    for example in hub_task("smoltalk", "train"):
        assert [m["role"] for m in example.messages] == ["user", "assistant"] * (len(example.messages) // 2)
        ids, mask = render_conversation(tokenizer, example.messages)
        assert len(ids) == len(mask) and any(mask)


def write_hub(base, name, rows, split="test"):
    path = base / "hub" / HUB_DATA[name].repo / HUB_DATA[name].folder / f"{dict(HUB_DATA[name].splits)[split]}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        pq.write_table(pa.table(rows) if isinstance(rows, dict) else pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("rows, words", [
    (None, ["nanochat fetch gsm8k"]), (b"PAR1 and then nothing", ["damaged", "nanochat fetch gsm8k"]),
    ([{"question": "?", "reply": "#### 1"}], ["no column 'answer'", "question, reply"]),
    ({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}, ["empty"]),
    ([{"question": "How many?", "answer": "quite a few"}], ["How many?", "no number"]),
])
def test_what_is_missing_or_damaged_says_so(tmp_path, monkeypatch, rows, words):
    monkeypatch.delenv("NANOCHAT_TEST_DATA", raising=False)
    if rows is not None:
        write_hub(tmp_path / "base", "gsm8k", rows)
    with pytest.raises(UserError) as error:
        list(hub_task("gsm8k"))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("name, words", [("trivia", ["trivia", "reading", "arc_easy"]), ("jsonl:/nowhere.jsonl", ["/nowhere.jsonl", "can't be read"])])
def test_unknown_tasks(name, words):  # and numbers that make no sense
    with pytest.raises(UserError) as error:
        load_task(name)
    assert all(word in str(error.value) for word in words)
    with pytest.raises(UserError, match="at least one"):
        load_task("reading", 0)


@pytest.mark.parametrize("line, words", [
    ("{", "not a conversation"), ("[]", "at least one message"), ('[{"role": "user", "content": "x"}]', "last message"),
    ('[{"role": "robot", "content": "x"}]', "robot"), ('{"messages": 7}', "a list of messages"), ('[{"role": "user"}, {"role": "assistant", "content": "y"}]', "message 0"),
    ("[1, 2]", "a list of messages"), ("null", "a list of messages"), ('"text"', "a list of messages"),
])
def test_a_bad_line_is_named(tmp_path, line, words):
    good = json.dumps([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    (tmp_path / "mine.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'mine.jsonl'}, line 3: ")) as error:
        jsonl_task(tmp_path / "mine.jsonl")
    assert words in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("topics: [", "not YAML"), ("facts: {}", "no topics"), ("topics: {a: {ask: [x], reply: []}}\ngreetings: &g {ask: [x], reply: [y]}\nfarewells: *g", "topic a"),
    ("topics: {a: {ask: [x], reply: ['I am {name}']}}\ngreetings: &g {ask: [x], reply: [y]}\nfarewells: *g", "{name}"), ("- 1", "no topics"), (None, "can't be read"),
])
def test_a_bad_persona_says_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "persona.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read_persona(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_persona_of_ones_own(tmp_path):
    path = tmp_path / "persona.yaml"
    path.write_text('facts: {name: Ada}\ntopics: {name: {ask: ["Who are you?"], reply: ["{name} is my name."]}}\n'
                    "greetings: &g {ask: [Hi], reply: [Hello]}\nfarewells: *g\n")
    replies = {m["content"] for e in identity_task(200, persona=path) for m in e.messages if m["role"] == "assistant"}
    assert replies == {"Ada is my name.", "Hello"}


def test_mixtures_of_the_full_recipe():
    "The numbers of the public recipe."
    mid = read_numbers(PRESETS["d20"]["mid"]["mixture"])
    assert mid == [("smoltalk", None), ("mmlu", 100_000), ("gsm8k", None), ("identity", 1000), ("identity", 1000), ("simple_spelling", 200_000), ("spelling_bee", 80_000)]
    sft = read_numbers(PRESETS["d20"]["sft"]["mixture"])
    assert sft == [("arc_easy", None), ("arc_challenge", None), ("gsm8k", None), ("smoltalk", 10_000), ("identity", 1000), ("simple_spelling", 300), ("spelling_bee", 300)]


def test_a_mixture_of_real_tasks(real_data, tmp_path):
    write_hub(tmp_path / "base", "mmlu", [{"question": f"{i}?", "choices": ["a", "b"], "answer": 1, "subject": "x"} for i in range(50)], "train")
    mixture = load_mixture("smoltalk,mmlu=40,gsm8k=100,identity=30,identity=30,simple_spelling=200,spelling_bee=80", seed=1)
    assert len(mixture) == 1000 + 40 + 100 + 60 + 200 + 80
    texts = [json.dumps(e.messages) for e in mixture]
    assert texts == [json.dumps(e.messages) for e in load_mixture(mixture.name, seed=1)] != [json.dumps(e.messages) for e in load_mixture(mixture.name, seed=2)]
    held_out = load_mixture("smoltalk,gsm8k,identity=1000", seed=1, split="test", limit=200)
    asked = sum("####" in plain_text(e.messages[1]["content"]) for e in held_out)
    assert 195 <= len(held_out) <= 201 and abs(asked - 200 * 7473 / 9473) <= 2, "the proportions of training"
    assert not {json.dumps(e.messages) for e in held_out} & set(texts)


@pytest.mark.parametrize("text, words", [("", "at least one task"), ("tinyworld=many", "name=number"), ("moon=3", "moon"), ("tinyworld=0", "at least one example"),
                                         ("tinyworld=", "name=number")])
def test_mixtures_that_cant_be_read(text, words):
    with pytest.raises(UserError, match=words):
        load_mixture(text, 0)


TOKENIZER = Tokenizer.train(["the cat sat on the mat and said nothing at all, " * 20], 280)
TEXT = st.text("the cat said.", min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), min_size=1, max_size=12), st.sampled_from(["stream", "whole", "pad"]), st.booleans(),
       st.integers(12, 70), st.integers(1, 12))
def test_no_conversation_disappears_and_no_row_is_empty(tmp_path_factory, talks, packing, masked, row, part):
    "What the assistant says is predicted once, but for what is cut or skipped, and that is counted; each row has something to predict."
    messages = [[m for user, reply in turns for m in ({"role": "user", "content": user}, {"role": "assistant", "content": reply})] for turns in talks]
    rendered = [render_conversation(TOKENIZER, m) for m in messages]
    longest = 10**9 if packing == "stream" else row + 1
    useful = [(ids[:longest], mask[:longest]) for ids, mask in rendered if any(mask[1:longest])]
    task, folder = Task("talks", [Example(m) for m in messages]), tmp_path_factory.mktemp("rows")
    try:
        store, counts = conversation_rows(task, TOKENIZER, row, packing, masked, folder, part=part)
    except UserError as error:
        assert "not even one row" in str(error) and not useful
        return
    assert counts["conversations"] == len(talks) and counts["skipped"] == len(talks) - len(useful) and counts["rows"] == len(store)
    assert counts["cut"] == sum(len(ids) > longest for ids, _ in rendered) and counts["tokens"] == sum(len(ids) for ids, _ in rendered)
    predicted = []
    for index in range(store.parts):
        ids, mask = store.part(index)
        mask = np.ones(ids.shape, bool) if mask is None else np.array(mask)
        assert mask[:, 1:].any(axis=1).all()
        predicted += ids[:, 1:][mask[:, 1:]].tolist()
    bos = predicted.count(TOKENIZER.bos)  # in mid-row it is predicted too, where all is
    expected = [token for ids, mask in useful for token, counted in zip(ids[1:], mask[1:]) if counted or not masked]
    assert sorted(token for token in predicted if token != TOKENIZER.bos) == sorted(expected) and counts["counted"] == len(predicted)
    assert bos <= len(talks) and not (masked and bos)


def test_rows_are_made_in_parts_and_taken_from_disk(tmp_path):
    task = spelling_task("simple_spelling", 500, split="train")
    store, counts = conversation_rows(task, TOKENIZER, 64, "whole", True, tmp_path, part=120)
    assert store.parts == 5 and counts["conversations"] == 500 and counts["rows"] == len(store)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert conversation_rows(task, TOKENIZER, 64, "whole", True, tmp_path, part=120)[1] == counts
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == before
    conversation_rows(task.shuffle(1), TOKENIZER, 64, "whole", True, tmp_path, part=120)
    assert len(list(tmp_path.rglob("*.npy"))) == 2 * len(before), "other conversations took these rows for theirs"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab ,.A", max_size=40), max_size=6), st.lists(st.text("ab ,.A", max_size=30), min_size=1, max_size=5), st.integers(1, 4))
def test_overlaps_against_the_definition(texts, questions, n):
    def grams(text, n):
        words = re.findall(r"\w+", text.lower())
        return [words[i : i + n] for i in range(len(words) - n + 1)]

    expected = []
    for question in questions:
        size = min(n, len(re.findall(r"\w+", question)))
        mine = grams(question, size) if size else []
        known = [gram for text in texts for gram in grams(text, size)] if size else []
        expected.append(sum(gram in known for gram in mine) / len(mine) if mine else 0.0)
    assert find_overlaps(iter(texts), questions, n) == expected


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as a download needs, over a folder laid out as the hub is."

    def log_message(self, *args):
        pass

    def reply(self, body, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)(/.*)?", path):
            folder = self.server.folder / match[1]
            files = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.parquet"))]
            if "/tree/" in (match[2] or ""):
                entries = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
                return self.reply(json.dumps(entries).encode(), Content_Type="application/json")
            info = {"id": match[1], "sha": "c" * 40, "siblings": [{"rfilename": f} for f in files]}
            return self.reply(json.dumps(info).encode(), Content_Type="application/json")
        match = re.fullmatch(r"/datasets/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path)
        file = self.server.folder / match[1] / match[2] if match else None
        if file is None or not file.exists():
            return self.send_error(404)
        self.reply(file.read_bytes(), ETag=f'"{len(file.read_bytes()):040x}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(real_data):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = real_data / "hub"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_fetched_from_a_hub_and_then_offline(hub, tmp_path):
    base, nowhere = tmp_path / "base", {"NANOCHAT_TEST_DATA": str(tmp_path)}
    online = {**nowhere, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    missing = call_nanochat(base, "fetch", "gsm8k", environment={**nowhere, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert missing.returncode == 2 and "nanochat fetch gsm8k" in missing.stderr and missing.stderr.count("\n") == 1, missing.stderr
    fetched = call_nanochat(base, "fetch", "gsm8k", environment=online)
    assert fetched.returncode == 0 and "7,473 rows to train, 1,319 rows to test" in fetched.stdout, fetched.stdout + fetched.stderr
    offline = call_nanochat(base, "fetch", "gsm8k", environment=nowhere | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0 and "7,473 rows" in offline.stdout, offline.stderr
    assert len(list((base / "hub" / "openai" / "gsm8k").rglob("*.parquet"))) == 2


def test_words_are_held_out():
    rng = random.Random(0)
    train, test = (spelling_task("spelling_bee", 400, seed=rng.randrange(99), split=split) for split in ("train", "test"))
    words = [{re.match(r"'(\w+)'", e.messages[1]["content"][1]["text"])[1] for e in task} for task in (train, test)]
    assert not words[0] & words[1] and min(map(len, words)) > 100


class Files(BaseHTTPRequestHandler):
    "Some files by their names."

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_core_and_words_are_fetched(real_data, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in (real_data / "eval_bundle").rglob("*"):
            if path.name in ("core.yaml", "eval_meta_data.csv", "copa.jsonl", "winograd_wsc.jsonl"):
                archive.write(path, path.relative_to(real_data))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files = {"/core.zip": packed.getvalue(), "/words.txt": "\r\n".join(a + b + "ed" for a in "abcdefgh" for b in "aeiou").encode()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, base = f"http://127.0.0.1:{server.server_port}", tmp_path / "base"
    environment = {"NANOCHAT_TEST_DATA": "", "NANOCHAT_EVAL_BUNDLE_URL": f"{url}/core.zip", "NANOCHAT_WORDS_URL": f"{url}/words.txt"}
    core = call_nanochat(base, "fetch", "core", environment=environment)
    assert core.returncode == 0 and "CORE: 2 tasks, 373 items" in core.stdout and not (base / "eval_bundle.zip").exists(), core.stdout + core.stderr
    words = call_nanochat(base, "fetch", "words", environment=environment)
    assert words.returncode == 0 and re.search(r"[1-9]\d* to learn and \d+ to test with", words.stdout), words.stdout + words.stderr
    gone = call_nanochat(base, "fetch", "core", environment=environment | {"NANOCHAT_EVAL_BUNDLE_URL": f"{url}/nothing.zip"})
    assert gone.returncode == 2 and "404" in gone.stderr.splitlines()[-1] and "Traceback" not in gone.stderr and (base / "eval_bundle" / "core.yaml").exists(), gone.stderr
    server.shutdown()


def test_conversations_of_ones_own_are_held_out(tmp_path):
    talks = [[{"role": "user", "content": f"{i}?\u2028"}, {"role": "assistant", "content": "y"}] for i in range(25)]
    path = tmp_path / "a=b.jsonl"
    path.write_text("".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks))
    parts = [[e.messages[0]["content"] for e in load_mixture(f"jsonl:{path}{number}", 0, split)]
             for split, number in (("train", ""), ("test", ""), ("train", "=7"))]
    assert sorted(parts[0] + parts[1]) == sorted(talk[0]["content"] for talk in talks) and len(parts[1]) == 2 and len(parts[2]) == 7
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks[:4]))
    assert len(load_mixture(f"jsonl:{path}", 0, "train")) == len(load_mixture(f"jsonl:{path}", 0, "test")) == 4, "too few to hold any out"


def test_rows_follow_the_persona(tmp_path):
    "An edit that a hundred samples may miss still makes new rows."
    path, hashes = tmp_path / "persona.yaml", []
    for name in ("Ada", "Bob"):
        path.write_text(f'facts: {{name: {name}}}\ntopics: {{name: {{ask: [Who], reply: ["{{name}}"]}}}}\ngreetings: &g {{ask: [Hi], reply: [Hello]}}\nfarewells: *g\n')
        hashes.append(mixture_hash("tinyworld=3000,identity=30", str(path)))
    assert hashes[0] != hashes[1] == mixture_hash("identity=30", str(path)) != mixture_hash("identity=30")


def test_half_a_dataset_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_TEST_DATA", raising=False)
    write_hub(tmp_path / "base", "gsm8k", [{"question": "1?", "answer": "#### 1"}])
    folder = tmp_path / "base" / "hub" / "openai" / "gsm8k" / "main"
    assert len(hub_task("gsm8k")) == 1
    (folder / "test-00000-of-00001.parquet").rename(folder / "test-00000-of-00002.parquet")
    with pytest.raises(UserError, match="nanochat fetch gsm8k"):
        hub_task("gsm8k")


@pytest.mark.parametrize("reply, right", [("cat: c,a,t", True), ("Cat: C, A, T.", True), ("c,a,t", True), ("scatter: s,c,a,t,t,e,r", False), ("cat: c,a,t,s", False), ("", False)])
def test_letters_are_all_or_nothing(reply, right):
    assert check_letters(Example([], "c,a,t"), reply) == right
