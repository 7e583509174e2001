"""Broken, strange and hostile input: one sentence, or the right result; never another exception, and never a wait without end."""
import contextlib
import io
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NANOCHAT, small_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import save

from nanochat.bpe import encode_bpe
from nanochat.chat import HELP, ChatSession, chat
from nanochat.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from nanochat.cli import _configs
from nanochat.common import Ranks, UserError, atomic_write
from nanochat.conversation import check_messages, parse_reply, plain_text, render_conversation
from nanochat.dataloader import RowLoader, RowStore, save_rows
from nanochat.dataset import Corpus, iter_texts, read_documents, read_manifest, write_shard
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run, make_config, read_settings
from nanochat.tinyworld import write_documents
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = [d.text for d in islice(write_documents(1), 100)]
TOKENIZER = Tokenizer.train(TEXTS, 400)
MANY = {"max_examples": 1000, "deadline": None, "suppress_health_check": list(HealthCheck)}
SURROGATES = st.text(st.characters(categories=["Cs", "Cc", "Cn", "Lu", "Ll", "Mn", "So"]))  # half characters, control characters, characters that don't exist
ANY_TEXT = st.one_of(st.text(), SURROGATES, st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\x00", "\ud800", "\udfff", "\r\n"])).map("".join))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=5)


@contextlib.contextmanager
def only_user_errors():
    "Nothing but a sentence may come out."
    try:
        yield
    except UserError as error:
        assert str(error) and "\n" not in str(error).strip()


@settings(**MANY)
@given(ANY_TEXT)
def test_any_text_is_encoded(text):
    ids = TOKENIZER.encode(text)
    plain = text.encode("utf-8", "replace").decode()
    assert TOKENIZER.decode(ids) == plain and all(0 <= i < TOKENIZER.bos for i in ids)
    assert ids == TOKENIZER.encode_batch([text])[0] == encode_bpe(plain.encode().decode(), TOKENIZER.tokens, TOKENIZER.pattern)


@settings(**MANY)
@given(st.lists(st.one_of(st.integers(0, TOKENIZER.vocab_size - 1), st.integers(-5, 1000), st.integers())))
def test_any_numbers_are_decoded_or_refused(ids):
    inside = all(0 <= i < TOKENIZER.vocab_size for i in ids)
    try:
        text = TOKENIZER.decode(ids)
        assert inside and isinstance(text, str)
    except UserError as error:
        assert not inside and "0 to 399" in str(error)


PART = st.one_of(JSON, st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output", "image", ""]), "text": st.one_of(ANY_TEXT, JSON)}))
MESSAGE = st.one_of(JSON, st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.one_of(ANY_TEXT, JSON, st.lists(PART, max_size=3))}))


@settings(**MANY)
@given(st.one_of(JSON, st.lists(MESSAGE, max_size=4)), st.one_of(st.none(), st.integers(0, 20)))
def test_any_conversation_is_rendered_or_refused(messages, limit):
    with only_user_errors():
        ids, mask = render_conversation(TOKENIZER, messages, limit)
        assert len(ids) == len(mask) and all(0 <= i < TOKENIZER.vocab_size for i in ids) and set(mask) <= {0, 1}
        assert ids[:1] == [TOKENIZER.bos][:limit] and TOKENIZER.bos not in ids[1:]
        assert all(isinstance(plain_text(m["content"]), str) for m in check_messages(messages))


@settings(**MANY)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_reply_is_parsed_and_can_be_said_again(ids):
    parts = parse_reply(TOKENIZER, ids)
    again, _ = render_conversation(TOKENIZER, [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}])
    assert TOKENIZER.bos not in again[1:] and isinstance(plain_text(parts), str)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("shard") / "good.parquet", [*TEXTS[:20], "caf\u00e9", ""]).read_bytes()


@settings(**MANY)
@given(data=st.data())
def test_a_shard_with_any_bytes_changed_is_read_or_refused(shard, tmp_path_factory, data):
    body = bytearray(shard)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.one_of(st.integers(0, len(body) - 1), st.integers(max(0, len(body) - 600), len(body) - 1)))  # or in what describes the rest
        body[where] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))]
    path = Path(tmp_path_factory.getbasetemp()) / "changed.parquet"
    path.write_bytes(body)
    with only_user_errors():
        assert all(isinstance(text, str) and text for text in iter_texts(path))


