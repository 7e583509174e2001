"""The leaderboard: what it refuses, what an entry can't do, and what of a result is believed."""
import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from list_results import render_leaderboard
from typer.testing import CliRunner

from nanochat import leaderboard
from nanochat.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, seal_meta
from nanochat.cli import app
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.leaderboard import (
    Rules,
    ask_process,
    ask_speed,
    check_entries,
    describe_board,
    draw_board,
    make_documents,
    measure_model,
    ratio_error,
    read_entry,
    read_results,
    read_rules,
    render_board,
    train_entry,
)
from nanochat.sandbox import find_mode
from nanochat.tinyworld import is_held_out, write_documents
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT / "assignments" / "leaderboard"
RULES = Rules(seconds=30, cores=2, memory_bytes=2**32, disk_bytes=2**26, output_bytes=10_000, entry_bytes=2**16, model_bytes=2**20, documents=40)
COPIER = """
import shutil
from pathlib import Path

def train(directory, seed, seconds):
    here = Path(__file__).parent
    for name in ("tokenizer/tokenizer.json", "base/step_000007/meta.json", "base/step_000007/model.safetensors"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(here / Path(name).name, directory / name)
"""
closed = pytest.mark.skipif(find_mode() == "guards", reason="nothing can be closed in on this machine")


def write_entry(folder, name, code, files=None, **about):
    "A folder as somebody might hand it in."
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "entry.py").write_text(code)
    (folder / "entry.json").write_text(json.dumps({"name": name, "authors": ["Ada"], "new": "A test.", "claimed": 0.01} | about))
    for file in files or []:
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    "What an honest entry leaves: a tiny model, and its tokenizer."
    folder = tmp_path_factory.mktemp("left")
    tokenizer = Tokenizer.train([document.text for document in islice(write_documents(0), 50)], 290)
    model = GPT(GPTConfig(tokenizer.vocab_size, depth=1, width=8, heads=1, kv_heads=1, context=64)).init_weights(0)
    save(folder, model, tokenizer)
    return folder


def save(folder, model, tokenizer, step=7):
    tokenizer.save(folder / "tokenizer")
    save_checkpoint(folder / "base", step, model.state_dict(), {}, {"model": asdict(model.config), "tokenizer_hash": tokenizer.hash})


@pytest.fixture
def files(left):
    "Its files, small enough for an entry that only copies them."
    return [left / "tokenizer" / "tokenizer.json", *(left / "base" / "step_000007" / name for name in ("meta.json", "model.safetensors"))]


def train(folder, rules=RULES, **options):
    return train_entry(read_entry(folder, rules.entry_bytes), seed=1, rules=rules, **options)


# What is handed in


def test_the_course_entries_are_entries_and_short():
    names = sorted(path.name for path in (BOARD / "entries").iterdir())
    assert "baseline" in names
    for name in names:
        entry = read_entry(BOARD / "entries" / name, read_rules(BOARD).entry_bytes)
        assert entry.name == name and len(entry.files["entry.py"].splitlines()) < 60


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: (folder / "weights.npy").write_bytes(bytes(2**16)), "larger than 65,536 bytes"),
    (lambda folder: (folder / "link.txt").symlink_to("/etc/passwd"), "a link"),
    (lambda folder: (folder / "more").mkdir(), "is a folder"),
    (lambda folder: (folder / "entry.py").unlink(), "has no entry.py"),
    (lambda folder: (folder / "entry.json").unlink(), "can't be used"),
    (lambda folder: (folder / "entry.json").write_text("[" * 100_000), "larger than|can't be used"),
    (lambda folder: (folder / "entry.json").write_text('{"name": "../up", "authors": ["A"], "new": "B", "claimed": null}'), "can't be used"),
    (lambda folder: (folder / "entry.json").write_text('{"name": "a", "authors": [], "new": "B", "claimed": null}'), "can't be used"),
    (lambda folder: (folder / "entry.json").write_text('{"name": "a", "authors": ["A\\u001b[2J"], "new": "B", "claimed": null}'), "can't be used"),
    (lambda folder: (folder / "entry.json").write_text('{"name": "a", "authors": ["A"], "new": "B", "claimed": NaN}'), "can't be used"),
    (shutil.rmtree, "is not a folder")])
def test_what_is_no_entry_is_refused(tmp_path, change, words):
    folder = write_entry(tmp_path, "try", "def train(directory, seed, seconds): ...")
    assert read_entry(folder, 2**16).name == "try"
    change(folder)
    with pytest.raises(UserError, match=words):
        read_entry(folder, 2**16)


