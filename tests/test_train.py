"""The loop over processes and through kills: the same run, whatever happens to it."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat.checkpoint import latest_checkpoint, load_checkpoint
from nanochat.common import UserError
from nanochat.pretrain import BaseConfig, run_pretrain
from nanochat.run import Run, make_config
from nanochat.train import launch
from nanochat.train_tokenizer import TokenizerConfig, run_tokenizer

QUICK = {"tokens": 40_960, "batch_tokens": 2048, "context": 64, "device_rows": 32, "precision": "float32", "sample_every": 0, "save_every": 4, "eval_every": 10}


@pytest.fixture
def base(tmp_path, monkeypatch):
    "A base directory of the test's own, with a tokenizer in the runs that are asked for."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PROGRESS", "lines")

    def make(name, **settings):
        run_tokenizer(make_config(TokenizerConfig, "demo", run=name))
        return make_config(BaseConfig, "demo", run=name, **{**QUICK, **settings})
    return make


def weights(name):
    return load_checkpoint(latest_checkpoint(Run(name).path / "base"))[0]


def losses(name):
    return {r["step"]: r["loss"] for r in Run(name).records("base", "step")}


def test_two_ranks_equal_one(base):
    launch(run_pretrain, base("one"), module="nanochat.pretrain")
    launch(run_pretrain, base("two", processes=2, device_rows=16), module="nanochat.pretrain")
    one, two = losses("one"), losses("two")
    assert one.keys() == two.keys() == set(range(1, 21))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    assert abs(Run("one").records("base", "summary")[0]["result"] - Run("two").records("base", "summary")[0]["result"]) < 1e-5


def test_accumulation_equals_one_large_batch(base):
    run_pretrain(base("large"))
    run_pretrain(base("small", device_rows=8))
    large, small = losses("large"), losses("small")
    assert max(abs(large[step] - small[step]) for step in large) < 1e-5


def start(cfg):
    "The stage in a process of its own."
    code = "import json, sys; from nanochat.pretrain import *; run_pretrain(BaseConfig(**json.loads(sys.argv[1])))"
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(vars(cfg))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(name, step, process):
    for _ in range(600):
        if len(losses(name)) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"never reached step {step}")


def test_killed_and_started_again_is_the_same_run(base):
    run_pretrain(base("whole", tokens=81_920))
    cfg = base("killed", tokens=81_920)
    for step in (6, 15):
        process = start(cfg)
        wait_for_step("killed", step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_pretrain(cfg)
    assert list(losses("killed")) == list(range(1, 41))
    assert losses("killed") == losses("whole")
    assert all(torch.equal(a, b) for a, b in zip(weights("whole").values(), weights("killed").values()))


def test_sigterm_saves_and_exits(base):
    cfg = base("terminated", tokens=2_048_000, save_every=1000)
    process = start(cfg)
    wait_for_step("terminated", 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "goes on from here" in output
    assert latest_checkpoint(Run("terminated").path / "base").name == f"step_{max(losses('terminated')):06d}"


def test_a_complete_stage_is_not_run_again(base, capsys):
    cfg = base("twice")
    run_pretrain(cfg)
    before = Run("twice").metrics.read_text()
    run_pretrain(cfg)
    assert Run("twice").metrics.read_text() == before
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="depth=2.*depth=3"):
        run_pretrain(base("twice", depth=3))


@pytest.mark.parametrize("settings, message", [
    ({"width": 63}, "63"), ({"heads": 3}, "3"), ({"batch_tokens": 1000}, "--set base.batch_tokens=2048"), ({"batch_tokens": 2048 * 3, "device_rows": 64}, "--set base.device_rows=48"),
    ({"corpus": "moon"}, "moon"),
])
def test_bad_settings_get_one_sentence(base, settings, message):
    with pytest.raises(UserError, match=message):
        run_pretrain(base("bad", **settings))


def test_another_tokenizer_is_refused(base):
    from nanochat.train import load_model

    run_pretrain(base("mixed", tokens=4096))
    other = base("other")
    run_tokenizer(make_config(TokenizerConfig, "demo", run="different", vocab_size=300))
    tokenizer = Run("mixed").path / "tokenizer"
    for file in (Run("different").path / "tokenizer").iterdir():
        (tokenizer / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="another tokenizer"):
        load_model(Run("mixed"), "base")
    assert other.run == "other"


def test_errors_of_a_rank_reach_the_caller(base):
    with pytest.raises(UserError, match="batch_tokens"):
        launch(run_pretrain, base("failing", processes=2, batch_tokens=1000), module="nanochat.pretrain")
