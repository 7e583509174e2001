"""Panels without a browser: what they compute, what they show, what their controls do, and that no text becomes markup."""
import asyncio
import json
import math
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import widgets
from nanochat.common import UserError
from nanochat.engine import Engine, sample_tokens
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.train import BPB, LOSS
from nanochat.widgets import (
    INK,
    MetricsReader,
    Panel,
    Still,
    attention_html,
    attention_weights,
    browse_attention,
    chat_panel,
    compare_html,
    compare_results,
    compare_runs,
    curve_points,
    differing_settings,
    distribution_html,
    entropy_bits,
    explore_tokens,
    figure_html,
    message_html,
    name_token,
    next_token_distribution,
    run_engines,
    sample_next,
    stage_points,
    tokens_html,
    watch_run,
)

TOKENIZER = Tokenizer.train(["the cat sat on the mat and the dog ran to the cat that sat on the mat"] * 3, 270)
HOSTILE = "<img src=x onerror=\"alert(1)\">'</div></style><script>alert(2)</script>&lt;&#60;<|bos|>"
OURS = {"p", "b", "i", "br", "small", "span", "div", "table", "thead", "tbody", "tr", "th", "td", "code",
        "svg", "g", "defs", "path", "use", "text", "style", "metadata", "clippath", "rect"}  # the second line: what matplotlib draws with


class Page(HTMLParser):
    "The tags, the attributes and the text of a page."

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def assert_harmless(page):
    page = Page(page)
    assert page.tags - {"rdf:rdf", "cc:work", "dc:type", "dc:format", "dc:creator", "cc:agent", "dc:title"} <= OURS, page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    return page.text


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(widgets, "in_notebook", lambda: True)


@pytest.fixture
def still(monkeypatch):
    monkeypatch.setattr(widgets, "in_notebook", lambda: False)


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=["heads", "grouped heads"])
def model(request):
    heads, kv_heads = request.param
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 3, 32, heads, kv_heads, 64)).init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                weight.normal_(0, 0.3, generator=generator)
    return model.eval()


def find(panel, kind, description):
    "A control by its label."
    todo = [panel]
    while todo:
        widget = todo.pop()
        if isinstance(widget, kind) and getattr(widget, "description", None) == description:
            return widget
        todo += getattr(widget, "children", ())
    raise AssertionError(f"no {kind.__name__} {description!r}")


def pages(panel):
    "All HTML of a panel, from top to bottom."
    if isinstance(panel, ipywidgets.HTML):
        return panel.value
    return "".join(pages(child) for child in getattr(panel, "children", ()))


def controls(panel):
    if isinstance(panel, ipywidgets.Box):
        return [control for child in panel.children for control in controls(child)]
    return [] if isinstance(panel, ipywidgets.HTML) else [panel]


# live or still

def test_one_rule_decides(model, live, monkeypatch):
    assert isinstance(sample_next(model, TOKENIZER, "the cat"), Panel)
    monkeypatch.setattr(widgets, "in_notebook", lambda: False)
    assert isinstance(sample_next(model, TOKENIZER, "the cat"), Still)


def test_a_panel_carries_its_still(model, live):
    panel = explore_tokens({"ours": TOKENIZER}, "the cat")
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/html"] == panel.still.html and bundle["text/plain"] == repr(panel.still)


def test_every_control_has_a_label(model, live, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    write_run("a")
    for panel in (explore_tokens({"ours": TOKENIZER}), browse_attention(model, TOKENIZER, "the cat"), sample_next(model, TOKENIZER, "the"),
                  chat_panel({"ours": lambda: Engine(model, TOKENIZER)}), watch_run("a"), compare_runs()):
        assert controls(panel) and all(control.description for control in controls(panel))


def test_stills_say_the_same_in_text(model, still):
    for panel, word in ((explore_tokens({"ours": TOKENIZER}, "the cat"), "1.75 bytes a token"), (browse_attention(model, TOKENIZER, "the cat"), "layer 0, head 0"),
                        (sample_next(model, TOKENIZER, "the cat"), "tokens can be drawn"), (chat_panel({"ours": lambda: Engine(model, TOKENIZER)}, ["sat"]), "sat")):
        assert word in repr(panel) and word in assert_harmless(panel._repr_html_())


# tokens

@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("<>&'\"\n\u202e\x00 ")), max_size=60))
def test_no_text_becomes_markup(text):
    assert_harmless(tokens_html(TOKENIZER, text))
    assert_harmless(message_html("you", text, text))
    assert_harmless(message_html(text, [{"type": "python", "text": text}, {"type": "python_output", "text": text}, {"type": "text", "text": text}]))
    for token in TOKENIZER.encode(text):
        assert name_token(TOKENIZER, token).isprintable()


