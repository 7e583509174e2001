"""The report: made from metrics.jsonl alone, of runs in any state."""
import json
import re

import pytest

from nanochat.common import UserError
from nanochat.report import (
    active_seconds,
    best_known,
    compose_report,
    describe_costs,
    describe_missing,
    describe_progress,
    describe_stages,
    make_report,
    quote,
    table,
)
from nanochat.run import Run

NAN = float("nan")


def config(stage, time, **more):
    settings = {"run": "r", "preset": "small", **({"corpus": "folder:/texts"} if stage in ("tokenizer", "base") else {})}
    model = {"depth": 6, "width": 256, "heads": 4, "kv_heads": 4, "context": 256}
    return {"stage": stage, "kind": "config", "time": time, "settings": settings, "params": 5_000_000, "steps": 40, "ranks": 2,
            "flops_per_token": 3e7, "floor": None, "model": model, **more}


def environment(stage, time, **more):
    return {"stage": stage, "kind": "environment", "time": time, "device": "cpu", "device_name": "x86", "cores": 8, "threads": 8, "python": "3.12.0",
            "torch": "2.9", "system": "Linux", "peak_flops": 1e12, **more}


def stage(name, start, steps=40, done=True, loss=2.0, bpb=1.0, mfu=0.5):
    "Records of one training stage, a step a second."
    yield environment(name, start)
    yield config(name, start)
    for step in range(1, steps + 1):
        yield {"stage": name, "kind": "step", "time": start + step, "step": step, "tokens": 1000 * step, "loss": loss, "lr_scale": 1.0, "mfu": mfu,
               "tokens_per_second": 1000.0, "epoch": 0, "seconds": float(step), "grad_norm": 1.0}
        if step % 10 == 0:
            yield {"stage": name, "kind": "eval", "time": start + step, "step": step, "tokens": 1000 * step, "bpb": bpb, "seconds": float(step)}
            yield {"stage": name, "kind": "sample", "time": start + step, "step": step, "prompt": "The", "text": f"The text of {name} at {step}"}
    if done:
        yield {"stage": name, "kind": "summary", "time": start + steps + 2, "step": steps, "bpb": bpb, "seconds": float(steps), "memory": 2e9}


def score(task, source, accuracy, count=100, checkpoint=40, chance=0.0):
    return {"stage": "eval", "kind": "score", "time": 500.0, "source": source, "checkpoint": checkpoint, "task": task, "accuracy": accuracy,
            "low": max(0, accuracy - 0.1), "high": min(1, accuracy + 0.1), "chance": chance, "count": count}


def tokenizer():
    yield {"stage": "tokenizer", "kind": "data", "time": 0.0, "corpus": "folder:/texts", "shards": 3, "floor": None}
    yield config("tokenizer", 0.0)
    yield {"stage": "tokenizer", "kind": "summary", "time": 5.0, "vocab_size": 2048, "bytes_per_token": 3.5, "seconds": 5.0}


def evaluation(*scores):
    return [config("eval", 400.0), *scores, {"stage": "eval", "kind": "summary", "time": 430.0, "seconds": 30.0}]


WHOLE = [*tokenizer(), *stage("base", 10.0), *stage("mid", 100.0), *stage("sft", 200.0),
         *evaluation(score("reading", "base", 0.25, chance=0.25), score("reading", "sft", 0.85, chance=0.25), score("spelling", "sft", 0.4))]
