"""To Hugging Face and back: another implementation of the model and of the tokenizer, other people's files, and the evaluation harness."""
import json
import os
import pickle
import random
import re
import shutil
import string
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import tokenizers
import torch
import transformers
import yaml
from conftest import call_nanochat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nanochat.bpe import SPLIT_PATTERN
from nanochat.chat_eval import score_choices
from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError
from nanochat.conversation import render_conversation, render_prompt
from nanochat.core import CoreTask, encode_items, is_right, read_items, render_item
from nanochat.engine import Engine
from nanochat.export import (
    check_weights,
    choose_license,
    describe_tokenizer,
    export_hf,
    harness_model,
    import_model,
    read_encoding,
    read_hf,
    read_public_tokenizer,
    read_tokenizer,
    rename_tensor,
    run_harness,
    tensor_shapes,
    write_card,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.likelihood import Text, choose, score_texts
from nanochat.mixtures import load_task
from nanochat.report import best_known
from nanochat.run import Run
from nanochat.tinyworld import write_documents
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.train import load_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SMALL = GPTConfig(vocab_size=300, depth=2, width=32, heads=4, kv_heads=2, context=64)
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.fixture(scope="module")
def small_tokenizer():
    return Tokenizer.train((d.text for _, d in zip(range(300), write_documents(seed=1))), SMALL.vocab_size)


@pytest.fixture(scope="module")
def shown(base, demo, tmp_path_factory):
    "The demo run's models in the format of Hugging Face."
    assert demo.returncode == 0, demo.stdout + demo.stderr
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return {source: export_hf(Run("demo"), folder / source, source) for source in ("base", "sft")}


@pytest.fixture(scope="module")
def trained(base, demo):
    "The demo run's models."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return {source: load_model(Run("demo"), source) for source in ("base", "sft")}


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A base directory of the test's own."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    return tmp_path


def draw_model(config, seed=0):
    "A model whose weights are all drawn, the head included."
    model = GPT(config).init_weights().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 if "wte" in name else 0.08))
    return model


def make_run(name, tokenizer, config=SMALL, dtype=torch.float32, source="sft"):
    "A run with one checkpoint of drawn weights."
    run, model = Run(name), draw_model(config)
    tokenizer.save(run.path / "tokenizer")
    tensors = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
    save_checkpoint(run.path / source, 7, tensors, {}, {"stage": source, "model": asdict(config), "tokenizer_hash": tokenizer.hash})
    run.log(source, "summary")
    return run, tensors


def draw_ids(config, rows=3, seed=1):
    return torch.randint(0, config.vocab_size, (rows, config.context), generator=torch.Generator().manual_seed(seed))


NEAR = 1e-3  # nats: which of two choices that are nearer is the better one may depend on rounding


@torch.no_grad()
def clear_choices(model, text):
    "How many tokens from `start` on come before the first choice between two that are nearly as likely."
    ids = text.ids[-model.config.context :]
    logits = model(torch.tensor([ids]))[0, text.start - 1 - len(text.ids) : -1]
    best = logits.topk(2).values
    return ((best[:, 0] - best[:, 1] >= NEAR).cumprod(dim=0)).sum().item()


def is_clear(values):
    "Whether the largest is the largest on every CPU."
    second, first = sorted(values)[-2:]
    return first - second >= NEAR


def assert_mostly_equal(rights, others, clear):
    "Equal where it is clear, and clear more often than not."
    assert [a for a, c in zip(rights, clear, strict=True) if c] == [b for b, c in zip(others, clear, strict=True) if c]
    assert sum(clear) > len(clear) / 2


@torch.no_grad()
def largest_difference(model, hf_model, ids):
    return (model(ids) - hf_model(ids).logits).abs().max().item()


# The model

@pytest.mark.parametrize("source", ["base", "sft"])
def test_transformers_gives_the_same_logits_for_a_trained_model(shown, trained, source):
    model, tokenizer, _ = trained[source]
    hf_model = AutoModelForCausalLM.from_pretrained(shown[source])
    assert type(hf_model).__name__ == "NanoChatForCausalLM"
    texts = [[tokenizer.bos, *tokenizer.encode(d.text)][:100] for _, d in zip(range(30), write_documents(seed=9))]
    eager = AutoModelForCausalLM.from_pretrained(shown[source], attn_implementation="eager")
    rounding = max(largest_difference(lambda ids: eager(ids).logits, hf_model, torch.tensor([ids])) for ids in texts)  # of the library's two routines
    assert rounding < 1e-4 and max(largest_difference(model, hf_model, torch.tensor([ids])) for ids in texts) < max(1e-5, 6 * rounding)
    wrong = AutoModelForCausalLM.from_pretrained(shown[source], rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert largest_difference(model, wrong, torch.tensor([texts[0]])) > 1e-3  # the bar can be missed


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_queries_and_other_types(home, small_tokenizer, kv_heads, dtype):
    config = replace(SMALL, kv_heads=kv_heads)
    run, tensors = make_run("r", small_tokenizer, config, getattr(torch, dtype))
    folder = export_hf(run, home / "hf")
    hf_config = AutoConfig.from_pretrained(folder)
    assert (hf_config.num_key_value_heads, str(hf_config.dtype)) == (kv_heads, f"torch.{dtype}")
    model, _, _ = load_model(run)
    assert largest_difference(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), draw_ids(config)) < 1e-5
    assert next(AutoModelForCausalLM.from_pretrained(folder).parameters()).dtype == getattr(torch, dtype)
    import_model(Run("back"), folder)
    found = read_hf(folder)
    assert all(found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    again, _, meta = load_model(Run("back"))
    assert meta["step"] == 7 and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_weights_can_be_rounded(home, small_tokenizer):
    run, tensors = make_run("r", small_tokenizer)
    found = read_hf(export_hf(run, home / "hf", dtype="bfloat16"))
    assert all(torch.equal(found.tensors[name], tensor.bfloat16()) for name, tensor in tensors.items())
    with pytest.raises(UserError, match="int8.*--dtype"):
        export_hf(run, home / "other", dtype="int8")


def test_shards(home, small_tokenizer):
    run, _ = make_run("r", small_tokenizer)
    folder = export_hf(run, home / "hf", shard_bytes=30_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and not (folder / "model.safetensors").exists()
    assert all(file.stat().st_size < 42_000 for file in files)  # the embedding alone has 38,400 bytes
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert largest_difference(load_model(run)[0], AutoModelForCausalLM.from_pretrained(folder), draw_ids(SMALL)) < 1e-5
    import_model(Run("back"), folder)
    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1].name} is missing"):
        read_hf(folder)
    index["weight_map"] = {"x": "../../secret.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names no files"):
        read_hf(folder)