def test_no_token_becomes_markup(model):
    tags = Tokenizer([*TOKENIZER.tokens, b"<i", b"<im", b"<img"])
    assert b"<img" in [tags.decode_bytes([i]) for i in tags.encode(HOSTILE)]
    assert_harmless(tokens_html(tags, HOSTILE))
    likely = torch.arange(tags.vocab_size, dtype=torch.float32)
    assert "<img" in assert_harmless(distribution_html(tags, likely))
    names = [name_token(tags, i) for i in tags.encode(HOSTILE)]
    assert_harmless(attention_html(names, torch.full((len(names), len(names)), 0.1), 3))


def test_tokens_are_named():
    ids = TOKENIZER.encode("caf\u00e9 \n")
    assert [name_token(TOKENIZER, i) for i in ids[-4:]] == ["c3", "a9", "\u00b7", "\u21b5"]
    assert name_token(TOKENIZER, TOKENIZER.bos) == "<|bos|>" and name_token(TOKENIZER, 0) == "\\x00"


def test_tokens_follow_the_text(live):
    panel = explore_tokens({"ours": TOKENIZER, "bytes": Tokenizer(TOKENIZER.tokens[:256])}, "the cat")
    assert "4 tokens, 7 bytes" in pages(panel)
    find(panel, ipywidgets.Textarea, "Text").value = HOSTILE
    assert HOSTILE not in pages(panel) and f"{len(HOSTILE)} bytes" in assert_harmless(pages(panel))
    find(panel, ipywidgets.Textarea, "Text").value = ""
    assert "0 tokens, 0 bytes" in pages(panel)
    find(panel, ipywidgets.Textarea, "Text").value = "x" * 3000
    assert "and 2,600 more" in pages(panel)


# attention

def naive_weights(model, ids):
    "Every head's weights and the logits, in float64, position by position."
    def norm(x):
        return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def turn(x):  # (T, heads, D)
        half = x.size(-1) // 2
        angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[..., :half], x[..., half:]
        return norm(torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], dim=-1))
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    c, x, found = model.config, norm(w["transformer.wte.weight"][ids]), []
    for i in range(c.depth):
        parts = (F.linear(norm(x), w[f"transformer.h.{i}.attn.c_{n}.weight"]).view(len(ids), -1, c.width // c.heads) for n in "qkv")
        q, k, v = (turn(t) if n < 2 else t for n, t in enumerate(parts))
        weights = torch.zeros(c.heads, len(ids), len(ids), dtype=torch.float64)
        y = torch.zeros(len(ids), c.heads, c.width // c.heads, dtype=torch.float64)
        for h in range(c.heads):
            g = h * c.kv_heads // c.heads
            for t in range(len(ids)):
                weights[h, t, : t + 1] = torch.softmax(k[: t + 1, g] @ q[t, h] / math.sqrt(c.width // c.heads), dim=0)
                y[t, h] = weights[h, t, : t + 1] @ v[: t + 1, g]
        found.append(weights)
        x = x + F.linear(y.flatten(1), w[f"transformer.h.{i}.attn.c_proj.weight"])
        x = x + F.linear(F.linear(norm(x), w[f"transformer.h.{i}.mlp.c_fc.weight"]).relu().square(), w[f"transformer.h.{i}.mlp.c_proj.weight"])
    return torch.stack(found), 15 * torch.tanh(F.linear(norm(x), w["lm_head.weight"]) / 15)


def test_attention_weights_are_the_models(model):
    ids = [TOKENIZER.bos, *TOKENIZER.encode("the dog sat on the cat")]
    expected, logits = naive_weights(model, ids)
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids]))[0].double(), logits, atol=1e-4)
    weights = attention_weights(model, ids)
    assert weights.shape == (3, model.config.heads, len(ids), len(ids)) and torch.allclose(weights.double(), expected, atol=1e-5)


def test_hooks_are_taken_away(model):
    attention_weights(model, [1, 2])
    with pytest.raises(UserError, match="don't fit"):
        attention_weights(model, [1] * 65)
    assert not any(block.attn._forward_hooks for block in model.transformer.h)


def test_attention_follows_its_controls(model, live):
    panel = browse_attention(model, TOKENIZER, "the cat sat")
    token, text, seen = find(panel, ipywidgets.IntSlider, "Token"), find(panel, ipywidgets.Textarea, "Text"), {pages(panel)}
    for control, value in ((find(panel, ipywidgets.IntSlider, "Layer"), 2), (find(panel, ipywidgets.IntSlider, "Head"), 1), (token, 3), (text, HOSTILE)):
        control.value = value
        assert pages(panel) not in seen
        assert_harmless(pages(panel))
        seen.add(pages(panel))
    assert token.max == min(48, len(TOKENIZER.encode(HOSTILE)) + 1) - 1
    token.value = token.max
    text.value = ""  # only the token that begins a text is left
    assert token.value == token.max == 0 and "looks most at" in pages(panel)
    text.value = "the cat " * 100
    assert token.max == 47


# what comes next

@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=2, max_size=40), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([None, 0, 1, 3, 100]), st.floats(0.05, 1))
def test_distribution(values, temperature, top_k, top_p):
    logits = torch.tensor(values)
    p = next_token_distribution(logits, temperature, top_k, top_p)
    assert abs(p.sum().item() - 1) < 1e-5 and logits[p.argmax()] == logits.max() and p.min() >= 0
    assert p.count_nonzero() <= (top_k or len(values)) and -1e-6 <= entropy_bits(p) <= math.log2(len(values)) + 1e-4
    if temperature == 0:
        assert p.max() == 1
        return
    whole = next_token_distribution(logits, temperature, top_k)
    kept = whole[p > 0]
    assert kept.sum() >= top_p - 1e-5  # enough
    assert len(kept) == 1 or kept.sum() - kept.min() < top_p + 1e-5  # and not one too many
    assert torch.allclose(p[p > 0], kept / kept.sum(), atol=1e-5)
    assert kept.min() >= whole[p == 0].max() if (p == 0).any() else True


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, None, 1.0), (0.4, None, 1.0), (2.0, 5, 1.0), (0.7, 1, 1.0), (0, None, 1.0), (1.0, 500, 1.0),
                                                       (1.0, None, 0.9), (2.0, 20, 0.6), (0.4, None, 0.05), (1.0, 500, 0.99), (0, None, 0.5)])