TYPES = [pa.int64(), pa.float32(), pa.bool_(), pa.list_(pa.string()), pa.struct([("a", pa.string())]), pa.null(), pa.timestamp("s"), pa.date32()]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_text_column_of_another_type_is_refused(tmp_path, kind):
    values = {pa.int64(): [1], pa.float32(): [1.5], pa.bool_(): [True], pa.timestamp("s"): [5], pa.date32(): [5], pa.null(): [None],
              pa.list_(pa.string()): [["a"]], pa.struct([("a", pa.string())]): [{"a": "x"}]}[kind]
    pq.write_table(pa.table({"text": pa.array(values, kind)}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet has a column 'text' that holds .*, and not text"):
        list(iter_texts(tmp_path / "x.parquet"))


def test_texts_of_the_kinds_that_parquet_knows(tmp_path):
    kinds = [pa.array(["a", None, "", "\u00e9"], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    kinds += [pa.array([b"a", None, b"", "\u00e9".encode()], kind) for kind in (pa.binary(), pa.large_binary())]
    kinds += [pa.array(["a", None, "", "\u00e9"]).dictionary_encode()]
    for values in kinds:
        pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
        assert list(iter_texts(tmp_path / "x.parquet")) == ["a", "\u00e9"]
    pq.write_table(pa.table({"text": [b"\xff\xfe broken", b"\xed\xa0\x80 half"]}), tmp_path / "x.parquet")  # not UTF-8
    texts = list(iter_texts(tmp_path / "x.parquet"))
    assert len(texts) == 2 and all(isinstance(text, str) and text.encode() for text in texts)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    assert list(iter_texts(tmp_path / "x.parquet")) == []


def test_one_document_of_200_megabytes(tmp_path):
    "For learning a vocabulary only its beginning counts; memory holds it two or three times and no more."
    code = """
import resource, sys, time
from pathlib import Path
from nanochat.dataset import write_shard, iter_texts
from nanochat.tokenizer import limit_chars
path, start = Path(sys.argv[1]), time.perf_counter()
write_shard(path, ["The cat sat on the mat. " * (200_000_000 // 24), "a short one"])
assert [len(text) for text in limit_chars(iter_texts(path), 1_000_000)] == [10_000, 11]
print(path.stat().st_size, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big.parquet")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    size, seconds, memory = map(float, done.stdout.split())
    assert size < 1e6 and seconds < 120 and (memory < 2 or sys.platform == "darwin")  # a Mac counts in bytes


@pytest.mark.parametrize("texts", [[""], ["", None], [None], []])
def test_a_shard_without_a_word_gets_a_sentence(tmp_path, texts):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "empty.parquet")
    from nanochat.dataloader import make_rows

    with pytest.raises(UserError, match="not even one row"):
        make_rows(tmp_path / "empty.parquet", TOKENIZER, 16, "crop", tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


@settings(**MANY)
@given(st.lists(st.one_of(st.text(max_size=30), st.builds("{}.{}={}".format, st.sampled_from(["base", "mid", "sft", "rl", "eval", "tokenizer", "x"]),
                                                         st.sampled_from(["depth", "tokens", "lr_scale", "mixture", "masked", "run", "y"]), ANY_TEXT)), max_size=3))
def test_any_setting_is_read_or_refused(pairs):
    with only_user_errors():
        found = read_settings(pairs, CONFIGS)
        for stage, values in found.items():
            make_config(CONFIGS[stage], "demo", **values)


CONFIGS = _configs()


@settings(**MANY)
@given(body=st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode()), st.just(b"[" * 100_000)))
def test_any_config_of_a_run_is_read_or_refused(body, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "configs"
    os.environ["NANOCHAT_BASE_DIR"], before = str(base), os.environ.get("NANOCHAT_BASE_DIR")
    try:
        atomic_write(Run("r").path / "config.json", body)
        with only_user_errors():
            choices = Run("r").choices()
            assert isinstance(choices, dict) and all(isinstance(choices.get(key, {}), dict) for key in ("shape", "settings"))
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)


@settings(**MANY)
@given(body=st.one_of(st.binary(max_size=60), st.lists(JSON, max_size=3).map(lambda values: "".join(json.dumps(v) + "\n" for v in values).encode()), st.just(b"[" * 100_000 + b"\n")))
def test_any_metrics_file_is_read_or_refused(body, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "metrics"
    os.environ["NANOCHAT_BASE_DIR"], before = str(base), os.environ.get("NANOCHAT_BASE_DIR")
    try:
        atomic_write(Run("r").metrics, body)
        with only_user_errors():
            assert all(isinstance(r, dict) and "stage" in r and "kind" in r for r in Run("r").records())
            Run("r").rewind("base", 3)
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)


@settings(**MANY)
@given(body=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()), st.just(b"[" * 100_000),
                      st.fixed_dictionaries({"format": st.just(1), "special": st.just(list(SPECIAL_TOKENS)), "pattern": st.one_of(JSON, st.just("(")),
                                             "tokens": st.one_of(JSON, st.lists(st.one_of(st.sampled_from(["00", "zz", ""]), JSON), max_size=5))}).map(lambda v: json.dumps(v).encode())))
def test_any_tokenizer_file_is_read_or_refused(body, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_bytes(body)
    with only_user_errors():
        Tokenizer.load(path.parent)


@settings(**MANY)
@given(body=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()), st.just(b"[" * 100_000)))
def test_any_manifest_is_read_or_refused(body, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "manifest"
    atomic_write(folder / "manifest.json", body)
    with only_user_errors():
        from nanochat.dataset import is_present

        is_present(folder, "shard_00000.parquet", read_manifest(folder))


@settings(**MANY)
@given(body=st.one_of(st.binary(max_size=60), ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), JSON.map(lambda v: json.dumps({"text": v}).encode()), st.just(b"[" * 100_000)),
       suffix=st.sampled_from([".txt", ".jsonl"]))
def test_any_text_file_is_read_or_refused(body, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"file{suffix}"
    path.write_bytes(body)
    with only_user_errors():
        assert all(isinstance(text, str) for text in read_documents(path))


@settings(**MANY)
@given(data=st.data())
def test_a_checkpoint_with_any_bytes_changed_is_refused(data, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "checkpoints"
    path = directory / "step_000005"
    if not path.exists():
        save(directory, 5)
    file = path / data.draw(st.sampled_from(["meta.json", "model.safetensors", "optim_00000.safetensors"]))
    good = file.read_bytes()
    body = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(body[: data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))])
        with only_user_errors():
            load_checkpoint(path, optim=True)
            assert file.read_bytes() == good or json.loads(file.read_bytes()) == json.loads(good)  # or only its spaces are others
    finally:
        file.write_bytes(good)


@pytest.fixture(scope="module")
def engine():
    model = GPT(GPTConfig(TOKENIZER.vocab_size, depth=1, width=16, heads=1, kv_heads=1, context=64))
    model.init_weights(seed=1)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0, generator=torch.Generator().manual_seed(5))
    return Engine(model.eval(), TOKENIZER)


LINES = st.one_of(st.sampled_from(["/reset", "/quit", "/help", "/", "//", "/quit now", "  /reset  ", "", "\x00", "<|assistant_end|>"]), ANY_TEXT.filter(lambda t: "\n" not in t), st.just("word " * 200))


@settings(**MANY)
@given(lines=st.lists(LINES, max_size=2), seed=st.integers(0, 100))
def test_anything_can_be_typed_in_a_chat(lines, seed, engine):
    session, given_lines = ChatSession(engine, temperature=1.0, top_k=None, max_tokens=2, seed=seed), iter(lines)

    def ask(prompt):
        try:
            return next(given_lines)
        except StopIteration:
            raise EOFError from None
    out, problems = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(problems):
        patch.setattr("builtins.input", ask)
        chat(session, "test")
    assert HELP in out.getvalue() and "Traceback" not in problems.getvalue()
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * (len(session.messages) // 2)
    if session.messages:
        check_messages(session.messages)


def test_a_shard_that_is_removed_while_training_is_named_and_the_state_is_saved(tmp_path, monkeypatch):
    from test_sickness import make_trainer, sick

    from nanochat.train import train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    paths = tuple(write_shard(tmp_path / f"shard_{i}.parquet", TEXTS[i * 10 : i * 10 + 10]) for i in range(4))
    t = make_trainer(sick("robbed", tokens=400 * 256, save_every=1000, eval_every=1000))
    store = RowStore.from_corpus(Corpus("x", (*paths, paths[0])), "train", t.tokenizer, 32, tmp_path / "rows")
    t.loader = RowLoader(store, 8, Ranks(), torch.device("cpu"), shuffle_seed=1)
    real = t.train_step

    def rob():
        if t.step == 2:
            for path in paths[2:]:
                path.unlink(missing_ok=True)
        return real()
    t.train_step = rob
    t.estimate = lambda: ({"steps": 0.0, "saving": 0.0}, 0)
    with pytest.raises(UserError, match=r"shard_[23].parquet is missing: run the same command again"):
        train(t)
    found = latest_checkpoint(Run("robbed").path / "base")
    assert found is not None and found.name == f"step_{t.step:06d}" and t.step > 2
    for path, i in zip(paths, range(4)):
        write_shard(path, TEXTS[i * 10 : i * 10 + 10])
    t = make_trainer(sick("robbed", tokens=60 * 256, save_every=1000, eval_every=1000))
    t.loader = RowLoader(RowStore.from_corpus(Corpus("x", (*paths, paths[0])), "train", t.tokenizer, 32, tmp_path / "rows"), 8, Ranks(), torch.device("cpu"), shuffle_seed=1)
    train(t)
    assert t.step == 60


def test_a_clock_that_goes_backwards(tmp_path, monkeypatch):
    from test_sickness import make_trainer, sick

    from nanochat.train import train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    now = iter(range(2_000_000_000, 0, -100_000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    monkeypatch.setenv("NANOCHAT_DEADLINE", "2000000001")
    train(make_trainer(sick("backwards", tokens=10 * 256)))
    records = Run("backwards").records()
    assert records[-1]["kind"] == "summary" and records[-1]["took"] > 0 and all(r.get("seconds", 0) >= 0 for r in records)
    seconds = [r["seconds"] for r in records if r["kind"] == "step"]
    assert seconds == sorted(seconds) and seconds[0] > 0 and all(r["tokens_per_second"] > 0 for r in records if r["kind"] == "step")


def write_notebook(disk):
    from test_pipeline import write_notebook

    from nanochat.pipeline import Kernels, execute_stage

    source = write_notebook(disk.parent / "a.ipynb", "print('x' * 100_000)")
    with Kernels(disk.parent / "kernel.log", 1) as kernels:
        execute_stage(source, disk / "notebooks" / "a.ipynb", {}, kernels)


def write_report(disk):
    from nanochat.report import make_report

    make_report(Run("r"))


WRITERS = {
    "shard": lambda disk: write_shard(disk / "shard.parquet", [os.urandom(30_000).hex()]),
    "rows": lambda disk: save_rows(disk / "rows", np.zeros((1000, 33), np.int64), np.ones((1000, 33), bool)),
    "checkpoint": lambda disk: save_checkpoint(disk / "base", 1, {"w": torch.zeros(20_000)}, {}, {}),
    "optimizer": lambda disk: save_checkpoint(disk / "base", 1, {}, {"m": torch.zeros(20_000)}, {}),
    "metrics": lambda disk: Run("r").log("base", "sample", text="x" * 60_000),
    "tokenizer": lambda disk: Tokenizer.train(TEXTS, 2000).save(disk / "tokenizer"),
    "report": write_report,
    "notebook": write_notebook,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch, kind):
    with small_disk(tmp_path / "disk", 600_000) as disk:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(disk))
        run = Run("r")
        run.log("base", "config", step=0, settings={"run": "r", "corpus": "tinyworld", "device": "cpu"}, model={"depth": 1, "width": 8, "heads": 1, "context": 8, "vocab_size": 300}, params=1, steps=1, ranks=1, flops_per_token=1)
        run.log("base", "step", step=1, loss=1.0, grad_norm=1.0, lr_scale=1.0, tokens=1, epoch=0, tokens_per_second=1.0, mfu=0.1, seconds=1.0)
        before = {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - 2 * 4096)  # room for a directory or a small file, not for what is written
        with pytest.raises(UserError, match="no space left on the disk while writing") as caught:
            WRITERS[kind](disk)
        assert "\n" not in str(caught.value)
        assert {p: p.read_bytes() for p in disk.rglob("*") if p.is_file() and p != filler} == before
        filler.unlink()
        WRITERS[kind](disk)
        assert run.records("base", "step")[0]["loss"] == 1.0


@pytest.mark.parametrize("how", ["mount", "user"])
def test_a_base_directory_that_can_only_be_read(tmp_path, how):
    base = tmp_path / "base"
    base.mkdir()
    command, arguments = [NANOCHAT, "run", "--preset", "demo", "--stages", "tokenizer"], {}
    if how == "mount":
        command = ["unshare", "-rm", "sh", "-c", 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && "$@"', "sh", str(base), *command]
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip("this system lets nobody make a namespace")
    elif os.geteuid() == 0:
        if subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", "test", "-x", NANOCHAT], capture_output=True).returncode:
            pytest.skip("another user can't run this environment")
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    os.chmod(base, 0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(parent, os.stat(parent).st_mode | 0o055)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd="/", env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "HOME": "/nonexistent", **arguments})
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot write" in done.stderr and "NANOCHAT_BASE_DIR=/path" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(base.iterdir())