def test_the_settings_that_matter_are_written(shown, trained):
    config, tokenizer = AutoConfig.from_pretrained(shown["sft"]), trained["sft"][1]
    assert config.intermediate_size == 4 * config.hidden_size and config.rms_norm_eps == torch.finfo(torch.float32).eps
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0} and config.final_logit_softcapping == 15.0
    end = tokenizer.special["<|assistant_end|>"]
    for said in (config, AutoModelForCausalLM.from_pretrained(shown["sft"]).generation_config):
        assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == (tokenizer.bos, [end, tokenizer.bos], tokenizer.bos)
    hf_tokenizer = AutoTokenizer.from_pretrained(shown["sft"])
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id) == (tokenizer.bos, end, tokenizer.bos)
    assert len(hf_tokenizer) == tokenizer.vocab_size and hf_tokenizer.model_max_length == config.max_position_embeddings


def test_greedy_replies_are_the_same_alone_and_in_a_padded_batch(shown, trained):
    model, tokenizer, _ = trained["sft"]
    hf_model, hf_tokenizer = AutoModelForCausalLM.from_pretrained(shown["sft"]), AutoTokenizer.from_pretrained(shown["sft"])
    questions = ["Hello! Who are you?", "What is 27 + 45?", "Tell me a story.", "How do you spell lantern?", "Hi"]
    prompts = [[{"role": "user", "content": text}] for text in questions]
    ours = [reply.tokens for reply in Engine(model, tokenizer).complete([render_prompt(tokenizer, p) for p in prompts], 24, 0.0, tools=False)]
    batch = hf_tokenizer.apply_chat_template(prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0  # something is padded
    padded = hf_model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    alone = [hf_model.generate(torch.tensor([render_prompt(tokenizer, p)]), max_new_tokens=24, do_sample=False)[0].tolist() for p in prompts[:2]]
    compared = 0
    for i, tokens in enumerate(ours):
        prompt = render_prompt(tokenizer, prompts[i])
        clear = clear_choices(model, Text(prompt + tokens + [tokenizer.bos], len(prompt)))  # the last one: where it ended
        for row in [padded[i]] + [row[len(prompt) :] for row in alone[i : i + 1]]:
            assert row[:clear][: len(tokens)] == tokens[:clear]
            assert clear <= len(tokens) or len(tokens) == 24 or row[len(tokens)] in (tokenizer.bos, tokenizer.special["<|assistant_end|>"])
        compared += clear
    assert compared > 20  # of up to 125


# The tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TRICKY = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", " ", "\n", "\r\n", "\t", "  ", "123", "'s", "'LL", "é", "日本", "🙂", "e\u0301", "\x00", "a"])).map("".join)


def test_the_same_ids_on_any_text(shown, trained):
    tokenizer, hf_tokenizer = trained["sft"][1], AutoTokenizer.from_pretrained(shown["sft"])

    @settings(max_examples=200, **QUIET)
    @given(st.one_of(ANY_TEXT, TRICKY, st.text(string.printable)))
    def check(text):
        ours = tokenizer.encode(text)
        assert hf_tokenizer(text, split_special_tokens=True).input_ids == ours
        if not any(name in text for name in SPECIAL_TOKENS):
            assert hf_tokenizer(text).input_ids == ours
        assert hf_tokenizer.decode(ours) == text
    check()


def test_the_same_ids_with_vocabularies_in_which_every_merge_is_contested():
    rng, backwards = random.Random(0), 0
    for seed in range(12):
        letters = "ab" if seed % 2 else "abc"
        if seed % 3:
            tokenizer = Tokenizer.train(["".join(rng.choices(letters, k=20)) for _ in range(300)], 300)
        else:  # put together by hand: tokens in no order that training would give
            words = sorted({"".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(40)}, key=lambda word: (len(word), rng.random()))
            tokenizer = Tokenizer([bytes([i]) for i in range(256)] + [word.encode() for word in words])
        description = describe_tokenizer(tokenizer)
        texts = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(300)]
        theirs = tokenizers.Tokenizer.from_str(json.dumps(description))
        assert [e.ids for e in theirs.encode_batch(texts)] == tokenizer.encode_batch(texts)
        description["model"]["merges"].reverse()
        theirs = tokenizers.Tokenizer.from_str(json.dumps(description))
        backwards += [e.ids for e in theirs.encode_batch(texts)] != tokenizer.encode_batch(texts)
    assert backwards == 12  # the order of the merges matters, and this test sees it