# What an entry can't do

PRISONER = """
import json, os, socket, sys
from pathlib import Path

def refused(attempt):
    try:
        attempt()
    except OSError:
        return True
    return False

def trace(process):
    import ctypes
    libc = ctypes.CDLL(None)
    if libc.ptrace(16, process, None, None) != 0:  # PTRACE_ATTACH
        raise OSError
    libc.ptrace(17, process, None, None)

def train(directory, seed, seconds):
    print(json.dumps({
        "seconds": seconds, "seed": seed, "cores": len(os.sched_getaffinity(0)), "environment": sorted(os.environ),
        "more cores": refused(lambda: os.sched_setaffinity(0, [0])),
        "network": refused(lambda: socket.create_connection(("127.0.0.1", PORT), 1)),
        "board": refused(lambda: os.listdir("BOARD")), "home": refused(lambda: os.listdir("/home")), "course": refused(lambda: os.listdir("ROOT/nbs")),
        "others": refused(lambda: open("SECRET")), "own files": refused(lambda: open(__file__, "a")),
        "package": refused(lambda: open("ROOT/nanochat/bpb.py", "a")),
        "parent": refused(lambda: open(f"/proc/{os.getppid()}/mem")), "trace": refused(lambda: trace(os.getppid())),
        "disk": refused(lambda: [open(f"big{i}", "wb").write(bytes(2**24)) for i in range(9)])}))
"""


@closed
def test_an_entry_is_closed_in(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "secret.txt").write_text("another entry")
        code = PRISONER
        for word, value in {"SECRET": tmp_path / "secret.txt", "PORT": server.getsockname()[1], "BOARD": BOARD, "ROOT": ROOT}.items():
            code = code.replace(word, str(value))
        trained = train(write_entry(tmp_path, "prisoner", code))
    seen = json.loads(trained.printed)
    assert seen.pop("seed") == 1 and 10 < seen.pop("seconds") < 30 and seen.pop("cores") <= 2 and "PATH" not in seen.pop("environment")
    assert all(seen.values()), seen
    assert trained.files == {}


def wait_until_gone(name):
    "Whether within five seconds no process of the machine has this name."
    for _ in range(100):
        names = []
        for path in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):  # it has just ended
                names.append(path.read_text().strip())
        if name not in names:
            return True
        time.sleep(0.05)
    return False


@closed
def test_the_clock_ends_it_and_what_is_on_the_disk_counts(tmp_path, files):
    name = f"left-{os.getpid()}"
    lasting = COPIER + ("    import ctypes, os, time\n    if os.fork() == 0:\n        os.setsid()\n"
                        f"        ctypes.CDLL(None).prctl(15, b'{name}')  # PR_SET_NAME\n        data = ctypes.create_string_buffer(16)\n"
                        "        ctypes.CDLL(None).prctl(16, data)\n        print(data.value, flush=True)\n    while True: time.sleep(0.01)\n")
    start = time.monotonic()
    trained = train(write_entry(tmp_path, "sleeper", lasting, files), replace(RULES, seconds=3))
    assert 3 <= trained.seconds <= 3 + leaderboard.LATE and time.monotonic() - start < 15
    assert name in trained.printed
    assert wait_until_gone(name), "a process of its own group outlived the training"
    assert {name.rpartition("/")[2]: data for name, data in trained.files.items()} == {file.name: file.read_bytes() for file in files}


ATTACKS = {
    "error": ("raise ValueError('no idea')", "training failed: ValueError: no idea"),
    "exit": ("raise SystemExit(0)", "training failed: SystemExit: 0"),
    "hard exit": ("import os; os._exit(3)", "training failed: exit code 3"),
    "crash": ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    "print": ("while True: print('x' * 10000)", "printed more than 10,000 bytes"),
    "memory": ("x = bytearray(2**36)", "training failed: MemoryError"),
    "disk": ("for i in range(9): open(str(i), 'wb').write(bytes(2**24))", "training failed: OSError"),
    "kill": ("import os; os.kill(os.getppid(), 9)", "left nothing that can be read"),
    "large": ("p = directory / 'tokenizer'; p.mkdir(); (p / 'tokenizer.json').write_bytes(bytes(2**21))", "may have 1,048,576"),
    "syntax": ("return return", "SyntaxError"),
}


