"""The optimizer computes what its papers say, and two ranks compute what one computes."""
import os
import subprocess
import sys

import torch
from torch.nn import Parameter

from nanochat.common import Ranks
from nanochat.optim import Optimizer, ParamGroup, lr_schedule, muon_momentum, share_out

SHAPES = {"table": (31, 7), "a": (7, 7), "b": (7, 7), "tall": (29, 7), "wide": (7, 13), "odd": (5, 3)}
WORKER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_optim import build, train
from nanochat.common import get_ranks
dist.init_process_group("gloo")
ranks = get_ranks()
params, optimizer = build(ranks)
train(params, optimizer, 25, ranks)
torch.save(optimizer.state_dict(), f"{sys.argv[2]}/state{ranks.rank}.pt")
train(params, optimizer, 25, ranks, start=25)
if ranks.is_main:
    torch.save({k: v.data for k, v in params.items()}, f"{sys.argv[2]}/weights.pt")
dist.destroy_process_group()
"""


def build(ranks):
    generator = torch.Generator().manual_seed(0)
    params = {name: Parameter(torch.randn(*shape, generator=generator)) for name, shape in SHAPES.items()}
    matrices = {name: p for name, p in params.items() if name != "table"}
    groups = [ParamGroup("adamw", {"table": params["table"]}, lr=0.1), ParamGroup("muon", matrices, lr=0.02)]
    return params, Optimizer(groups, ranks, torch.float32)


def train(params, optimizer, steps, ranks, start=0):
    "Each rank brings its share of the gradient; the shares of all ranks add up to the same."
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + t)
        for p in params.values():
            parts = torch.randn(2, *p.shape, generator=generator)
            p.grad = parts[ranks.rank].clone() if ranks.world == 2 else parts.sum(0)
        optimizer.step()


def test_two_ranks_equal_one_and_resume_as_one(tmp_path):
    alone, optimizer = build(Ranks())
    train(alone, optimizer, 50, Ranks())
    here = os.path.dirname(__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable, "-c", WORKER]
    subprocess.run([*command, here, str(tmp_path)], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all((alone[name] - together[name]).abs().max() < 1e-5 for name in SHAPES)
    states = [torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in range(2)]
    assert not (states[0].keys() & states[1].keys()) - {"steps"}
    resumed, optimizer = build(Ranks())  # two ranks saved it, one goes on
    train(resumed, optimizer, 25, Ranks())
    optimizer.load_state_dict(states[0] | states[1])
    train(resumed, optimizer, 25, Ranks(), start=25)
    assert all((alone[name] - resumed[name]).abs().max() < 1e-5 for name in SHAPES)


def adamw_in_float64(weight, gradients, rates):
    mean = square = torch.zeros_like(weight)
    for t, (g, lr) in enumerate(zip(gradients, rates), 1):
        mean, square = 0.8 * mean + 0.2 * g, 0.95 * square + 0.05 * g * g
        weight = weight - lr * (mean / (1 - 0.8**t)) / ((square / (1 - 0.95**t)).sqrt() + 1e-10)
    return weight


def muon_in_float64(weight, gradients, rates):
    "Nesterov's momentum; the quintic is applied to the singular values themselves."
    rows, columns = weight.shape
    mean = torch.zeros_like(weight)
    for t, (g, lr) in enumerate(zip(gradients, rates)):
        keep = 0.85 + 0.1 * min(1.0, t / 300)
        mean = keep * mean + (1 - keep) * g
        u, s, vt = torch.linalg.svd(keep * mean + (1 - keep) * g, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        weight = weight - lr * max(1.0, rows / columns) ** 0.5 * (u * s) @ vt
    return weight


def test_steps_are_those_of_the_papers():
    "All of a training's formulas in float64, on gradients whose singular values fall by a thousand; momentum and rates change with the step."
    params, optimizer = build(Ranks())
    start = {name: p.detach().double().clone() for name, p in params.items()}
    gradients, steps = {name: [] for name in params}, 40
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        for name, p in params.items():
            g = torch.randn(p.shape, generator=generator) * torch.logspace(0, -3, p.size(1))
            gradients[name].append(g.double())
            p.grad = g
        optimizer.step(lr_schedule(t, steps, cooldown=0.4), muon_momentum(t))
    rates = [min(1.0, (steps - t) / (0.4 * steps)) for t in range(steps)]
    for name, p in params.items():
        of, lr = (adamw_in_float64, 0.1) if name == "table" else (muon_in_float64, 0.02)
        expected = of(start[name], gradients[name], [lr * rate for rate in rates])
        assert (p.detach() - expected).norm() < 1e-3 * (expected - start[name]).norm(), name


def test_work_is_shared_evenly():
    owners = share_out({f"p{i}": 100 for i in range(17)} | {"big": 800}, world=4)
    load = [sum(800 if name == "big" else 100 for name, owner in owners.items() if owner == rank) for rank in range(4)]
    assert max(load) == 800 and set(owners.values()) == set(range(4))