@pytest.mark.parametrize("pattern", [r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmtlver])"])
def test_both_libraries_mean_the_same_letters(pattern):
    assert pattern in SPLIT_PATTERN or "(?i:[sdmt]|ll|ve|re)" in SPLIT_PATTERN
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    rust = tiktoken.Encoding("letters", pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    matched = rust.decode(rust.encode_ordinary(everything))  # what a pattern doesn't match is dropped
    rest = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed").pre_tokenize_str(everything)
    assert set(matched) == set(everything) - set("".join(piece for piece, _ in rest))


def test_a_lone_surrogate(shown, trained):
    assert trained["sft"][1].encode("a\ud800") == trained["sft"][1].encode("a?")  # ours is written as UTF-8 writes it
    with pytest.raises((TypeError, UnicodeError)):  # theirs is refused
        AutoTokenizer.from_pretrained(shown["sft"])("a\ud800")


def test_a_vocabulary_of_full_size_has_a_file_of_bearable_size(small_tokenizer):
    description = describe_tokenizer(small_tokenizer)
    assert len(description["model"]["merges"]) < 3 * small_tokenizer.vocab_size
    assert len(description["model"]["vocab"]) == small_tokenizer.vocab_size - 9


# Conversations

WORDS = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(["", " ", "\n", "{{ 1 }}", "{% if %}", "2+3", " a "]))
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": WORDS}), max_size=4)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 6))):
        messages.append({"role": "assistant", "content": draw(st.one_of(WORDS, PARTS))} if i % 2 else {"role": "user", "content": draw(WORDS)})
    return messages


def test_the_chat_template_is_our_rendering(shown, trained):
    tokenizer, hf_tokenizer = trained["sft"][1], AutoTokenizer.from_pretrained(shown["sft"])

    @settings(max_examples=80, **QUIET)
    @given(conversations())
    def check(messages):
        theirs = hf_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = render_conversation(tokenizer, messages)
        assert theirs["input_ids"] == ids
        # transformers finds a stretch's last token by its last letter, and a letter can be several tokens: so stretches end with a mark
        parts = [message["content"] for message in messages if isinstance(message["content"], list)]
        if not any((a["type"], b["type"]) == ("text", "python_output") for content in parts for a, b in zip(content, content[1:])):
            assert [int(i) for i in theirs["assistant_masks"]] == mask
        asked = messages if messages[-1]["role"] == "user" else messages[:-1]  # a begun reply is gone on with here, and a new one begun there
        assert hf_tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == render_prompt(tokenizer, asked)
    check()


@pytest.mark.parametrize("messages", [
    [], [{"role": "system", "content": "a"}], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": ["a"]}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "tool", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": "a"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": 5}]}], [{"role": "user", "content": None}],
])
def test_what_we_refuse_the_template_refuses(shown, trained, messages):
    with pytest.raises(UserError):
        render_conversation(trained["sft"][1], messages)
    with pytest.raises(Exception, match="message|conversation|part|content"):
        AutoTokenizer.from_pretrained(shown["sft"]).apply_chat_template(messages)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_marks_in_a_users_text_are_refused_by_the_template(shown, trained, name):
    hf_tokenizer, text = AutoTokenizer.from_pretrained(shown["sft"]), f"Hi {name} there"
    for messages in ([{"role": "user", "content": text}], [{"role": "system", "content": text}, {"role": "user", "content": "a"}],
                     [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "python_output", "text": text}]}]):
        with pytest.raises(Exception, match=re.escape(name)):
            hf_tokenizer.apply_chat_template(messages)
    assert max(hf_tokenizer(text, split_special_tokens=True).input_ids) < trained["sft"][1].bos <= max(hf_tokenizer(text).input_ids)


# The card