def test_distribution_is_what_the_engine_draws_from(temperature, top_k, top_p):
    logits, n = 3 * torch.randn(60, generator=torch.Generator().manual_seed(1)), 10_000
    drawn = sample_tokens(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, temperature, top_k, top_p)  # an even grid instead of chance
    assert (torch.bincount(drawn, minlength=60) / n - next_token_distribution(logits, temperature, top_k, top_p)).abs().max() < 2 / n


def test_dials_cut_and_draw(model, live):
    panel = sample_next(model, TOKENIZER, "the cat")
    top_k, heat = find(panel, ipywidgets.SelectionSlider, "Top-k"), find(panel, ipywidgets.FloatSlider, "Temperature")
    assert pages(panel).count(">cut<") == 0
    top_k.value = 3
    assert pages(panel).count(">cut<") == 17 and "3 of" in pages(panel)
    top_k.value = 0
    heat.value = 0
    assert pages(panel).count(">cut<") == 19 and "0.00 bits, and 1 of" in pages(panel)
    heat.value, top_p = 1, find(panel, ipywidgets.FloatSlider, "Top-p")
    top_p.value = 0.05
    assert pages(panel).count(">cut<") > 10


def test_drawing_goes_on_and_starts_again(model, live):
    def words(panel):
        return Page(pages(panel).partition("<table")[0].rpartition("<p")[0]).text  # above the bars
    panel = sample_next(model, TOKENIZER, "the cat", seed=4)
    draw, again = find(panel, ipywidgets.Button, "Draw a token"), find(panel, ipywidgets.Button, "Start again")
    find(panel, ipywidgets.FloatSlider, "Temperature").value = 0
    for _ in range(5):
        draw.click()
    first = words(panel)
    ids = [TOKENIZER.bos, *TOKENIZER.encode("the cat")]
    greedy = [token for (token,), _ in Engine(model, TOKENIZER).generate(ids, max_tokens=5, temperature=0, tools=False)]
    assert first == "the cat" + "".join(TOKENIZER.decode([i]) for i in greedy)
    again.click()
    assert words(panel) == "the cat"
    for _ in range(70):  # past the context
        draw.click()
    assert words(panel).startswith(first)
    find(panel, ipywidgets.Text, "Text").value = HOSTILE
    assert HOSTILE in assert_harmless(pages(panel))


