"""What a run costs: formulas against counts, and an estimate that leaves no trace."""
import json
import random
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import run_ranks
from torch.utils.flop_counter import FlopCounterMode

import nanochat.attention
import nanochat.gpt
from nanochat.common import Ranks
from nanochat.costs import (
    activation_bytes,
    agree,
    count_due,
    count_saved,
    estimate_bytes,
    estimate_seconds,
    flops_per_token,
    meta_model,
    optimizer_flops,
    predict_run,
    restore_after,
)
from nanochat.dataloader import RowLoader, RowStore
from nanochat.evaluate import scale_exam
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import newton_schulz
from nanochat.rl import RLConfig, RLTrainer, run_rl
from nanochat.run import Run
from nanochat.train import TrainConfig, Trainer, build_optimizer, load_model, train

SHAPES = [GPTConfig(300, 2, 64, 2, 2, 64), GPTConfig(512, 3, 96, 3, 1, 128), GPTConfig(1000, 1, 128, 1, 1, 32), GPTConfig(257, 4, 64, 4, 2, 100)]
SHAPE_NAMES = [f"d{c.depth}w{c.width}h{c.heads}k{c.kv_heads}" for c in SHAPES]


@pytest.mark.parametrize("config", SHAPES, ids=SHAPE_NAMES)
def test_parameters_and_operations(config, monkeypatch):
    monkeypatch.setattr(nanochat.attention, "has_onednn", lambda: False)  # PyTorch's counter doesn't know its product
    model = GPT(config).init_weights(0)
    assert meta_model(config).num_params() == model.num_params()
    assert flops_per_token(config) == model.flops_per_token()
    assert flops_per_token(config) - flops_per_token(config, 20) == 12 * config.depth * config.width * (config.context - 20)
    ids = torch.randint(config.vocab_size, (3, 20))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, reduction="sum").backward()
    attention = 12 * config.depth * config.width * 20
    products = flops_per_token(config, 20) - attention
    assert products <= counter.get_total_flops() / ids.numel() <= products + 1.4 * attention  # of attention, our blocks compute 7 products instead of 6, and half of them


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_optimizer_operations(dtype):
    config = SHAPES[1]
    with FlopCounterMode(display=False) as counter:
        for name, p in GPT(config).init_weights(0).named_parameters():
            if name.startswith("transformer.h."):
                newton_schulz((p.detach() + 1)[None], dtype=dtype)
    assert optimizer_flops(config, dtype=dtype) == counter.get_total_flops()


