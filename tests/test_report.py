"""Reports of runs whose metrics we write ourselves: whole, unfinished, and with things missing."""
import re

import pytest

from nanochat.common import UserError
from nanochat.report import ReportConfig, make_report, run_report, stage_row, surest_scores, table
from nanochat.run import Run

MODEL = {"depth": 2, "width": 64, "heads": 2, "context": 256}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return Run("made")


def log_training(run, stage, steps=4, finished=True, floor=0.5):
    run.log(stage, "config", settings={}, model=MODEL, params=163_800, steps=4, flops_per_token=1e6, floor=floor)
    for step in range(1, steps + 1):
        run.log(stage, "step", step=step, tokens=step * 1000, loss=5.0 - step, tokens_per_second=step * 100, mfu=step / 10, seconds=step * 2.0)
        run.log(stage, "eval", step=step, tokens=step * 1000, bpb=3.0 - step / 2)
        run.log(stage, "sample", step=step, prompt="Once", text=f"Once, at step {step}\nof {stage}")
    if finished:
        run.log(stage, "summary", step=steps, bpb=1.0, seconds=9.0, tokens=4000, memory=5_000_000, floor=floor)


def log_score(run, source, accuracy, count=100, task="reading", checkpoint=4):
    run.log("eval", "score", source=source, checkpoint=checkpoint, task=task, accuracy=accuracy, low=max(0, accuracy - 0.1),
            high=min(1, accuracy + 0.1), count=count, chance=0.25)


def section(text, title):
    return re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", text, re.S)[1]


def rows(text):
    "Cells of a Markdown table's rows."
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_whole_run(run):
    run.log("base", "environment", device_name="chip", device="cpu", cores=2, peak_flops=80e9, python="3.11", torch="2.6", system="Linux")
    run.log("tokenizer", "config", settings={})
    run.log("tokenizer", "data", corpus="tinyworld", shards=4, floor=0.28)
    run.log("tokenizer", "summary", vocab_size=2048, bytes_per_token=3.456, seconds=1.5)
    for stage in ("base", "mid", "sft"):
        log_training(run, stage, floor=0.5 if stage == "base" else None)
    for source, accuracy in (("base", 0.25), ("mid", 0.7), ("sft", 0.8)):
        log_score(run, source, accuracy)
    run.log("eval", "config", settings={})
    run.log("eval", "summary", sources=["base", "mid", "sft"], seconds=3.0)
    text = run_report(ReportConfig(run="made")).read_text()
    assert "Not finished" not in text and "2,048 tokens, 3.46 bytes each" in text and "entropy 0.2800" in text
    stages = {row[0]: row[1:] for row in rows(section(text, "Stages"))}
    assert stages["base"] == ["9.0 s", "4.0K", "4.0e+09", "250", "25%", "5.0 MB", "1.000", "1.0000"]
    assert stages["total"][:3] == ["31.5 s", "", "1.2e+10"] and "report" not in stages
    assert rows(section(text, "Scores"))[2:] == [["reading", "100", "25%", "25% (15% to 35%)", "70% (60% to 80%)", "80% (70% to 90%)"]]
    assert "Once, at step 4\n> of sft" in text and "step 3" not in text
    for image in re.findall(r"!\[\w+\]\((.+)\)", text):
        assert (run.path / image).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"!\[", text)) == 4 and run.stage_done("report")


def test_made_again_it_is_the_same_and_records_nothing(run):
    log_training(run, "base")
    first = run_report(ReportConfig(run="made")).read_text()
    records = run.metrics.read_text()
    assert run_report(ReportConfig(run="made")).read_text() == first and run.metrics.read_text() == records


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_unfinished_run(run, steps):
    log_training(run, "base", steps=steps, finished=False)
    text = make_report(run).read_text()
    assert "Not finished: tokenizer, base, mid, sft, eval. Go on with: nanochat run --run made" in text
    assert f"| base (unfinished) | {2.0 * steps:.1f} s |" in text
    assert ("figures/base.png" in text) == (steps > 0)
    assert "## Scores" not in text


def test_a_run_with_nothing_in_it(run):
    assert make_report(run).read_text().startswith("# Report of run made\n")
    assert stage_row(run, "base") == {}


def test_a_half_written_last_line_is_no_obstacle(run):
    log_training(run, "base")
    with open(run.metrics, "a") as file:
        file.write('{"stage": "base", "kind": "st')
    assert "9.0 s" in make_report(run).read_text()


def test_a_quick_look_does_not_replace_a_sure_score(run):
    log_score(run, "sft", 0.8, count=100)
    log_score(run, "sft", 0.3, count=5)
    assert surest_scores(run)["reading", "sft"]["accuracy"] == 0.8
    log_score(run, "sft", 0.9, count=50, checkpoint=8)  # trained on since
    assert surest_scores(run)["reading", "sft"]["accuracy"] == 0.9


def test_a_task_that_only_one_model_was_asked(run):
    log_score(run, "base", 0.2)
    log_score(run, "sft", 0.8)
    log_score(run, "sft", 0.5, task="spelling")
    assert rows(make_report(run).read_text())[-1] == ["spelling", "100", "25%", "", "50% (40% to 60%)"]


def test_a_bar_does_not_break_a_table():
    assert table(["a"], [["x|y"]]).splitlines()[2] == "| x\\|y |"


def test_without_a_run_it_says_what_makes_one(run):
    with pytest.raises(UserError, match="nanochat run --preset tiny"):
        run_report(ReportConfig(run="made"))