def test_the_card_has_the_runs_numbers_and_its_five_lines_work(base, demo, shown, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    text = (shown["sft"] / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "mit", "tags": ["nanochat"]}
    scores = [r for (_, source), r in best_known(Run("demo").records()).items() if source == "sft"]  # others may have asked since, but fewer questions
    assert scores and all(f"{r['accuracy']:.0%} ({r['low']:.0%} to {r['high']:.0%})" in text for r in scores)
    assert "| sft |" in text and "| base |" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line]) == 5
    done = subprocess.run([sys.executable, "-c", code], cwd=shown["sft"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("<|bos|><|user_start|>Hello! Who are you?<|user_end|><|assistant_start|>"), done.stderr
    assert "bos_token" in (shown["base"] / "README.md").read_text()


def test_the_licence_of_an_imported_model_is_not_guessed(home, small_tokenizer):
    run, _ = make_run("r", small_tokenizer)
    folder = export_hf(run, home / "hf", license="apache-2.0")
    record = import_model(Run("known"), folder)
    assert record["license"] == "apache-2.0" == choose_license(Run("known"), "sft", None)
    edit_json("nanochat.json", lambda body: body.update(license=5))(folder)
    assert import_model(Run("number"), folder)["license"] is None
    with pytest.raises(UserError, match="--license"):
        export_hf(Run("number"), home / "again")
    (folder / "nanochat.json").unlink()
    import_model(Run("unknown"), folder, "sft")
    with pytest.raises(UserError, match="--license"):
        export_hf(Run("unknown"), home / "again")
    with pytest.raises(UserError, match="identifier"):
        export_hf(run, home / "again", license="mit\nmodel: evil")
    assert "trained elsewhere" in write_card(Run("unknown"), "sft", SMALL, 7, "mit")


# Export refuses

def test_a_directory_with_something_in_it_is_left_alone(home, small_tokenizer):
    run, _ = make_run("r", small_tokenizer)
    (home / "full").mkdir()
    (home / "full" / "thesis.tex").write_text("years of work")
    (home / "file").write_text("x")
    for taken in ("full", "file"):
        with pytest.raises(UserError, match="there already"):
            export_hf(run, home / taken)
    assert (home / "full" / "thesis.tex").read_text() == "years of work"
    (home / "empty").mkdir()
    export_hf(run, home / "empty")
    with pytest.raises(UserError, match="there already"):
        export_hf(run, home / "empty")


def test_a_failed_export_leaves_nothing(home, small_tokenizer, monkeypatch):
    run, _ = make_run("r", small_tokenizer)
    monkeypatch.setattr("nanochat.export.write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_hf(run, home / "out" / "hf")
    assert not list((home / "out").iterdir())


def test_no_model_no_export(home):
    with pytest.raises(UserError, match="nanochat run --run r --stages base"):
        export_hf(Run("r"), home / "hf")


# Import refuses

@pytest.fixture(scope="module")
def good(tmp_path_factory, small_tokenizer):
    "A folder that can be imported."
    home = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        return export_hf(make_run("r", small_tokenizer)[0], home / "hf")


def edit_json(name, change):
    def edit(folder):
        body = json.loads((folder / name).read_text())
        change(body)
        (folder / name).write_text(json.dumps(body))
    return edit


def edit_config(**changes):
    return edit_json("config.json", lambda body: body.update(changes))


def edit_bpe(change):
    return edit_json("tokenizer.json", lambda body: change(body["model"]))


def edit_weights(change):
    def edit(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def drop_letter(folder):
    "A vocabulary of the same size without the byte 0: a token of two bytes takes its place."
    edit_bpe(lambda m: m.update(merges=[], vocab={("\u0101\u0101" if token == "\u0100" else token): i for token, i in m["vocab"].items()}))(folder)
    (folder / "nanochat.json").unlink()


REFUSED = {
    "no config": (lambda f: (f / "config.json").write_text("{"), "config.json can't be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "can't be read"),
    "another type": (edit_config(model_type="llama"), "llama"),
    "no type": (edit_json("config.json", lambda b: b.pop("model_type")), "None"),
    "wrong MLP": (edit_config(intermediate_size=8192), "intermediate_size 8192"),
    "default MLP": (edit_json("config.json", lambda b: b.pop("intermediate_size")), "intermediate_size 8192"),
    "another base": (edit_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}), "rope_theta"),
    "another rope": (edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 10_000.0}), "yarn"),
    "stretched rope": (edit_config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 4}), "rope_scaling.*linear"),
    "both spellings": (edit_config(rope_scaling={"type": "linear", "factor": 4}), "rope_scaling.*linear"),
    "partial rope": (edit_config(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}), "partial_rotary"),
    "rope a text": (edit_config(rope_parameters="yarn"), "rope_parameters 'yarn'"),
    "rope a list": (edit_config(rope_parameters=[1]), r"rope_parameters \[1\]"),
    "no cap": (edit_config(final_logit_softcapping=30.0), "softcapping 30.0"),
    "tied": (edit_config(tie_word_embeddings=True), "tie_word"),
    "gelu": (edit_config(hidden_act="gelu"), "gelu"),
    "epsilon": (edit_config(rms_norm_eps=1e-3), "rms_norm_eps"),
    "epsilon a text": (edit_config(rms_norm_eps="small"), "small"),
    "heads": (edit_config(num_attention_heads=5), "describes no model"),
    "size a text": (edit_config(hidden_size="32"), "width"),
    "size true": (edit_config(num_hidden_layers=True), "depth"),
    "size missing": (edit_json("config.json", lambda b: b.pop("hidden_size")), "width"),
    "depth zero": (edit_config(num_hidden_layers=0), "depth"),
    "very deep": (edit_config(num_hidden_layers=10**7), "10000000 blocks"),
    "endless context": (edit_config(max_position_embeddings=10**12), "context"),
    "long context": (edit_config(max_position_embeddings=2**20 + 1), "context"),
    "one layer more": (edit_config(num_hidden_layers=3), r"lacks 6 tensors.*transformer.h.2"),
    "another vocabulary": (edit_config(vocab_size=301), "lm_head|wte"),
    "kv heads": (edit_config(num_key_value_heads=4), "c_k"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 20_000), "damaged"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "weights a text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "more tensors": (edit_weights(lambda t: t.update({"model.layers.0.self_attn.ve_gate.weight": torch.ones(1), "smear_gate.weight": torch.ones(1)})),
                     r"2 tensors .*ve_gate.*2026"),
    "escapes": (edit_weights(lambda t: t.update({"\x1b[2J\nfine" * 9: torch.ones(1)})), r"1 tensors .*\\x1b\[2J"),
    "a tensor less": (edit_weights(lambda t: t.pop("lm_head.weight")), "lm_head"),
    "a shape": (edit_weights(lambda t: t.update({"lm_head.weight": torch.ones(300, 31)})), r"lm_head.weight is \[300, 31\]"),
    "integers": (edit_weights(lambda t: t.update({"lm_head.weight": torch.ones(300, 32, dtype=torch.int8)})), "int8"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer cut": (lambda f: os.truncate(f / "tokenizer.json", 999), "tokenizer.json can't be read"),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text("{}"), "can't be used"),
    "normalised": (edit_json("tokenizer.json", lambda b: b.update(normalizer={"type": "NFC"})), "another way"),
    "another cut": (edit_json("tokenizer.json", lambda b: b["pre_tokenizer"]["pretokenizers"].pop(0)), "another way"),
    "a bad pattern": (edit_json("tokenizer.json", lambda b: b["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("})), "can't be used"),
    "another pattern": (edit_json("tokenizer.json", lambda b: b["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\S+|\s+"})), "export it again"),
    "another mark": (edit_json("tokenizer.json", lambda b: b["added_tokens"][3].update(content="<|evil|>")), "special tokens"),
    "a mark less": (edit_json("tokenizer.json", lambda b: b["added_tokens"].pop()), "special tokens"),
    "merges backwards": (edit_bpe(lambda m: m["merges"].reverse()), "merges are not in the order"),
    "a gap": (edit_bpe(lambda m: m["vocab"].update({"!": 9999})), "ids from 0"),
    "a byte less": (drop_letter, "not every byte"),
    "pattern with escapes": (edit_json("tokenizer.json", lambda b: b["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "\x1b[2J("})), "can't be used"),
    "an unknown letter": (edit_bpe(lambda m: m["vocab"].update({"\u4e00": m["vocab"].pop("!")})), "can't be used"),
    "wordpiece": (edit_bpe(lambda m: m.update(type="WordPiece")), "can't be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_our_model_is_refused_in_one_sentence(home, good, case):
    damage, words = REFUSED[case]
    shutil.copytree(good, home / "bad")
    damage(home / "bad")
    with pytest.raises(UserError, match=words) as caught:
        import_model(Run("new"), home / "bad")
    assert str(caught.value).isprintable() and not Run("new").path.exists()


def test_the_good_folder_is_good(home, good):
    import_model(Run("new"), good)


def test_places_without_a_model(home, good):
    with pytest.raises(UserError, match="not a directory"):
        import_model(Run("new"), home / "nowhere")
    (home / "empty").mkdir()
    with pytest.raises(UserError, match="no model that can be imported"):
        import_model(Run("new"), home / "empty")


def test_a_run_is_not_overwritten(home, good, small_tokenizer):
    import_model(Run("new"), good)
    with pytest.raises(UserError, match="ANOTHER-NAME"):
        import_model(Run("new"), good)
    import_model(Run("new"), good, "base")  # another stage with the same tokenizer is welcome
    assert Run("new").furthest() == "sft" and Run("new").has_model("base")
    other = Tokenizer.train((d.text for _, d in zip(range(300), write_documents(seed=77))), SMALL.vocab_size)
    make_run("other", other, source="base")
    with pytest.raises(UserError, match="another tokenizer"):
        import_model(Run("other"), good)


def test_other_peoples_exports(home, good, small_tokenizer):
    "What exporters of the same model write differently, and what is no difference."
    shutil.copytree(good, home / "theirs")
    (home / "theirs" / "nanochat.json").unlink()

    def rewrite(body):
        for key in ("architectures", "dtype", "hidden_act", "tie_word_embeddings", "attention_bias", "final_logit_softcapping", "rope_parameters"):
            body.pop(key)
        body |= {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "eos_token_id": 1, "transformers_version": "5.0.0"}
    edit_json("config.json", rewrite)(home / "theirs")

    def respell(body):  # the converter of transformers: pairs as texts, the marks in the vocabulary too, cut and kept what is between
        body["model"]["merges"] = [" ".join(pair) for pair in body["model"]["merges"]]
        body["model"]["vocab"] |= {token["content"]: token["id"] for token in body["added_tokens"]}
        body["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
        body["post_processor"] = body["pre_tokenizer"]["pretokenizers"][1]
    edit_json("tokenizer.json", respell)(home / "theirs")
    record = import_model(Run("theirs"), home / "theirs")
    assert record["source"] == "sft" and record["step"] == 0 and "1.0e-06" in record["remarks"][0]
    assert load_model(Run("theirs"))[1].hash == small_tokenizer.hash


def test_damaged_bytes_never_give_more_than_a_sentence(home, good):
    rng = random.Random(5)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "nanochat.json"):
        raw = (good / name).read_bytes()
        for trial in range(12):
            folder = home / f"{name}{trial}"
            shutil.copytree(good, folder)
            data = bytearray(raw)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(min(len(data), 3000))] = rng.randrange(256)
            (folder / name).write_bytes(data)
            try:
                found = read_hf(folder)
                check_weights(found.tensors, found.config, folder)
            except UserError:
                pass


# The public layout

class Evil:
    "A pickle that writes a file when it is loaded."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def public_sizes(config):
    return {"sequence_len": config.context, "vocab_size": config.vocab_size, "n_layer": config.depth, "n_head": config.heads, "n_kv_head": config.kv_heads,
            "n_embd": config.width}


def write_public(folder, tokenizer, config=SMALL, prefix="", dtype=torch.float32, protocol=4, step=650):
    "A checkpoint as the public program writes it."
    folder.mkdir(exist_ok=True)
    tensors = {prefix + name: tensor.to(torch.bfloat16 if "wte" in name else dtype) for name, tensor in draw_model(config).state_dict().items()}
    torch.save(tensors, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "val_bpb": 0.8, "model_config": public_sizes(config), "user_config": {"run": "d"}}))
    encoding = tiktoken.Encoding("rustbpe", pat_str=tokenizer.pattern, mergeable_ranks={token: i for i, token in enumerate(tokenizer.tokens)},
                                 special_tokens=tokenizer.special)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol))
    torch.save(torch.from_numpy(tokenizer.token_bytes), folder / "token_bytes.pt")
    return tensors


@pytest.mark.parametrize("prefix, dtype, protocol, kv_heads", [("", torch.float32, 4, 4), ("_orig_mod.", torch.bfloat16, 5, 2), ("", torch.bfloat16, 3, 1)])
def test_the_public_layout(home, small_tokenizer, prefix, dtype, protocol, kv_heads):
    config = replace(SMALL, kv_heads=kv_heads)
    write_public(home / "d", small_tokenizer, config, step=300)
    tensors = write_public(home / "d", small_tokenizer, config, prefix, dtype, protocol)
    record = import_model(Run("d"), home / "d", "base")
    assert record["step"] == 650 and record["source"] == "base"
    model, tokenizer, meta = load_model(Run("d"))
    assert tokenizer.hash == small_tokenizer.hash and meta["step"] == 650
    assert all(torch.equal(tensor, tensors[prefix + name].float()) for name, tensor in model.state_dict().items())
    hf = AutoModelForCausalLM.from_pretrained(export_hf(Run("d"), home / "hf", license="mit"), dtype=torch.float32)
    assert largest_difference(model, hf, draw_ids(config)) < 1e-5


def test_a_tokenizer_of_hugging_face_will_do_as_well(home, good, small_tokenizer):
    write_public(home / "d", small_tokenizer)
    (home / "d" / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match="tokenizer.pkl is missing: copy"):
        import_model(Run("d"), home / "d")
    shutil.copy(good / "tokenizer.json", home / "d")
    import_model(Run("d"), home / "d")


def test_a_pickle_is_never_followed(home, small_tokenizer):
    write_public(home / "d", small_tokenizer)
    folder, trap = home / "d", home / "trap"
    raw = pickle.loads((folder / "tokenizer.pkl").read_bytes()).__getstate__()
    for protocol in range(6):
        for evil in (Evil(trap), {"mergeable_ranks": Evil(trap)}, {**raw, "extra": Evil(trap)}, [Evil(trap)]):
            (folder / "tokenizer.pkl").write_bytes(pickle.dumps(evil, protocol))
            with pytest.raises(UserError, match="not read, because"):
                import_model(Run("d"), folder)
    write_public(folder, small_tokenizer)
    for evil in (Evil(trap), {"lm_head.weight": Evil(trap)}):
        torch.save(evil, folder / "model_000650.pt")
        with pytest.raises(UserError, match="not read, because it is damaged or holds more than weights"):
            import_model(Run("d"), folder)
    assert not trap.exists() and not Run("d").path.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("state, words", [
    ("cl100k_base", "no tokenizer|not one that"), ({"pat_str": "a"}, "mergeable_ranks"), ([1, 2], "no tokenizer|not one that"), (5, "no tokenizer"), ({}, "mergeable")])
def test_pickles_that_are_no_tokenizer(home, state, words):
    (home / "tokenizer.pkl").write_bytes(pickle.dumps(state))
    with pytest.raises(UserError, match=words):
        read_public_tokenizer(home / "tokenizer.pkl")


def test_a_damaged_pickle_gives_a_sentence(home, small_tokenizer):
    write_public(home / "d", small_tokenizer)
    path = home / "d" / "tokenizer.pkl"
    raw, rng = path.read_bytes(), random.Random(0)
    assert read_public_tokenizer(path).hash == small_tokenizer.hash
    for trial in range(150):
        data = bytearray(raw)
        if trial % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_public_tokenizer(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_references_in_a_pickle_are_followed_as_data():
    text = "x" * 300
    assert read_encoding(pickle.dumps({"a": text, "b": text, "c": {b"k": 70_000, b"l": 2**40, b"m": -1}}, 4)) == {"a": text, "b": text, "c": {b"k": 70_000, b"l": 2**40, b"m": -1}}
    with pytest.raises(ValueError, match="GLOBAL os system"):
        read_encoding(b"cos\nsystem\n(S'echo'\ntR.")


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "meta_000650.json").unlink(), "meta_000650.json is missing"),
    (lambda f: (f / "meta_000650.json").write_text("{}"), "no model_config"),
    (lambda f: (f / "meta_000650.json").write_text('{"model_config": {"window_pattern": "SSSL", "n_layer": 2}}'), "window_pattern.*2026"),
    (lambda f: os.truncate(f / "model_000650.pt", 3000), "model_000650.pt is not read"),
    (lambda f: (f / "model_000650.pt").write_text("no"), "model_000650.pt is not read"),
    (lambda f: torch.save([torch.ones(2)], f / "model_000650.pt"), "no dictionary of tensors"),
    (lambda f: torch.save({**torch.load(f / "model_000650.pt", weights_only=True), "x0_lambdas": torch.ones(2), "value_embeds.1.weight": torch.ones(2, 2)},
                          f / "model_000650.pt"), r"2 tensors.*'value_embeds.1.weight', 'x0_lambdas'.*2026"),
])
def test_public_checkpoints_that_are_refused(home, small_tokenizer, change, words):
    write_public(home / "d", small_tokenizer)
    change(home / "d")
    with pytest.raises(UserError, match=words) as caught:
        import_model(Run("d"), home / "d")
    assert "\n" not in str(caught.value) and not Run("d").path.exists()


