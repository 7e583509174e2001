"""The chat page in a real browser, before the real server with a finished run of the demo preset."""
import json
import math
import os
import re
import shutil
import subprocess
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import NANOCHAT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SOURCES = ["base", "mid", "sft"]  # of the demo run
COMPLETIONS = "**/v1/chat/completions"
SERIOUS = ("serious", "critical")

# A network that hands over as many events as a test allows, however fast the model is.
HELD = """(() => {
  const real = window.fetch;
  window.allowed = 5;
  window.fetch = async (url, options = {}) => {
    const response = await real(url, options);
    if (!String(url).endsWith("completions") || !response.ok) return response;
    const events = (await response.text()).split(/(?<=\\n\\n)/), encoder = new TextEncoder();
    let passed = 0;
    return new Response(new ReadableStream({async pull(controller) {
      while (passed >= window.allowed && !options.signal.aborted) await new Promise(done => setTimeout(done, 10));
      if (options.signal.aborted) controller.error(options.signal.reason);
      else if (passed < events.length) controller.enqueue(encoder.encode(events[passed++]));
      else controller.close();
    }}, {highWaterMark: 0}));
  };
})()"""


@pytest.fixture(scope="module")
def browser():
    "Chromium; without one the tests are skipped, and fail in CI."
    if CHROMIUM is None and os.environ.get("CI"):
        pytest.fail("CI must have a Chromium")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(base, demo):
    "The address of `nanochat serve`."
    assert demo.returncode == 0, demo.stdout + demo.stderr
    process = subprocess.Popen([NANOCHAT, "serve", "--run", "demo", "--port", "0"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"})
    try:
        line = process.stdout.readline()
        assert "http://" in line, line
        yield re.search(r"http://\S+", line)[0].rstrip("/")
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def visit(browser, server):
    "Opens the page in a fresh browser profile; afterwards nothing may have gone wrong or elsewhere."
    visits = []

    def visit(kept=None, allow_errors=False, held=False, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(15_000)
        page, seen = context.new_page(), SimpleNamespace(requests=[], errors=[], allow=allow_errors)
        page.on("request", lambda request: seen.requests.append(request))
        page.on("console", lambda message: message.type in ("error", "warning") and seen.errors.append(message.text))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        store = json.dumps(json.dumps({"settings": {"temperature": 0.7, "top_k": 50, "max_tokens": 30, "seed": 1}, **(kept or {})}))
        page.add_init_script(f"localStorage['nanochat.1'] ??= {store}")
        if held:
            page.add_init_script(HELD)
        page.goto(server)
        page.locator("#stages label").first.wait_for()
        visits.append((context, seen))
        page.asked = lambda: [json.loads(r.post_data) for r in seen.requests if r.url.endswith("/v1/chat/completions")]
        return page

    yield visit
    for context, seen in visits:
        context.close()
        assert {request.url.split("/v1")[0].rstrip("/").removesuffix("/favicon.ico") for request in seen.requests} == {server}
        assert not seen.errors or seen.allow, seen.errors


def finished(page):
    "Wait until all replies are there."
    from playwright.sync_api import expect

    expect(page.locator(".reply").last).to_be_visible()
    expect(page.locator(".writing")).to_have_count(0, timeout=30_000)
    return page


def ask(page, text):
    page.fill("#message", text)
    page.press("#message", "Enter")
    return finished(page)


def words(page):
    "The replies as they are shown."
    return page.locator(".words").all_inner_texts()


def fact(text, p, kind="text", sampled=True, **others):
    "What the server tells of a token: its probability, and those of others."
    def entry(text, p):
        return {"token": text, "bytes": list(text.encode()), "logprob": math.log(p)}
    top = sorted([(text, p), *others.items()], key=lambda pair: -pair[1])
    return {**entry(text, p), "top_logprobs": [entry(*pair) for pair in top], "nanochat": {"kind": kind, "sampled": sampled}}


TOKENS = [fact("The", 0.5, A=0.25, One=0.125), fact(" cat", 0.01, dog=0.6), fact("<|python_start|>", 0.9, "python"), fact("1+1", 0.8, "python"),
          fact("<|python_end|>", 0.99, "python"), fact("2", 0.1, "python_output", False), fact(" sat", 0.999, lay=0.0005)]


def record(*deltas, reason="stop", **first):
    "A stream as the server would send it; a delta may be a text, a pair of kind and text, or a token's facts."
    def chunk(delta, finish=None, facts=None, **more):
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": facts and {"content": [facts]}}
        return {"object": "chat.completion.chunk", "choices": [choice], **more}
    def read(delta):
        if isinstance(delta, str):
            return chunk({"content": delta})
        if isinstance(delta, tuple):
            return chunk({"nanochat": {"kind": delta[0], "text": delta[1]}})
        kind, text = delta["nanochat"]["kind"], "" if delta["token"].startswith("<|") else delta["token"]
        return chunk({"content": text} if kind == "text" else {"nanochat": {"kind": kind, "text": text}}, None, delta)
    chunks = [chunk({"role": "assistant", "content": ""}, **first), *map(read, deltas), chunk({}, reason)]
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def play(page, *deltas, **first):
    "Answer the page's questions with a recorded stream."
    page.route(COMPLETIONS, lambda route: route.fulfill(body=record(*deltas, **first), content_type="text/event-stream"))


def fits(page):
    "Whether nothing is wider than the screen."
    return page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def complete(server, **request):
    "The server's own answer."
    call = urllib.request.Request(f"{server}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(call, timeout=60))


def test_an_empty_page_says_whom_you_talk_to(visit):
    page = visit()
    assert page.locator("#stages label").all_inner_texts() == [*SOURCES, "side by side"]
    assert page.locator("#stages input:checked").input_value() == "sft"
    hello = page.locator(".hello").inner_text()
    assert "demo" in hello and "nothing of the real world" in hello and re.search(r"\d+ thousand parameters, a context of \d+ tokens", hello)
    page.locator(".starters button").first.click()
    assert page.asked()[0]["messages"] == [{"role": "user", "content": "Hello! Who are you?"}]
    finished(page)


def test_a_reply_is_the_servers(visit, server):
    page = ask(visit(), "Tell me a story.")
    whole = complete(server, model="demo/sft", messages=[{"role": "user", "content": "Tell me a story."}], temperature=0.7, top_k=50, max_tokens=30, seed=1)
    kept = page.evaluate("JSON.parse(localStorage['nanochat.1']).chats[0].turns[0].replies[0]")
    assert kept["parts"] == whole["choices"][0]["message"]["nanochat"]["parts"]
    assert kept["reason"] == whole["choices"][0]["finish_reason"] and kept["count"] == whole["usage"]["completion_tokens"]
    if kept["count"]:  # so small a model may end its reply at once
        assert f"{kept['count']} token" in page.locator(".reply .actions").inner_text()
    assert not page.asked()[0].keys() & {"logprobs", "top_logprobs"}


def test_the_reply_grows_and_is_announced_once(visit):
    page = visit(held=True)
    play(page, *(f"word{i} " for i in range(20)))
    page.evaluate("window.heard = []; new MutationObserver(() => heard.push(spoken.textContent)).observe(spoken, {childList: true, characterData: true, subtree: true})")
    page.fill("#message", "Count.")
    page.press("#message", "Enter")
    page.locator(".writing", has_text="word3").wait_for()
    assert "word4" not in words(page)[0] and page.locator(".reply").get_attribute("aria-busy") == "true"
    assert page.locator("#send").inner_text() == "Stop"
    page.evaluate("window.allowed = Infinity")
    finished(page)
    assert words(page)[0].split() == [f"word{i}" for i in range(20)]
    assert page.evaluate("heard") == ["sft: " + words(page)[0].strip()]
    assert page.locator("#send").inner_text() == "Send"


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(visit, how):
    page = visit(held=True)
    play(page, *(f"word{i} " for i in range(20)))
    page.fill("#message", "Count.")
    page.press("#message", "Enter")
    page.locator(".writing", has_text="word3").wait_for()
    page.click("#send") if how == "button" else page.keyboard.press("Escape")
    finished(page)
    assert words(page)[0].split() == ["word0", "word1", "word2", "word3"]
    assert "stopped" in page.locator(".reply .actions").inner_text()
    page.unroute(COMPLETIONS)
    page.evaluate("window.allowed = Infinity")
    ask(page, "And now?")  # what was written so far belongs to the conversation
    assert page.asked()[1]["messages"][1]["content"][0]["text"].split() == ["word0", "word1", "word2", "word3"]


def test_again(visit):
    page = ask(visit(kept={"settings": {"temperature": 1, "top_k": 0, "max_tokens": 20, "seed": ""}}), "Hello!")
    page.get_by_role("button", name="Again", exact=True).click()
    finished(page)
    first, second = page.asked()
    assert first["messages"] == second["messages"] and first["seed"] != second["seed"]
    assert page.locator(".turn").count() == 1


def test_edit(visit):
    page = visit()
    for text in ("One?", "Two?", "Three?"):
        ask(page, text)
    page.locator(".you").nth(1).get_by_text("Edit").click()
    page.keyboard.press("Escape")  # changed my mind
    assert page.locator(".turn").count() == 3
    page.locator(".you").nth(1).get_by_text("Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("Four?")
    page.keyboard.press("Enter")
    finished(page)
    assert [m["content"] for m in page.asked()[-1]["messages"] if m["role"] == "user"] == ["One?", "Four?"]
    assert page.locator(".turn").count() == 2


def test_side_by_side(visit):
    page = visit()
    page.click("text=side by side")
    ask(page, "What is 27 + 45?")
    assert [h.split("\n")[0] for h in page.locator(".columns h2").all_inner_texts()] == SOURCES
    asked = page.asked()
    assert sorted(r["model"] for r in asked) == [f"demo/{s}" for s in SOURCES] and len({(r["seed"], str(r["messages"])) for r in asked}) == 1
    columns = [page.locator(".columns .reply").nth(i).bounding_box() for i in range(3)]
    assert columns[0]["y"] == columns[1]["y"] == columns[2]["y"] and columns[0]["x"] < columns[1]["x"] < columns[2]["x"]
    kept = {r["model"]: r["parts"] for r in page.evaluate("JSON.parse(localStorage['nanochat.1']).chats[0].turns[0].replies")}
    ask(page, "And 3 + 4?")
    for request in page.asked()[3:]:  # each stage remembers what it said itself
        assert request["messages"][1] == {"role": "assistant", "content": kept[request["model"]] or ""}
    page.locator("#stages label.mid").click()  # one conversation may go on with a single stage
    ask(page, "Thank you.")
    assert page.asked()[-1]["model"] == "demo/mid" and page.locator(".turn").last.locator(".reply").count() == 1


def test_token_view(visit, server):
    page = visit()
    play(page, "Good ", "morning.")
    ask(page, "Hello!")
    page.unroute(COMPLETIONS)
    page.click("#tokens")
    assert "not known" in page.locator(".reply .note").inner_text()  # it was written without
    page.get_by_role("button", name="Again", exact=True).click()
    finished(page)
    asked = page.asked()[1]
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 5)
    facts = complete(server, **{k: v for k, v in asked.items() if k not in ("stream", "stream_options")})["choices"][0]["logprobs"]["content"]
    assert [t.replace("\u21b5", "") for t in page.locator(".token").all_text_contents()] == [f["token"] for f in facts]
    play(page, *TOKENS)
    ask(page, "And now?")
    tokens = page.locator(".turn").last.locator(".token")
    assert tokens.all_text_contents() == [token["token"] for token in TOKENS]
    def alpha(i):
        color = tokens.nth(i).evaluate("node => getComputedStyle(node).backgroundColor")
        return float(re.search(r"([\d.e-]+)\)$", color)[1])
    assert alpha(1) > alpha(0) > alpha(3) > alpha(6)  # the less likely, the stronger; then what the tool put in
    assert [i for i in range(7) if "put" in tokens.nth(i).get_attribute("class").split()] == [5]
    tokens.nth(1).hover()
    page.locator("#card").wait_for()
    assert page.locator("#card li").all_inner_texts() == ["dog\n60%", "\u00b7cat\n1.0%"]
    page.locator("#card").hover()  # one can move onto it
    page.wait_for_timeout(400)
    assert page.locator("#card").is_visible()
    page.mouse.move(5, 5)
    page.locator("#card").wait_for(state="hidden")


def test_another_token_is_chosen_and_the_reply_goes_on(visit):
    page = visit(kept={"tokens": True})
    play(page, fact("Well", 0.9), *TOKENS[:2])  # the second has alternatives
    ask(page, "Hello!")
    page.unroute(COMPLETIONS)
    turn = page.locator(".turn").last
    before, asked = turn.locator(".token").all_text_contents(), page.asked()[-1]["messages"]
    for place in range(len(before)):  # the first place with an alternative that is text
        turn.locator(".token").nth(place).click()
        if page.locator("#card button").count():
            break
    page.locator("#card button").first.click()
    finished(page)
    after, begun = turn.locator(".token").all_text_contents(), page.asked()[-1]["messages"]
    assert after[:place] == before[:place] and after[place] != before[place]
    text = "".join(t for t in after[: place + 1] if not t.startswith("<|")).replace("\u21b5\n", "\n")
    assert begun == [*asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    assert "put" in turn.locator(".token").nth(place).get_attribute("class").split()
    assert page.evaluate("JSON.parse(localStorage['nanochat.1']).chats[0].turns.at(-1).replies[0].parts[0].text").startswith(text)


def test_a_tool_call_is_shown_as_one(visit):
    page = visit()
    play(page, "Let me ", "calculate. ", ("python", "27+"), ("python", "45"), ("python_output", "72"), "27 + 45 is 72.")
    ask(page, "What is 27 + 45?")
    assert page.locator(".tool code").inner_text() == "27+45" and page.locator(".tool samp").inner_text() == "72"
    assert "27 + 45 is 72." in words(page)[0] and page.locator(".tool").get_attribute("aria-label") == "Calculator"
    page.unroute(COMPLETIONS)
    ask(page, "And 1 + 1?")
    assert [part["type"] for part in page.asked()[1]["messages"][1]["content"]] == ["text", "python", "python_output", "text"]


def test_text_stays_text(visit):
    nasty = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script> **bold** &amp; [link](javascript:alert(1)) <|assistant_end|>'
    page = visit()
    play(page, nasty, ("python", nasty), ("python_output", nasty))
    ask(page, nasty)
    assert page.locator(".you p").inner_text().endswith(nasty) and words(page)[0].startswith(nasty)
    assert page.locator(".tool code").inner_text() == nasty and page.locator("#chats .open").inner_text() == nasty
    assert page.locator("#log img, #log script, #log a, #chats img, #chats script").count() == 0
    page.reload()
    assert words(page)[0].startswith(nasty) and page.evaluate("window.pwned") is None


def test_a_reload_keeps_everything(visit):
    page = ask(visit(), "First question")
    page.click("#new")
    page.click("text=side by side")
    page.click("#tokens")
    page.click("#settings")
    page.fill("#max_tokens", "12")
    page.click("text=Done")
    ask(page, "Second question")
    page.fill("#message", "a draft")
    shown = words(page)
    page.reload()
    page.locator("#stages label").first.wait_for()
    assert words(page) == shown and page.locator(".columns .reply").count() == 3
    assert page.input_value("#message") == "a draft" and page.locator("#stages input:checked").input_value() == "all"
    assert page.locator("#tokens").get_attribute("aria-pressed") == "true" and page.asked()[-1]["max_tokens"] == 12
    assert page.locator("#chats .open").all_inner_texts() == ["Second question", "First question"]
    page.click("text=First question")
    assert page.locator(".you p").inner_text().endswith("First question")
    other = page.context.new_page()  # a second tab, which has the conversation open
    other.goto(page.url)
    other.locator("#stages label").first.wait_for()
    ask(other, "In the other tab")
    page.locator("#chats .open", has_text="Second question").wait_for()
    other.close()
    page.evaluate("""() => { // the page was closed while a reply was being written
      const kept = JSON.parse(localStorage["nanochat.1"]);
      kept.chats.find(chat => chat.turns[0].text === "Second question").turns[0].replies[0].reason = "";
      localStorage["nanochat.1"] = JSON.stringify(kept);
    }""")
    page.reload()
    page.click("text=Second question")
    assert "stopped" in page.locator(".reply .actions").first.inner_text()
    page.click("text=First question")
    page.get_by_label("Delete: First question").click()
    assert page.locator("#chats .open").all_inner_texts() == ["Second question"]


def test_a_full_store_loses_the_oldest_conversation_only(visit):
    page = ask(visit(), "Old question")
    page.click("#new")
    page.evaluate("""() => { // as much as fits beside what is there
      let text = "x".repeat(2 ** 20);
      for (let i = 0; text; i++) try { localStorage["other" + i] = text } catch { text = text.slice(0, text.length / 2) }
    }""")
    play(page, "a long answer " * 20)
    ask(page, "New question")
    assert [chat["turns"][0]["text"] for chat in page.evaluate("JSON.parse(localStorage['nanochat.1']).chats")] == ["New question"]
    assert "a long answer" in words(page)[0]


def test_a_store_that_is_switched_off_loses_nothing_here(visit):
    page = visit()
    play(page, *TOKENS)
    page.evaluate("""() => { Storage.prototype.setItem = () => { throw new DOMException("no", "SecurityError") } }""")
    for text in ("First question", "Second question"):
        ask(page, text)
        page.click("#new")
    assert page.locator("#chats .open").all_inner_texts() == ["Second question", "First question"]


def test_the_servers_sentence_and_a_retry(visit):
    page = visit(allow_errors=True)
    ask(page, "word " * 600)
    assert "context" in page.locator(".error p").inner_text()
    busy = {"error": {"message": "too many requests are waiting", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
    page.route(COMPLETIONS, lambda route: route.fulfill(status=429, json=busy), times=1)
    page.click("#new")
    ask(page, "Hello!")
    assert page.locator(".error p").inner_text() == "too many requests are waiting"
    page.click("text=Try again")
    finished(page)
    assert page.locator(".error").locator("visible=true").count() == 0 and page.locator(".turn").count() == 1


def test_the_server_is_gone(visit):
    page = visit(allow_errors=True)
    page.route(COMPLETIONS, lambda route: route.abort())
    ask(page, "Are you there?")
    assert "does not answer" in page.locator(".reply .error").inner_text() and "Are you there?" in page.locator(".you").inner_text()
    page.unroute(COMPLETIONS)
    page.click("text=Try again")
    finished(page)
    assert page.locator(".reply .error").count() == 0
    play(page, "half an ans", reason=None)  # the stream breaks off
    ask(page, "And now?")
    assert words(page)[1] == "half an ans" and "ended before" in page.locator(".reply .error").inner_text()
    page.route("**/v1/models", lambda route: route.abort())
    page.fill("#message", "kept")
    page.reload()
    page.locator("#notice").wait_for()
    page.press("#message", "Enter")
    assert page.input_value("#message") == "kept"
    page.unroute("**/v1/models")
    page.click("#notice button")
    page.locator("#notice").wait_for(state="hidden")


def test_turns_that_were_dropped_are_mentioned(visit):
    page = visit()
    for _ in range(9):
        ask(page, "Tell me a story about a bear and a boat. " * 3)
        if page.locator(".note", has_text="no longer fit").count():
            break
    assert re.search(r"The oldest \d+ messages no longer fit", page.locator(".note").last.inner_text())


def luminance(page):
    r, g, b = (int(x) for x in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_dark_and_light(visit):
    assert luminance(visit(color_scheme="light")) > 200
    page = visit(color_scheme="dark")
    assert luminance(page) < 50 and page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.click("#theme")
    assert luminance(page) > 200
    page.reload()
    assert luminance(page) > 200


def test_phone(visit):
    page = visit(kept={"tokens": True, "stage": "all"}, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert fits(page)
    play(page, *TOKENS, "lantern" * 30)
    ask(page, "How do you spell " + "lantern" * 30)
    assert fits(page)
    boxes = [page.locator(".columns .reply").nth(i).bounding_box() for i in range(3)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
    page.locator(".token").last.tap()
    card = page.locator("#card").bounding_box()
    assert card["x"] >= 0 and card["x"] + card["width"] <= 360 and fits(page)
    page.tap("#tokens")
    page.tap("#menu")
    page.locator("#new:focus").wait_for()
    assert page.locator("#menu").get_attribute("aria-expanded") == "true"
    page.keyboard.press("Escape")
    page.locator("#new").wait_for(state="hidden")
    assert page.locator("#menu").get_attribute("aria-expanded") == "false"
    page.tap("#settings")
    assert fits(page) and page.locator("#panel").is_visible()


def test_keyboard_alone(visit):
    page = visit(kept={"tokens": True, "stage": "base"})
    play(page, *TOKENS)
    def active():
        return page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
    assert active() == "message"  # one can write at once; the skip link is the first of the page
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if active() == "skip":
            break
    assert active() == "skip" and page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert active() == "message"
    page.keyboard.type("Hello!")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Who are you?")
    page.keyboard.press("Enter")
    finished(page)
    assert page.asked()[0]["messages"][0]["content"] == "Hello!\nWho are you?" and active() == "message"
    page.locator("#stages input:checked").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#stages input:checked").input_value() == "mid" and active() != "BODY"
    seen = set()
    for _ in range(25):  # Tab leads to the tokens, which are one stop
        page.keyboard.press("Tab")
        seen.add(active())
        if "token" in active().split():
            break
    assert "token" in active().split() and {"tokens", "settings", "theme"} <= seen
    assert page.locator(".token").first.evaluate("node => node === document.activeElement")
    for key, place in (("End", 6), ("ArrowRight", 6), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        assert page.locator(".token").nth(place).evaluate("node => node === document.activeElement"), key
    page.keyboard.press("Enter")
    assert page.locator("#card button:focus").inner_text() == "dog\n60%"
    page.keyboard.press("Escape")
    token = page.locator(".token").nth(1)
    assert page.locator("#card").is_hidden() and token.evaluate("node => node === document.activeElement")
    assert page.locator(".token[tabindex='0']").count() == 1 and token.get_attribute("aria-label") == "cat, 1.0%"
    assert token.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"  # focus can be seen


def test_copy(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    play(page, "Let me see. ", ("python", "1+1"), ("python_output", "2"), "It is 2.")
    ask(page, "What is 1 + 1?")
    page.locator(".reply").get_by_text("Copy").click()
    page.locator(".reply").get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "Let me see. It is 2."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(visit, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page, axe = visit(color_scheme=scheme, allow_errors=True), Axe()

    def check(state):
        found = [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in axe.run(page).response["violations"] if v["impact"] in SERIOUS]
        assert not found, (state, found)

    check("empty")
    play(page, "Let me see. ", ("python", "1+1"), ("python_output", "2"), "It is 2.", nanochat={"dropped": 2})
    ask(page, "What is 1 + 1?")
    page.unroute(COMPLETIONS)
    ask(page, "word " * 600)
    check("chat")
    page.get_by_text("Edit").last.click()
    check("edit")
    page.click("#new")
    page.click("text=side by side")
    page.click("#tokens")
    play(page, *TOKENS)
    ask(page, "Hello!")
    page.locator(".token").first.click()
    check("side by side, token view")
    page.keyboard.press("Escape")
    page.click("#settings")
    check("settings")
