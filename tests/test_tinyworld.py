"""The tiny world at length: what its notebook shows on hundreds of texts is held here on thousands."""

import itertools
import random
import re
from collections import Counter

import pytest

from nanochat import tinyworld
from nanochat.common import UserError
from nanochat.tinyworld import Reader, World, check_answer, check_story, is_held_out, word_list, write_conversations, write_documents, write_items


@pytest.fixture(scope="module")
def world() -> World:
    return tinyworld.load_world()


def texts_of(talk: tinyworld.Talk) -> list[str]:
    "What is said in a conversation; a tool call is written as its expression."
    parts = [part for m in talk.messages for part in ([m["content"]] if isinstance(m["content"], str) else [p["text"] for p in m["content"]])]
    return [re.split(r"\n- |\nQuestion", part)[0] for part in parts]


def story_triple(world: World, text: str) -> list[tuple[str, ...]]:
    "Hero, object and place of the story in a text, if there is one; what stands around it is skipped."
    for piece in text.split("\n\n"):
        reader = Reader(world)
        reader.read(piece.removeprefix("Listen. "))
        if {"a", "o", "p"} <= set(reader.players):
            return [tuple(reader.players[part][""] for part in "aop")]
    return []


def scene_triples(world: World, text: str) -> list[tuple[str, ...]]:
    "What each person in a scene of short sentences has, and where they are, at first."
    first: dict[str, dict[str, str]] = {}
    tables = {name: set(word_list(world, name)) for name in ("person", "toy", "place")}
    for sentence in re.split(r"\. |\n", text):
        words = re.findall(r"[\w-]+", sentence)
        person = next((word for word in words if word in tables["person"]), None)
        for table in ("toy", "place"):
            for word in [word for word in words if word in tables[table]][:1]:
                first.setdefault(person, {}).setdefault(table, word)
    return [(person, seen["toy"], seen["place"]) for person, seen in first.items() if person and len(seen) == 2]


def combinations(world: World, text: str) -> list[tuple[str, ...]]:
    "The combinations in a text which the hold-out is about."
    found = [tuple(row.replace(" ", "")) for row in re.findall(r"\b[a-z](?: [a-z]\b){2,}", text)]
    found += re.findall(r"(?<![\d.])(\d+) ?[-+*] ?(\d+)", text)
    if len(text) > 60 and not found:
        found += story_triple(world, text) or scene_triples(world, text)
    return found


@pytest.mark.parametrize("split", ["train", "test"])
def test_nothing_held_out_in_training(world: World, split: str):
    "20,000 documents and conversations of each split, read by code that knows nothing of the writer."
    documents = (document.text.partition("\nQuestion")[0] for document in write_documents(17, split) if document.kind != "dialogue")
    talks = (text for talk in write_conversations(17, split) for text in texts_of(talk))
    found = Counter()
    for text in itertools.chain(itertools.islice(documents, 10_000), itertools.islice(talks, 20_000)):
        for combination in combinations(world, text):
            found[is_held_out(combination)] += 1
    assert sum(found.values()) > 15_000
    assert found[split == "train"] == 0, found


def test_every_story_is_accepted(world: World):
    stories = [document.text for document in itertools.islice(write_documents(5, kinds={"story": 1}), 2000)]
    assert not [story for story in stories if check_story(story)]
    assert len(set(stories)) == len(stories)