@pytest.mark.parametrize("make", [
    lambda weight: torch.zeros(1).expand(weight.shape), lambda weight: weight.T.contiguous().T, lambda weight: weight.to_sparse(), lambda weight: weight.to("meta"),
], ids=["expanded", "transposed", "sparse", "meta"])
def test_tensors_that_do_not_hold_their_numbers_are_refused(home, small_tokenizer, make):
    tensors = write_public(home / "d", small_tokenizer)
    torch.save({**tensors, "lm_head.weight": make(tensors["lm_head.weight"])}, home / "d" / "model_000650.pt")
    with pytest.raises(UserError, match="lm_head.weight does not hold|is not read"):
        import_model(Run("d"), home / "d")
    assert not Run("d").path.exists()


def test_merges_may_be_left_out(home, good, small_tokenizer):
    shutil.copytree(good, home / "bare")
    edit_bpe(lambda m: m.pop("merges"))(home / "bare")
    assert read_tokenizer(home / "bare").hash == small_tokenizer.hash


def test_a_pickled_tokenizer_without_a_byte_is_refused(home, small_tokenizer):
    write_public(home / "d", small_tokenizer)
    tokens = [b"\x00\x00" if token == b"\x00" else token for token in small_tokenizer.tokens]
    encoding = tiktoken.Encoding("rustbpe", pat_str=small_tokenizer.pattern, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                                 special_tokens=small_tokenizer.special)
    (home / "d" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    with pytest.raises(UserError, match="not every byte"):
        import_model(Run("d"), home / "d")


def test_shapes_by_formula():
    for config in (SMALL, replace(SMALL, kv_heads=1), GPTConfig.from_depth(3, 500, 32)):
        assert tensor_shapes(config) == {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    names = {rename_tensor(name) for name in tensor_shapes(SMALL)}
    assert names == set(transformers.NanoChatForCausalLM(transformers.NanoChatConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
                        .state_dict())


# The commands

@pytest.fixture
def own_tasks(monkeypatch):
    "The harness without its list of all public tasks, which takes seconds to make."
    import lm_eval.tasks
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


def command(capsys, monkeypatch, *arguments):
    "The command line without a new process: exit code, output, errors."
    from nanochat.cli import main
    monkeypatch.setattr(sys, "argv", ["nanochat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, *capsys.readouterr()


def test_export_import_and_talk(demo_run, tmp_path, capsys, monkeypatch):
    done = call_nanochat(tmp_path, "export", "hf", "out", "--run", "demo", "--source", "mid", cwd=tmp_path)
    assert done.returncode == 0 and str(tmp_path / "out") in done.stdout, done.stderr
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, monkeypatch, "import", "out", "--run", "again")
    assert code == 0 and "mid model" in out and "nanochat chat --run again" in out, err
    replies = [command(capsys, monkeypatch, "chat", "--run", name, "--source", "mid", "-p", "Hello!", "--temperature", "0")[1] for name in ("demo", "again")]
    assert replies[0] == replies[1]
    assert "imported from out" in command(capsys, monkeypatch, "info", "--run", "again")[1]
    code, out, err = command(capsys, monkeypatch, "eval", "--run", "again", "--tasks", "reading", "--max-problems", "5")
    assert re.search(r"mid +reading +\d", out), err
    text = Path(command(capsys, monkeypatch, "report", "--run", "again")[1].strip()).read_text()
    assert "trained elsewhere and imported from out" in text and "Not finished" not in text and "reading" in text and "depth 2" in text


@pytest.mark.parametrize("arguments, words", [
    (["export", "gguf", "x"], ["gguf", "hf"]), (["export", "hf", "x", "--run", "nobody"], ["nobody"]), (["export", "hf", "x", "--source", "moon"], ["moon", "sft"]),
    (["export", "hf", "x", "--source", "rl"], ["rl", "nanochat run"]), (["import", "nowhere", "--run", "n"], ["nowhere"]), (["import", ".", "--run", "../n"], ["../n"]),
    (["lm-eval", "--tasks", "no_such_task"], ["no_such_task"]),
])
def test_mistakes_get_one_sentence(demo_run, own_tasks, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, monkeypatch, *arguments)
    assert code == 2 and all(word in err for word in words), err
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("nanochat: ")


# The evaluation harness

def ask(engine, folder, name, items, chat=False, **task):
    "The harness's answers to items, in their order: a result for each, and the log-probability of each choice."
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (folder / f"{name}.jsonl").write_text("".join(json.dumps({**item, "number": i}) + "\n" for i, item in enumerate(items)))
    described = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder)},
                 "test_split": "test", **task}
    samples = simple_evaluate(harness_model(engine), tasks=[described], apply_chat_template=chat, bootstrap_iters=0,
                              task_manager=TaskManager(include_defaults=False))["samples"][name]  # without the list of all public tasks
    samples.sort(key=lambda sample: sample["doc"]["number"])
    return [bool(sample["acc"]) for sample in samples], [[float(response[0][0]) for response in sample["resps"]] for sample in samples]


CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}