@closed
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_failing_entry_is_one_sentence(tmp_path, attack):
    code, words = ATTACKS[attack]
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        train(write_entry(tmp_path, "attack", f"def train(directory, seed, seconds):\n    {code}\n"))
    assert "\n" not in str(raised.value)


@closed
def test_stopping_the_clock_wins_nothing(tmp_path, files):
    thief = COPIER + ("    import os, signal, time\n    time.sleep(max(0, seconds - 0.5))\n    os.kill(os.getppid(), signal.SIGSTOP)\n"
                      "    time.sleep(4.5)\n    os.kill(os.getppid(), signal.SIGCONT)\n    time.sleep(9)\n")
    with pytest.raises(UserError, match="went on .* after its end"):
        train(write_entry(tmp_path, "thief", thief, files), replace(RULES, seconds=3))


def test_without_the_sandbox_it_is_the_same_training(tmp_path, files):
    trained = train(write_entry(tmp_path, "mine", COPIER, files), sandbox=False)
    assert sorted(len(data) for data in trained.files.values()) == sorted(file.stat().st_size for file in files)


# What is measured


def test_the_measure_needs_every_byte_and_every_end(left):
    documents, found = make_documents(3, 20), measure_model(left, 3, 20, 10**6)
    model, tokenizer = GPT(GPTConfig(**load_checkpoint(left / "base" / "step_000007")[2]["model"])).init_weights(0), Tokenizer.load(left / "tokenizer")
    assert found["parameters"] == model.num_params() and found["step"] == 7
    tokens = [len(tokenizer.encode(document.text)) + 1 for document in documents]  # the head starts at zero: all tokens are alike
    np.testing.assert_allclose(found["bits"], np.log2(model.config.vocab_size) * np.array(tokens), rtol=1e-5)


def test_held_out_combinations_are_not_measured():
    def held_out(documents):
        return [is_held_out(parts) for document in documents for parts in re.findall(r"(\d+) (?:plus|\+) (\d+)", document.text)]

    assert held_out(make_documents(3, 1000)) and not any(held_out(make_documents(3, 1000)))
    assert all(held_out(islice(write_documents(3, "test"), 1000)))


def change_weights(change):
    def damage(folder):
        tensors, _, meta = load_checkpoint(list_checkpoints(folder / "base")[-1])
        tensors, meta = {name: tensor.clone() for name, tensor in tensors.items()}, {"model": dict(meta["model"]), "tokenizer_hash": meta["tokenizer_hash"]}
        change(tensors, meta)
        save_checkpoint(folder / "base", 8, tensors, {}, meta)
    return damage


TABLES = ("lm_head.weight", "transformer.wte.weight")


def change_tokenizer(**values):
    def damage(folder):
        path = folder / "tokenizer" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        lossy = Tokenizer.load(folder / "tokenizer")
        change_weights(lambda tensors, meta: meta.update(tokenizer_hash=lossy.hash))(folder)
    return damage


@pytest.mark.parametrize(("damage", "words"), [
    (change_tokenizer(pattern="[0-9]"), "the tokenizer's tokens spell"),
    (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "damaged"),
    (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "no tokenizer/tokenizer.json"),
    (change_weights(lambda tensors, meta: meta.update(tokenizer_hash="0" * 64)), "another tokenizer"),
    (change_weights(lambda tensors, meta: tensors["lm_head.weight"][3].fill_(float("nan"))), "not finite, lm_head.weight"),
    (change_weights(lambda tensors, meta: [tensors[f"transformer.h.0.mlp.{name}.weight"].fill_(3e38) for name in ("c_fc", "c_proj")]), "not a number"),
    (change_weights(lambda tensors, meta: meta["model"].update(depth=10**9)), "sizes are"),
    (change_weights(lambda tensors, meta: meta["model"].update(vocab_size=2**17, width=4096)), "parameters and may have"),
    (change_weights(lambda tensors, meta: meta["model"].update(width=8.0)), "sizes are"),
    (change_weights(lambda tensors, meta: meta["model"].update(heads=3)), "not divisible"),
    (change_weights(lambda tensors, meta: meta.pop("model")), "sizes are None"),
    (change_weights(lambda tensors, meta: tensors.pop("lm_head.weight")), "lacks the tensor"),
    (change_weights(lambda tensors, meta: tensors.update(extra=torch.zeros(3))), "this model does not"),
    (change_weights(lambda tensors, meta: (meta["model"].update(vocab_size=100), [tensors.update({n: tensors[n][:100]}) for n in TABLES])), "the tokenizer has 290"),
    (lambda folder: shutil.rmtree(folder / "base"), "no whole model")])