def test_damaged_stories_are_refused(world: World):
    "Names, objects and pronouns exchanged one at a time."
    dice = random.Random(1)
    stories = [document.text for document in itertools.islice(write_documents(6, kinds={"story": 1}), 400)]
    for table, least in (("person", 0.93), ("toy", 0.93)):
        words, refused = word_list(world, table), []
        for story in stories:
            hit = dice.choice([m for m in re.finditer(r"[\w-]+", story) if m[0] in words])
            refused.append(bool(check_story(story[:hit.start()] + dice.choice([w for w in words if w != hit[0]]) + story[hit.end():])))
        assert sum(refused) / len(refused) > least
    assert all(check_story(story[:len(story) * 3 // 4]) for story in stories)
    assert all(check_story(first + " " + second) for first, second in itertools.pairwise(stories))
    assert check_story("") and check_story("Once upon a time there was a cat.")


def test_same_seed_same_text():
    def take(seed, split):
        return [d.text for d in itertools.islice(write_documents(seed, split), 50)] + [t.messages for t in itertools.islice(write_conversations(seed, split), 50)]
    assert take(1, "train") == take(1, "train")
    assert take(1, "train") != take(2, "train")
    assert take(1, "train") != take(1, "test")


def test_articles_and_capitals():
    "No 'a apple', no small letter after a full stop, no slot left open."
    for document in itertools.islice(write_documents(8), 3000):
        text = document.text
        assert not re.search(r"\b[Aa] (?!uni|use|uku)[aeiou]\w", text.replace(" a e", "").replace(" a i", "")) or document.kind == "spelling", text
        assert not re.search(r"\b[Aa] (?:honest|hour)\b|\b[Aa]n (?!honest|hour)[^aeiou\W]\w", text) or document.kind == "spelling", text
        assert not re.search(r"[a-z][.!?] [a-z]", text), text
        assert not re.search(r"[{}\[\]|#%]|  ", text), text


@pytest.mark.parametrize("kind", sorted(set(tinyworld.ITEMS) - {"programs"}))
def test_items_know_their_answers(kind: str):
    items = write_items(kind, 0, 300)
    assert len({item.messages[0]["content"] for item in items}) > 80
    for item in items:
        user, assistant = item.messages
        assert (user["role"], assistant["role"], item.kind) == ("user", "assistant", kind)
        assert not check_answer(item, "") and not check_answer(item, "I do not know that.")
        right = " ".join(item.answer) if kind.startswith("spelling") else item.answer
        assert check_answer(item, right)
        if item.choices:
            assert 3 <= len(item.choices) == len(set(item.choices)) <= 4
            assert sum(check_answer(item, choice) for choice in item.choices) == 1
        if item.answer.startswith("- "):
            assert all(f"{line}\n" in user["content"] for line in item.choices)
    if items[0].choices:
        counts = Counter(item.choices.index(right) for item in write_items(kind, 1, 3000) if len(item.choices) == 4
                         for right in item.choices if check_answer(item, right))
        assert max(counts.values()) < 1.3 * min(counts.values())


def test_programs_pass_their_tests_and_no_others():
    items = write_items("programs", 0, 200)
    for item, other in zip(items, items[1:]):
        code = item.messages[1]["content"]
        assert re.fullmatch(r"def f\(x\): return (\(x [-+*] \d+\) [-+*] \d+|x [-+*] \d+)", code)
        scope = {}
        exec(code, scope)
        exec(item.answer, scope)
        if other.messages[1]["content"] != code:
            with pytest.raises(AssertionError):
                exec(other.answer, scope)
    trained = {talk.messages[1]["content"] for talk in itertools.islice(write_conversations(0, kinds={"program": 1}), 3000)}
    assert not trained & {item.messages[1]["content"] for item in items}


def test_replies_are_right():
    "The conversations that a model learns from pass the test that it will take."
    for kind in ("arithmetic", "counting", "spelling", "facts"):
        for talk in itertools.islice(write_conversations(3, kinds={kind: 1}), 300):
            reply = talk.messages[1]["content"]
            text = reply if isinstance(reply, str) else reply[-1]["text"]
            if kind == "arithmetic":
                (expression,) = [part["text"] for part in reply if part["type"] == "python"]
                m, sign, n = re.fullmatch(r"(\d+)([-+*])(\d+)", expression).groups()
                assert int(text.split()[-1][:-1]) == {"+": int(m) + int(n), "-": int(m) - int(n), "*": int(m) * int(n)}[sign]
            if kind == "counting":
                count = int(re.findall(r"\d+", text)[-1])
                plural = re.search(r"There are \d+ ([\w-]+)", text)[1]
                (name,) = [r[""] for r in tinyworld.load_world().tables["fruit"] if r["s"] == plural]
                assert len(re.findall(rf"\b[Aa]n? [a-z]+ {name}\b", talk.messages[0]["content"])) == count
                assert not is_held_out((name, str(count)))
            if kind == "spelling":
                word = re.search(r"\b([a-z]{3,}) (?:is spelled|like this|are [a-z] )|write ([a-z]{3,}),", text)
                letters = re.findall(r"\b[a-z](?: [a-z]\b)+", text)[-1].replace(" ", "")
                assert letters in talk.messages[0]["content"].lower() and word


def test_answers_follow_from_the_scene(world: World):
    "Who has it and where they are, found again by a replay of the sentences."
    checked = 0
    for document in itertools.islice(write_documents(9, kinds={"questions": 1}), 1500):
        scene, *questions = document.text.split("\nQuestion: ")
        has, at = {}, {}
        if not all(re.match(r"(Then )?[A-Z]\w+ (is|has|went|gave|found|picked)|You can find|(Then )?[A-Z]\w+ \w+ to the", s) for s in scene.split(". ")):
            continue
        for sentence in scene.rstrip(".").split(". "):
            words = [w for w in re.findall(r"[\w-]+", sentence) if w not in ("Then", "You", "can", "find")]
            toys, places = [w for w in words if w in word_list(world, "toy")], [w for w in words if w in word_list(world, "place")]
            people = [w for w in words if w in word_list(world, "person")]
            if "gave" in words:
                has[toys[0]] = people[1]
            elif toys:
                has[toys[0]] = people[0]
            elif places:
                at[people[0]] = places[0]
        for question in questions:
            text, answer = question.split("\nAnswer: ")
            text, *choices = text.split("\n- ")
            answer = answer.partition("=")[0]
            if match := re.match(r"Who has the ([\w-]+)", text):
                assert has[match[1]] == answer.rstrip("."), document.text
                checked += 1
            if match := re.match(r"Where is (\w+)|Where did (\w+) go", text):
                assert at[match[1] or match[2]] in answer, document.text
                checked += 1
    assert checked > 500


def test_kinds_are_mixed_as_asked():
    kinds = Counter(document.kind for document in itertools.islice(write_documents(0, kinds={"facts": 3, "counting": 1, "story": 0}), 2000))
    assert set(kinds) == {"facts", "counting"} and 2 < kinds["facts"] / kinds["counting"] < 4.5
    for wrong in ({"poem": 1}, {"story": 0}, {"story": -1, "facts": 2}):
        with pytest.raises(UserError):
            next(write_documents(0, kinds=wrong))
    with pytest.raises(UserError):
        next(write_documents(0, split="validation"))
    with pytest.raises(UserError):
        write_items("poem", 0, 1)


def test_size_of_the_world():
    assert len(tinyworld.word_types()) >= 1500 and len(tinyworld.STORY_KINDS) >= 6
    assert 0.2 < tinyworld.entropy(2000) < 1
