"Scores of texts against one text at a time, in every batch, with and without sharing; two processes against one."
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.likelihood import Reading, Score, Text, choose, common_prefix, crop_text, form_batches, plan_group, score_texts

CONTEXT = 24
ids = st.lists(st.integers(0, 29), min_size=1, max_size=40)
texts = ids.flatmap(lambda row: st.builds(Text, st.just(row), st.integers(1, len(row))))


def random_model(kv_heads=2):
    model = GPT(GPTConfig(30, 2, 32, 4, kv_heads, CONTEXT)).init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                weight.normal_(0, 0.3, generator=generator)
    return model


MODELS = {kv_heads: random_model(kv_heads) for kv_heads in (2, 4)}


@st.composite
def groups_of_texts(draw):
    "Groups that begin alike, or don't; some texts are longer than the context, some count nothing."
    groups = []
    for _ in range(draw(st.integers(0, 4))):
        before = draw(st.lists(st.integers(0, 2), max_size=30))
        rows = [before + draw(st.lists(st.integers(0, 29), min_size=1, max_size=8)) for _ in range(draw(st.integers(1, 4)))]
        groups.append([Text(row, draw(st.integers(1, len(row)))) for row in rows])
    return groups


@torch.no_grad()
def one_by_one(model, text):
    over = max(0, len(text.ids) - CONTEXT)
    row, start = text.ids[over:], max(1, text.start - over)
    logs = torch.log_softmax(model(torch.tensor([row])).double(), dim=-1)[0]
    picked = [logs[t - 1, row[t]].item() for t in range(start, len(row))]
    gaps = [(logs[t - 1].max() - p).item() for t, p in zip(range(start, len(row)), picked)]
    return Score(sum(picked), len(row) - start, all(gap == 0 for gap in gaps))


@settings(max_examples=60, deadline=None)
@given(groups_of_texts(), st.sampled_from([1, 2, 5, 32]), st.sampled_from([0.0, 0.75, 1.0]), st.sampled_from([2, 4]))
def test_any_texts_in_any_batch(groups, batch, worth, kv_heads):
    found = score_texts(MODELS[kv_heads], groups, batch, worth=worth)
    assert [len(group) for group in found] == [len(group) for group in groups]
    for group, scores in zip(groups, found):
        for text, score in zip(group, scores):
            expected = one_by_one(MODELS[kv_heads], text)
            assert abs(score.logprob - expected.logprob) < 1e-3
            assert score[1:] == expected[1:]


@given(texts, st.integers(1, 50))
def test_crop_keeps_the_end(text, context):
    cropped = crop_text(text, context)
    assert cropped.ids == text.ids[-context:] and 1 <= cropped.start <= len(cropped.ids)
    behind = len(text.ids) - text.start
    assert len(cropped.ids) - cropped.start == min(behind, len(cropped.ids) - 1)
    assert crop_text(cropped, context) == cropped


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_common_prefix_is_the_longest(rows):
    n = common_prefix(rows)
    assert all(row[:n] == rows[0][:n] for row in rows)
    assert any(len(row) == n for row in rows) or len({row[n] for row in rows}) > 1


@settings(max_examples=60)
@given(groups_of_texts(), st.integers(1, 9), st.sampled_from([0.0, 0.75, 1.0]))
def test_plans_and_batches_lose_nothing_and_stay_inside(groups, batch, worth):
    readings, flat = [], []
    for group in groups:
        cropped = [crop_text(text, CONTEXT) for text in group]
        readings += plan_group(cropped, len(flat), worth)
        flat += cropped
    served = sorted(n for r in readings for numbers in r.texts for n in numbers)
    assert served == [n for n, text in enumerate(flat) if text.start < len(text.ids)]
    for reading in readings:
        for row, numbers in zip(reading.rows, reading.texts):
            for n in numbers:
                assert [*reading.shared, *row] == flat[n].ids[:-1] and len(reading.shared) < flat[n].start
    batches = form_batches(readings, batch, CONTEXT)
    assert sorted(map(id, readings)) == sorted(id(r) for chosen in batches for r in chosen)
    for chosen in batches:
        assert sum(len(r.rows) for r in chosen) <= batch or len(chosen) == 1
        assert max(len(r.shared) for r in chosen) + max(len(row) for r in chosen for row in r.rows) <= CONTEXT
        assert len({bool(r.shared) for r in chosen}) == 1


def test_the_longest_come_first():
    rows = [Reading((), [(1,) * n], [[i]]) for i, n in enumerate((3, 9, 5, 7))]
    assert [[r.length for r in chosen] for chosen in form_batches(rows, 2, CONTEXT)] == [[9, 7], [5, 3]]


def test_a_long_beginning_and_a_long_ending_are_not_read_together():
    one, two = Reading((1,) * 20, [(1,), (2,)], [[0], [1]]), Reading((1,), [(1,) * 19, (2,) * 19], [[2], [3]])
    assert len(form_batches([one, two], 32, CONTEXT)) == 2 and len(form_batches([one, two], 32, 64)) == 1


def test_equal_reads_are_read_once():
    letters = [Text([5, 6, 7, letter], 3) for letter in range(4)]
    (reading,) = plan_group(letters, 0)
    assert reading == Reading((), [(5, 6, 7)], [[0, 1, 2, 3]])


@pytest.mark.parametrize("values, index", [([1.0], 0), ([1.0, 2.0], 1), ([2.0, 2.0 + 1e-6], 0), ([-300.0, -300.0 + 1e-3], 0), ([-3.0, -3.0 + 1e-3], 1),
                                           ([-math.inf, -1.0], 1), ([-math.inf, -math.inf], 0)])
def test_choose(values, index):
    assert choose(values) == index


def test_equal_texts_are_equal_in_any_batch():
    text = Text([1, 2, 3, 4, 5, 6], 2)
    groups = [[text, text, text], [Text([9] * 11, 1), text]]
    for batch in (1, 2, 32):
        first, second = score_texts(MODELS[2], groups, batch)
        assert choose([s.logprob for s in first]) == 0 and abs(second[1].logprob - first[0].logprob) < 1e-4


RANK = """
import json, os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_likelihood import make_groups, random_model
from nanochat.common import get_ranks
from nanochat.likelihood import score_texts
torch.set_num_threads(1)
ranks = get_ranks()
if ranks.world > 1: dist.init_process_group("gloo")
scores = score_texts(random_model(), make_groups(), 4, ranks)
with open(f"{sys.argv[2]}_{ranks.world}_{ranks.rank}.json", "w") as file: json.dump(scores, file)
if ranks.world > 1: dist.destroy_process_group()
"""


def make_groups():
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: torch.randint(low, high, (1,), generator=generator).item()  # noqa: E731
    groups = []
    for _ in range(30):
        before = [draw(0, 30) for _ in range(draw(1, 30))]
        groups.append([Text(before + [draw(0, 30) for _ in range(draw(1, 6))], len(before)) for _ in range(draw(1, 5))])
    return groups


def test_two_processes_give_the_same_bits(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    for count in (1, 2):
        run_ranks(count, tmp_path / "rank.py", Path(__file__).parent, tmp_path / "scores")
    one, first, second = (json.loads((tmp_path / f"scores_{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert one == first == second and len(one) == 30
