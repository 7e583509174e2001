"""Training, decoding and quality of models, each in a process of its own."""
import tempfile
from argparse import Namespace
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from safetensors.torch import save_file

from bench.harness import HERE, Team, Variant, check_peer, describe_machine, format_table, show_results
from nanochat.common import COLORS, UserError, base_dir, get_device
from nanochat.costs import peak_flops
from nanochat.dataloader import RowStore
from nanochat.dataset import iter_texts, open_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import PRESETS
from nanochat.tokenizer import Tokenizer, limit_chars

HELD_OUT = 60_000  # tokens of held-out rows
TURN = 5.0  # seconds that one variant trains before the next does

SHAPES = {  # depth, width, heads, vocabulary, context, row, rows of a batch
    "micro": (1, 64, 1, 320, 128, 32, 2),
    "tiny": (4, 128, 1, 2048, 256, 160, 24),
    "small": (4, 256, 2, 4096, 512, 512, 8),
    "wide": (6, 384, 3, 2048, 512, 512, 8),
    "d12": (12, 768, 6, 65_536, 2048, 2048, 16),
    "d20": (20, 1280, 10, 65_536, 2048, 2048, 8),
}


def read_shape(
    name: str,  # a key of SHAPES
    context: int | None = None,  # None: as the name says
) -> tuple[dict[str, int], int, int]:  # fields of GPTConfig, row, rows of a batch
    "A configuration by its name."
    if name not in SHAPES:
        raise UserError(f"configuration {name!r} is unknown; choose one of {', '.join(SHAPES)}: --config small")
    depth, width, heads, vocab, own, row, rows = SHAPES[name]
    return {"vocab_size": vocab, "depth": depth, "width": width, "heads": heads, "kv_heads": heads, "context": context or own}, row, rows