def own_scores(engine, items, kind="multiple_choice"):
    task = CoreTask("x", kind, Path("x"), 0, " ", 0.25)
    return score_texts(engine.model, encode_items(engine.tokenizer, task, [render_item(task, item) for item in items]))


def test_the_harness_agrees_on_our_own_questions(trained, tmp_path):
    engine = Engine(*trained["sft"][:2])
    task = load_task("choice", 40)
    assert all(len(example.question) == 1 and example.answer in example.choices for example in task)
    items = [{"query": e.question[0]["content"], "choices": list(e.choices), "gold": e.choices.index(e.answer)} for e in task]
    right, theirs = ask(engine, tmp_path, "choice", items, chat=True, doc_to_text="{{query}}", target_delimiter="", **CHOICES)
    assert_mostly_equal(right, score_choices(engine, task), [is_clear(row) for row in theirs])


@pytest.mark.parametrize("name, path", [("arc_easy", "world_knowledge/arc_easy"), ("copa", "commonsense_reasoning/copa")])
def test_the_harness_agrees_on_public_questions_with_choices(trained, real_data, tmp_path, name, path):
    engine = Engine(*trained["base"][:2])
    items = read_items(CoreTask(name, "multiple_choice", real_data / "eval_bundle" / "eval_data" / f"{path}.jsonl", 0, " ", 0.25))[:60]
    right, theirs = ask(engine, tmp_path, name, items, doc_to_text="{{query}}", **CHOICES)
    texts = [[Text([engine.tokenizer.bos, *engine.tokenizer.encode(f"{item['query']} {choice}")],
                   1 + len(engine.tokenizer.encode(item["query"]))) for choice in item["choices"]] for item in items]
    sums = [[score.logprob for score in scores] for scores in score_texts(engine.model, texts)]
    assert max(abs(a - b) for row, other in zip(theirs, sums) for a, b in zip(row, other)) < 1e-3
    assert_mostly_equal(right, [choose(row) == item["gold"] for row, item in zip(sums, items)], [is_clear(row) for row in sums])
    by_token = [is_right("multiple_choice", item, scores) for item, scores in zip(items, own_scores(engine, items))]
    counts = [[len(text.ids) - text.start for text in row] for row in texts]
    shared = [min(len(os.path.commonprefix([text.ids for text in row])), len(row[0].ids)) - row[0].start for row in texts]
    again, clear = [], []
    for item, row, count, skip, group in zip(items, theirs, counts, shared, texts):  # from the harness's sums: CORE's rule, the mean over tokens behind what is common
        common = score_texts(engine.model, [[Text(group[0].ids[: group[0].start + skip], group[0].start)]])[0][0].logprob
        means = [(value - common) / (n - skip) if n > skip else float("-inf") for value, n in zip(row, count)]
        again.append(choose(means) == item["gold"])
        clear.append(is_clear(means))
    assert_mostly_equal(again, by_token, clear)