def test_what_is_no_model_is_refused(left, tmp_path, damage, words):
    folder = shutil.copytree(left, tmp_path / "left")
    damage(folder)
    with pytest.raises(UserError, match=words):
        measure_model(folder, 3, 20, 10**6)


def test_what_is_written_down_of_a_checkpoint_is_ours(left, tmp_path):
    folder = shutil.copytree(left, tmp_path / "left")
    change_weights(lambda tensors, meta: None)(folder)
    path = folder / "base" / "step_000008" / "meta.json"
    meta = json.loads(path.read_text()) | {"step": "<b>" * 1000}
    path.write_text(json.dumps(meta | {"seal": seal_meta(meta)}))
    assert measure_model(folder, 3, 20, 10**6)["step"] == 8


def test_a_half_saved_model_leaves_the_one_before(left, tmp_path):
    folder = shutil.copytree(left, tmp_path / "left")
    shutil.copytree(folder / "base" / "step_000007", folder / "base" / "step_000009")
    weights = folder / "base" / "step_000009" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert measure_model(folder, 3, 20, 10**6)["step"] == 7


def test_a_process_that_does_not_answer_is_one_sentence():
    with pytest.raises(UserError, match="more than 1 s"):
        ask_process("import time; time.sleep(60)", None, patience=1)
    with pytest.raises(UserError, match="the last line was 'SystemError: boom'"):
        ask_process("raise SystemError('boom')", None)


def test_an_interval_of_differences_is_narrower():
    dice = np.random.default_rng(0)
    sizes = dice.integers(50, 500, 300).astype(float)
    one = sizes * dice.normal(0.5, 0.1, 300)
    two = one + sizes * dice.normal(0.01, 0.005, 300)
    assert ratio_error(two - one, sizes) < 0.2 * ratio_error(one, sizes)
    assert ratio_error(0.5 * sizes, sizes) < 1e-9


# The whole of it


@pytest.fixture
def board(tmp_path, files):
    "A leaderboard whose baseline only copies a model."
    folder = tmp_path / "board"
    write_entry(folder / "entries", "baseline", COPIER, files, claimed=None)
    (folder / "rules.json").write_text(json.dumps(asdict(RULES)))
    return folder


@pytest.fixture
def quick(monkeypatch):
    "No measuring of the machine."
    monkeypatch.setattr(leaderboard, "ask_speed", lambda cores: {"gflops": 50.0, "processor": "a machine", "torch": "2"})


def test_the_machine_is_described():
    speed = ask_speed(leaderboard.choose_cores(2))
    assert speed["gflops"] > 0 and speed["processor"] and speed["torch"] == torch.__version__


