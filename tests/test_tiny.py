"""The model that `make run` pretrains, in half as many steps: it is good, and another implementation computes the same."""
import os
import subprocess

import pytest
import torch
from conftest import NANOCHAT
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat.engine import Engine
from nanochat.export import export_hf, import_model
from nanochat.run import Run
from nanochat.tinyworld import write_documents
from nanochat.train import load_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "The base model of the tiny preset after half of its tokens: a minute on a free core."
    base = tmp_path_factory.mktemp("tiny")
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    done = subprocess.run([NANOCHAT, "run", "--preset", "tiny", "--stages", "tokenizer,base", "--set", "base.tokens=1248000"], env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return base


@pytest.fixture
def run(tiny, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny))
    return Run("tiny")


def test_it_comes_near_the_floor(run):
    summary = run.records("base", "summary")[-1]
    assert summary["floor"] < summary["result"] < 1.38 * summary["floor"]  # 1.29 times on the machine seen so far; 1.13 times after all tokens


def test_transformers_computes_the_same_and_nothing_is_lost_on_the_way_back(run, tmp_path):
    model, tokenizer, _ = load_model(run, "base")
    folder = export_hf(run, tmp_path / "hf", "base")
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        for _, document in zip(range(40), write_documents(seed=9)):
            ids = [tokenizer.bos, *tokenizer.encode(document.text)][:200]
            assert their_tokenizer(document.text)["input_ids"][:199] == ids[1:]
            assert (model(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-5  # 4e-6 is usual
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in ("Once there was", "The", "What is 3 + 4?")]
    for prompt, reply in zip(prompts, Engine(model, tokenizer).complete(prompts, 40, 0.0, tools=False)):
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert written[: len(reply.tokens)] == reply.tokens
    import_model(Run("back"), folder, "base")
    back = load_model(Run("back"), "base")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))