def test_the_harness_agrees_on_public_texts(trained, real_data, tmp_path):
    engine = Engine(*trained["base"][:2])
    items = read_items(CoreTask("lambada_openai", "language_modeling", real_data / "eval_bundle/eval_data/language_understanding/lambada_openai.jsonl", 0, " ", 0.0))[:60]
    greedy = [{"context": item["context"], "continuation": engine.tokenizer.decode(reply.tokens).strip().split(" ")[0]} for item, reply in zip(items[:20], engine.complete(
        [[engine.tokenizer.bos, *engine.tokenizer.encode(item["context"].strip())][-200:] for item in items[:20]], 6, 0.0, tools=False))]
    items += [item for item in greedy if item["continuation"].strip()]  # some that this small model gets right
    right, theirs = ask(engine, tmp_path, "lambada", [{"context": item["context"].strip(), "continuation": item["continuation"]} for item in items],
                        output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target=" {{continuation}}", metric_list=[{"metric": "acc"}])
    scores = own_scores(engine, items, "language_modeling")
    assert max(abs(row[0] - score[0].logprob) for row, score in zip(theirs, scores)) < 1e-3
    task = CoreTask("x", "language_modeling", Path("x"), 0, " ", 0.0)
    texts = [group[0] for group in encode_items(engine.tokenizer, task, [render_item(task, item) for item in items])]
    assert_mostly_equal(right, [is_right("language_modeling", item, score) for item, score in zip(items, scores)],
                        [clear_choices(engine.model, text) == len(text.ids) - text.start for text in texts])


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_the_harness_model_against_transformers(shown, trained):
    engine, hf_model = Engine(*trained["base"][:2]), AutoModelForCausalLM.from_pretrained(shown["base"])
    tokenizer, pairs = engine.tokenizer, [("The fox", " is red."), ("The fox", " sleeps"), ("", "The"), ("A b", "c"), ("x", "")]
    found = harness_model(engine).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        ids = [tokenizer.bos, *tokenizer.encode(context + continuation)]
        start = max(1, len(os.path.commonprefix([ids, [tokenizer.bos, *tokenizer.encode(context)]])))
        with torch.no_grad():
            logprobs = hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logprobs[at - 1, ids[at]].item() for at in range(start, len(ids)))
        assert abs(logprob - expected) < 1e-4 and greedy == all(logprobs[at - 1].argmax() == ids[at] for at in range(start, len(ids)))
    assert found[-1] == (0.0, True)


