"""Optimizers against PyTorch, against float64, and over processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from nanochat.common import Ranks, UserError
from nanochat.optim import Optimizer, ParamGroup, adamw_update, lr_schedule, muon_momentum, muon_update, newton_schulz, share_out

SHAPES = {"table": (37, 6), "head": (29, 6), "bias": (5,), "square": (7, 7), "again": (7, 7), "tall": (13, 5), "wide": (5, 13), "row": (1, 9)}
TABLES = ("table", "head", "bias")


def make(ranks=Ranks(), dtype=torch.float64, decay=0.0):
    generator = torch.Generator().manual_seed(0)
    params = {name: Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in SHAPES.items()}
    tables, matrices = ({n: p for n, p in params.items() if (n in TABLES) == kind} for kind in (True, False))
    groups = [ParamGroup("adamw", tables, lr=0.1, weight_decay=decay), ParamGroup("muon", matrices, lr=0.02, weight_decay=decay)]
    return params, Optimizer(groups, ranks, dtype=dtype)


def gradient(name, step, part, parts, dtype=torch.float64):
    "One of `parts` pieces whose sum is the same however many there are."
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    pieces = torch.randn(12, *SHAPES[name], generator=generator, dtype=dtype)
    return pieces[part::parts].sum(0)


def take_steps(params, optimizer, steps, dtype=torch.float64, clip=3.0):
    norms = []
    for step in steps:
        for name, p in params.items():
            p.grad = gradient(name, step, optimizer.ranks.rank, optimizer.ranks.world, dtype)
        optimizer.reduce_gradients()
        norms.append(optimizer.clip_gradients(clip).item())
        optimizer.apply(lr_schedule(step, 50), muon_momentum(step))
        optimizer.zero_grad()
    return norms


def work(rank, world, path, steps, dtype, load):
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting{world}", rank=rank, world_size=world)
    params, optimizer = make(Ranks(rank, world), dtype)
    if load:
        saved = torch.load(f"{path}/{load}.pt")
        for name, p in params.items():
            p.data.copy_(saved["params"][name])
        optimizer.load_state_dict(saved["state"])
    norms = take_steps(params, optimizer, steps, dtype)
    shares = [None] * world
    dist.all_gather_object(shares, optimizer.state_dict())
    same = [None] * world
    dist.all_gather_object(same, {name: p.data for name, p in params.items()})
    assert all(torch.equal(same[0][name], other[name]) for other in same for name in params)  # all ranks hold the same weights
    names = [key for share in shares for key in share if key != "steps"]
    assert len(names) == len(set(names)) == 3 * 2 + 5  # each state exists once, at its owner
    if rank == 0:
        state = {key: tensor for share in shares for key, tensor in share.items()}
        torch.save({"params": same[0], "state": state, "norms": norms}, f"{path}/{world}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_two_ranks_equal_one(tmp_path, dtype, tolerance):
    mp.spawn(work, (2, str(tmp_path), range(50), dtype, None), nprocs=2)
    params, optimizer = make(dtype=dtype)
    norms = take_steps(params, optimizer, range(50), dtype)
    saved = torch.load(tmp_path / "2.pt")
    assert torch.allclose(torch.tensor(saved["norms"]), torch.tensor(norms), rtol=1e-5)
    for name, p in params.items():
        assert (p - saved["params"][name]).abs().max() < tolerance * max(1, p.abs().max()), name


def test_state_of_three_ranks_goes_on_with_two_and_one(tmp_path):
    mp.spawn(work, (3, str(tmp_path), range(6), torch.float64, None), nprocs=3)
    mp.spawn(work, (2, str(tmp_path), range(6, 10), torch.float64, "3"), nprocs=2)
    params, optimizer = make()
    saved = torch.load(tmp_path / "2.pt")
    for name, p in params.items():
        p.data.copy_(saved["params"][name])
    optimizer.load_state_dict(saved["state"])
    take_steps(params, optimizer, range(10, 13))
    whole, at_once = make()
    take_steps(whole, at_once, range(13))
    assert optimizer.steps == 13
    for name in params:
        assert torch.allclose(params[name], whole[name], atol=1e-9), name


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_pytorch(decay):
    w = torch.randn(7, 5)
    ours, mean, square, theirs = w.clone(), torch.zeros(7, 5), torch.zeros(7, 5), Parameter(w.clone())
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=decay)
    for step in range(1, 101):
        theirs.grad = torch.randn(7, 5) * 10.0 ** torch.randint(-6, 3, ())
        adamw_update(ours, theirs.grad, mean, square, step, lr=0.1, weight_decay=decay)
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-5)


def naive_newton_schulz(g, steps=5):
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_newton_schulz_equals_the_svd(rows, columns, seed):
    g = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.stack([naive_newton_schulz(m) for m in g])
    assert torch.allclose(newton_schulz(g, dtype=torch.float64), expected, atol=1e-4)
    assert torch.allclose(newton_schulz(g[0], dtype=torch.float64), expected[0], atol=1e-4)


def test_newton_schulz_in_bfloat16_and_of_zero():
    values = torch.linalg.svdvals(newton_schulz(torch.randn(3, 64, 32), dtype=torch.bfloat16))
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.equal(newton_schulz(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_muon_equals_float64(shape):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, *shape, generator=generator)
    ours, means = [w.clone() for w in start], [torch.zeros(shape) for _ in start]
    w, mean = start.double(), torch.zeros(3, *shape, dtype=torch.float64)
    for step in range(30):
        grads, momentum = torch.randn(3, *shape, generator=generator), muon_momentum(10 * step)
        muon_update(ours, list(grads), means, lr=0.02, momentum=momentum, weight_decay=0.1)
        mean = momentum * mean + (1 - momentum) * grads.double()
        ahead = momentum * mean + (1 - momentum) * grads.double()
        update = torch.stack([naive_newton_schulz(m) for m in ahead])
        w = w * (1 - 0.02 * 0.1) - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * update
    assert torch.allclose(torch.stack(ours).double(), w, atol=1e-4)


def test_stopping_in_the_middle_changes_nothing():
    whole, optimizer = make(decay=0.1)
    take_steps(whole, optimizer, range(20))
    params, first = make(decay=0.1)
    take_steps(params, first, range(9))
    second = Optimizer(first.groups, dtype=torch.float64)
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    take_steps(params, second, range(9, 20))
    assert all(torch.equal(params[name], whole[name]) for name in params)


def test_clipping():
    params, optimizer = make()
    for p in params.values():
        p.grad = torch.randn_like(p)
    before = {name: p.grad.clone() for name, p in params.items()}
    norm = optimizer.clip_gradients(0.5)
    assert torch.allclose(norm, torch.cat([g.flatten() for g in before.values()]).norm())
    for name, p in params.items():
        assert torch.allclose(p.grad, before[name] * 0.5 / norm, rtol=1e-5)
    optimizer.clip_gradients(100.0)
    assert torch.allclose(torch.cat([p.grad.flatten() for p in params.values()]).norm(), torch.tensor(0.5, dtype=torch.float64), rtol=1e-5)


def test_a_parameter_without_gradient_stays():
    params, optimizer = make()
    start = {name: p.detach().clone() for name, p in params.items()}
    for name in ("head", "tall"):
        params[name].grad = torch.ones_like(params[name])
    optimizer.step()
    assert {name for name, p in params.items() if not torch.equal(p, start[name])} == {"head", "tall"}


def test_a_foreign_state_is_refused():
    _, optimizer = make()
    for state in ({"other.mean": torch.zeros(2)}, {"table.mean": torch.zeros(36, 6)}):
        with pytest.raises(UserError, match="which this model doesn't"):
            optimizer.load_state_dict({"steps": torch.tensor(1), **state})


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), st.integers(1, 1000), max_size=30), st.integers(1, 9))
def test_work_is_shared_out_fairly(sizes, world):
    owners = share_out(sizes, world)
    assert owners == share_out(dict(reversed(sizes.items())), world)  # every rank finds the same, in whatever order
    load = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(world)]
    assert max(load) - min(load) <= max(sizes.values(), default=0)


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1))
def test_schedule(total, warmup, cooldown, final):
    values = [lr_schedule(step, total, warmup, cooldown, final) for step in range(total)]
    assert all(0 < v <= 1 for v in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1]) and values[top:] == sorted(values[top:], reverse=True)
    assert math.isclose(lr_schedule(total, total, 0, cooldown, final), final if cooldown else 1.0)


def test_recipe():
    assert [lr_schedule(step, 1000) for step in (0, 799, 800)] == [1.0, 1.0, 1.0]
    assert lr_schedule(900, 1000) == pytest.approx(0.5) and lr_schedule(999, 1000) == pytest.approx(0.005)
    assert [muon_momentum(step) for step in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
