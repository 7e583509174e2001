"""Several processes: one that fails, is killed or hangs ends all; nothing is left over; together they compute what one computes."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from nanochat.common import Ranks, UserError
from nanochat.optim import Optimizer, ParamGroup, share_out
from nanochat.run import Run
from nanochat.train import RankProcesses, Stopped, accumulate_gradients, launch, process_group, read_timeout

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class FaultConfig:
    "What goes wrong on the last rank."
    STAGE = "base"
    run: str = "faulty"
    device: str = "cpu"
    processes: int = 2
    fault: str = "none"
    folder: str = ""


def count_together(cfg):
    "A stage as short as can be: steps are sums over the ranks, and after the third the last rank meets its fault."
    with process_group(torch.device("cpu")) as ranks:
        Path(cfg.folder, f"pid_{ranks.rank}").write_text(str(os.getpid()))
        for step in range(1000):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == ranks.world
            if step == 3 and ranks.rank == ranks.world - 1:
                meet_fault(cfg.fault)
            time.sleep(0.02)


def meet_fault(fault):
    if fault == "exception":
        raise ZeroDivisionError("a mistake in the program")
    if fault == "mistake":
        raise UserError("a mistake of the user's: say please")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(600)


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    "Launches the stage above with a fault, and shows that nobody is left."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))

    def make(fault, processes=2):
        try:
            launch(count_together, FaultConfig(fault=fault, processes=processes, folder=str(tmp_path)), module="test_processes")
        finally:
            assert not [pid for pid in pids(tmp_path) if is_alive(pid)]
            assert not list(Run("faulty").path.glob("launch_*"))
    return make


def pids(folder):
    return [int(path.read_text()) for path in Path(folder).glob("pid_*")]


def is_alive(pid):
    "Whether a process runs; one that has ended and waits to be asked for its exit code does not."
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(listed) and not listed.startswith("Z")


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.05)


def test_the_traceback_of_the_rank_that_failed_is_shown_first_and_alone(faulty, capfd):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed .ZeroDivisionError: a mistake in the program.*goes on from the last checkpoint"):
        faulty("exception")
    shown = capfd.readouterr().out
    assert shown.splitlines()[0] == "rank 1 of 2 failed:" and shown.count("Traceback (most recent call last)") == 1
    assert 'raise ZeroDivisionError("a mistake in the program")' in shown and "in count_together" in shown
    assert time.monotonic() - start < 60


def test_a_rank_that_is_killed_is_named(faulty):
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by SIGKILL, as the system does when memory runs out"):
        faulty("killed")


def test_a_rank_that_hangs_is_named_and_ended(faulty, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TIMEOUT", "3")
    with pytest.raises(RuntimeError, match="rank 1 of 2 gave no sign for 3 s, while rank 0 waited for it .NANOCHAT_TIMEOUT=3600 waits longer"):
        faulty("hang")


def test_a_mistake_on_one_rank_is_one_sentence(faulty, capfd):
    with pytest.raises(UserError, match="^a mistake of the user's: say please$"):
        faulty("mistake")
    assert "Traceback" not in capfd.readouterr().out


@pytest.mark.parametrize("text", ["soon", "0", "-5", "nan", "inf", "1e9"])
def test_a_timeout_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("NANOCHAT_TIMEOUT", text)
    with pytest.raises(UserError, match="NANOCHAT_TIMEOUT=600"):
        read_timeout()


def test_exit_codes_are_told_apart():
    for codes, error in (("0 0", None), ("3 3", Stopped), ("0 3", Stopped), ("3 1", RuntimeError), ("1 0", RuntimeError)):
        program = f"import os; raise SystemExit({codes.split()}[int(os.environ['RANK'])] != '0' and int({codes.split()}[int(os.environ['RANK'])]))"
        ranks = RankProcesses([sys.executable, "-Sc", program], 2, dict(os.environ), grace=0.2)
        if error is None:
            ranks.follow()
        else:
            with pytest.raises(error):
                ranks.follow()


def test_something_that_a_rank_has_started_and_left_is_ended_too(tmp_path):
    program = ("import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(600)']); "
               "print(child.pid, flush=True); os._exit(int(os.environ['RANK']))")
    ranks = RankProcesses([sys.executable, "-Sc", f"{program}"], 2, dict(os.environ), grace=0.5)
    with pytest.raises(RuntimeError):
        ranks.follow()
    for process in ranks.processes:
        listed = subprocess.run(["ps", "-o", "pid=", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
        wait_until(lambda listed=listed: not any(is_alive(pid) for pid in listed), 10)


def launcher(folder, fault):
    "A process that launches ranks, and the environment that it needs."
    code = ("import sys; from nanochat.train import launch; from test_processes import FaultConfig, count_together; "
            "launch(count_together, FaultConfig(fault=sys.argv[1], folder=sys.argv[2]), module='test_processes')")
    return subprocess.Popen([sys.executable, "-c", code, fault, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "NANOCHAT_TIMEOUT": "5"})


def test_killing_the_launching_process_leaves_no_orphan(faulty, tmp_path):
    process = launcher(tmp_path, "hang")
    wait_until(lambda: len(pids(tmp_path)) == 2 or process.poll() is not None)
    time.sleep(0.3)
    ranks = pids(tmp_path)
    assert len(ranks) == 2 and all(map(is_alive, ranks))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_alive, ranks)), 30)


def test_a_stage_whose_launcher_is_killed_saves_first(tmp_path, monkeypatch):
    from test_train import QUICK

    from nanochat.checkpoint import latest_checkpoint
    from nanochat.pretrain import BaseConfig
    from nanochat.run import make_config
    from nanochat.train_tokenizer import TokenizerConfig, run_tokenizer

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(f"The {i}th sentence says that {i * i} is the square of {i}." for i in range(3000)))
    corpus = f"folder:{tmp_path / 'texts'}"
    run_tokenizer(make_config(TokenizerConfig, "demo", run="left", corpus=corpus, vocab_size=300))
    cfg = make_config(BaseConfig, "demo", run="left", **{**QUICK, "corpus": corpus, "tokens": 20_480_000, "save_every": 100_000, "eval_every": 100_000, "processes": 2, "device_rows": 16})
    code = ("import json, sys; from nanochat.train import launch; from nanochat.pretrain import *; "
            "launch(run_pretrain, BaseConfig(**json.loads(sys.argv[1])), module='nanochat.pretrain')")
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(vars(cfg))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: len(Run("left").records("base", "step")) > 3 or process.poll() is not None, 120)
    listed = subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True).stdout.splitlines()
    ranks = [int(line.split()[0]) for line in listed if f"run_worker() {process.pid} " in line]
    assert len(ranks) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_alive, ranks)), 40)
    steps = [r["step"] for r in Run("left").records("base", "step")]
    assert latest_checkpoint(Run("left").path / "base").name == f"step_{steps[-1]:06d}"


def test_sigterm_to_the_launching_process_lets_the_ranks_save(tmp_path):
    program = ("import os, pathlib, signal, sys, time; name = pathlib.Path(sys.argv[1], os.environ['RANK'])\n"
               "def save(*_):\n    name.with_suffix('.saved').touch(); raise SystemExit(3)\n"
               "signal.signal(signal.SIGTERM, save); name.touch(); time.sleep(600)")
    code = ("import os, signal, sys; from nanochat.train import RankProcesses; listen = signal.signal\n"
            "def told(number, handler):\n    before = listen(number, handler); print('listens', flush=True); return before\n"
            "ranks = RankProcesses([sys.executable, '-Sc', sys.argv[1], sys.argv[2]], 2, dict(os.environ)); signal.signal = told; ranks.follow()")
    process = subprocess.Popen([sys.executable, "-c", code, program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listens\n"
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "0.saved", "1", "1.saved"]


SHAPES = [(31, 7), (7, 7), (7, 7), (7, 13), (29, 7), (5, 3), (1, 1), (3, 1), (1, 4), (2, 2), (64, 32), (17, 17)]  # no number of ranks divides them all
VECTORS = {"vector": (11,), "number": (), "cube": (2, 3, 5)}  # AdamW takes any shape


def build(ranks):
    generator = torch.Generator().manual_seed(0)
    matrices = {f"m{i}": Parameter(torch.randn(*shape, generator=generator)) for i, shape in enumerate(SHAPES)}
    others = {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in VECTORS.items()}
    groups = [ParamGroup("adamw", others, lr=0.01, weight_decay=0.1), ParamGroup("muon", matrices, lr=0.02, weight_decay=0.1)]
    return {**matrices, **others}, Optimizer(groups, ranks, torch.float32)


def descend(ranks, steps=50):
    "Each rank has a twelfth, a half ... of the gradient, in halves of whole numbers, so that sums are the same in any order."
    params, optimizer = build(ranks)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params.values():
            parts = torch.randint(-8, 9, (6, *p.shape), generator=generator) / 4
            p.grad = parts[ranks.rank :: ranks.world].sum(0)
        if step == 7 and ranks.rank == ranks.world - 1 and ranks.world > 1:
            params["cube"].grad = None  # a rank that has nothing to say
        optimizer.step()
    return {name: p.data for name, p in params.items()}, optimizer


def descend_and_compare(ranks):
    alone, _ = descend_alone(ranks.world)
    together, optimizer = descend(ranks)
    worst = max((alone[name] - together[name]).abs().max().item() for name in alone)
    assert worst < 1e-6, f"{worst} apart"
    owned = torch.tensor([float(len({key.rpartition('.')[0] for key in optimizer.state}))])
    dist.all_reduce(owned)
    assert owned.item() == len(alone)  # each state lives on one rank only
    print(f"optimizers agree within {worst:.1e}")


def descend_alone(world):
    "One process with the whole gradient; where the others' last rank had none, without its share."
    params, optimizer = build(Ranks())
    for step in range(50):
        generator = torch.Generator().manual_seed(100 + step)
        for name, p in params.items():
            parts = torch.randint(-8, 9, (6, *p.shape), generator=generator) / 4
            if step == 7 and name == "cube":
                parts[world - 1 :: world] = 0
            p.grad = parts.sum(0)
        optimizer.step()
    return {name: p.data for name, p in params.items()}, optimizer


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 1000), max_size=12), st.integers(1, 5))
def test_work_is_shared_out_for_any_sizes(sizes, world):
    owners = share_out(sizes, world)
    assert owners.keys() == sizes.keys() and all(0 <= owner < world for owner in owners.values())
    load = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(world)]
    assert max(load) <= sum(sizes.values()) / world + max(sizes.values(), default=0)


def make_batch(world):
    "Six rows; the first predicts three tokens, the last all, and one nothing at all."
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 50, (6, 16), generator=generator), torch.randint(0, 50, (6, 16), generator=generator)
    y[0, 3:], y[1, 1:], y[2] = -1, -1, -1
    return [[(x[i : i + 1], y[i : i + 1]) for i in range(rank * 6 // world, (rank + 1) * 6 // world)] for rank in range(world)]


def small_model():
    from nanochat.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=50, depth=1, width=16, heads=1, kv_heads=1, context=16))
    model.init_weights(seed=1)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def weigh_and_compare(ranks):
    alone, model = small_model(), small_model()
    expected = weigh_alone(alone)
    loss = accumulate_gradients(model, make_batch(ranks.world)[ranks.rank])
    dist.all_reduce(loss)
    assert abs(loss - expected) < 1e-6
    for a, b in zip(alone.parameters(), model.parameters()):
        dist.all_reduce(b.grad)
        assert torch.allclose(a.grad, b.grad, atol=1e-6), "gradients are weighted wrongly"
    print(f"this rank had {sum((y >= 0).sum().item() for _, y in make_batch(ranks.world)[ranks.rank])} targets")


def weigh_alone(model):
    "Loss and gradients of all rows in one batch, straight from the definition."
    x, y = (torch.cat(part) for part in zip(*make_batch(1)[0]))
    loss = model(x, y, reduction="sum") / (y >= 0).sum()
    loss.backward()
    return loss.detach()


def compare_with_one(cfg):
    with process_group(torch.device("cpu")) as ranks:
        descend_and_compare(ranks)
        weigh_and_compare(ranks)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_compute_what_one_process_computes(faulty, tmp_path, capfd, world):
    "The optimizer shared out, and gradients of ranks that predict different numbers of tokens."
    launch(compare_with_one, FaultConfig(processes=world), module="test_processes")
    shown = capfd.readouterr().out
    assert shown.count("optimizers agree") == world
    counts = [int(line.split()[3]) for line in shown.splitlines() if line.startswith("this rank")]
    assert len(counts) == world and min(counts) < max(counts)
