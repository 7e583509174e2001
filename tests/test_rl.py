"""Reinforcement learning: what is sampled, what is learnt, and that a run goes on where it stopped."""
import shutil

import pytest
import torch
from conftest import call_nanochat

from nanochat.checkpoint import latest_checkpoint, load_checkpoint
from nanochat.common import Ranks, UserError
from nanochat.engine import Engine
from nanochat.mixtures import load_task
from nanochat.rl import QuestionLoader, RLConfig, Rollout, advantages, run_rl, sample_group
from nanochat.run import Run
from nanochat.train import Stopped, launch, load_model

QUICK = {"run": "demo", "preset": "demo", "mixture": "counting=40", "steps": 4, "questions": 8, "samples": 16, "exam_items": 4, "max_tokens": 24,
         "eval_every": 4, "save_every": 2, "device_rows": 8, "lr_scale": 1.0, "sample_every": 0, "precision": "float32"}


def test_ranks_ask_what_one_would_ask():
    one, two = QuestionLoader(10, 6, Ranks(), 3), [QuestionLoader(10, 6, Ranks(rank, 2), 3) for rank in (0, 1)]
    asked = []
    for _ in range(5):
        numbers, first = next(one)
        parts = [next(loader) for loader in two]
        assert numbers == parts[0][0] + parts[1][0] and (first, parts[0][1], parts[1][1]) == (0, 0, 3)
        asked += numbers
    assert all(sorted(asked[i : i + 10]) == list(range(10)) for i in (0, 10, 20)), "each epoch asks every question once"
    again = QuestionLoader(10, 6, Ranks(), 3)
    again.position = 18
    assert next(again)[0] == asked[18:24]


def test_what_counts_is_what_the_model_chose(demo_run):
    model, tokenizer, _ = load_model(demo_run, "sft")
    task = load_task("arithmetic", 6, split="train")
    groups = sample_group(Engine(model, tokenizer), task, list(task), 8, 40, seed=5)
    special = tokenizer.special
    assert [len(group) for group in groups] == [8] * 6
    for group in groups:
        assert abs(sum(advantages(group))) < 1e-9
        for rollout in group:
            assert len(rollout.ids) == len(rollout.mask)
            start = rollout.ids.index(special["<|assistant_start|>"]) + 1
            assert not any(rollout.mask[:start])
            inside = False
            for token, counted in zip(rollout.ids[start:], rollout.mask[start:]):
                inside |= token == special["<|output_start|>"] and not counted
                assert counted == (not inside)
                inside &= token != special["<|output_end|>"]
            assert rollout.reward in (0.0, 1.0)
    halves = sample_group(Engine(model, tokenizer), task, list(task)[3:], 8, 40, seed=5, first=3)
    assert [[r.ids for r in g] for g in halves] == [[r.ids for r in g] for g in groups[3:]]


def test_advantages():
    def group(*rewards):
        return [Rollout([1], [1], reward, "") for reward in rewards]
    assert advantages(group(1, 1, 1)) == [0, 0, 0] == advantages(group(0, 0, 0))
    assert advantages(group(1, 0, 0, 0)) == [0.75, -0.25, -0.25, -0.25]


def weights(run):
    return load_checkpoint(latest_checkpoint(run.path / "rl"))[0]


def forget(run):
    "As if the stage had never run."
    shutil.rmtree(run.path / "rl")
    run.metrics.write_text("".join(line for line in run.metrics.read_text().splitlines(True) if '"stage": "rl"' not in line))


def test_stopped_and_started_again_is_the_same_run(demo_run, tmp_path):
    cfg = RLConfig(**QUICK)
    run_rl(cfg)
    whole, steps = weights(demo_run), [r["reward"] for r in demo_run.records("rl", "step")]
    assert any(not torch.equal(a, b) for a, b in zip(whole.values(), load_checkpoint(latest_checkpoint(demo_run.path / "sft"))[0].values()))
    forget(demo_run)

    import nanochat.train as train
    advance, count = train.advance, []

    def stop_after_two(t, *rest):
        advance(t, *rest)
        count.append(t.step)
        if t.step == 2:
            (demo_run.path / "stop").touch()
    train.advance = stop_after_two
    try:
        with pytest.raises(Stopped):
            run_rl(cfg)
    finally:
        train.advance = advance
    run_rl(cfg)
    assert [r["reward"] for r in demo_run.records("rl", "step")] == steps and count == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), weights(demo_run).values()))


def test_two_ranks_learn_what_one_learns(demo_run):
    cfg = RLConfig(**{**QUICK, "steps": 2})
    run_rl(cfg)
    one = demo_run.records("rl", "step")
    forget(demo_run)
    launch(run_rl, RLConfig(**{**QUICK, "steps": 2, "processes": 2}), module="nanochat.rl")
    two = demo_run.records("rl", "step")
    assert [r["reward"] for r in one] == [r["reward"] for r in two] and [r["length"] for r in one] == [r["length"] for r in two]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two)) < 1e-5


@pytest.mark.parametrize("settings, words", [({"mixture": "counting=5,reading=5"}, "can't be practised"), ({"mixture": "identity=5"}, "can't be practised"),
                                             ({"mixture": "moon"}, "moon"), ({"mixture": ""}, "at least one"), ({"questions": 0}, "no group"), ({"samples": 1}, "no group"), ({"questions": 3, "processes": 2}, "3 questions")])
def test_what_cant_be_practised_says_so(demo_run, settings, words):
    with pytest.raises(UserError, match=words):
        launch(run_rl, RLConfig(**{**QUICK, **settings}), module="nanochat.rl")


def test_a_stage_of_the_pipeline_that_is_asked_for(demo_run):
    base = demo_run.path.parent.parent
    result = call_nanochat(base, "run", "--run", "demo", "--stages", "rl,eval,report")
    assert result.returncode == 0, result.stdout + result.stderr
    assert Run("demo").furthest() == "rl" and {r["source"] for r in demo_run.records("eval", "score")} == {"base", "mid", "sft", "rl"}
    report = (demo_run.path / "report.md").read_text()
    assert "counting, held out, one try" in report and (demo_run.path / "figures" / "rl.png").exists()


def test_gsm8k_from_end_to_end(demo_run, real_data):
    run_rl(RLConfig(**{**QUICK, "mixture": "gsm8k=20", "steps": 1, "samples": 2}))
    (step,) = demo_run.records("rl", "step")
    assert step["reward"] == 0 and step["length"] > 1 and demo_run.records("rl", "eval")[-1]["task"] == "gsm8k"