def count(config, rows, dtype):
    model, ids = GPT(config).init_weights(0), torch.randint(config.vocab_size, (rows, config.context))

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(ids, ids, reduction="sum")
    return count_saved(model, forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("config", SHAPES, ids=SHAPE_NAMES)
def test_activations(config, device, dtype, monkeypatch):
    if device == "cuda":  # PyTorch's own operations, counted here
        for module in (nanochat.attention, nanochat.gpt):
            monkeypatch.setattr(module, "use_own_gradient", lambda x: False)
    counted = count(config, 8, dtype)
    formula = activation_bytes(config, 8 * config.context, dtype, device)
    print(f"counted {counted:,}, formula {formula:,}: {formula / counted - 1:+.1%}")
    assert abs(formula / counted - 1) < 0.15


def test_what_is_not_kept_is_not_counted():
    x, w = torch.randn(100, 10), torch.nn.Linear(10, 10, bias=False)
    assert count_saved(w, lambda: w(x).sum()) == x.nbytes, "the input; a sum needs nothing, and the weights are there anyway"
    a = torch.randn(50, requires_grad=True)
    assert count_saved(torch.nn.Module(), lambda: (a * a).sum() + (a[:10] * a[:10]).sum()) == a.nbytes, "one storage, several views"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_optimizers_state_is_shared_out(world):
    config = SHAPES[3]
    held = []
    for rank in range(world):
        model = GPT(config).init_weights(0)
        optimizer = build_optimizer(model, TrainConfig(), Ranks(rank, world))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.ranks = Ranks()  # nobody to send to
        optimizer.apply()
        held.append(sum(t.nbytes for t in optimizer.state.values()))
    assert estimate_bytes(config, 64, world=world)["optimizer"] == max(held)
    assert sum(held) == estimate_bytes(config, 64)["optimizer"]


def test_published_runs():
    d20 = GPTConfig.from_depth(20)
    one = predict_run(d20, 11_219_763_200, 16, 8, utilisation=0.5)
    assert 8 < one["hours"] < 9.5 and one["bytes"] < 80e9
    assert predict_run(d20, 11_219_763_200, 16, 8, utilisation=0.25)["hours"] == pytest.approx(2 * one["hours"])
    assert predict_run(d20, 11_219_763_200, 32, 8, compiled=True)["bytes"] < 85e9 < predict_run(d20, 11_219_763_200, 64, 8, compiled=True)["bytes"]


def test_counts_of_what_is_due():
    for every in (0, 1, 2, 3, 10):
        for first in range(12):
            for last in range(12):
                due = [s for s in range(first, last + 1) if every and (s % every == 0 or s == last)]
                assert count_due(every, first, last) == len(due), (every, first, last)


def test_units_are_tried_a_few_times():
    calls = []
    assert estimate_seconds(lambda: calls.append(1), 0) == 0.0 and not calls
    estimate_seconds(lambda: calls.append(1), 1000)
    assert len(calls) == 9, "one to warm up, and eight"
    calls.clear()
    estimate_seconds(lambda: calls.append(1), 2, warm=0)
    assert len(calls) == 2, "never more than there will be"
    calls.clear()
    estimate_seconds(lambda: calls.append(1), 100, limit=0.0)
    assert len(calls) == 2, "one after the warm-up, however slow"
    assert agree(2.5) == 2.5


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    "Trainers on the same random rows."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PROGRESS", "lines")
    numbers = np.random.default_rng(0)
    docs = [[0, *numbers.integers(1, 300, numbers.integers(20, 60)).tolist()] for _ in range(200)]
    store = RowStore.from_docs(docs, T=64, mode="whole")

    class Letters:
        hash, token_bytes = "letters", np.ones(300, np.int32)

    def make(name, **settings):
        cfg = TrainConfig(run=name, **{"tokens": 10_240, "batch_tokens": 1024, "device_rows": 8, "eval_every": 5, "sample_every": 5, "save_every": 4, "precision": "float32", **settings})
        model = GPT(SHAPES[0]).init_weights(seed=1)
        loader = RowLoader(store, 8, Ranks(), torch.device("cpu"), shuffle_seed=3)
        return Trainer("base", cfg, Run(name), model, Letters(), loader, lambda: islice(RowLoader(store, 8), 3),
                       lambda model: [{"prompt": "", "text": str(torch.rand(()).item())}])
    return make


def everything(t):
    "All that decides the next step."
    return {**t.model.state_dict(), **t.optimizer.state_dict(), "position": torch.tensor(t.loader.position), "step": torch.tensor(t.step),
            "random": torch.get_rng_state(), "gradients": torch.tensor([p.grad is None or bool((p.grad == 0).all()) for p in t.model.parameters()])}


@pytest.mark.parametrize("before", [0, 3])
def test_an_estimate_leaves_no_trace(make_trainer, before):
    t = make_trainer("one")
    for _ in range(before):
        t.train_step()
    first, others = everything(t), (random.getstate(), t.model.training)
    first = {name: tensor.clone() for name, tensor in first.items()}
    parts, memory = t.estimate()
    assert set(parts) == {"steps", "measuring", "samples", "saving"} and all(v > 0 for v in parts.values()) and memory > 0
    after = everything(t)
    assert first.keys() == after.keys()
    assert all(torch.equal(first[name], after[name]) for name in first), [name for name in first if not torch.equal(first[name], after[name])]
    assert (random.getstate(), t.model.training) == others
    assert not [p for p in t.run.path.glob(".*") if p.is_dir()], "the trial checkpoint is gone"
    assert not t.run.records(), "nothing of it is recorded"


def test_training_after_an_estimate_is_training_without(make_trainer, monkeypatch):
    with_estimate = make_trainer("with")
    train(with_estimate)
    monkeypatch.setattr(Trainer, "estimate", lambda t: ({"steps": 0.0, "saving": 0.0}, 0))
    without = make_trainer("without")
    train(without)
    assert all(torch.equal(a, b) for a, b in zip(with_estimate.model.state_dict().values(), without.model.state_dict().values()))
    losses = [[r["loss"] for r in Run(name).records("base", "step")] for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_what_was_estimated_is_recorded_beside_what_it_took(make_trainer):
    t = make_trainer("recorded")
    train(t)
    (config,), (summary,) = t.run.records("base", "config"), t.run.records("base", "summary")
    print(f"estimated {summary['estimated_seconds']:.3f} s, took {summary['took']:.3f} s")
    assert config["estimated_seconds"] == pytest.approx(sum(config["estimated_parts"].values())) == summary["estimated_seconds"]
    assert summary["took"] >= summary["seconds"] > 0
    resumed = make_trainer("recorded", tokens=10_240)
    train(resumed)
    assert t.run.records("base", "summary")[-1]["estimated_seconds"] < config["estimated_seconds"], "of the rest, which is one measurement"


def test_an_error_in_a_rehearsal_is_undone_too(make_trainer):
    t = make_trainer("error")
    before = t.model.lm_head.weight.clone()
    with pytest.raises(ZeroDivisionError), restore_after(t.model, t.optimizer, t.loader):
        t.train_step()
        assert not torch.equal(t.model.lm_head.weight, before)
        _ = 1 / 0
    assert torch.equal(t.model.lm_head.weight, before) and t.loader.position == 0


RANKS = """
import json, sys, time
import torch
from nanochat.common import get_device
from nanochat.costs import estimate_seconds
from nanochat.train import process_group
with process_group(get_device("cpu")) as ranks:
    tried = []
    seconds = estimate_seconds(lambda: (tried.append(1), time.sleep(0.05 * (1 + 4 * ranks.rank))), 100, limit=0.6)
    print(json.dumps([ranks.rank, len(tried), seconds]), flush=True)
"""


def test_ranks_agree(tmp_path):
    (tmp_path / "agree.py").write_text(RANKS)
    found = sorted(json.loads(line) for line in run_ranks(2, tmp_path / "agree.py").splitlines() if line.startswith("["))
    assert [rank for rank, _, _ in found] == [0, 1]
    assert found[0][1:] == found[1][1:], "the same number of tries, and the same answer"
    assert found[0][2] >= 25, "the slower rank's"


def test_practice_after_an_estimate_is_practice_without(demo_run, monkeypatch):
    cfg, rewards = RLConfig(run="demo", preset="demo", mixture="counting=40", steps=2, questions=4, samples=8, exam_items=4, max_tokens=24, eval_every=2,
                            save_every=2, device_rows=8, lr_scale=1.0, precision="float32"), []
    for estimate in (RLTrainer.estimate, lambda t: ({"steps": 0.0, "saving": 0.0}, 0)):
        monkeypatch.setattr(RLTrainer, "estimate", estimate)
        run_rl(cfg)
        rewards.append([(r["loss"], r["reward"], r["length"]) for r in demo_run.records("rl", "step")])
        (summary,) = demo_run.records("rl", "summary")
        print(f"estimated {summary['estimated_seconds']:.2f} s, took {summary['took']:.2f} s")
        rewards[-1].append({name: t.clone() for name, t in load_model(demo_run, "rl")[0].state_dict().items()})
        shutil.rmtree(demo_run.path / "rl")
        demo_run.metrics.write_text("".join(line for line in demo_run.metrics.read_text().splitlines(True) if '"stage": "rl"' not in line))
    assert rewards[0][:-1] == rewards[1][:-1] and len(rewards[0]) == 3
    assert all(torch.equal(rewards[0][-1][name], t) for name, t in rewards[1][-1].items())


def test_every_stage_says_what_it_will_take(demo_run):
    for stage in ("tokenizer", "base", "mid", "sft", "eval"):
        summary = demo_run.records(stage, "summary")[0]  # other tests may have asked the same models more
        print(f"{stage}: estimated {summary['estimated_seconds']:.2f} s, took {summary['took']:.2f} s")
        assert summary["estimated_seconds"] > 0 and summary["took"] > 0
        assert demo_run.records(stage, "config")[0]["estimated_seconds"] == summary["estimated_seconds"]
    assert "estimated / took" in (demo_run.path / "report.md").read_text()


def test_an_exam_is_scaled_by_its_batches():
    assert scale_exam(8, 8) == scale_exam(16, 12) == 1
    assert scale_exam(8, 640) == pytest.approx(10 * scale_exam(8, 64))
    assert scale_exam(16, 640, world=2) == pytest.approx(scale_exam(8, 320))
    assert 4 < scale_exam(8, 64) < 5
