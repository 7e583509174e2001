"""The command line, end to end, as a user types it."""
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import NANOCHAT, call_nanochat
from test_checkpoint import small_disk

from nanochat.run import Run


def test_before_anything_is_trained(tmp_path):
    for command in (["chat", "-p", "hello"], ["report"], ["eval"]):
        result = call_nanochat(tmp_path, *command)
        assert result.returncode == 2 and "nanochat run --preset tiny" in result.stderr
        assert result.stderr.count("\n") == 1


def test_relative_paths_mean_the_callers_directory(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text("".join(f"Line {i} of {name}: the cat sat on mat number {i * i}.\n\n" for i in range(3000)))
    result = call_nanochat("mine", "run", "--preset", "demo", "--run", "r", "--corpus", "folder:texts", "--vocab-size", "300", "--stages", "tokenizer",
                      cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "mine" / "runs" / "r" / "tokenizer").is_dir()
    again = call_nanochat("mine", "run", "--run", "r", "--stages", "tokenizer", cwd=tmp_path)  # a run remembers its preset, corpus and shape
    assert again.returncode == 0 and "is complete" in again.stdout, again.stdout + again.stderr


def test_a_full_disk_says_so_and_the_run_goes_on(tmp_path):
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        arguments = ("run", "--preset", "demo", "--stages", "tokenizer,base")
        full = call_nanochat(disk, *arguments)
        assert full.returncode == 2 and full.stderr.count("\n") == 1 and "no space left on the disk" in full.stderr, full.stderr
        subprocess.run(["mount", "-o", "remount,size=64000000", str(disk)], check=True)
        again = call_nanochat(disk, *arguments)
        assert again.returncode == 0, again.stdout + again.stderr


def test_demo_runs_all_stages(base, demo, monkeypatch):
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stdout.split("--- report took")[1].count("\n> ") == 3
    report = Path(re.search(r"report: (\S+report\.md)\s*$", demo.stdout)[1])
    assert "## Scores" in report.read_text() and (report.parent / "figures" / "base.png").exists()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    run = Run("demo")
    assert all(run.stage_done(stage) for stage in ("tokenizer", "base", "mid", "sft", "eval", "report"))
    notebooks = sorted(p.name for p in (run.path / "notebooks").glob("*.ipynb"))
    assert [name[:2] for name in notebooks] == ["51", "52", "53", "54", "56", "57"]
    for name in notebooks:
        cells = json.loads((run.path / "notebooks" / name).read_text())["cells"]
        assert not any(output["output_type"] == "error" for c in cells for output in c.get("outputs", []))


def test_a_complete_run_is_not_run_again(base, demo):
    before = (base / "runs" / "demo" / "metrics.jsonl").read_text()
    result = call_nanochat(base, "run", "--preset", "demo", "--stages", "tokenizer,base,mid")
    assert result.returncode == 0 and result.stdout.count("is complete") == 3
    assert (base / "runs" / "demo" / "metrics.jsonl").read_text() == before


def test_commands_on_a_run(base, demo):
    assert call_nanochat(base, "chat", "-p", "Hello!").stdout.strip()
    assert call_nanochat(base, "chat", "-p", "Hello!", "--source", "base").returncode == 0
    same = [call_nanochat(base, "chat", "-p", "Hello!", "--temperature", "0").stdout for _ in range(2)]
    assert same[0] == same[1]
    assert "done: tokenizer, base, mid, sft" in call_nanochat(base, "info").stdout
    assert call_nanochat(base, "report").stdout.strip().endswith("report.md")
    result = call_nanochat(base, "eval", "--tasks", "reading", "--max-problems", "5", "--source", "sft")
    assert re.search(r"sft +reading +\d", result.stdout)
    assert "ready" in call_nanochat(base, "doctor").stdout


def test_chat_is_a_conversation(base, demo):
    result = call_nanochat(base, "chat", input="Hello!\n/reset\n/help\n\nTell me a story.\n/quit\n")
    assert result.returncode == 0 and "forgotten" in result.stdout and result.stdout.count("> ") >= 5


def test_control_c_stops_a_reply_and_not_the_chat(base, demo):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([NANOCHAT, "chat", "--max-tokens", "200", "--temperature", "1.5", "--top-k", "0"], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    process.stdin.write("Tell me a story.\n")
    process.stdin.flush()
    seen = ""
    while "> " not in seen:
        seen += process.stdout.read(1)
    process.stdout.read(1)  # the reply has begun
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    output, _ = process.communicate("/quit\n", timeout=60)
    assert process.returncode == 0 and "> " in output


@pytest.mark.parametrize("arguments, words", [
    (["run", "--preset", "tinny"], ["tinny", "tiny"]),
    (["run", "--preset", "demo", "--stages", "bse"], ["bse", "base"]),
    (["run", "--preset", "demo", "--run", "x1", "--corpus", "moon"], ["moon", "tinyworld"]),
    (["run", "--preset", "demo", "--set", "base.dept=3"], ["dept", "depth"]),
    (["run", "--preset", "demo", "--set", "base.depth=three"], ["three", "int"]),
    (["run", "--preset", "demo", "--run", "../x"], ["../x"]),
    (["run", "--preset", "demo", "--run", "x2", "--vocab-size", "264"], ["264", "265"]),
    (["run", "--preset", "demo", "--run", "x3", "--stages", "tokenizer,base", "--width", "65", "--set", "base.heads=2"], ["65", "heads"]),
    (["run", "--preset", "demo", "--run", "x4", "--stages", "mid"], ["base", "nanochat run"]),
    (["chat", "--run", "nobody", "-p", "x"], ["nobody"]),
    (["chat", "--run", "demo", "--source", "moon", "-p", "x"], ["moon", "sft"]),
    (["eval", "--run", "demo", "--tasks", "trivia"], ["trivia", "reading"]),
    (["fetch", "wikipedia"], ["wikipedia", "tinyworld"]),
])
def test_mistakes_get_one_sentence(base, demo, arguments, words):
    result = call_nanochat(base, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr and result.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("files, words", [
    ({}, ["holds no"]),
    ({"a.txt": "caf\u00e9".encode("latin1")}, ["UTF-8", "byte 3"]),
    ({"a.parquet": b"PAR1" + bytes(100), "b.parquet": b"PAR1"}, ["a.parquet", "damaged"]),
])
def test_bad_folders_get_one_sentence(base, tmp_path, files, words):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    result = call_nanochat(base, "run", "--preset", "demo", "--run", "folder", "--stages", "tokenizer", "--corpus", f"folder:{tmp_path}")
    assert result.returncode == 2 and all(word in result.stderr for word in words), result.stderr


def test_killed_in_the_middle_it_goes_on(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    command = ["run", "--preset", "demo", "--run", "killed", "--stages", "tokenizer,base", "--set", "base.tokens=204800"]
    process = subprocess.Popen([NANOCHAT, *command], env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    run = Run("killed")
    for _ in range(1200):
        if len(run.records("base", "step")) > 25:
            break
        time.sleep(0.05)
    kernels = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, kernels)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    result = call_nanochat(base, *command)
    assert result.returncode == 0 and "goes on from step" in result.stdout, result.stdout + result.stderr
    assert [r["step"] for r in run.records("base", "step")] == list(range(1, 101))


def test_real_text(base, real_data):
    folder = real_data / "text"
    result = call_nanochat(base, "run", "--preset", "demo", "--run", "real", "--corpus", f"folder:{folder}", "--stages", "tokenizer,base,report")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bits per byte" in (base / "runs" / "real" / "report.md").read_text()
