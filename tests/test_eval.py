"""Accuracies against a straightforward implementation: one question at a time, no batches, no cache, no shared beginnings."""
import json
import re

import pytest
import torch
from conftest import call_nanochat, run_ranks

from nanochat.chat_eval import count_right, fit_prompt, score_choices, score_task, write_replies
from nanochat.common import UserError
from nanochat.conversation import check_messages, render_prompt
from nanochat.engine import Engine
from nanochat.evaluate import EvalConfig, run_evaluate
from nanochat.mixtures import TASKS, load_task
from nanochat.tasks import Example, Task, join_tasks
from nanochat.tools import calculate
from nanochat.train import launch, load_model

PUBLIC = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee", "simple_spelling")
LONGEST = 24  # tokens of a reply


def encode_question(tokenizer, example, converse, room):
    "The prompt, from the format's definition."
    if not converse and example.opening:
        ids = [tokenizer.bos, *tokenizer.encode(example.opening)]
    else:
        ids = [tokenizer.bos]
        for message in check_messages(example.question):
            assert message["role"] == "user"
            ids += [tokenizer.special["<|user_start|>"], *tokenizer.encode(message["content"]), tokenizer.special["<|user_end|>"]]
        ids += [tokenizer.special["<|assistant_start|>"]]
    return ids if len(ids) <= room else ids[:2] + ids[len(ids) - room + 2 :]


@torch.no_grad()
def reference_choice(model, tokenizer, example, converse):
    "The likeliest reply, one forward pass for each."
    plain, sums = not converse and example.opening, []
    for choice in example.choices:
        reply = tokenizer.encode(" " + choice if plain else choice)
        room = model.config.context - max(len(tokenizer.encode(" " + c if plain else c)) for c in example.choices)
        ids = encode_question(tokenizer, example, converse, room) + reply
        logs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        sums.append(sum(logs[-len(reply) - 1 + i, token].item() for i, token in enumerate(reply)))
    ranked = sorted(sums)
    return example.choices[sums.index(ranked[-1])], ranked[-1] - ranked[-2]


