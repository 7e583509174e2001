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
from nanochat.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint, verify_checkpoint
from nanochat.common import Ranks, UserError
from nanochat.dataloader import RowLoader, RowStore
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run, append_line
from nanochat.train import StopNow, Stopped, TrainConfig, Trainer, find_best, load_model, train

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
    assert count == len(run.records(stage, "step")) + 1
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
