"""Rows and batches: what isn't needed is not read, and parts are made once, whoever makes them."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import Ranks
from nanochat.dataloader import RowLoader, RowStore, pack_rows, save_rows
from nanochat.gpt import GPT, GPTConfig


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 150), min_size=4, max_size=12), st.integers(0, 9))
def test_padding_that_nobody_needs_is_not_read(lengths, seed):
    "The loss of a batch without the empty columns is that of the whole rows."
    rng = np.random.default_rng(seed)
    docs = [[0, *rng.integers(1, 50, length).tolist()] for length in lengths]
    masks = [[0, *rng.integers(0, 2, length - 1).tolist(), 1] for length in lengths]
    store = RowStore.from_docs(docs, 150, "pad", masks)
    ids, mask = pack_rows(docs, 150, "pad", masks)
    x, y = next(RowLoader(store, 2))
    assert x.shape == y.shape and (x.size(1) == 150 or x.size(1) % 64 == 0)
    whole = torch.from_numpy(ids[:2, 1:]).masked_fill(~torch.from_numpy(mask[:2, 1:]), -1)
    assert (whole >= 0).sum() == (y >= 0).sum() and torch.equal(whole[:, : y.size(1)], y)
    model = GPT(GPTConfig(50, 1, 16, 2, 1, 150)).init_weights(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x, y), model(torch.from_numpy(ids[:2, :-1]), whole), atol=1e-6)


@pytest.mark.parametrize("world", [1, 3])
def test_each_part_is_made_once_by_its_rank(tmp_path, world):
    made = []

    def fill(part, path):
        made.append(part)
        save_rows(path, np.full((4, 9), part), np.ones((4, 9), bool), number=part)
    from functools import partial

    jobs = [(tmp_path / f"part_{i}", partial(fill, i)) for i in range(6)]
    stores = [RowStore.from_jobs(jobs, Ranks(rank, world)) for rank in range(world)]
    for index in range(6):
        parts = [store.part(index)[0] for store in [stores[index % world], *stores]]  # the one that makes it first, or the others wait
        assert all((part == index).all() for part in parts)
    assert sorted(made) == list(range(6))
    assert len(RowStore.from_jobs(jobs)) == 24 and sorted(made) == list(range(6))
