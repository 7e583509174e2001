"""Bad steps: left out on all ranks alike, recorded, and the end of a stage when they don't stop; resumed exactly."""
import json
import math
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.checkpoint import latest_checkpoint, load_checkpoint
from nanochat.common import Ranks, UserError
from nanochat.dataloader import RowLoader, RowStore
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import FREE_SETTINGS, Run
from nanochat.tinyworld import write_documents
from nanochat.tokenizer import Tokenizer
from nanochat.train import StepJudge, Stopped, TrainConfig, Trainer, launch, process_group, train

TESTS = Path(__file__).resolve().parent
TEXTS = [d.text for d in islice(write_documents(1), 120)]


@pytest.fixture(autouse=True)
def own_base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PROGRESS", "lines")


@dataclass(frozen=True)
class SickConfig(TrainConfig):
    "A small stage with faults at some steps."
    STAGE = "base"
    gradients: str = ""  # 12:nan,13:1e4: what the gradients of a step are multiplied by
    losses: str = ""  # the same for the loss alone
    rank: int = -1  # that falls ill; -1: all


class SickTrainer(Trainer):
    "Falls ill as its configuration says."

    def faults(self, text):
        pairs = (pair.split(":") for pair in text.split(",") if pair and self.cfg.rank in (-1, self.ranks.rank))
        return {int(step): float(factor) for step, factor in pairs}.get(self.step + 1, 1.0)

    def apply_gradients(self, loss):
        for p in self.model.parameters():
            p.grad.mul_(self.faults(self.cfg.gradients))
        return super().apply_gradients(loss * self.faults(self.cfg.losses))


