"""A process that has imported everything and forks a stage for each request, so that one starts, dies and starts again in a fraction of a second."""
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch

import nanochat.optim
import nanochat.rl
import nanochat.train
from nanochat.common import UserError
from nanochat.costs import estimate_seconds
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run, make_config
from nanochat.train import Trainer

STAGES = {"tokenizer": ("train_tokenizer", "TokenizerConfig", "run_tokenizer"), "base": ("pretrain", "BaseConfig", "run_pretrain"),
          "mid": ("midtrain", "MidConfig", "run_midtrain"), "sft": ("sft", "SFTConfig", "run_sft"), "rl": ("rl", "RLConfig", "run_rl")}
MODULES = {stage: importlib.import_module(f"nanochat.{module}") for stage, (module, _, _) in STAGES.items()}
HALF = {"tensors": lambda real, path, data: real(path, data[: len(data) // 2]), "meta": lambda real, path, text, **_: real(path, text[: len(text) // 2]),
        "metrics": lambda real, handle, data: real(handle, data[: len(data) // 2])}
FAULTS = {  # where to die; what is written at that moment is left half-written
    "step": (nanochat.train, "accumulate_gradients"), "learn": (nanochat.rl, "policy_loss"), "update": (nanochat.optim, "muon_update"),
    "replace": (os, "replace"), "fsync": (os, "fsync"), "delete": (shutil, "rmtree"), "tensors": (Path, "write_bytes"), "meta": (Path, "write_text"),
    "metrics": (os, "write"), "measure": (GPT, "forward"), "sample": (Engine, "generate_batch"), "rewind": (Run, "rewind"), "save": (Trainer, "save"),
}


def counts(fault, arguments):
    "Whether a call is one of those that the fault counts."
    if fault == "measure":
        return not arguments[0].training
    return fault != "metrics" or arguments[1].startswith(b'{"stage"')


def arm(fault, number, stop):
    "Kill this process at a call, or ask the stage to stop there."
    owner, name = FAULTS[fault]
    real, seen = getattr(owner, name), 0

    def hook(*arguments, **options):
        nonlocal seen
        seen += counts(fault, arguments)
        if seen == number and counts(fault, arguments):
            if stop == "file":
                Path(os.environ["STOP_FILE"]).touch()
            elif stop:
                os.kill(os.getpid(), getattr(signal, stop))
            else:
                if fault in HALF:
                    HALF[fault](real, *arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, name, hook)


def stop_after(steps):
    "Ask the stage to stop after so many steps of this process."
    advance, done = nanochat.train.advance, []

    def advance_and_stop(trainer, *arguments):
        advance(trainer, *arguments)
        done.append(trainer.step)
        if len(done) == steps:
            trainer.stop.reason = "the test"
    nanochat.train.advance = advance_and_stop


def work(request, rank, world, port):
    "What a child does; its exit code."
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ.update(request.get("environment", {}))
    stage, run = request["stage"], request["settings"]["run"]
    os.environ["STOP_FILE"] = str(Run(run).path / "stop")
    torch.manual_seed(os.getpid())  # nothing may depend on it
    nanochat.train.estimate_seconds = nanochat.rl.estimate_seconds = partial(estimate_seconds, limit=0.0)  # a rehearsal of one unit of each kind
    if not request.get("rehearse", True):
        Trainer.estimate = lambda self: ({"steps": 0.0, "saving": 0.0}, 0)
    if request.get("fault") and rank in request.get("hit", [rank]):
        arm(request["fault"], request["number"], request.get("stop"))
    if request.get("stop_after"):
        stop_after(request["stop_after"])
    _, config, function = STAGES[stage]
    cfg = make_config(getattr(MODULES[stage], config), "demo", **request["settings"])
    try:
        getattr(MODULES[stage], function)(cfg)
    except UserError as error:
        print(f"nanochat error: {error}", flush=True)
        return 2
    except SystemExit as stopped:
        return stopped.code
    return 0


def fork(*arguments):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work(*arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    return pid


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answer(request):
    "Run a stage in so many children; if one is killed, all are, as when a node fails."
    world, port, started = request.get("ranks", 1), free_port(), time.perf_counter()
    running = {fork(request, rank, world, port): rank for rank in range(world)}
    codes, end = [None] * world, started + request.get("seconds", 1e9)
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        if pid and code == -signal.SIGKILL or time.perf_counter() > end:
            for other in running:
                os.kill(other, signal.SIGKILL)
            end = 1e18
        time.sleep(0 if pid else 0.002)
    return {"codes": codes, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    with torch.device("meta"):  # brings in what torch loads when it needs it
        GPT(GPTConfig(300, 1, 32, 1, 1, 32))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
