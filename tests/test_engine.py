"""The engine against a naive loop with the real model, and against scripts with a model that says what it is told."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.conversation import parse_reply
from nanochat.engine import PIECE, Engine, Row, prefill, row_uniforms, sample_tokens
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

TOKENIZER = Tokenizer.train(["the cat sat on the mat and the dog ran to the cat that sat on the mat"] * 3, 270)
S = TOKENIZER.special
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = (S[f"<|{name}|>"] for name in ("python_start", "python_end", "output_start", "output_end"))
END = S["<|assistant_end|>"]


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=["heads", "grouped heads"])
def model(request):
    heads, kv_heads = request.param
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 2, 32, heads, kv_heads, 48)).init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                weight.normal_(0, 0.3, generator=generator)
        model.lm_head.weight[[PYTHON, PYTHON_END, END]] *= 3  # said often enough to matter
    return model


@torch.no_grad()
def naive(model, prompt, max_tokens, temperature, top_k, seed, row):
    "Generation without a cache, without a batch, with a sampler of its own."
    ids, forced, uniforms = list(prompt), [], row_uniforms(seed, row, max_tokens).tolist()
    while len(ids) - len(prompt) < max_tokens and len(ids) < model.config.context:
        logits = model(torch.tensor([ids]))[0, -1].double()
        if forced:
            token = forced.pop(0)
        elif temperature == 0:
            token = int(logits.argmax())
        else:
            token = climb(logits / temperature, top_k, uniforms[len(ids) - len(prompt)])
        if token in (END, TOKENIZER.bos):
            return ids[len(prompt):], "stop"
        ids.append(token)
        said = ids[len(prompt):]
        if token == PYTHON_END and PYTHON in said:
            call = said[len(said) - said[::-1].index(PYTHON):-1]
            if PYTHON_END not in call and (result := calculate(TOKENIZER.decode(call))) is not None:
                forced = [OUTPUT, *TOKENIZER.encode(result), OUTPUT_END]
    return ids[len(prompt):], "max_tokens" if len(ids) - len(prompt) == max_tokens else "context"


def climb(scores, top_k, uniform):
    "One draw by walking up the ladder of probabilities, of which top-k leaves k rungs."
    order = sorted(scores.argsort(descending=True)[:top_k].tolist()) if top_k else range(len(scores))
    p = {i: float(torch.exp(scores[i])) for i in order}
    height = uniform * sum(p.values())
    for i in order:
        height -= p[i]
        if height < 0:
            return i
    return i


PROMPTS = [[TOKENIZER.bos] + TOKENIZER.encode("the cat sat on the mat and the dog ran to"[:n]) for n in (3, 41, 9, 9, 20, 1, 30, 15, 26, 41, 5, 12)]
SETTINGS = [{"temperature": 0, "top_k": None, "seed": 0}, {"temperature": 1.0, "top_k": None, "seed": 1},
            {"temperature": 0.7, "top_k": 12, "seed": 2}, {"temperature": 3.0, "top_k": None, "seed": 3}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equal_to_the_naive_loop_token_for_token(model, setting):
    engine = Engine(model, TOKENIZER)
    for max_tokens in (1, 7, 60):
        expected = [naive(model, prompt, max_tokens, row=i, **setting) for i, prompt in enumerate(PROMPTS)]
        for batch in (1, 5, 64):
            replies = engine.complete(PROMPTS, max_tokens, batch=batch, **setting)
            assert [(r.tokens, r.reason) for r in replies] == expected
        columns = list(engine.generate(PROMPTS[0], 1, max_tokens, **setting))
        assert [tokens[0] for tokens, _ in columns] == expected[0][0]


def test_the_naive_comparison_is_not_empty(model):
    replies = [r for setting in SETTINGS for r in Engine(model, TOKENIZER).complete(PROMPTS * 8, 60, **setting)]
    assert {r.reason for r in replies} == {"stop", "context"}
    assert any(PYTHON in r.tokens for r in replies) and len({len(r.tokens) for r in replies}) > 10


def test_a_row_does_not_depend_on_its_neighbours(model):
    engine = Engine(model, TOKENIZER)
    for row in range(4):
        alone = engine.complete([PROMPTS[row]] * (row + 1), 40, seed=9)[row].tokens
        for company in (PROMPTS, PROMPTS[: row + 1], PROMPTS[: row + 1] + [PROMPTS[1]] * 30):
            assert engine.complete(company, 40, seed=9)[row].tokens == alone
    samples = engine.generate(PROMPTS[2], num_samples=6, max_tokens=40, seed=4)
    columns = list(samples)
    replies = engine.complete([PROMPTS[2]] * 6, 40, seed=4)
    assert [row.reply.tokens for row in samples.rows] == [reply.tokens for reply in replies]
    assert len({tuple(reply.tokens) for reply in replies}) > 1  # six samples, not one sample six times
    for i, reply in enumerate(replies):  # a sample that has ended waits for the others with (bos, False)
        assert [tokens[i] for tokens, _ in columns] == reply.tokens + [TOKENIZER.bos] * (len(columns) - len(reply.tokens))
        assert [sampled[i] for _, sampled in columns] == reply.sampled + [False] * (len(columns) - len(reply.tokens))


def test_random_numbers_of_rows_and_seeds_differ():
    draws = {tuple(row_uniforms(seed, row, 4).tolist()) for seed in range(20) for row in range(20)}
    assert len(draws) == 400
    assert torch.equal(row_uniforms(5, 6, 9)[:4], row_uniforms(5, 6, 4))
    many = torch.cat([row_uniforms(0, row, 50) for row in range(200)])
    assert abs(many.mean() - 0.5) < 0.015 and 0 <= many.min() and many.max() < 1


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 4), (1.0, 1), (1.0, 99)])
def test_frequencies_are_the_probabilities(temperature, top_k):
    logits, n = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0, 1.0]), 40_000
    kept = logits.topk(min(top_k or 7, 7)).indices
    p = torch.zeros(7)
    p[kept] = torch.softmax(logits[kept] / temperature, dim=0)
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    seen = torch.bincount(sample_tokens(logits.expand(n, -1), uniforms, temperature, top_k), minlength=7)
    assert (seen[p == 0] == 0).all()
    assert (((seen - n * p) ** 2)[p > 0] / (n * p[p > 0])).sum() < 30  # chi squared with at most 6 degrees of freedom: p < 0.0001


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, None, 0.5), (1.0, None, 0.9), (2.0, None, 0.8), (1.0, 3, 0.7), (1.0, None, 0.0), (0.5, 5, 0.999)])
def test_top_p_keeps_the_smallest_set(temperature, top_k, top_p):
    logits, n = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0, 1.0]), 40_000
    p = torch.zeros(7).double()
    kept = logits.topk(top_k or 7).indices
    p[kept] = torch.softmax(logits[kept].double() / temperature, dim=0)
    total, order = 0.0, p.argsort(descending=True).tolist()
    nucleus = []
    while not nucleus or total < top_p:
        nucleus.append(order.pop(0))
        total += p[nucleus[-1]].item()
    for i in order:
        p[i] = 0
    p /= p.sum()
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1))
    seen = torch.bincount(sample_tokens(logits.expand(n, -1), uniforms, temperature, top_k, top_p), minlength=7)
    assert set(seen.nonzero().flatten().tolist()) <= set(nucleus)
    assert (((seen - n * p) ** 2)[p > 0] / (n * p[p > 0])).sum() < 30


def test_the_ends_of_the_ladder():
    logits = torch.tensor([[0.0, 15.0, -15.0]] * 2)
    almost_one = 1 - 2.0**-24
    assert sample_tokens(logits, torch.tensor([0.0, almost_one]), 1e-3).tolist() == [1, 1]
    assert sample_tokens(torch.zeros(2, 65_536), torch.tensor([0.0, almost_one])).max() <= 65_535
    assert sample_tokens(torch.zeros(1, 4), torch.tensor([almost_one]), top_p=0.5) == 1  # the last rung that has a height
    assert sample_tokens(logits, torch.rand(2), temperature=0).tolist() == [1, 1]


class ScriptCache:
    def __init__(self):
        self.names, self.longest = [], 0

    def rows(self, start, end):
        return self

    def set_lengths(self, lengths):
        self.lengths, self.longest = list(lengths), max(lengths)

    def keep(self, rows):
        self.names, self.lengths = [self.names[i] for i in rows], [self.lengths[i] for i in rows]
        self.longest = max(self.lengths)


class Scripted:
    "Says the script that belongs to a prompt's first token, whatever it reads; remembers what it read."

    def __init__(self, scripts, context=100):
        self.scripts, self.config, self.cos = scripts, SimpleNamespace(context=context), torch.zeros(1)
        self.read = {name: [] for name in scripts}
        self.calls, self.rows = 0, 0

    def new_cache(self, batch, length):
        return ScriptCache()

    def hidden(self, ids, cache):
        self.calls += 1
        self.rows += len(ids)
        if not cache.names:  # the prompts
            cache.names, cache.lengths = ids[:, 0].tolist(), [0] * len(ids)
        else:
            for i, (name, (token,)) in enumerate(zip(cache.names, ids.tolist())):
                self.read[name].append(token)
                cache.lengths[i] += 1
            cache.longest = max(cache.lengths)
            assert cache.longest <= self.config.context, "read beyond the context"
        return torch.tensor([[name] for name in cache.names])[:, None].expand(-1, ids.size(1), -1)

    def logits(self, h):
        logits = torch.zeros(len(h), TOKENIZER.vocab_size)
        for row, (name,) in enumerate(h.tolist()):
            script, said = self.scripts[name], len(self.read[name])
            logits[row, script[said] if said < len(script) else END] = 15
        return logits


def say(*parts):
    return [token for part in parts for token in ([part] if isinstance(part, int) else TOKENIZER.encode(part))]


def run(script, context=100, prompt_length=1, **options):
    model = Scripted({7: script}, context)
    (reply,) = Engine(model, TOKENIZER).complete([[7] * prompt_length], temperature=0, **options)
    assert model.read[7] == reply.tokens[: len(model.read[7])]  # what is said is what is read
    assert len(model.read[7]) == len(reply.tokens) - (reply.reason != "stop")
    assert len(reply.tokens) == len(reply.sampled)
    return reply


X = [0] * 9  # what the model would say while it isn't asked


def test_a_call_is_answered():
    reply = run(say("see ", PYTHON, "12*8", PYTHON_END) + X[:4] + say(" done", END))
    assert parse_reply(TOKENIZER, reply.tokens) == [{"type": "text", "text": "see "}, {"type": "python", "text": "12*8"},
                                                    {"type": "python_output", "text": "96"}, {"type": "text", "text": " done"}]
    forced = [token for token, sampled in zip(reply.tokens, reply.sampled) if not sampled]
    assert forced == say(OUTPUT, "96", OUTPUT_END) and reply.reason == "stop" and reply.stop == END


@pytest.mark.parametrize("script", [
    say(PYTHON, "10**10**10", PYTHON_END, "x", END), say(PYTHON, PYTHON_END, END), say(PYTHON_END, "1+1", PYTHON_END, END),
    say(PYTHON, "1+", PYTHON, "x", PYTHON_END, END), say(PYTHON, 200, 201, PYTHON_END, END), say("1+1", PYTHON_END, PYTHON, END),
    say(PYTHON, "1+1", END), say(OUTPUT, "7", OUTPUT_END, END), say(PYTHON, "__import__('os').getcwd()", PYTHON_END, END),
])
def test_what_is_no_call_forces_nothing(script):
    reply = run(script)
    assert reply.tokens == script[:-1] and all(reply.sampled) and reply.reason == "stop"


def test_without_tools_nothing_is_forced():
    assert run(say(PYTHON, "1+1", PYTHON_END, "x", END), tools=False).tokens == say(PYTHON, "1+1", PYTHON_END, "x")


def test_two_calls_and_a_call_begun_again():
    reply = run(say(PYTHON, "9", PYTHON, "1+1", PYTHON_END) + X[:3] + say(PYTHON, "2+2", PYTHON_END) + X[:3] + say(END))
    outputs = [part["text"] for part in parse_reply(TOKENIZER, reply.tokens) if part["type"] == "python_output"]
    assert outputs == ["2", "4"]


def test_stop_tokens_said_while_a_result_goes_in_do_not_count():
    reply = run(say(PYTHON, "1+1", PYTHON_END, END, TOKENIZER.bos, END, "x", TOKENIZER.bos))
    assert reply.tokens == say(PYTHON, "1+1", PYTHON_END, OUTPUT, "2", OUTPUT_END, "x") and reply.stop == TOKENIZER.bos


@pytest.mark.parametrize("room", range(1, 12))
def test_limits_cut_anywhere_even_inside_a_result(room):
    script = say(PYTHON, "12*8", PYTHON_END) + X
    whole = run(script, max_tokens=13).tokens
    cut = run(script, max_tokens=room)
    assert cut.tokens == whole[:room] and cut.reason == "max_tokens" and cut.stop is None
    wall = run(script, context=20 + room, prompt_length=20)
    assert wall.tokens == whole[:room] and wall.reason == "context"
    assert run(script, context=20 + room, prompt_length=20, max_tokens=room).reason == "max_tokens"


def test_rows_that_end_leave_and_nothing_else_changes():
    scripts = {name: [name] * (3 * name + 1) for name in range(1, 25)}
    model = Scripted(scripts, context=200)
    replies = Engine(model, TOKENIZER).generate_batch([[name] * (1 + name % 5) for name in scripts], temperature=0)
    assert replies == list(scripts.values())
    written, longest = sum(map(len, replies)) + len(scripts), 3 * 24 + 2
    assert model.calls <= longest
    assert model.rows < 1.34 * written < 0.8 * longest * len(scripts)  # at most a quarter of a step is wasted on ended rows


def test_the_longest_rows_reach_the_wall_first():
    scripts = {name: [name] * 50 for name in range(1, 9)}
    model = Scripted(scripts, context=30)
    replies = Engine(model, TOKENIZER).complete([[name] * (20 + name) for name in scripts], temperature=0)
    assert [len(r.tokens) for r in replies] == [10 - name for name in scripts] and {r.reason for r in replies} == {"context"}


def test_equal_prompts_are_read_once(model):
    seen, hidden = [], model.hidden
    model.hidden = lambda ids, cache=None: seen.append(tuple(ids.shape)) or hidden(ids, cache)
    try:
        Engine(model, TOKENIZER).complete([PROMPTS[1]] * 8 + [PROMPTS[2]] * 8, max_tokens=2)
        assert seen[0] == (2, len(PROMPTS[1])) and seen[1][0] > 8
    finally:
        del model.hidden


def test_a_stream_gives_a_token_before_the_next_is_computed():
    model = Scripted({7: say("abcdef", END)})
    stream = Engine(model, TOKENIZER).generate([7], temperature=0)
    for n in (1, 2, 3):
        next(stream)
        assert model.calls == n
    assert stream.rows[0].reply.reason == ""
    list(stream)
    assert stream.rows[0].reply.reason == "stop" and next(stream, None) is None


def test_a_first_token_that_stops_gives_nothing():
    model = Scripted({7: [END], 8: [TOKENIZER.bos]})
    assert list(Engine(model, TOKENIZER).generate([7], temperature=0)) == []
    assert Engine(model, TOKENIZER).generate_batch([[7], [8]], temperature=0) == [[], []]
    assert Engine(model, TOKENIZER).generate_batch([]) == []


def test_training_goes_on_after_generation(model):
    weights = [p.clone() for p in model.parameters()]
    model.train()
    Engine(model, TOKENIZER).generate_batch(PROMPTS, 10)
    assert model.training and all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    loss = model(torch.tensor([PROMPTS[1]]), torch.tensor([PROMPTS[1]]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "empty"), ([1] * 48, {}, "48 tokens.*context of 48"), ([1], {"max_tokens": 0}, "max_tokens.*0"),
    ([1], {"temperature": -1}, "temperature.*-1"),
    ([1], {"temperature": float("nan")}, "temperature"), ([1], {"top_k": 0}, "top_k.*0"),
])
def test_bad_requests_get_one_sentence_at_once(model, prompt, options, message):
    with pytest.raises(UserError, match=message):
        Engine(model, TOKENIZER).generate(prompt, **options)
    with pytest.raises(UserError, match=message):
        Engine(model, TOKENIZER).complete([[1], prompt], **options)


LIKELY = [PYTHON, PYTHON_END, OUTPUT, OUTPUT_END, END, *TOKENIZER.encode("1+2*3")]


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(LIKELY), st.integers(0, TOKENIZER.vocab_size - 1)), min_size=1, max_size=60), st.integers(1, 40))
def test_any_tokens_leave_a_row_in_order(tokens, room):
    row = Row(TOKENIZER, room, "max_tokens")
    for token in tokens:
        if row.reply.reason:
            break
        said = row.accept(token)
        if row.reply.reason != "stop":
            assert said == row.reply.tokens[-1]
            assert said == token or not row.reply.sampled[-1]
    reply = row.reply
    assert len(reply.tokens) == len(reply.sampled) <= room
    assert END not in reply.tokens and TOKENIZER.bos not in reply.tokens
    for i, (token, sampled) in enumerate(zip(reply.tokens, reply.sampled)):
        if not sampled and reply.sampled[i - 1]:  # a result begins right behind a call
            assert token == OUTPUT and reply.tokens[i - 1] == PYTHON_END


@torch.inference_mode()
def test_prompts_that_are_read_in_pieces(model, monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 50)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 9, 30, 47, 12, 9)]
    logits, cache = prefill(model, prompts, 48)
    assert cache.lengths.tolist() == [1, 9, 30, 47, 12, 9] and cache.longest == 47
    token = torch.tensor([[5]] * len(prompts))
    following = model.logits(model.hidden(token, cache)[:, -1])
    for prompt, first, second in zip(prompts, logits, following):
        assert (model(torch.tensor([prompt]))[0, -1] - first).abs().max() < 1e-4
        assert (model(torch.tensor([[*prompt, 5]]))[0, -1] - second).abs().max() < 1e-4


def test_one_row_and_several_in_bfloat16(model):
    prompts = [[3, 4, 5], [6, 7]]
    with torch.autocast("cpu", torch.bfloat16):
        alone = Engine(model, TOKENIZER).complete(prompts[:1], max_tokens=4, temperature=0, tools=False)
        both = Engine(model, TOKENIZER).complete(prompts, max_tokens=4, temperature=0, tools=False)
    assert len(alone) == 1 and len(both) == 2 and all(reply.tokens or reply.stop for reply in [*alone, *both])