def test_special_tokens_are_drawn_as_text(model):
    logits = torch.full((TOKENIZER.vocab_size,), -9.0)
    logits[TOKENIZER.bos :] = 9.0
    page = distribution_html(TOKENIZER, logits)
    assert set(SPECIAL_TOKENS) <= set(assert_harmless(page).replace("|>", "|>\n").replace("<|", "\n<|").split("\n"))


# chat

class Script:
    "An engine whose model says what it is told, and that remembers how it was asked."

    def __init__(self, text, model, seconds=0.0):
        self.tokenizer, self.model, self.seconds, self.asked = TOKENIZER, model, seconds, []
        self.ids = TOKENIZER.encode(text) if isinstance(text, str) else text

    def generate(self, prompt, **settings):
        self.asked.append((TOKENIZER.decode(prompt), settings))
        for token in self.ids:
            time.sleep(self.seconds)
            yield (token,), (True,)


def chat(work, *engines):
    "Run a conversation with a live panel inside of an event loop."
    async def main():
        panel = chat_panel({f"model {i}": (lambda engine=engine: engine) for i, engine in enumerate(engines)})
        await work(panel)
        return panel
    return asyncio.run(main())


async def say(panel, text):
    find(panel, ipywidgets.Text, "You").value = text
    panel.entry._handle_custom_msg({"event": "submit"}, [])  # what the browser sends on Enter
    await panel.task


def test_chat_replies_and_shows_tools(model, live):
    s = TOKENIZER.special
    call = [s["<|python_start|>"], *TOKENIZER.encode("1+2"), s["<|python_end|>"], s["<|output_start|>"], *TOKENIZER.encode("3"), s["<|output_end|>"],
            *TOKENIZER.encode("the mat")]

    async def work(panel):
        await say(panel, HOSTILE)
        assert panel.entry.value == "" and not panel.ask.disabled and panel.halt.disabled
        await say(panel, "   ")
    panel = chat(work, Script(call, model))
    text = assert_harmless(pages(panel))
    assert HOSTILE in text and "calculator: 1+2" in text and "result: 3" in text and "the mat" in text
    assert len(panel.transcript.children) == 2


def test_chat_streams_and_stops(model, live):
    async def work(panel):
        panel.entry.value = "go"
        panel.send()
        seen = []
        while not panel.halt.disabled or not seen:
            await asyncio.sleep(0)
            seen.append(pages(panel))
            panel.send()  # while a reply is being written, nothing is asked
            if len(seen) == 5:
                panel.stop()
        assert len(set(seen)) >= 4  # it grew
        await panel.task
        reply = panel.session.messages[-1]["content"][0]["text"]
        assert "the cat sat on the mat".startswith(reply) and 0 < len(reply) < 22 and "[stopped]" in pages(panel)
        assert Page(panel.transcript.children[1].value).text == f"model 0{reply} [stopped]"
        await say(panel, "on")
    panel = chat(work, Script("the cat sat on the mat", model, seconds=0.05))
    assert [m["role"] for m in panel.session.messages] == ["user", "assistant"] * 2 and "[stopped]" not in panel.transcript.children[-1].value


def test_another_model_goes_on_with_the_conversation(model, live):
    one, two = Script("the cat", model), Script("the dog", model)

    async def work(panel):
        await say(panel, "a")
        panel.source.value, panel.heat.value = "model 1", 1.5
        await say(panel, "b")
        panel.reset()
        assert panel.transcript.children == ()
        await say(panel, "c")
    chat(work, one, two)
    assert len(one.asked) == 1 and two.asked[0][1]["temperature"] == 1.5
    assert "the cat" in two.asked[0][0] and "the cat" not in two.asked[1][0]


def test_chat_says_what_can_not_be_done(model, live):
    async def work(panel):
        await say(panel, "x" * 500)
        assert "leaves no room" in pages(panel) and panel.session.messages == [] and not panel.ask.disabled
        await say(panel, "sat")
        assert len(panel.session.messages) == 2
    chat(work, Engine(model, TOKENIZER))


# a run that is being trained

