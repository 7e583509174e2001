"""Killed anywhere, stopped anyhow: the run goes on and ends with the same bits."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import NANOCHAT, call_nanochat

import nanochat.train
from nanochat.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, verify_checkpoint
from nanochat.common import Ranks, UserError
from nanochat.dataloader import RowLoader, RowStore
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import PRESETS, Run, append_line
from nanochat.train import Stopped, TrainConfig, Trainer, find_best, load_model, train

QUICK = {"precision": "float32", "save_every": 4, "eval_every": 5, "sample_every": 10, "eval_tokens": 2048, "device_rows": 8, "batch_tokens": 2048}
SETTINGS = {
    "tokenizer": {},
    "base": {**QUICK, "tokens": 40_960, "context": 128, "row": 64},
    "mid": {**QUICK, "tokens": 16_384, "mixture": "tinyworld=200"},
    "sft": {**QUICK, "tokens": 16_384, "mixture": "tinyworld=200"},
    "rl": {**QUICK, "mixture": "counting=20", "steps": 6, "questions": 2, "samples": 4, "exam_items": 2, "max_tokens": 8, "save_every": 2, "eval_every": 3,
           "lr_scale": 1.0},
}
TIMES = {"time", "seconds", "tokens_per_second", "mfu", "took", "estimated_seconds", "estimated_parts", "estimated_bytes", "memory", "tensor_bytes"}


class Forker:
    "Runs stages in processes of their own, which begin with everything imported."

    def __init__(self, base):
        self.base, self.log = base, base / "log.txt"
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_PROGRESS": "lines", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_stage.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)

    def begin(self, stage, name, **request):
        "Start a stage; `finish` waits for it."
        settings = {**SETTINGS[stage], **request.pop("settings", {}), "run": name}
        self.process.stdin.write(json.dumps({"stage": stage, "settings": settings, "log": str(self.log), **request}) + "\n")
        self.process.stdin.flush()

    def finish(self):
        "The exit code of the ranks, -9 if they were killed, if it is the same; or else all codes."
        codes = json.loads(self.process.stdout.readline())["codes"]
        return codes[0] if len(set(codes)) == 1 else codes

    def run(self, stage, name, **request):
        self.begin(stage, name, **request)
        return self.finish()

    def copy(self, name, stage, source="whole"):
        "A run that has come as far as this stage, and not begun it."
        later = list(SETTINGS)[list(SETTINGS).index(stage) :]
        shutil.copytree(Run(source).path, Run(name).path, ignore=lambda folder, names: [n for n in names if n in later])
        records = [json.dumps(r) + "\n" for r in Run(source).records() if r["stage"] not in later]
        Run(name).metrics.write_text("".join(records))
        return Run(name)


@pytest.fixture(scope="module")
def forker(tmp_path_factory):
    "One base directory for all tests of this file, with a finished run named whole."
    forker = Forker(tmp_path_factory.mktemp("faults"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(forker.base))
        for stage in SETTINGS:
            assert forker.run(stage, "whole") == 0, forker.log.read_text()
        yield forker
    forker.process.stdin.close()
    forker.process.wait()


def happened(name, stage):
    "What a run has recorded, in order, without what a clock says."
    lines = Run(name).metrics.read_bytes().split(b"\n")
    assert lines.pop() == b""
    records = [r for r in map(json.loads, lines) if r["stage"] == stage and r["kind"] != "environment"]
    return [{key: value for key, value in r.items() if key not in TIMES and key != "settings"} for r in records]


def assert_same(name, stage="base", whole="whole"):
    "Two runs have the same records, weights, optimizer state and position, to the last bit."
    assert happened(name, stage) == happened(whole, stage)
    ours, theirs = (load_checkpoint(latest_checkpoint(Run(n).path / stage), optim=True) for n in (name, whole))
    for mine, other in zip(ours[:2], theirs[:2]):
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert all(ours[2][key] == theirs[2][key] for key in ("step", "position", "tokenizer_hash"))
    assert not list(Run(name).path.glob(f"{stage}/*.broken")) and not list(Run(name).path.glob(f"{stage}/.*"))


def kill_and_resume(forker, name, stage, faults, whole="whole", **request):
    "Die of one fault after another; what is left is whole each time, and the end is that of an uninterrupted run."
    for fault, number in faults:
        cause = {"seconds": number} if fault == "time" else {"fault": fault, "number": number}
        if (code := forker.run(stage, name, **cause, **request)) == 0:  # the run was over before: once more, from the start
            assert_same(name, stage, whole)
            shutil.rmtree(Run(name).path)
            forker.copy(name, stage)
            code = forker.run(stage, name, **cause, **request)
        assert code == -9, (fault, number, code, forker.log.read_text()[-2000:])
        for path in list_checkpoints(Run(name).path / stage):
            verify_checkpoint(path)
        Run(name).records()
    assert forker.run(stage, name, **request) == 0, forker.log.read_text()[-2000:]
    assert_same(name, stage, whole)


def test_killed_twenty_times_it_is_the_same_run(forker):
    dice = random.Random(5)
    faults = [("step", dice.randint(3, 24)), ("step", dice.randint(3, 24)), ("update", dice.randint(4, 9)), ("update", dice.randint(10, 40)),
              ("tensors", dice.randint(1, 2)), ("tensors", dice.randint(3, 6)), ("meta", 1), ("meta", 2), ("fsync", dice.randint(1, 9)),
              ("fsync", dice.randint(10, 20)), ("replace", dice.randint(1, 3)), ("replace", dice.randint(4, 9)), ("delete", dice.randint(1, 4)),
              ("metrics", 1), ("metrics", dice.randint(2, 5)), ("measure", dice.randint(1, 3)), ("measure", dice.randint(4, 6)), ("sample", 1),
              ("rewind", 1), ("save", 1), ("time", dice.uniform(0.2, 1.0))]
    dice.shuffle(faults)
    forker.copy("killed", "base")
    kill_and_resume(forker, "killed", "base", faults)


@pytest.mark.parametrize("stage, faults", [("mid", [("step", 7), ("tensors", 3), ("metrics", 4), ("measure", 5)]),
                                           ("sft", [("update", 20), ("meta", 2), ("replace", 7), ("sample", 1)]),
                                           ("rl", [("learn", 3), ("tensors", 2), ("metrics", 3), ("sample", 2)])])
def test_every_stage_survives(forker, stage, faults):
    forker.copy(f"killed_{stage}", stage)
    kill_and_resume(forker, f"killed_{stage}", stage, faults)


def test_two_ranks_survive(forker):
    for name in ("pair", "killed_pair"):
        forker.copy(name, "base")
    assert forker.run("base", "pair", ranks=2) == 0, forker.log.read_text()[-2000:]
    faults = [("step", 12), ("tensors", 2), ("update", 15), ("fsync", 8), ("measure", 6)]
    kill_and_resume(forker, "killed_pair", "base", faults, "pair", ranks=2)


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_any_step_is_a_place_to_stop(forker, stage):
    run, settings = forker.copy(f"halting_{stage}", stage), {"save_every": 1000}
    for count in range(1, 100):
        code = forker.run(stage, run.name, stop_after=1, rehearse=False, settings=settings)
        if code == 0:
            break
        assert code == 3 and latest_checkpoint(run.path / stage).name == f"step_{count:06d}"
    assert count - len(run.records(stage, "step")) == (stage != "rl")  # after the last step a measurement is given up, an exam is not
    assert_same(run.name, stage)


def test_other_numbers_of_ranks(forker):
    settings = {"batch_tokens": 1536, "device_rows": 4, "tokens": 13_824, "save_every": 1000}  # 24 rows a batch: 1, 2 or 3 ranks
    for name in ("alone", "passed_on"):
        forker.copy(name, "base")
    assert forker.run("base", "alone", settings=settings) == 0
    for ranks in (1, 2, 1, 3):
        assert forker.run("base", "passed_on", ranks=ranks, settings=settings, stop_after=2, rehearse=False) == 3, forker.log.read_text()[-2000:]
    assert forker.run("base", "passed_on", ranks=2, settings=settings) == 0
    alone, passed = ({r["step"]: r["loss"] for r in Run(name).records("base", "step")} for name in ("alone", "passed_on"))
    assert alone.keys() == passed.keys() == set(range(1, 10))
    assert max(abs(alone[step] - passed[step]) for step in alone) < 1e-4
    states = [load_checkpoint(latest_checkpoint(Run(name).path / "base"), optim=True)[1] for name in ("alone", "passed_on")]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("saved, resumed", [(1, 2), (2, 1), (3, 2), (2, 3), (1, 5)])
def test_optimizer_state_moves_to_other_ranks_without_a_changed_bit(saved, resumed):
    model = GPT(GPTConfig(vocab_size=300, depth=3, width=32, heads=2, kv_heads=1, context=32))
    optimizers = [[nanochat.train.build_optimizer(model, TrainConfig(precision="float32"), Ranks(rank, world)) for rank in range(world)]
                  for world in (saved, resumed)]
    parts = {"adamw": ("mean", "square"), "muon": ("momentum",)}
    for optimizer in optimizers[0]:
        optimizer.steps = 7
        optimizer.state = {f"{name}.{part}": torch.randn_like(p) for group in optimizer.groups for name, p in group.owned.items() for part in parts[group.kind]}
    union = {key: tensor for optimizer in optimizers[0] for key, tensor in optimizer.state_dict().items()}
    found = {}
    for optimizer in optimizers[1]:
        optimizer.load_state_dict(union)
        assert not found.keys() & optimizer.state.keys() and optimizer.steps == 7
        found |= optimizer.state
    assert found.keys() == union.keys() - {"steps"} and all(torch.equal(found[key], union[key]) for key in found)


def test_when_no_checkpoint_is_whole(forker):
    "A job leaves the decision to a person, and changes nothing; elsewhere the stage begins anew and says so."
    run = forker.copy("none_whole", "base")
    assert forker.run("base", run.name, stop_after=6, rehearse=False) == 3
    for path in list_checkpoints(run.path / "base"):
        (path / "model.safetensors").write_bytes(b"")
    before = happened(run.name, "base")
    for _ in range(2):
        assert forker.run("base", run.name, rehearse=False, environment={"NANOCHAT_JOB": "7"}) == 2
        assert "none of the checkpoints in" in said(forker) and said(forker).endswith(f"give it up with rm -r {run.path / 'base'}")
        assert happened(run.name, "base") == before
    assert forker.run("base", run.name, rehearse=False) == 0
    assert "base begins anew: none of the checkpoints in" in forker.log.read_text()
    assert happened(run.name, "base") == happened("whole", "base")


def said(forker):
    return forker.log.read_text().splitlines()[-1]


WORDS = {"file": "a stop file"}


@pytest.mark.parametrize("stop, fault, number, step", [
    ("SIGINT", "measure", 1, 0), ("SIGTERM", "step", 2, 0),  # in the rehearsal
    ("file", "step", 9, 7), ("SIGINT", "step", 5, 3), ("SIGTERM", "save", 2, 4), ("file", "update", 20, 5), ("SIGTERM", "metrics", 9, 5), ("SIGINT", "sample", 2, 10)])
def test_asked_to_stop(forker, stop, fault, number, step):
    "It ends when the step is done, and gives a measurement up."
    run = forker.copy(f"asked_{stop}_{fault}_{number}", "base")
    assert forker.run("base", run.name, fault=fault, number=number, stop=stop) == 3
    assert f"stopped by {WORDS.get(stop, stop)} at step {step}; the same command goes on" in said(forker)
    assert not (run.path / "stop").exists()
    assert (latest_checkpoint(run.path / "base") is None) if step == 0 else latest_checkpoint(run.path / "base").name == f"step_{step:06d}"
    assert [r["step"] for r in run.records("base", "step")] == list(range(1, step + 1))
    assert forker.run("base", run.name, rehearse=False) == 0
    assert_same(run.name)


def test_a_measurement_is_given_up(forker):
    run = forker.copy("given_up", "base")
    assert forker.run("base", run.name, fault="measure", number=4, stop="SIGTERM", rehearse=False, settings={"eval_tokens": 100_000, "device_rows": 4}) == 3
    assert "at step 0" in said(forker) and not run.records("base", "eval")


def test_one_rank_is_asked_and_all_stop(forker):
    run = forker.copy("asked_pair", "base")
    assert forker.run("base", run.name, ranks=2, fault="step", number=8, stop="SIGTERM", hit=[1]) == 3
    assert "base stopped by another rank at step 6" in forker.log.read_text()
    assert latest_checkpoint(run.path / "base").name == "step_000006"


def test_the_clock_ends_it(forker):
    run = forker.copy("clock", "base")
    limit = {"environment": {"NANOCHAT_DEADLINE": str(time.time() + 3)}, "settings": {"tokens": 2_048_000}, "rehearse": False}
    assert forker.run("base", run.name, **limit) == 3 and "stopped by the time limit" in said(forker)
    assert forker.run("base", run.name, **limit) == 3 and said(forker).endswith(f"at step {max(r['step'] for r in run.records('base', 'step'))}; the same command goes on from here")
    assert latest_checkpoint(run.path / "base") is not None


def notebook_kernel(base):
    from jupyter_client import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_PROGRESS": "lines", "OMP_NUM_THREADS": "1"})
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    return manager, client


def wait_for_reply(client, message):
    while (reply := client.get_shell_msg(timeout=120))["parent_header"].get("msg_id") != message:
        pass
    return reply["content"]


def test_an_interrupted_notebook_loses_nothing(forker):
    run = forker.copy("interrupted", "base")
    cfg = {**SETTINGS["base"], "run": run.name, "save_every": 1000, "tokens": 2_048_000}
    code = f"from nanochat.pretrain import *\nfrom nanochat.run import make_config\nrun_pretrain(make_config(BaseConfig, 'demo', **{cfg!r}))"
    manager, client = notebook_kernel(forker.base)
    try:
        started = client.execute(code, stop_on_error=False)  # or else what is asked right afterwards is not executed
        for _ in range(1200):
            if len(run.records("base", "step")) > 3:
                break
            time.sleep(0.1)
        manager.interrupt_kernel()
        reply = wait_for_reply(client, started)
        assert reply["status"] == "error" and reply["ename"] == "Stopped"
        assert wait_for_reply(client, client.execute("still = 6 * 7"))["status"] == "ok", "the kernel lives"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert latest_checkpoint(run.path / "base").name == f"step_{len(run.records('base', 'step')):06d}"


def start_run(base, name, *arguments):
    "`nanochat run`, until the first line about a step."
    command = [NANOCHAT, "run", "--run", name, "--preset", "demo", "--stages", "tokenizer,base", "--set", "base.tokens=20000000", "--set", "base.save_every=1000000",
               "--set", "base.sample_every=0", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("base step 1"):
            break
    return process


def test_one_run_one_owner_and_sigterm_saves(forker):
    "While a run is trained another is refused, whoever reads it is not, and SIGTERM to the command ends in a checkpoint."
    run = forker.copy("owned", "base")
    process = start_run(forker.base, run.name)
    try:
        other = call_nanochat(forker.base, "run", "--run", run.name)
        assert other.returncode == 2 and f"in use by process {process.pid} on " in other.stderr and "stop it with touch" in other.stderr
        assert forker.run("base", run.name, settings={"tokens": 20_000_000, "save_every": 1_000_000, "context": 256, "row": 0}) == 2
        assert "in use by process" in said(forker)
        assert call_nanochat(forker.base, "report", "--run", run.name).returncode == 0
        assert "base step" in call_nanochat(forker.base, "info", "--run", run.name).stdout
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "goes on" in rest, rest
    steps = [r["step"] for r in run.records("base", "step")]
    assert steps == list(range(1, len(steps) + 1)) and latest_checkpoint(run.path / "base").name == f"step_{len(steps):06d}"
    with run.lock(patience=0), run.lock("pipeline", patience=0):
        pass


def test_a_lock_dies_with_its_owner(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    code = "import time; from nanochat.run import Run\nwith Run('r').lock(): print('held', flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {owner.pid} on .* since "), Run("r").lock(patience=0.2):
        pass
    owner.kill()
    with Run("r").lock(patience=5):
        owner.wait()


def test_records_of_several_processes_stay_whole(tmp_path, monkeypatch):
    "Three append, short lines and long ones, while a fourth resumes again and again and drops records of its stage."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    code = "import sys; from nanochat.run import Run\nfor i in range(100): Run('r').log('eval', 'score', text=sys.argv[1] * (1 + 997 * i % 70_000))"
    writers = [subprocess.Popen([sys.executable, "-c", code, letter]) for letter in "abc"]
    run = Run("r")
    while any(writer.poll() is None for writer in writers):
        run.log("base", "step", step=1)
        run.rewind("base", 0, 0)
        time.sleep(0.01)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = run.metrics.read_text().splitlines()
    assert len(lines) == 300 and all(len(set(json.loads(line)["text"])) == 1 for line in lines)


@pytest.mark.parametrize("left", ['{"st', "", '{"a": 1}\n{"b', '{"a": 1}\n'])
def test_a_half_line_is_taken_away(tmp_path, left):
    (tmp_path / "metrics").write_text(left)
    append_line(tmp_path / "metrics", '{"c": 2}')
    assert (tmp_path / "metrics").read_text() == ('{"a": 1}\n' if "1" in left else "") + '{"c": 2}\n'


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A trainer of a second, in this process."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PROGRESS", "lines")
    rows = RowStore.from_docs([[0, *range(i, i + 16)] for i in range(1, 200)], T=16)
    monkeypatch.setattr(nanochat.train, "peak_flops", lambda *_: 1e12)

    class Words:
        hash, token_bytes = "same", [1] * 300

    def make(name="small", **settings):
        cfg = TrainConfig(run=name, **{"tokens": 640, "batch_tokens": 64, "device_rows": 4, "eval_every": 2, "save_every": 2, "sample_every": 0,
                                       "precision": "float32", **settings})
        model = GPT(GPTConfig(vocab_size=300, depth=1, width=32, heads=1, kv_heads=1, context=16)).init_weights(seed=1)
        batches = [next(RowLoader(rows, 4, position=4))]
        return Trainer("base", cfg, Run(name), model, Words, RowLoader(rows, 4, shuffle_seed=1), lambda: iter(batches))
    return make


def test_saved_before_the_last_measurement(small):
    t = small()
    measure = t.measure

    def fail():
        if t.step == t.steps:
            raise MemoryError
        return measure()
    t.measure = fail
    with pytest.raises(MemoryError):
        train(t)
    assert latest_checkpoint(t.directory).name == "step_000010"
    assert train(small()) > 0 and Run("small").stage_done("base")


def test_stopped_before_the_first_checkpoint_nothing_is_there_twice(small):
    t = small(save_every=1000)
    learn = t.train_step

    def fail():
        if t.step == 3:
            raise MemoryError
        return learn()
    t.estimate = lambda: ({"steps": 0.0, "saving": 0.0}, 0)
    t.train_step = fail
    with pytest.raises(MemoryError):
        train(t)
    assert len(Run("small").records("base", "step")) == 3 and not list_checkpoints(t.directory)
    train(small(save_every=1000))
    records = Run("small").records("base")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 11))
    assert [[r["kind"] for r in records].count(kind) for kind in ("environment", "config", "summary")] == [2, 1, 1]


def test_random_numbers_go_on(small):
    "A model that draws from PyTorch's own generator is resumed exactly too."
    def make(name):
        t = small(name)
        learn = t.train_step

        def noisy():
            with torch.no_grad():
                t.model.lm_head.weight.add_(torch.randn_like(t.model.lm_head.weight), alpha=0.01)
            return learn()
        t.train_step = noisy
        return t
    torch.manual_seed(3)
    whole = make("whole")
    train(whole)
    torch.manual_seed(3)
    first = make("parts")
    learn = first.train_step

    def stop_at_four():
        numbers = learn()
        first.stop.reason = "the test" if first.step == 4 and first.saved == 2 else ""  # a rehearsal has saved nothing yet
        return numbers
    first.train_step = stop_at_four
    with pytest.raises(Stopped):
        train(first)
    torch.manual_seed(99)
    second = make("parts")
    train(second)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values()))


def test_the_number_format_of_the_first_start_stays(small, monkeypatch):
    for fast, slow in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        name = str(fast).removeprefix("torch.")
        monkeypatch.setattr(nanochat.train, "fast_dtype", lambda device, answer=fast: answer)
        t = small(name, precision="auto")
        t.step = 1
        t.save()
        monkeypatch.setattr(nanochat.train, "fast_dtype", lambda device, answer=slow: answer)
        again = small(name, precision="auto")
        assert again.dtype == slow == again.optimizer.dtype
        assert again.resume() and again.dtype == fast == again.optimizer.dtype


def test_the_best_is_kept_and_taken_only_if_asked_for(small):
    run, t = Run("small"), small(keep=2)
    for step, bpb in ((2, 3.0), (4, 1.0), (6, float("nan")), (8, 2.0), (10, 1.0), (12, 4.0), (14, 5.0)):
        t.step = step
        t.save()
        run.log("base", "eval", step=step, bpb=bpb)
        assert find_best(run, "base") == (2 if step == 2 else 4 if step < 10 else 10)
    assert [path.name[-2:] for path in list_checkpoints(t.directory)] == ["10", "12", "14"]
    without = small("without", keep=1, keep_best=False)
    for step in (2, 4):
        without.step = step
        without.save()
        Run("without").log("base", "eval", step=step, bpb=float(step))
    assert [path.name for path in list_checkpoints(without.directory)] == ["step_000004"]


def test_a_chat_can_ask_for_the_best(forker):
    run = Run("whole")
    assert load_model(run, "base")[2]["step"] == 20
    best = find_best(run, "base")
    assert load_model(run, "base", best=True)[2]["step"] == best
    assert find_best(run, "rl") in {int(path.name[5:]) for path in list_checkpoints(run.path / "rl")}


@pytest.mark.parametrize("long", [bool(os.environ.get("NANOCHAT_SOAK"))])
def test_soak(forker, long, tmp_path):
    """A random kill every few seconds. The long version is the tiny preset with a kill every 20 seconds, half an hour:
    NANOCHAT_SOAK=1 python -m pytest tests/test_faults.py -k soak"""
    settings = PRESETS["tiny"]["base"] | {"shards": 4, "save_every": 25} if long else {"tokens": 143_360, "eval_every": 50, "save_every": 5, "sample_every": 0}
    for name in ("quiet", "soaked"):
        forker.copy(f"{name}_{long}", "base")
    began = time.perf_counter()
    assert forker.run("base", f"quiet_{long}", settings=settings, rehearse=long) == 0
    pause, dice, kills = 20.0 if long else (time.perf_counter() - began) / 4, random.Random(7), 0
    while forker.run("base", f"soaked_{long}", settings=settings, rehearse=long, seconds=dice.uniform(0.5, 1.5) * pause) == -9 and kills < (500 if long else 10):
        kills += 1
    assert kills and forker.run("base", f"soaked_{long}", settings=settings, rehearse=long) == 0
    print(f"killed {kills} times")
    assert_same(f"soaked_{long}", whole=f"quiet_{long}")


def test_checkpoints_that_take_long_are_said_beforehand(small, capsys):
    for saving, said_so in ((5.0, True), (1.0, False)):
        t = small(f"saving_{said_so}")
        t.estimate = lambda saving=saving: ({"steps": 20.0, "saving": saving}, 0)
        train(t)
        assert ("checkpoints take 25% as long as the steps do; fewer: --set base.save_every=8" in capsys.readouterr().out) == said_so
