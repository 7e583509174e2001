"""The course's own recipe: the sizes and learning rates of the preset `tiny`, on 130,000 documents, so many that none is read twice."""
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.common import fast_dtype
from nanochat.dataloader import RowLoader, RowStore
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import lr_schedule, muon_momentum
from nanochat.tinyworld import write_documents
from nanochat.tokenizer import Tokenizer
from nanochat.train import TrainConfig, build_optimizer

DOCUMENTS, FIRST, VOCABULARY, ROW, ROWS, COOLDOWN = 130_000, 40_000, 2048, 160, 24, 0.4
SPARE = 2.0  # seconds for saving


def train(directory: Path, seed: int, seconds: float) -> None:
    "Make text, a tokenizer and rows; then train until the time is over, and save."
    end = time.monotonic() + seconds - SPARE
    texts = [document.text for document in islice(write_documents(seed), DOCUMENTS)]
    tokenizer = Tokenizer.train(texts[:FIRST], VOCABULARY)
    tokenizer.save(directory / "tokenizer")
    rows = RowStore.from_docs([[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(texts)], ROW)
    loader = RowLoader(rows, ROWS, shuffle_seed=seed)

    model = GPT(GPTConfig(tokenizer.vocab_size, depth=4, width=128, heads=1, kv_heads=1, context=256)).init_weights(seed)
    optimizer = build_optimizer(model, TrainConfig(head_lr=0.014))
    dtype = fast_dtype(torch.device("cpu"))
    begin, step = time.monotonic(), 0
    while (now := time.monotonic()) < end:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(*next(loader))
        loss.backward()
        rate = lr_schedule((now - begin) / (end - begin), 1.0, cooldown=COOLDOWN)
        optimizer.apply(lr_scale=rate, momentum=muon_momentum(step))
        optimizer.zero_grad()
        step += 1
    loader.close()
    meta = {"stage": "base", "model": asdict(model.config), "tokenizer_hash": tokenizer.hash}
    save_checkpoint(directory / "base", step, model.state_dict(), {}, meta)