def save_weights(
    shape: dict[str, int],
    path: Path,
) -> Path:
    "Weights for everybody; none of them is zero, so that a wrong one shows in the loss."
    model = GPT(GPTConfig(**shape)).init_weights(seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any():
                weight.normal_(0, 0.1 if name == "lm_head.weight" else 0.02, generator=generator)
    save_file(model.state_dict(), path)
    return path


def list_variants(
    args: Namespace,
    job: dict,  # what all have in common
    compiled: bool = True,  # whether compiled ones are asked for with --compile
    device: str = "cpu",
) -> list[Variant]:
    "Ours, transformers', and those of the checkouts, eager and compiled; `--only` chooses among them by a part of the name."
    sources = [("ours", "worker_ours.py", HERE.parent), ("transformers", "worker_transformers.py", HERE)]
    sources += [(f"public {folder.name}", "worker_public.py", folder) for folder in map(check_peer, args.peer)]
    job = {"device": device, "precision": args.precision, **job}
    modes = (False, True) if compiled and args.compile else (False,)
    variants = [Variant(name + (" compiled" if mode else ""), HERE / script, job | {"compile": mode}, path, {"NANOCHAT_DTYPE": args.precision}, name == "ours")
                for name, script, path in sources for mode in modes]
    return choose_variants(variants, args.only)


def choose_variants(
    variants: list[Variant],
    parts: str,  # of names, with commas; "": all
) -> list[Variant]:
    "Those that are asked for. Raises `UserError` if there are none."
    chosen = [v for v in variants if any(part.strip() in v.name for part in parts.split(","))]
    if not chosen:
        raise UserError(f"--only {parts} leaves nothing of: {'; '.join(v.name for v in variants)}")
    return chosen


def train(args: Namespace) -> None:
    "Steps of training."
    device = get_device(args.device)
    machine = describe_machine(device)
    print(machine)
    shape, row, rows = read_shape(args.config)
    shape["context"] = row  # what attention costs
    rows = args.batch or rows
    peak = peak_flops(device, getattr(torch, args.precision))
    with tempfile.TemporaryDirectory() as folder:
        ids = torch.randint(shape["vocab_size"], (64 * rows, row + 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        save_file({"train": ids}, Path(folder) / "rows")
        job = {"shape": shape, "batch": rows, "rows": f"{folder}/rows", "weights": str(save_weights(shape, Path(folder) / "weights"))}
        variants = list_variants(args, job, device=device.type)
        with Team(variants) as team:
            warm = team.ask("warmup")
            measured = team.measure(args.rounds, "steps", count=args.steps)
            about = {name: worker.about for name, worker in team.workers.items()}
    expected = next((warm[v.name]["loss"] for v in variants if v.ours and v.name in warm), None)
    results = {}
    for name, m in measured.items():
        speed = rows * row / m["step"]
        parts = {f"{part} ms": 1000 * m[part] for part in ("data", "forward", "backward", "optimizer", "step")}
        same = abs(warm[name]["loss"] - expected) if about[name]["same_weights"] and expected is not None else "other weights"
        results[name] = {"parameters": about[name]["parameters"], "first loss - ours": same, "first step s": warm[name]["first step s"], **parts,
                         "tokens/s": speed, "GFLOP/s": speed * about[name]["flops"] / 1e9, "% of peak": 100 * speed * about[name]["flops"] / peak,
                         "MB": m["memory"] / 1e6}
    configuration = f"{args.config} {rows}x{row} {args.precision} {device.type}"
    title = f"train, {configuration}: {shape['depth']} blocks of width {shape['width']}, {shape['vocab_size']} tokens, medians of {args.rounds} rounds"
    print(f"added to {show_results('train', machine, configuration, results, title, {v.name for v in variants if v.ours}, 'tokens/s')}")


def decode(args: Namespace) -> None:
    "Writing tokens."
    device = get_device(args.device)
    machine = describe_machine(device)
    print(machine)
    if args.new < 2:
        raise UserError(f"the speed of later tokens needs at least two of them, not {args.new}: --new 128")
    lengths, batches = ([int(n) for n in text.split(",")] for text in (args.prompts, args.batches))
    shape, _, _ = read_shape(args.config, context=max(lengths) + args.new)
    with tempfile.TemporaryDirectory() as folder:
        job = {"shape": shape, "weights": str(save_weights(shape, Path(folder) / "weights"))}
        variants = list_variants(args, job, compiled=False, device=device.type)
        with Team(variants) as team:
            for length in lengths:
                for batch in batches:
                    team.ask("decode", length=length, batch=batch, new=min(args.new, 8))  # warms up
                    measured = team.measure(args.rounds, "decode", length=length, batch=batch, new=args.new)
                    said = next((measured[v.name]["said"] for v in variants if v.ours and v.name in measured), [])
                    results = {name: {"first token ms": 1000 * m["first"], "tokens/s": batch / m["later"],
                                      "as ours": f"{sum(a == b for a, b in zip(m['said'], said))} of {args.new}"
                                      if team.workers[name].about["same_weights"] else "other weights", "MB": m["memory"] / 1e6}
                               for name, m in measured.items()}
                    configuration = f"{args.config} prompt {length} batch {batch} new {args.new} {args.precision} {device.type}"
                    title, ours = f"decode, {configuration}, medians of {args.rounds} rounds", {v.name for v in variants if v.ours}
                    path = show_results("decode", machine, configuration, results, title, ours, "tokens/s")
                    if batch == 1:
                        print(format_table(results, ours, "first token ms", lower=True).splitlines()[-1])
    print(f"added to {path}")


def prepare_rows(
    args: Namespace,  # corpus and shards
    vocab_size: int,
    row: int,
    folder: Path,  # where the files go
) -> Path:  # of a file for workers
    "Rows to train on, in the order in which all train on them, and held-out rows with what counts in them."
    corpus = open_corpus(args.corpus, args.shards, progress=False)
    texts = chain.from_iterable(map(iter_texts, corpus.shards("train")))
    tokenizer = Tokenizer.train(limit_chars(texts, 3_000_000), vocab_size)
    stores = {split: RowStore.from_corpus(corpus, split, tokenizer, row, folder / "rows", mode=mode) for split, mode in (("train", "crop"), ("val", "whole"))}
    rows = np.concatenate([stores["train"].part(i)[0] for i in range(stores["train"].parts)]).astype(np.int32)
    held, mask = stores["val"].part(0)
    count = max(1, HELD_OUT // row)
    save_file({"train": torch.from_numpy(np.random.default_rng(0).permutation(rows)), "val": torch.from_numpy(held[:count].astype(np.int32)),
               "counted": torch.ones(held[:count].shape, dtype=torch.bool) if mask is None else torch.from_numpy(np.array(mask[:count])),
               "bytes": torch.from_numpy(tokenizer.token_bytes)}, folder / "tensors")
    return folder / "tensors"


RECIPE = ("embedding_lr", "head_lr", "matrix_lr", "lr_scale", "warmup", "cooldown", "clip", "echo_tokens", "echo_part", "echo_length")


def read_recipe(
    config: str,  # a name that may be a preset's too
) -> dict:  # settings of pretraining that decide how much is learned of the same rows
    "What a preset's pretraining does otherwise than the defaults, which are the full-size recipe; empty where there is no such preset."
    base = PRESETS.get(config, {}).get("base", {})
    return {key: base[key] for key in RECIPE if key in base}


def tune_variants(
    variants: list[Variant],
    recipe: dict,  # of our preset
    weights: Path,  # that training starts from, where the model is the same and its makers draw them in the same way
) -> list[Variant]:
    "Each once for each recipe that its makers publish, or that it is tried with."
    same = {"weights": str(weights)}
    tries = {"ours": [("", same)] + ([("as its preset", same | {"settings": recipe})] if recipe else []),
             "transformers": [(f"lr {lr:g}", {"lr": lr, "clip": 1.0}) for lr in (1e-3, 3e-3)],
             "2025": [("", same)], "2026": [("", {}), ("scaled for the batch", {"scaled": True})]}
    tuned = []
    for v in variants:
        modern = "public" in v.name and "def setup_optimizer(" in (v.path / "nanochat" / "gpt.py").read_text(encoding="utf-8")
        options = tries["ours" if v.ours else "transformers" if "transformers" in v.name else "2026" if modern else "2025"]
        tuned += [replace(v, name=f"{v.name}, {text}" if text else v.name, job=v.job | more) for text, more in options]
    return tuned


def train_for(
    variants: list[Variant],
    seconds: float,  # of training each
) -> dict[str, dict]:  # variant -> parameters, steps, bits per byte, memory
    "All of them by turns, and what they have learned."
    with Team(variants) as team:
        parameters, turn = {key: worker.about["parameters"] for key, worker in team.workers.items()}, 0
        while not all(answer["done"] for answer in team.ask("train", first=turn, budget=seconds, turn=TURN).values()):
            turn += 1
        return {key: {"parameters": parameters[key], **m} for key, m in team.ask("evaluate").items()}


def summarize_runs(
    runs: list[dict],  # of one variant from different initial weights
    step_tokens: int,
) -> dict:  # what the table says
    "Means, and how far luck moves what has been learned."
    values, steps = [m["bits per byte"] for m in runs], round(mean(m["steps"] for m in runs))
    return {"parameters": runs[0]["parameters"], "runs": len(runs), "steps": steps, "tokens": steps * step_tokens, "bits per byte": mean(values),
            "lowest": min(values), "highest": max(values), "MB": max(m["memory"] for m in runs) / 1e6}


def plot_quality(
    curves: dict[str, dict[float, dict]],  # variant -> minutes -> a row of the table
    path: Path,
) -> Path:
    "Bits per byte over minutes, a curve for each variant, from the lowest to the highest of its runs."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, curve) in enumerate(curves.items()):
        middle, low, high = ([row[key] for row in curve.values()] for key in ("bits per byte", "lowest", "highest"))
        ax.errorbar(list(curve), middle, [np.subtract(middle, low), np.subtract(high, middle)], marker="o", capsize=3, label=name,
                    color=list(COLORS.values())[i % len(COLORS)], linewidth=2 if name.startswith("ours") else 1)
    ax.set(xlabel="minutes of training", ylabel="bits per byte of held-out text")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def quality(args: Namespace) -> None:
    "Bits per byte after minutes of training; each budget is a training of its own, with its own cooldown, from several initial weights."
    device = get_device(args.device)
    machine = describe_machine(device)
    print(machine)
    if args.seeds < 1:
        raise UserError(f"there is nothing to show of {args.seeds} trainings: --seeds 3")
    shape, row, rows = read_shape(args.config)
    shape["vocab_size"], rows = args.vocab_size or shape["vocab_size"], args.batch or rows
    configuration = f"{args.config} {rows}x{row} {args.precision} {device.type} {args.corpus}"
    curves: dict[str, dict[float, dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "weights"
        job = {"shape": shape, "batch": rows, "rows": str(prepare_rows(args, shape["vocab_size"], row, Path(name))),
               "parameters": GPT(GPTConfig(**shape)).num_params()}
        for minutes in map(float, args.minutes.split(",")):
            runs: dict[str, list[dict]] = {}
            for seed in range(1337, 1337 + args.seeds):
                save_file(GPT(GPTConfig(**shape)).init_weights(seed).state_dict(), weights)
                variants = tune_variants(list_variants(args, job | {"seed": seed}, device=device.type), read_recipe(args.config), weights)
                for key, m in train_for(variants, 60 * minutes).items():
                    runs.setdefault(key, []).append(m)
            results = {key: summarize_runs(m, rows * row) for key, m in runs.items()}
            for key, m in results.items():
                curves.setdefault(key, {})[minutes] = m
            title = f"quality, {configuration}, after {minutes:g} minutes of training, means"
            path = show_results("quality", machine, f"{configuration} {minutes:g} min", results, title, {v.name for v in variants if v.ours}, "bits per byte", lower=True)
    print(f"added to {path}, plot: {plot_quality(curves, base_dir() / 'bench' / 'quality.png')}")
