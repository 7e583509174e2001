"""Text into tokens, and tokens into batches."""
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from bench.harness import Team, describe_machine, show_results, take_turns
from nanochat.bpe import SPLIT_PATTERN
from nanochat.common import format_bytes, get_device
from nanochat.dataloader import RowLoader, RowStore, make_rows, read_rows, save_rows
from nanochat.dataset import iter_texts, open_corpus
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


def read_texts(
    corpus: str,  # as for nanochat run; "" takes what NANOCHAT_TEST_DATA names, or the tiny world
    size: float,  # bytes
) -> tuple[str, list[str]]:  # where they come from, and documents
    "The beginning of a corpus."
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    corpus = corpus or (f"folder:{folder}/text" if folder else "tinyworld")
    texts, total = [], 0
    for text in chain.from_iterable(map(iter_texts, open_corpus(corpus).shards("train"))):
        texts.append(text)
        total += len(text.encode(errors="replace"))
        if total >= size:
            break
    return corpus.rpartition("/")[2], texts


def time_tasks(
    tasks: dict[str, Callable[[], object]],
    rounds: int,
) -> dict[str, float]:  # seconds, medians
    "Time functions that take turns."
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds):
        for name, task in take_turns(list(tasks.items()), turn):
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def find_merges(
    tokens: list[bytes],  # in the order of their ids
) -> list[tuple[bytes, bytes]]:
    "What was merged for each token of several bytes: the two parts that earlier merges leave of it."
    ranks = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges += [tuple(parts)] if len(parts) == 2 else []
    return merges


def make_other(
    tokens: list[bytes] | None = None,  # None: to be trained
):  # a tokenizers.Tokenizer
    "The same tokenizer in Hugging Face's library, which writes each byte as a character that can be seen."
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Other

    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(seen)))}

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    model = models.BPE({spell(token): i for i, token in enumerate(tokens)}, [(spell(a), spell(b)) for a, b in find_merges(tokens)]) if tokens else models.BPE()
    other = Other(model)
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return other


def train_other(texts: list[str], size: int) -> object:
    "Train with Hugging Face's library."
    from tokenizers import pre_tokenizers, trainers

    other = make_other()
    other.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return other


def train_rustbpe(texts: list[str], size: int) -> object:
    "Train with rustbpe alone."
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size, pattern=SPLIT_PATTERN)
    return trainer


def tokenizer(args: Namespace) -> None:
    "Megabytes a second of training and of encoding."
    machine = describe_machine(get_device("cpu"))
    print(machine)
    source, texts = read_texts(args.corpus, args.megabytes * 1e6)
    size, plain, threads = sum(len(text.encode()) for text in texts), args.vocab_size - len(SPECIAL_TOKENS), os.cpu_count() or 1
    ours = Tokenizer.train(texts, args.vocab_size)
    ranks = {token: i for i, token in enumerate(ours.tokens)}
    theirs = tiktoken.Encoding("same", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=ours.special)
    tasks = {
        "training": {"ours": lambda: Tokenizer.train(texts, args.vocab_size), "rustbpe": lambda: train_rustbpe(texts, plain)},
        "encoding, one thread": {"ours": lambda: [ours.encode(text) for text in texts], "tiktoken": lambda: [theirs.encode_ordinary(text) for text in texts]},
        f"encoding, {threads} threads": {"ours": lambda: ours.encode_batch(texts), "tiktoken": lambda: theirs.encode_ordinary_batch(texts, num_threads=threads)},
    }
    expected = ours.encode_batch(texts)
    same = {"ours": True, "tiktoken": theirs.encode_ordinary_batch(texts) == expected}
    try:
        other = make_other(ours.tokens)
        same["tokenizers"] = [e.ids for e in other.encode_batch_fast(texts, add_special_tokens=False)] == expected
        for name, task in zip(tasks, (lambda: train_other(texts, plain), lambda: [other.encode(text, add_special_tokens=False) for text in texts],
                                      lambda: other.encode_batch_fast(texts, add_special_tokens=False))):
            tasks[name]["tokenizers"] = task
    except ImportError as error:
        print(f"tokenizers failed: {error}")
    for name, variants in tasks.items():
        configuration = f"{name}, {format_bytes(size)} of {source}, {args.vocab_size} tokens"
        seconds = time_tasks(variants, args.rounds)
        results = {key: {"MB/s": size / 1e6 / value} | ({"same tokens": str(same[key])} if key in same and name != "training" else {})
                   for key, value in seconds.items()}
        path = show_results("tokenizer", machine, configuration, results, f"{configuration}, medians of {args.rounds} rounds", {"ours"}, "MB/s")
    print(f"added to {path}")


def data(args: Namespace) -> None:
    "Batches a second of the loader alone, and those that training eats."
    from bench.models import list_variants, read_shape, save_weights

    device = get_device(args.device)
    machine = describe_machine(device)
    print(machine)
    shape, row, rows = read_shape(args.config)
    shape["context"], rows = row, args.batch or rows
    _, texts = read_texts("tinyworld", 2e6)
    speller = Tokenizer.train(texts, min(2048, shape["vocab_size"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.random.default_rng(0).integers(shape["vocab_size"], size=(64 * rows, row + 1))
        save_rows(folder / "rows", ids, np.ones(ids.shape, bool))
        loader = RowLoader(RowStore(1, lambda _: read_rows(folder / "rows")), rows, device=device, shuffle_seed=0)
        batches = time_tasks({"loader": lambda: list(islice(loader, 64))}, args.rounds)["loader"] / 64
        loader.close()
        start = time.perf_counter()
        make_rows(open_corpus("tinyworld").shards("train")[0], speller, row, "crop", folder / "made")
        made = (time.perf_counter() - start) / len(read_rows(folder / "made")[0]) * rows
        import torch
        from safetensors.torch import save_file

        save_file({"train": torch.from_numpy(ids).int()}, folder / "tensors")
        job = {"shape": shape, "batch": rows, "rows": str(folder / "tensors"), "weights": str(save_weights(shape, folder / "weights"))}
        variants = [v for v in list_variants(args, job, device=device.type) if v.ours]
        with Team(variants) as team:
            team.ask("warmup")
            steps = team.measure(args.rounds, "steps", count=args.steps)
    fastest = min(m["step"] for m in steps.values())
    results = {"rows read from disk": {"batches/s": 1 / batches, "times what training eats": fastest / batches},
               "rows made of text": {"batches/s": 1 / made, "times what training eats": fastest / made},
               **{f"training, {name}": {"batches/s": 1 / m["step"]} for name, m in steps.items()}}
    configuration = f"{args.config} {rows}x{row} {args.precision} {device.type}"
    path = show_results("data", machine, configuration, results, f"data, {configuration}, medians of {args.rounds} rounds", set(), "batches/s")
    print(f"the loader alone gives {fastest / batches:.0f} times what training eats: " + ("enough" if fastest >= 10 * batches else "too few, 10 are wanted"))
    print(f"added to {path}")