def write_run(name, steps=20, loss=2.0, **settings):
    run = Run(name)
    run.log("base", "config", steps=steps, floor=0.2, settings={"run": name, "batch_tokens": 100, **settings})
    for step in range(1, steps + 1):
        run.log("base", "step", step=step, tokens=100 * step, seconds=0.5 * step, loss=loss + 1 / step, tokens_per_second=200.0)
    run.log("base", "eval", step=steps, tokens=100 * steps, seconds=0.5 * steps, bpb=loss / 4)
    return run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_file_may_be_cut_anywhere(tmp_path_factory, numbers, cuts):
    run = Run("r")
    reader = MetricsReader(run)
    reader.path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    records, news = [{"stage": "base", "kind": "step", "step": n, "name": "\u00e9"} for n in numbers], 0
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    with open(reader.path, "wb", buffering=0) as file:
        while data:
            cut = cuts[news % len(cuts)]
            file.write(data[:cut])
            data, news = data[cut:], news + 1
            reader.read()
            assert reader.records == records[: len(reader.records)]
    reader.read()
    assert reader.records == records and not reader.read()


def test_a_run_that_resumes_is_read_again(home):
    run = write_run("a")
    reader = MetricsReader(run)
    assert reader.read()
    run.rewind("base", 10)
    assert reader.read() and reader.records == run.records() and len(select_steps(reader.records)) == 10
    run.log("base", "step", step=11, name="before")
    assert reader.read()
    run.rewind("base", 10)
    for step in range(11, 40):  # at the next look the file is longer than it was
        run.log("base", "step", step=step, name="resumed")
    assert reader.read() and reader.records == run.records()
    assert not MetricsReader(Run("absent")).read()


def select_steps(records):
    return [r for r in records if r["kind"] == "step"]


def test_points_are_smoothed_and_few():
    records = [{"stage": "base", "kind": "step", "step": i, "tokens": i, "loss": 1.0} for i in range(1, 5001)]
    points = stage_points(records, "base")[LOSS]
    assert len(points) <= 1000 and points[-1] == (5000, 1.0)
    rl = [{"stage": "rl", "kind": "step", "step": 1, "tokens": 9, "reward": 0.5}, {"stage": "rl", "kind": "eval", "step": 1, "tokens": 16, "accuracy": 0.25}]
    assert stage_points(rl, "rl") == {"mean reward": [(1, 0.5)], "held-out accuracy": [(1, 0.25)]}