@closed
def test_claims_are_shown_and_not_believed(board, left, tmp_path, quick, monkeypatch):
    events, said = [], []
    real = train_entry
    monkeypatch.setattr(leaderboard, "train_entry", lambda *a, **k: events.append("trained") or real(*a, **k))
    monkeypatch.setattr(leaderboard.secrets, "randbits", lambda n: events.append("drawn") or 12345 + n)
    files = [left / "tokenizer" / "tokenizer.json", *(left / "base" / "step_000007" / name for name in ("meta.json", "model.safetensors"))]
    lossy = shutil.copytree(left, tmp_path / "forged")
    change_tokenizer(pattern="[0-9]")(lossy)
    forged = [lossy / "tokenizer" / "tokenizer.json", *(lossy / "base" / "step_000008" / name for name in ("meta.json", "model.safetensors"))]
    liar = "import nanochat.leaderboard as b, nanochat.bpb\nb.document_bits = nanochat.bpb.bits_per_byte = lambda *_: 0\n" + COPIER
    entries = [write_entry(tmp_path, "liar", liar, files, claimed=0.0001, authors=["<script>alert(1)</script>", "{{< env HOME >}}"]),
               write_entry(tmp_path, "lossy", COPIER, forged), write_entry(tmp_path, "dead", "1 / 0"), tmp_path / "nowhere"]
    records = check_entries(entries, board, seeds=(1, 2), say=said.append)
    assert events == ["trained"] * 7 + ["drawn"]  # the dead one is not tried again
    assert [r["entry"] for r in records] == ["baseline", "liar"] and len(records[1]["runs"]) == 2
    assert records[1]["bpb"] == records[0]["bpb"] == records[1]["baseline"] > 2 and records[1]["gain"] == records[1]["gain_error"] == 0
    assert records[1]["claimed"] == 0.0001 and records[1]["text"] == {"seed": 12345 + 63, "documents": 40}
    for words in ("lossy doesn't count: the tokenizer's tokens spell", "dead doesn't count: training failed: ZeroDivisionError", "nowhere doesn't count"):
        assert any(words in line for line in said), said
    assert [json.loads(line) for line in (board / "results.jsonl").read_text().splitlines()] == records

    page = render_board(board)
    assert "<script>" not in page and "{{<" not in page and "liar" in page
    assert read_results(board)[0]["entry"] in ("baseline", "liar")
    again = check_entries([], board, text_seed=records[0]["text"]["seed"], say=said.append)
    assert again[0]["bpb"] == records[0]["bpb"] and len((board / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("options", [{"seconds": 20}, {"sandbox": False}])
def test_a_try_never_enters_the_table(board, quick, options):
    check_entries([], board, say=lambda line: None, **({"sandbox": find_mode() != "guards"} | options))
    assert not (board / "results.jsonl").exists()


def record(name, bpb, rules=RULES, **more):
    machine = {"processor": "x", "torch": "2", "cores": 2}
    runs = [{"seed": 1, "bpb": bpb, "parameters": 10, "step": 5, "seconds": 30.0, "gflops": [50.0, 51.0], "machine": machine}]
    return {"entry": name, "authors": ["A"], "new": "B", "claimed": None, "bpb": bpb, "error": 0.01, "baseline": 0.4,
            "gain": 0.4 - bpb, "gain_error": 0.001, "floor": 0.22, "runs": runs, "text": {"seed": 1, "documents": 40}, "rules": asdict(rules), "files": "0", "version": "1", "date": "2026-01-01"} | more


def test_the_table_shows_the_newest_result_under_the_present_rules(board):
    lines = [record("one", 0.30), record("two", 0.35), record("one", 0.36), record("three", 0.1, replace(RULES, seconds=600))]
    (board / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(board)
    assert [(r["entry"], r["bpb"]) for r in results] == [("two", 0.35), ("one", 0.36)]
    table = describe_board(results)
    assert list(table.index) == [1, 2] and table.loc[1, "gain"] == "+0.0500 +- 0.0010"
    picture = draw_board(results)
    assert picture.count("<circle") == picture.count("dasharray") == 2  # each with the floor of its own text
    assert re.findall(r">(0\.\d+)<", picture) == ["0.20", "0.25", "0.30", "0.35", "0.40", "0.45"]
    with open(board / "results.jsonl", "a") as file:
        file.write(json.dumps(record("two", 0.9, authors=["Mallory"])) + "\n")
    assert [(r["entry"], r["bpb"]) for r in read_results(board)] == [("two", 0.35), ("one", 0.36), ("two", 0.9)]  # nobody takes another's place
    with open(board / "results.jsonl", "a") as file:
        file.write('{"entry": "torn')
    with pytest.raises(UserError, match="line 6, is not a result"):
        read_results(board)


def test_the_page_is_in_step_and_reads_well_when_nobody_was_measured(board):
    assert (ROOT / "docs" / "leaderboard.qmd").read_text(encoding="utf-8") == render_leaderboard(ROOT), "make export"
    assert "Nobody has been measured" in render_board(board)


def test_the_command(board, files, tmp_path):
    run = CliRunner()
    shown = run.invoke(app, ["leaderboard", "show", "--board", str(board)])
    assert shown.exit_code == 0 and "nobody has been measured" in shown.output
    (board / "results.jsonl").write_text(json.dumps(record("one", 0.3)) + "\n")
    shown = run.invoke(app, ["leaderboard", "show", "--board", str(board), "--plot", str(tmp_path / "plot.svg")])
    assert shown.exit_code == 0 and "one" in shown.output and (tmp_path / "plot.svg").read_text().startswith("<svg")
    assert isinstance(run.invoke(app, ["leaderboard", "show", "--board", str(tmp_path)]).exception, UserError)


def test_the_command_checks(board, files, tmp_path, quick):
    entry = write_entry(tmp_path, "mine", COPIER, files)
    options = ["--board", str(board), "--no-sandbox", "--seed", "3", "--seconds", "25"]
    done = CliRunner().invoke(app, ["leaderboard", "check", str(entry), str(tmp_path / "none"), *options])
    assert done.exit_code == 1 and "none doesn't count" in done.output and "This was a try" in done.output and re.search(r"mine +Ada", done.output), done.output