def make_trainer(cfg, ranks=Ranks()):
    tokenizer = Tokenizer.train(TEXTS, 300)
    store = RowStore.from_docs([[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(TEXTS)], T=32)
    model = GPT(GPTConfig(vocab_size=300, depth=1, width=16, heads=1, kv_heads=1, context=32))
    model.init_weights(seed=cfg.seed)
    rows, device = 8, torch.device("cpu")
    loader = RowLoader(store, rows, ranks, device, shuffle_seed=cfg.seed)
    return SickTrainer("base", cfg, Run(cfg.run), model, tokenizer, loader, lambda: islice(RowLoader(store, rows, ranks, device), 1), ranks=ranks)


def sick(name, **more):
    fixed = {"precision": "float32", "tokens": 40 * 256, "batch_tokens": 256, "device_rows": 8, "eval_every": 20, "sample_every": 0, "save_every": 5}
    return SickConfig(run=name, **{**fixed, **more})


def records(name, kind):
    return Run(name).records("base", kind)


def saved(name, step=None):
    "Weights, optimizer state and meta of a checkpoint."
    directory = Run(name).path / "base"
    return load_checkpoint(directory / f"step_{step:06d}" if step else latest_checkpoint(directory), optim=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("faults, reason", [
    ({"gradients": "23:nan"}, "gradient's norm nan"), ({"gradients": "23:inf"}, "gradient's norm (nan|inf)"), ({"gradients": "23:1e4"}, "times the usual"),
    ({"losses": "23:nan"}, "loss is nan"), ({"losses": "23:inf"}, "loss is inf"), ({"losses": "23:-inf"}, "loss is -inf"),
    ({"losses": "23:1e3"}, "knows nothing has 5.7"),
])
def test_a_bad_step_is_left_out_and_its_batch_is_not_used_again(faults, reason, capsys):
    cfg = sick("ill", save_every=1, keep=40, tokens=25 * 256, **faults)
    train(make_trainer(cfg))
    (record,) = records("ill", "bad_step")
    assert record["step"] == 23 and record["in_a_row"] == 1 and re.search(reason, record["reason"])
    assert [r["step"] for r in records("ill", "step")] == [*range(1, 23), 24, 25]
    assert "step 23/25 is not applied" in capsys.readouterr().out
    for line in Run("ill").metrics.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    before, after = saved("ill", 22), saved("ill", 24)
    assert not (Run("ill").path / "base" / "step_000023").exists()  # in the middle of trouble nothing is saved
    assert after[1]["steps"] == before[1]["steps"] + 1 and after[2]["position"] == before[2]["position"] + 16  # one update, two batches
    assert all(torch.isfinite(tensor).all() for part in after[:2] for tensor in part.values())


def test_weights_and_optimizer_are_untouched_by_a_bad_step():
    t = make_trainer(sick("untouched", gradients="3:nan"))
    t.train_step(), t.train_step()
    weights = {name: p.clone() for name, p in t.model.state_dict().items()}
    state = {name: p.clone() for name, p in t.optimizer.state_dict().items()}
    position = t.loader.position
    assert t.train_step()["fault"] and t.judge.bad == 1 and t.step == 3
    assert same(t.model.state_dict(), weights) and same(t.optimizer.state_dict(), state) and t.loader.position == position + 8
    assert all(not p.grad.any() for p in t.model.parameters())  # nothing of it is added to the next step
    assert t.train_step()["fault"] == "" and t.judge.bad == 0 and not same(t.model.state_dict(), weights)


@pytest.mark.parametrize("bad_steps", [1, 3])
def test_a_run_that_stays_ill_stops_with_its_last_good_checkpoint(bad_steps, capsys):
    cfg = sick("lost", gradients=",".join(f"{step}:nan" for step in range(24, 41)), bad_steps=bad_steps)
    for _ in range(2):  # the same command meets the same end, and does no harm
        with pytest.raises(UserError) as caught:
            train(make_trainer(cfg))
        message = str(caught.value)
        assert f"after {bad_steps} bad steps in a row" in message and "its checkpoint of step 20" in message
        assert "--set base.lr_scale=0.5 --set base.clip=1.0" in message and "\n" not in message
        assert latest_checkpoint(Run("lost").path / "base").name == "step_000020"
        assert [r["step"] for r in records("lost", "bad_step")] == list(range(24, 24 + bad_steps))
        assert [r["step"] for r in records("lost", "step")] == list(range(1, 24))


def test_what_the_message_proposes_can_be_done(monkeypatch):
    monkeypatch.setattr("nanochat.run.FREE_SETTINGS", FREE_SETTINGS | {"gradients"})
    run = Run("cured")
    with pytest.raises(UserError):
        train(make_trainer(sick("cured", gradients=",".join(f"{step}:nan" for step in range(24, 41)))))
    before = sick("cured")
    for cfg in (sick("cured", lr_scale=0.5, clip=1.0), sick("cured", spike=0.0, bad_steps=9)):
        assert not run.is_complete(cfg)
    with pytest.raises(UserError, match="seed"):
        run.is_complete(sick("cured", seed=2))
    train(make_trainer(sick("cured", lr_scale=0.5, clip=1.0)))
    assert [(r["step"], r["settings"]["lr_scale"]) for r in records("cured", "config")] == [(0, 1.0), (20, 0.5)]
    assert [r["step"] for r in records("cured", "step")] == list(range(1, 41)) and not records("cured", "bad_step")
    with pytest.raises(UserError, match="lr_scale=0.5, and lr_scale=1.0"):  # a stage that is done was done with these
        run.is_complete(before)


def test_weights_that_are_not_finite_are_never_saved():
    t = make_trainer(sick("spoilt"))
    for _ in range(5):
        t.train_step()
    t.save()
    t.train_step()
    next(iter(t.model.parameters())).data[0, 0] = math.inf
    with pytest.raises(UserError, match="not finite, transformer.wte.weight among them; go on from its checkpoint of step 5"):
        t.save()
    assert latest_checkpoint(Run("spoilt").path / "base").name == "step_000005"


@pytest.mark.parametrize("stop", [21, 23, 24, 26, 31])
def test_resumed_in_the_middle_of_an_illness_is_the_same_run(stop):
    "The judge's memory is in the checkpoint: a norm that is bad for one that remembers is bad for one that has resumed."
    faults = {"gradients": "23:nan,24:nan,26:1e3,32:50,35:1e3"}
    train(make_trainer(sick("whole", **faults)))
    (Run("halves").path).mkdir(parents=True)
    t = make_trainer(sick("halves", **faults))
    step = t.train_step

    def stop_after():
        result = step()
        if t.step == stop and t.seconds:  # not in the rehearsal
            (t.run.path / "stop").touch()
        return result
    t.train_step = stop_after
    with pytest.raises(Stopped):
        train(t)
    assert t.step == stop
    train(make_trainer(sick("halves", **faults)))
    assert same(saved("whole")[0], saved("halves")[0]) and same(saved("whole")[1], saved("halves")[1])
    for kind, fields in (("step", ("step", "loss", "grad_norm")), ("bad_step", ("step", "reason", "in_a_row")), ("eval", ("step", "bpb"))):
        assert [[r[f] for f in fields] for r in records("whole", kind)] == [[r[f] for f in fields] for r in records("halves", kind)]
    assert [r["step"] for r in records("whole", "bad_step")] == [23, 24, 26, 32, 35]


def test_the_rehearsal_leaves_no_trace_in_the_judge():
    t = make_trainer(sick("rehearsed", gradients="1:nan,2:nan,3:nan,4:nan,5:nan,6:nan,7:nan"))
    t.estimate()
    assert t.judge.norms == [] and t.judge.bad == 0 and t.step == 0


def test_old_checkpoints_without_a_memory_are_read(monkeypatch):
    cfg = sick("old", tokens=10 * 256)
    train(make_trainer(cfg))
    import nanochat.train

    real = nanochat.train.load_checkpoint

    def forget(*arguments, **options):
        tensors, state, meta = real(*arguments, **options)
        return tensors, state, {key: value for key, value in meta.items() if key not in ("norms", "bad")}
    monkeypatch.setattr(nanochat.train, "load_checkpoint", forget)
    t = make_trainer(cfg)
    assert t.resume() and t.judge.norms == [] and t.judge.bad == 0


NUMBERS = st.one_of(st.floats(), st.floats(0, 10))


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=60), st.sampled_from([0.0, 2.0, 20.0]))
def test_the_judge_keeps_to_its_rule(steps, spike):
    judge, applied, row = StepJudge(spike, ceiling=6.0), [], 0
    for loss, norm in steps:
        fault = judge.judge(loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            assert fault
        elif spike == 0:
            assert not fault
        else:
            usual = sorted(applied[-50:])
            late = len(usual) >= 20 and norm > spike * (usual[(len(usual) - 1) // 2] + usual[len(usual) // 2]) / 2
            assert bool(fault) == (loss > 6.0 or late)
        row = row + 1 if fault else 0
        applied += [norm] * (not fault and norm > 0)
        assert judge.bad == row and judge.norms == applied[-50:]


def test_healthy_runs_are_left_alone():
    "Norms as the presets' runs have them: falling, with a jump to seven times at once where the data change."
    judge = StepJudge(ceiling=1.5 * math.log(2048))
    norms = [0.7, 4.2, *(4.0 * 0.95**i for i in range(100)), *(0.17 for _ in range(40)), *(1.2 for _ in range(60))]
    losses = [7.63, 8.0, *(5 * 0.97**i for i in range(100)), *(0.5 for _ in range(40)), *(6.1 for _ in range(60))]
    assert not any(judge.judge(loss, norm) for loss, norm in zip(losses, norms))


def fall_ill_together(cfg):
    with process_group(torch.device("cpu")) as ranks:
        t = make_trainer(cfg, ranks)
        train(t)
        print(f"rank ended with {t.optimizer.steps} updates, {t.judge.norms[-1]:.9f}")


def test_all_ranks_leave_out_the_same_steps(monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("NANOCHAT_TIMEOUT", "30")  # ranks that disagree wait for each other
    cfg = sick("both", processes=2, device_rows=4, tokens=30 * 256, gradients="22:nan,25:1e4", losses="27:inf", rank=1)
    launch(fall_ill_together, cfg, module="test_sickness")
    ends = [line for line in capfd.readouterr().out.splitlines() if line.startswith("rank ended")]
    assert len(ends) == 2 and ends[0] == ends[1] and "27 updates" in ends[0]
    assert [r["step"] for r in records("both", "bad_step")] == [22, 25, 27]