STATES = {"tokenizer begun": WHOLE[:2], "tokenizer done": WHOLE[:3], "before the first step": WHOLE[:5], "one step": WHOLE[:6],
          "within base": WHOLE[:30], "base done": [r for r in WHOLE if r["stage"] in ("tokenizer", "base")],
          "evaluation cut": WHOLE[:-3], "whole": WHOLE, "only scores": [r for r in WHOLE if r["stage"] == "eval"],
          "diverged": [*tokenizer(), *stage("base", 10.0, loss=NAN, bpb=NAN)], "unknown peak": [*tokenizer(), *stage("base", 10.0, mfu=NAN)]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return Run("r")


def save(run, records):
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_report(run, state):
    save(run, STATES[state])
    text = make_report(run).read_text()
    assert text.startswith("# Report of run r\n") and "nan" not in text.replace("nanochat", "") and "None" not in text
    for image in re.findall(r"\]\((.+?\.png)\)", text):
        assert (run.path / image).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^## ", text, re.M)) == len(set(re.findall(r"^## .+", text, re.M)))
    assert make_report(run).read_text() == text, "made twice, it differs"


def test_a_diverged_run_says_so(run):
    save(run, STATES["diverged"])
    assert make_report(run).read_text().count("diverged") == 3, "in the summary, and twice in the table"


def test_a_finished_report_has_every_section(run):
    save(run, WHOLE)
    text = make_report(run).read_text()
    assert re.findall(r"^## (.+)", text, re.M) == ["Set-up", "Stages", "Time and cost", "Curves", "Scores", "Samples"]
    assert re.findall(r"^### (.+)", text, re.M) == ["base", "mid", "sft"]
    assert "Not finished" not in text and "85% (75% to 95%)" in text
    assert "text of sft at 40" in text and "at 30" not in text, "samples are those of the last time"
    assert sorted(p.name for p in (run.path / "figures").iterdir()) == ["base.png", "mid.png", "scores.png", "sft.png"]


def test_nothing_recorded_is_a_mistake_with_a_remedy(run):
    with pytest.raises(UserError, match="nanochat run --run r"):
        make_report(run)


def test_what_is_missing_and_how_to_go_on():
    text = describe_missing("r", STATES["within base"])
    assert "base is at step" in text and "mid has not begun" in text
    assert "`nanochat run --preset small --run r --corpus folder:/texts`" in text
    assert describe_missing("r", WHOLE) == ""


def test_costs():
    text = describe_costs(WHOLE)
    base = next(line for line in text.splitlines() if line.startswith("| base"))
    assert "42.0 s" in base and "40.0 s" in base and "50%" in base and "2.0 GB" in base
    assert "1.2T" in base, "40,000 tokens of 3e7 FLOP"
    assert f"{42 / 3600 * 2:.2f}" in base, "two ranks, so two device hours an hour"
    assert "3.6T" in text.splitlines()[-1], "three stages together"


def test_a_pause_is_no_work():
    first, again = list(stage("base", 0.0, steps=20, done=False)), list(stage("base", 90_000.0))
    resumed = [*first, again[0], *[r for r in again if r.get("step", 0) > 20]]
    assert active_seconds(resumed, "base") == 20 + 42
    assert "| 2 |" in describe_stages([config("base", 0.0), *resumed]), "a stage with two starts says so"


def test_a_quick_look_does_not_replace_a_score():
    known = score("reading", "sft", 0.8)
    assert best_known([known, score("reading", "sft", 1.0, count=5)])["reading", "sft"] == known
    again = score("reading", "sft", 0.7)
    assert best_known([known, again])["reading", "sft"] == again, "of two equal ones the later"
    trained_on = score("reading", "sft", 0.6, count=50, checkpoint=80)
    assert best_known([known, trained_on])["reading", "sft"] == trained_on, "of a newer model"


@pytest.mark.parametrize("text", ["# a heading", "| a | b |", "*stars* and _lines_", "`code`", "<b>tag</b> & more", "[a](b)", "two\n\nparagraphs", "$x$", ""])
def test_samples_are_shown_literally(text):
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(quote(text))
    assert not {t.type for t in tokens} & {"heading_open", "table_open", "fence", "html_block"}
    inner = [child for t in tokens if t.type == "inline" for child in t.children]
    assert {child.type for child in inner} <= {"text", "softbreak", "hardbreak", "text_special"}
    assert "".join(child.content for child in inner) == (text.replace("\n", "") or "(nothing)")


def test_cells_of_a_table_stay_cells():
    assert table(["a", "b", "empty"], [["x|y", 1, None], ["", NAN, ""]]).splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | 1 |", "|  |  |"]
    assert table(["a"], []) == ""


def test_two_machines_are_both_named():
    records = [*tokenizer(), environment("base", 1.0), environment("base", 9.0, device_name="other"), config("base", 1.0)]
    assert compose_report("r", records, []).count("| machine |") == 2


def test_progress_in_words():
    records = list(stage("base", 0, steps=10, done=False))
    assert describe_progress([], 0) == "nothing yet" and describe_progress(records[:2], 0) == "base has begun"
    line = describe_progress(records, records[-1]["time"] + 1)
    assert line == "base, step 10 of 40, loss 2.000, 1.0K tokens a second, 30.0 s left"
    assert describe_progress(records, records[-1]["time"] + 100) == f"{line}; last heard of 1 min 40 s ago"
    assert describe_progress([*records, {"stage": "base", "kind": "summary", "time": 0}], 0) == "base is done"
    assert "reward 0.250" in describe_progress([config("rl", 0), {"stage": "rl", "kind": "step", "time": 1, "step": 1, "reward": 0.25, "tokens_per_second": 5.0, "seconds": 1.0}], 0)
