"""Downloads from a server that misbehaves in every way we could think of; folders of any text."""
import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import fetch_file, iter_texts, open_corpus, write_shard

DATA = bytes(range(256)) * 2000
GOOD = hashlib.sha256(DATA).hexdigest()


@contextmanager
def server(*faults, data=DATA):
    "Serves `data`; the n-th request meets the n-th fault, later ones none."
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fault = faults[len(seen)] if len(seen) < len(faults) else None
            seen.append(self.headers.get("Range"))
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Retry-After", "0")
                self.end_headers()
                return
            ranged = self.headers.get("Range") and fault != "ignore range"
            start = int(self.headers["Range"][6:-1]) if ranged else 0
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", '"%s"' % ("0" * 64 if fault == "wrong hash" else hashlib.sha256(data).hexdigest()))
            self.end_headers()
            body = data[start:]
            self.wfile.write(body[: len(body) // 2] if fault in ("drop", "truncate") else body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        http.shutdown()


@pytest.mark.parametrize("faults", [(), ("drop",), ("drop", "drop"), (429,), (500, 503), ("wrong hash",), ("drop", "ignore range"), (429, "drop", 500)])
def test_faults_are_overcome(tmp_path, faults):
    with server(*faults) as (url, seen):
        path = fetch_file(url, tmp_path / "file", wait=0.001)
    assert path.read_bytes() == DATA and len(seen) == len(faults) + 1 - ("ignore range" in faults)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_it_resumes_where_it_stopped(tmp_path):
    with server("drop") as (url, seen):
        fetch_file(url, tmp_path / "file", wait=0.001)
    assert seen == [None, f"bytes={len(DATA) // 2}-"]


def test_it_gives_up_with_one_sentence_and_keeps_what_came(tmp_path):
    with server(*["drop"] + [500] * 10) as (url, _), pytest.raises(UserError, match="3 tries"):
        fetch_file(url, tmp_path / "file", tries=3, wait=0.001)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size == len(DATA) // 2


def test_a_hash_that_never_fits_is_refused(tmp_path):
    with server() as (url, _), pytest.raises(UserError, match="hash"):
        fetch_file(url, tmp_path / "file", sha256="0" * 64, tries=2, wait=0.001)
    assert not (tmp_path / "file").exists()


def test_missing_files_are_not_tried_again(tmp_path):
    with server(404, 404) as (url, seen), pytest.raises(UserError, match="404"):
        fetch_file(url, tmp_path / "file", wait=0.001)
    assert len(seen) == 1


def test_a_hub_corpus_comes_from_a_mirror_once(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "shard.parquet", ["one", "two"]).read_bytes()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with server("drop", data=shard) as (url, seen):
        monkeypatch.setenv("HF_ENDPOINT", url)
        corpus = open_corpus("fineweb_edu", 2, progress=False)
        count = len(seen)
        assert open_corpus("fineweb_edu", 2, progress=False) == corpus and len(seen) == count == 4
    assert corpus.shards("val")[0].name == "shard_01822.parquet" and list(iter_texts(corpus.shards("train")[1])) == ["one", "two"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nanochat fetch fineweb_edu --shards 3"):
        open_corpus("fineweb_edu", 3, progress=False)


def test_other_schemas_and_nulls(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no column 'text'"):
        list(iter_texts(tmp_path / "other.parquet"))
    pq.write_table(pa.table({"text": ["a", None, "", "b"]}), tmp_path / "nulls.parquet")
    assert list(iter_texts(tmp_path / "nulls.parquet")) == ["a", "b"]


@pytest.mark.parametrize("line, message", [('{"text": 1', "line 2"), ('{"body": "x"}', "line 2"), ("[]", "line 2")])
def test_a_bad_jsonl_line_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        open_corpus(f"folder:{tmp_path}")


def test_the_tiny_world_is_made_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(dataset, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(dataset.make_world_shard, "__defaults__", (20_000,))
    corpus = open_corpus("tinyworld", 2, progress=False)
    before = [path.stat().st_mtime_ns for path in corpus.paths]
    assert [path.stat().st_mtime_ns for path in open_corpus("tinyworld", 2, progress=False).paths] == before
    assert 0.1 < corpus.entropy < 2
    monkeypatch.setattr(dataset, "world_fingerprint", lambda: "changed")
    assert [path.stat().st_mtime_ns for path in open_corpus("tinyworld", 2, progress=False).paths] != before
