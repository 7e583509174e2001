"""The fast tokenizer against the one from scratch, on any text."""
import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.bpe import encode_bpe, train_bpe
from nanochat.common import UserError
from nanochat.conversation import parse_reply, render_conversation, render_prompt
from nanochat.tinyworld import write_documents
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = [d.text for d in islice(write_documents(1), 400)]
TOKENIZER = Tokenizer.train(TEXTS, 600)
TEXT = st.one_of(st.text(), st.text(alphabet="abc 019'.,\n\t\r\u00e9\u65e5"), st.sampled_from(TEXTS), st.lists(st.sampled_from(SPECIAL_TOKENS)).map(" ".join))


@settings(max_examples=10_000, deadline=None)
@given(TEXT)
def test_same_ids_as_from_scratch(text):
    ids = TOKENIZER.encode(text)
    assert ids == encode_bpe(text.encode("utf-8", "replace").decode(), TOKENIZER.tokens, TOKENIZER.pattern)
    assert TOKENIZER.decode(ids) == text.encode("utf-8", "replace").decode()
    assert sum(TOKENIZER.token_bytes[i] for i in ids) == len(text.encode("utf-8", "replace"))


def test_same_vocabulary_as_from_scratch():
    assert train_bpe(TEXTS[:60], 400) == Tokenizer.train(TEXTS[:60], 400 + len(SPECIAL_TOKENS)).tokens


def test_lone_surrogates_are_encoded():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


@settings(max_examples=1000, deadline=None)
@given(TEXT, TEXT)
def test_users_cannot_write_special_tokens(question, answer):
    ids, mask = render_conversation(TOKENIZER, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    assert [i for i in ids if i >= TOKENIZER.bos] == [TOKENIZER.special[f"<|{name}|>"] for name in
                                                     ("bos", "user_start", "user_end", "assistant_start", "assistant_end")]
    assert len(ids) == len(mask) and mask[0] == 0 and mask[-1] == 1
    start = ids.index(TOKENIZER.special["<|assistant_start|>"])
    assert not any(mask[: start + 1]) and all(mask[start + 1 :])
    assert "".join(part["text"] for part in parse_reply(TOKENIZER, ids[start + 1 : -1])) == answer.encode("utf-8", "replace").decode()


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_reply_can_be_parsed(ids):
    assert all(part["type"] in ("text", "python", "python_output") for part in parse_reply(TOKENIZER, ids))


def test_a_system_message_joins_the_first_question():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render_prompt(TOKENIZER, messages) == render_prompt(TOKENIZER, [{"role": "user", "content": "Be brief.\n\nHi"}])


def test_saved_and_loaded_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == TOKENIZER.hash and again.tokens == TOKENIZER.tokens and again.special == TOKENIZER.special


@pytest.mark.parametrize("change", [
    lambda b: b.pop("tokens"), lambda b: b["tokens"].pop(5), lambda b: b.update(pattern="("), lambda b: b.update(format=2),
    lambda b: b["tokens"].append(b["tokens"][300]), lambda b: b.update(tokens=[5]), lambda b: b.update(special=["<|bos|>"]),
])
def test_damaged_files_are_refused(tmp_path, change):
    path = TOKENIZER.save(tmp_path)
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