@torch.no_grad()
def reference_reply(model, tokenizer, example, converse):
    "The likeliest next token again and again, everything read anew each time."
    special, context = tokenizer.special, model.config.context
    ids = encode_question(tokenizer, example, converse, context - min(LONGEST, context // 2))
    written, forced, call = [], [], None
    while len(written) < LONGEST and len(ids) < context:
        token = forced[0] if forced else model(torch.tensor([ids]))[0, -1].argmax().item()
        if not forced and token in (tokenizer.bos, special["<|assistant_end|>"]):
            break
        forced = forced[1:]
        ids, written = [*ids, token], [*written, token]
        if token == special["<|python_start|>"]:
            call = []
        elif token == special["<|python_end|>"] and call is not None:
            result, call = calculate(tokenizer.decode(call)), None
            if result is not None:
                forced += [special["<|output_start|>"], *tokenizer.encode(result), special["<|output_end|>"]]
        elif call is not None:
            call.append(token)
    text = re.sub(r"<\|(python|output)_start\|>.*?(<\|\1_end\|>|$)", "", tokenizer.decode(written), flags=re.DOTALL)
    return (example.opening if not converse and example.opening else "") + re.sub(r"<\|\w+\|>", "", text)


@pytest.mark.parametrize("source", ["base", "sft"])
@pytest.mark.parametrize("name", [*TASKS, *PUBLIC])
def test_equal_to_one_question_at_a_time(demo_run, request, name, source):
    if name in PUBLIC[:5]:
        request.getfixturevalue("real_data")
    model, tokenizer, _ = load_model(demo_run, source)
    engine, task, converse = Engine(model, tokenizer), load_task(name, 50), source == "sft"
    if task.is_choice:
        expected, margins = zip(*(reference_choice(model, tokenizer, example, converse) for example in task))
        for batch in (1, 32):
            right = score_choices(engine, task, converse, batch)
            assert all(margin < 1e-4 or r == task.check(e, choice) for r, e, choice, margin in zip(right, task, expected, margins))
        return
    expected = [reference_reply(model, tokenizer, example, converse) for example in task]
    replies = [reply for (reply,) in write_replies(engine, list(task), max_tokens=LONGEST, converse=converse)]
    assert replies == expected
    counted = count_right(engine, task, max_tokens=LONGEST, converse=converse)
    assert counted == [int(task.check(e, reply)) for e, reply in zip(task, expected)]


def test_a_stretch_of_samples_is_what_it_is_among_all(demo_run):
    model, tokenizer, _ = load_model(demo_run, "sft")
    examples = list(load_task("counting", 12))
    settings = {"samples": 3, "temperature": 1.0, "max_tokens": 30}
    whole = write_replies(Engine(model, tokenizer), examples, **settings)
    assert whole[5:] == write_replies(Engine(model, tokenizer), examples[5:], first=5, **settings)
    assert len({reply for replies in whole for reply in replies}) > 12


RANKS = """
import json, os, sys, torch, torch.distributed as dist
from nanochat.chat_eval import score_task
from nanochat.common import get_ranks
from nanochat.engine import Engine
from nanochat.mixtures import load_task
from nanochat.run import Run
from nanochat.train import load_model, process_group

torch.set_num_threads(1)
with process_group(torch.device("cpu")) as ranks:
    model, tokenizer, _ = load_model(Run("demo"), "sft")
    scores = [score_task(Engine(model, tokenizer), load_task(name, 21), samples=samples, max_tokens=40, ranks=ranks)
              for name, samples in (("reading", 1), ("choice", 1), ("counting", 4), ("spelling", 1))]
    if ranks.is_main:
        print(json.dumps(scores))
"""


def test_two_ranks_equal_one(demo_run, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    one, two = (json.loads(run_ranks(count, script).strip().splitlines()[-1]) for count in (1, 2))
    assert one == two


def test_tasks_without_questions_or_answers(demo_run):
    model, tokenizer, _ = load_model(demo_run, "sft")
    for task, words in ((Task("empty", [], lambda e, r: True), "no questions"), (load_task("identity", 3), "no right answers")):
        with pytest.raises(UserError, match=words):
            score_task(Engine(model, tokenizer), task)
    with pytest.raises(UserError, match="mixes"):
        score_task(Engine(model, tokenizer), join_tasks([load_task("choice", 2), load_task("facts", 2)]))
    with pytest.raises(UserError, match="right answers"):
        run_evaluate(EvalConfig(run="demo", tasks="counting,identity", items=2))
    assert not [r for r in demo_run.records("eval", "score") if r["asked"]["items"] == 2], "something was computed before"


def test_a_prompt_longer_than_the_context_keeps_its_end(demo_run):
    model, tokenizer, _ = load_model(demo_run, "sft")
    engine, question, check = Engine(model, tokenizer), load_task("choice", 1)[0], load_task("choice", 1).check
    texts = ["blah " * count + question.question[0]["content"] for count in (3000, 4000)]
    long = [Example([{"role": "user", "content": text}, question.messages[1]], question.answer, question.choices) for text in texts]
    prompt = render_prompt(tokenizer, long[0].question)
    fitted = fit_prompt(engine, prompt, 20)
    assert len(fitted) == model.config.context - 20 and fitted[:2] == prompt[:2] and fitted[2:] == prompt[-len(fitted) + 2 :]
    one, other = (write_replies(engine, [Example(e.messages, e.answer)], max_tokens=20) for e in long)
    assert one == other, "what was cut off makes a difference"
    assert score_choices(engine, Task("long", long[:1], check)) == score_choices(engine, Task("longer", long[1:], check))
    assert score_task(engine, Task("long", long, check))["cut"] == 2


def test_scored_once_and_table_of_all_stages(demo_run, capsys):
    cfg = EvalConfig(run="demo", tasks="arithmetic,choice", items=6)
    run_evaluate(cfg)
    asked = [(r["source"], r["task"]) for r in demo_run.records("eval", "score") if r["asked"]["items"] == 6]
    assert asked == [(source, task) for source in ("base", "mid", "sft") for task in ("arithmetic", "choice")]
    before = demo_run.metrics.read_text()
    run_evaluate(cfg)
    assert demo_run.metrics.read_text() == before and "is complete" in capsys.readouterr().out
    result = call_nanochat(demo_run.path.parent.parent, "eval", "--tasks", "Arithmetic, choice", "--max-problems", "6")
    header, *rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in result.stdout.splitlines() if line.startswith("|")]
    assert header == ["task", "questions", "chance", "base", "mid", "sft"] and [row[0] for row in rows[1:]] == ["arithmetic", "choice", "mean above chance of 2"]
    assert demo_run.metrics.read_text() == before
    for arguments, count in ((["--seed", "3"], 2), (["--max-tokens", "5"], 2), ([], 0)):  # another examination is another table
        records = len(demo_run.records("eval", "score"))
        call_nanochat(demo_run.path.parent.parent, "eval", "--tasks", "arithmetic,choice", "--source", "sft", "--max-problems", "6", *arguments)
        assert len(demo_run.records("eval", "score")) == records + count
    default = call_nanochat(demo_run.path.parent.parent, "eval")
    assert "is complete" in default.stdout and "| 8         |" in default.stdout, "the stage's own examination"
    missing = call_nanochat(demo_run.path.parent.parent, "eval", "--source", "rl")
    assert missing.returncode == 2 and "--stages rl" in missing.stderr


def test_two_processes_write_what_one_writes(demo_run):
    settings = {"run": "demo", "sources": "sft", "tasks": "choice,counting,programs", "items": 7}
    run_evaluate(EvalConfig(**settings))
    launch(run_evaluate, EvalConfig(**settings, seed=1, processes=2), module="nanochat.evaluate")
    run_evaluate(EvalConfig(**settings, seed=1))
    mine = [r for r in demo_run.records("eval", "score") if r["asked"]["items"] == 7]
    assert [(r["task"], r["asked"]["seed"]) for r in mine] == [(task, seed) for seed in (0, 1) for task in ("choice", "counting", "programs")]


def test_bfloat16_is_nearly_the_same(demo_run):
    for precision in ("float32", "bfloat16"):
        run_evaluate(EvalConfig(run="demo", sources="sft", tasks="choice,counting", items=40, precision=precision))
    scores = {(r["task"], r["asked"]["precision"]): r["accuracy"] for r in demo_run.records("eval", "score") if r["asked"]["items"] == 40}
    assert len(scores) == 4 and all(abs(scores[task, "float32"] - scores[task, "bfloat16"]) <= 0.1 for task in ("choice", "counting"))
    with pytest.raises(UserError, match="float8"):
        run_evaluate(EvalConfig(run="demo", sources="sft", tasks="choice", items=3, precision="float8"))


def test_interrupted_it_goes_on_with_the_next_task(demo_run, monkeypatch):
    import nanochat.evaluate as evaluate

    cfg, ask = EvalConfig(run="demo", sources="sft", tasks="facts,counting,arithmetic", items=4), evaluate.ask_model

    def interrupted(engine, name, *rest):
        if name == "counting":
            raise KeyboardInterrupt
        return ask(engine, name, *rest)
    monkeypatch.setattr(evaluate, "estimate_exam", lambda *_: 0.0)
    monkeypatch.setattr(evaluate, "ask_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(cfg)
    names = []
    monkeypatch.setattr(evaluate, "ask_model", lambda engine, name, *rest: (names.append(name), ask(engine, name, *rest))[1])
    run_evaluate(cfg)
    assert names == ["counting", "arithmetic"]


def test_core_and_public_tasks_on_the_command_line(demo_run, real_data):
    base = demo_run.path.parent.parent
    result = call_nanochat(base, "eval", "--source", "base", "--tasks", "core,arc_easy,gsm8k,humaneval", "--max-per-task", "12")
    assert result.returncode == 0, result.stderr
    assert "| partial score over 18 of 22 tasks |" in result.stdout and "CORE of GPT-2" in result.stdout
    assert len(demo_run.records("eval", "core")) == 18
    assert {r["task"] for r in demo_run.records("eval", "score")} >= {"arc_easy", "gsm8k", "humaneval"}
    few = call_nanochat(base, "eval", "--source", "base", "--tasks", "core", "--max-per-task", "5")
    assert few.returncode == 2 and "--max-per-task 11" in few.stderr and few.stderr.count("\n") == 1, few.stderr
    report = call_nanochat(base, "report")
    assert report.returncode == 0 and (demo_run.path / "figures" / "core.png").exists()
    assert "partial score over 18 of 22 tasks" in (demo_run.path / "report.md").read_text()


def test_core_that_is_not_there_names_the_command(demo_run):
    result = call_nanochat(demo_run.path.parent.parent, "eval", "--tasks", "core", environment={"NANOCHAT_TEST_DATA": ""})
    assert result.returncode == 2 and "nanochat fetch core" in result.stderr and result.stderr.count("\n") == 1