def test_rolling_windows_count_each_token_once(trained):
    engine = Engine(*trained["base"][:2])
    tokenizer, context = engine.tokenizer, engine.model.config.context
    text = " ".join(d.text for _, d in zip(range(40), write_documents(seed=4)))
    long = tokenizer.decode(tokenizer.encode(text)[: 2 * context + 17])
    ids = tokenizer.encode(long)
    assert len(ids) > 2 * context
    short, whole, nothing = harness_model(engine).loglikelihood_rolling([request("The fox is red."), request(long), request("")])
    (score,) = score_texts(engine.model, [[Text([tokenizer.bos, *tokenizer.encode("The fox is red.")], 1)]])[0]
    assert abs(short - score.logprob) < 1e-4 and nothing == 0
    n = context - 1
    windows = [Text([tokenizer.bos, *ids[:n]], 1), Text(ids[n - 1 : 2 * n], 1), Text(ids[-(n + 1) :], n + 1 - (len(ids) - 2 * n))]
    assert sum(len(w.ids) - w.start for w in windows) == len(ids)
    assert abs(whole - sum(scores[0].logprob for scores in score_texts(engine.model, [[w] for w in windows]))) < 1e-3


def test_generation_stops_where_the_harness_says(trained):
    engine = Engine(*trained["sft"][:2])
    model = harness_model(engine)
    prompt = model.apply_chat_template([{"role": "user", "content": "Tell me a story."}])
    free, cut, other = model.generate_until([request(prompt, {"until": [], "max_gen_toks": 20}), request(prompt, {"until": ["e", "zzz"], "max_gen_toks": 20}),
                                             request("The fox", {"until": "\n\n", "max_gen_toks": 5, "do_sample": True, "temperature": 0.5})])
    (reply,) = engine.complete([render_prompt(engine.tokenizer, [{"role": "user", "content": "Tell me a story."}])], 20, 0.0)
    assert free == engine.tokenizer.decode([t for t in reply.tokens if t < engine.tokenizer.bos]) and cut == free.split("e")[0]
    assert isinstance(other, str) and len(engine.tokenizer.encode(other)) <= 8
    typed = "<|bos|><|user_start|>x"
    assert max(model.encode_prompt(typed)[1:]) < engine.tokenizer.bos  # a context that nobody rendered is text


def test_tasks_in_a_folder(trained, own_tasks, tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"query": "The fox is", "choices": ["red", "blue"], "gold": i % 2}) + "\n" for i in range(6)))
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump({"task": "colours", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{query}}", **CHOICES,
                                                           "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}, "cache_dir": str(tmp_path)}}))
    results = run_harness(Engine(*trained["base"][:2]), ["colours"], limit=4, folder=tmp_path)["results"]["colours"]
    assert results["acc,none"] == 0.5 and results["sample_len"] == 4


def test_the_package_does_not_need_the_harness():
    code = "import sys, nanochat.export; print([m for m in ('lm_eval', 'transformers', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_read_tokenizer_names_the_file(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "tokenizer.json")):
        read_tokenizer(tmp_path)