def test_following_and_its_end(home, live):
    run = write_run("a", steps=5)

    async def wait(condition):
        for _ in range(2000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("nothing happened")

    async def main():
        panel = watch_run("a", every=0.01)
        assert "step 5 of 5" in pages(panel)
        run.log("base", "step", step=6, tokens=600, seconds=3.0, loss=1.5, tokens_per_second=200.0)
        await wait(lambda: "step 6 of 5, loss 1.500" in pages(panel))
        panel.on.value = False  # cleared: nobody looks any more
        await wait(panel.task.done)
        run.log("base", "step", step=7, tokens=700, seconds=3.5, loss=1.4, tokens_per_second=200.0)
        await asyncio.sleep(0.05)
        assert "step 7" not in pages(panel)
        panel.on.value = True
        await wait(lambda: "step 7" in pages(panel))
        other = watch_run("a", every=0.01)  # takes over
        await wait(panel.task.done)
        assert not panel.on.value and not other.task.done()
        other.close()
        await wait(other.task.done)
        assert other.task.cancelled() and len(asyncio.all_tasks()) == 1
    asyncio.run(main())


def test_silence_is_reported_and_damage_is_named(home, live, monkeypatch):
    run, ahead = write_run("a", steps=5), [0]
    run.log("base", "config", steps=50)
    monkeypatch.setattr(widgets, "time", SimpleNamespace(time=lambda: time.time() + ahead[0], monotonic=time.monotonic))
    monkeypatch.setattr(widgets.Watcher, "patience", 0.05)

    async def wait(words):
        for _ in range(2000):
            if words in pages(panel):
                return
            await asyncio.sleep(0.005)
        raise AssertionError(pages(panel)[:300])

    async def main():
        nonlocal panel
        panel = watch_run("a", every=0.01)
        assert "left" in pages(panel) and "last heard of" not in pages(panel)
        ahead[0] = 600  # nothing was written for ten minutes
        await wait("last heard of 10 min")
        whole = run.metrics.read_bytes()
        run.metrics.write_bytes(whole + b"{damaged}\n")
        await wait("metrics.jsonl is damaged")
        run.metrics.write_bytes(whole)
        run.log("base", "step", step=6, tokens=600, seconds=3.0, loss=1.5, tokens_per_second=200.0)
        await wait("step 6 of 50, loss 1.500")
        panel.close()
    panel = None
    asyncio.run(main())


@pytest.mark.parametrize("line", [b"{damaged}", b"[]", b'{"kind": "step"}', b"\xff", b"[" * 100_000])
def test_a_damaged_line_is_named_until_it_is_repaired(home, line):
    run = write_run("a", steps=2)
    reader, whole = MetricsReader(run), run.metrics.read_bytes()
    assert reader.read()
    before = list(reader.records)
    run.metrics.write_bytes(whole + line + b"\n")
    for _ in range(2):
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            reader.read()
    assert reader.records == before
    run.metrics.write_bytes(whole + b'{"stage": "base", "kind": "summary"}\n')
    assert reader.read() and reader.records == run.records()


def test_no_loop_no_follower(home, live):
    write_run("a")
    assert watch_run("a").task is None


def test_absent_runs_are_named(home):
    with pytest.raises(UserError, match="nanochat run"):
        watch_run()
    with pytest.raises(UserError, match="nanochat run"):
        compare_runs()
    write_run("a")
    with pytest.raises(UserError, match="there is no run 'b'"):
        compare_runs(["a", "b"])


# several runs

def test_curves_against_costs(home):
    records = write_run("a", steps=4).records()
    assert [x for x, _ in curve_points(records, "base", LOSS, "seconds")] == [0.5, 1.0, 1.5, 2.0]
    assert curve_points(records, "base", LOSS)[0] == (100, 3.0) and curve_points(records, "base", BPB, "step") == [(4, 0.5)]
    assert curve_points(records, "mid", LOSS) == [] and curve_points(records, "base", "reward") == []
    rl = [{"stage": "rl", "kind": "step", "step": s, "tokens": 10 * s, "seconds": s, "reward": 0.5} for s in (1, 2, 3)]
    assert [x for x, _ in curve_points(rl, "rl", "reward")] == [10, 30, 60]  # each record has its own step's tokens


def test_what_differs_and_what_came_out(home):
    one, two = (write_run(name, width=width).records() for name, width in (("a", 1), ("b", 2)))
    score = {"stage": "eval", "kind": "score", "checkpoint": 1, "task": "sums", "low": 0.1, "high": 0.3, "count": 9, "chance": 0}
    one += [{**score, "source": "sft", "accuracy": 0.2}, {**score, "source": "base", "accuracy": 0.15}]
    assert differing_settings({"a": one, "b": two}) == [["base.width", 1, 2]]
    assert compare_results({"a": one, "b": two}) == [["base: bits per byte", "0.5000", "0.5000"], ["sums", "20% (10% to 30%), sft", None]]
    one.append({**score, "source": "base", "task": HOSTILE, "accuracy": 0.15})
    assert HOSTILE in assert_harmless(compare_html({"a": one, "b": two}))


def test_comparing_follows_its_controls(home, live):
    write_run("a", width=1)
    write_run("b", width=2)
    panel = compare_runs()
    runs, seen = find(panel, ipywidgets.SelectMultiple, "Runs"), {pages(panel)}
    assert set(runs.value) == {"a", "b"} and "base.width" in pages(panel)
    for label, value in (("Curve", BPB), ("Against", "seconds"), ("Stage", "mid")):
        find(panel, ipywidgets.Dropdown, label).value = value
        assert pages(panel) not in seen
        seen.add(pages(panel))
    assert "Nothing of this in" in pages(panel)
    runs.value = ()
    assert "Choose a run" in pages(panel)


def test_drawings_fit_a_page():
    import matplotlib.pyplot as plt

    open_before = plt.get_fignums()

    def draw():
        figure, ax = plt.subplots()
        ax.set_title(HOSTILE, parse_math=False)
        return figure
    svg = figure_html(draw, HOSTILE)
    assert_harmless(svg)
    assert svg.startswith("<svg ") and "currentColor" in svg and INK not in svg and "\n*{" not in svg and ">*{" not in svg
    assert plt.get_fignums() == open_before and plt.rcParams["text.color"] != INK


def test_a_real_run(demo_run, still):
    for panel in (watch_run(), compare_runs(), chat_panel(run_engines(demo_run), ["Hello!"])):
        assert_harmless(panel.html)
        assert repr(panel)
    assert list(run_engines(demo_run)) == ["sft", "mid", "base"]
    assert "is done" in repr(watch_run("demo")) and "bits per byte" in repr(compare_runs())
