"""Thin functions between the tests and your own files: write each here, or import yours and call it; then `python -m pytest`."""
from collections import Counter
from collections.abc import Callable
from itertools import islice
from math import comb
from math import exp
from math import log
from nanochat.dataloader import pack_rows
from nanochat.gpt import GPT
from nanochat.gpt import GPTConfig
from nanochat.tinyworld import write_documents
from nanochat.tokenizer import Tokenizer
from statistics import median
from torch import Tensor
import math
import random
import re
import regex
import torch
import torch.nn.functional as F


# a1-tokenizer


SPLIT_PATTERN = "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,2}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"


SPECIAL_TOKENS = ('<|bos|>', '<|user_start|>', '<|user_end|>', '<|assistant_start|>', '<|assistant_end|>', '<|python_start|>', '<|python_end|>', '<|output_start|>', '<|output_end|>')


def count_pairs(
    chunks: dict[tuple[int, ...], int],  # chunk of token ids -> how often it occurs
) -> dict[tuple[int, int], int]:  # (left, right) -> how often they are neighbours
    "Count neighbouring tokens, each chunk as often as it occurs. Gives a plain dict."
    raise NotImplementedError("count_pairs is not written yet")


def merge_pair(
    ids: tuple[int, ...],  # the tokens of a chunk
    pair: tuple[int, int],  # two neighbours
    new: int,  # the id that replaces them
) -> tuple[int, ...]:  # shorter by one for each place that was merged
    "Replace a pair wherever it stands, from left to right and without overlap."
    raise NotImplementedError("merge_pair is not written yet")


def choose_pair(
    counts: dict[tuple[int, int], int],  # (left, right) -> how often they are neighbours; may hold zeros
) -> tuple[int, int] | None:  # the pair to merge next; None if none is left
    "The most frequent pair; of equal ones the one with the smaller ids."
    raise NotImplementedError("choose_pair is not written yet")


def count_changes(
    ids: tuple[int, ...],  # the tokens of a chunk, before the merge
    pair: tuple[int, int],  # two neighbours
    new: int,  # the id that replaces them
) -> dict[tuple[int, int], int]:  # pair -> how much more (or, below 0, less) often it occurs; no zeros
    "How the counts of pairs change when a chunk is merged."
    raise NotImplementedError("count_changes is not written yet")


def train_bpe(
    texts: list[str],  # what to learn from
    size: int,  # tokens in the end, the 256 bytes included
    pattern: str = SPLIT_PATTERN,  # how text is cut before merging
) -> tuple[list[bytes], int]:  # the tokens in the order of their ids, and the number of visits
    "Learn a vocabulary, correcting the counts of pairs instead of counting anew. Stops early when no pair is left."
    raise NotImplementedError("train_bpe is not written yet")


def merge_steps(
    chunk: bytes,  # what is to be encoded
    ranks: dict[bytes, int],  # token -> id; holds every single byte
) -> list[list[bytes]]:  # the parts of the chunk, at first and after each merge
    "Apply the earliest merge, the leftmost if there are several, until none is left; give every stage."
    raise NotImplementedError("merge_steps is not written yet")


def encode_bpe(
    text: str,  # any text that UTF-8 can write
    tokens: list[bytes],  # in the order of their ids
    pattern: str = SPLIT_PATTERN,  # how text is cut before merging
) -> list[int]:  # token ids
    "Text to token ids."
    raise NotImplementedError("encode_bpe is not written yet")


def decode_bpe(
    ids: list[int],  # token ids
    tokens: list[bytes],  # in the order of their ids
) -> str:  # the text; half a character becomes a replacement character
    "Token ids to text."
    raise NotImplementedError("decode_bpe is not written yet")


def decode_stream(
    ids: list[int],  # token ids, as they arrive
    tokens: list[bytes],  # in the order of their ids
) -> list[str]:  # what each token lets us show, and at the end what is left
    "Text to show after each token, never half a character too early."
    raise NotImplementedError("decode_stream is not written yet")


def measure_compression(
    texts: list[str],  # at least one isn't empty
    tokens: list[bytes],  # in the order of their ids
) -> float:  # bytes per token
    "How many bytes a token stands for, in all texts together."
    raise NotImplementedError("measure_compression is not written yet")


def measure_words(
    texts: list[str],  # at least one has a word
    tokens: list[bytes],  # in the order of their ids
    pattern: str = SPLIT_PATTERN,  # what a chunk is
) -> tuple[float, float]:  # tokens per word, and the share (0 to 1) of words of more than one token
    "How words are cut: fertility, and the share of continued words."
    raise NotImplementedError("measure_words is not written yet")


def render_conversation(
    messages: list[dict],  # {"role": ..., "content": ...}; user and assistant in turns, perhaps a system message first
    tokens: list[bytes],  # the ordinary tokens in the order of their ids; the special ones follow
    max_tokens: int | None = None,  # cut behind so many tokens
) -> tuple[list[int], list[int]]:  # token ids, and 1 for each that the assistant is trained to write
    "Token ids of a conversation and its loss mask."
    raise NotImplementedError("render_conversation is not written yet")


def make_targets(
    ids: list[int],  # a row, at least two tokens
    mask: list[int],  # 1 for each token that is trained on
) -> tuple[list[int], list[int]]:  # inputs and targets, one shorter than the row; -1 where nothing is trained
    "Inputs and targets of a row."
    raise NotImplementedError("make_targets is not written yet")


# a2-transformer


EPS = torch.finfo(torch.float32).eps  # the epsilon of the normalisation, 1.2e-7


def select(
    weights: dict[str, Tensor],
    part: str,  # such as "transformer.h.0." or "attn.", with the dot
) -> dict[str, Tensor]:  # those whose names begin so, without this beginning
    "The weights of a part of the model."
    return {name.removeprefix(part): w for name, w in weights.items() if name.startswith(part)}


def count_blocks(
    weights: dict[str, Tensor],  # of a whole model
) -> int:  # L
    "How many blocks a model has."
    return sum(name.endswith("attn.c_q.weight") for name in weights)


def rms_norm(
    x: Tensor,  # (..., C) any floating-point type
) -> Tensor:  # (..., C) with mean square 1 along the last dimension
    "Divide each vector by the root of its mean square; `EPS` is added to the mean, under the root."
    raise NotImplementedError("rms_norm is not written yet")


def rotary_tables(
    length: int,  # positions
    head_dim: int,  # D, even
    base: float = 10_000.0,  # of the geometric series of speeds
    device: torch.device | None = None,  # where the tables lie
) -> tuple[Tensor, Tensor]:  # cosines and sines (length, 1, D/2), float32
    "Cosine and sine of every position's angles."
    raise NotImplementedError("rotary_tables is not written yet")


def apply_rotary(
    x: Tensor,  # (B, T, heads, D)
    cos: Tensor,  # (T, 1, D/2), or (B, T, 1, D/2) for rows at different positions
    sin: Tensor,  # likewise
) -> Tensor:  # (B, T, heads, D) in x's type
    "Turn each pair (x_i, x_{i + D/2}) by minus its position's angle."
    raise NotImplementedError("apply_rotary is not written yet")


def place_and_normalize(
    x: Tensor,  # (B, T, heads, D) queries or keys
    cos: Tensor,  # as for `apply_rotary`
    sin: Tensor,  # likewise
) -> Tensor:  # (B, heads, T, D)
    "Rotary positions, then `rms_norm` of each head, then heads in front of positions."
    raise NotImplementedError("place_and_normalize is not written yet")


def causal_mask(
    queries: int,  # T, those of the last T of the S positions
    keys: int,  # S, at least T
) -> Tensor:  # (T, S) bool, True where a query may look
    "Each query may look at its own position and at those before."
    raise NotImplementedError("causal_mask is not written yet")


def share_heads(
    x: Tensor,  # (B, K, S, D) keys or values
    heads: int,  # H, a multiple of K
) -> Tensor:  # (B, H, S, D)
    "Give each head of queries the keys or values of its group."
    raise NotImplementedError("share_heads is not written yet")


def attend(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, K, S, D)
    v: Tensor,  # (B, K, S, D)
    mask: Tensor,  # (T, S) bool, True where a query may look
) -> tuple[Tensor, Tensor]:  # y (B, H, T, D), and the weights (B, H, T, S)
    "Softmax attention in which heads share keys and values."
    raise NotImplementedError("attend is not written yet")


def attention_layer(
    x: Tensor,  # (B, T, C), normalised
    weights: dict[str, Tensor],  # c_q.weight, c_k.weight, c_v.weight, c_proj.weight
    rotary: tuple[Tensor, Tensor],  # cosines and sines of these T positions
    heads: int,  # H
    kv_heads: int,  # K, divides H
    past: tuple[Tensor, Tensor] | None = None,  # keys and values (B, K, S - T, D) of the positions before
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # y (B, T, C), and the keys and values (B, K, S, D) of all positions
    "Causal grouped-query attention with rotary positions and normalised queries and keys."
    raise NotImplementedError("attention_layer is not written yet")


def mlp(
    x: Tensor,  # (B, T, C), normalised
    weights: dict[str, Tensor],  # c_fc.weight (4 C, C), c_proj.weight (C, 4 C)
) -> Tensor:  # (B, T, C)
    "Each token by itself: widen four times, relu squared, narrow."
    raise NotImplementedError("mlp is not written yet")


def block(
    x: Tensor,  # (B, T, C) the residual stream
    weights: dict[str, Tensor],  # attn.c_q.weight, ..., mlp.c_proj.weight
    rotary: tuple[Tensor, Tensor],  # cosines and sines of these T positions
    heads: int,  # H
    kv_heads: int,  # K, divides H
    past: tuple[Tensor, Tensor] | None = None,  # keys and values of the positions before
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # the stream (B, T, C), and the keys and values of all positions
    "Attention, then MLP, each added to the residual stream."
    raise NotImplementedError("block is not written yet")


def soft_cap(
    z: Tensor,  # (...) products with the head
    cap: float = 15.0,  # what the results don't pass
) -> Tensor:  # (...) between -cap and cap
    "Bend large numbers."
    raise NotImplementedError("soft_cap is not written yet")


def gpt_logits(
    ids: Tensor,  # (B, T) int64
    weights: dict[str, Tensor],  # of the whole model
    heads: int,  # H
    kv_heads: int,  # K, divides H
) -> Tensor:  # (B, T, V) float32, between -15 and 15
    "The scores of the next token, after each token."
    raise NotImplementedError("gpt_logits is not written yet")


def cross_entropy(
    logits: Tensor,  # (B, T, V)
    targets: Tensor,  # (B, T) int64, -1 where nothing is predicted
) -> Tensor:  # () nats a target
    "The mean of minus the logarithm of the true token's probability."
    raise NotImplementedError("cross_entropy is not written yet")


def loss_and_gradients(
    ids: Tensor,  # (B, T) int64
    targets: Tensor,  # (B, T) int64, -1 where nothing is predicted
    weights: dict[str, Tensor],  # of the whole model
    heads: int,  # H
    kv_heads: int,  # K, divides H
) -> tuple[float, dict[str, Tensor]]:  # the loss in nats, and the gradient of each weight by name
    "The loss of a batch, and how it changes with each weight."
    raise NotImplementedError("loss_and_gradients is not written yet")


def decode_step(
    ids: Tensor,  # (B, T) int64, the tokens that come next
    weights: dict[str, Tensor],  # of the whole model
    cache: list[tuple[Tensor, Tensor]],  # keys and values (B, K, S, D) of each block; empty at the beginning
    heads: int,  # H
    kv_heads: int,  # K, divides H
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:  # logits (B, T, V), and the cache of all S + T positions
    "Read some more tokens after those in the cache."
    raise NotImplementedError("decode_step is not written yet")


def count_parameters(
    sizes: dict[str, int],  # vocab_size, depth, width, heads, kv_heads, context
) -> dict[str, int]:  # embedding, attention, mlp, head
    "The parameters of a model, by kind."
    raise NotImplementedError("count_parameters is not written yet")


def flops_per_token(
    parameters: dict[str, int],  # embedding, attention, mlp, head: as `count_parameters` gives them
    sizes: dict[str, int],  # vocab_size, depth, width, heads, kv_heads, context
) -> dict[str, int]:  # attention, mlp, head, scores: floating-point operations of training on one token
    "The operations that a token costs in training, by kind."
    raise NotImplementedError("flops_per_token is not written yet")


# a3-training


QUINTIC = 3.4445, -4.7750, 2.0315  # a, b and c of the polynomial (Jordan et al., 2024)


T = 96  # positions of a row


CONFIG = GPTConfig(vocab_size=512, depth=2, width=64, heads=2, kv_heads=2, context=T)


STOP_BITS = (math.log2(4) + math.log2(3) + math.log2(2)) / 4  # a document has 3 to 6 sentences; the surprise that it stops after the last, on average


MODEL = GPT(CONFIG)  # lends its structure; its own weights are never used


TOKENIZER = Tokenizer.train([document.text for document in islice(write_documents(seed=1, kinds={"facts": 1}), 500)], CONFIG.vocab_size)


def make_rows(
    seed: int,  # which documents
    documents: int,  # how many
) -> tuple[Tensor, Tensor, float]:  # x and y, (N, T) int64, y -1 where nothing is predicted; bits per byte that no model can beat
    "Rows of whole documents of the tiny world."
    drawn = list(islice(write_documents(seed=seed, kinds={"facts": 1}), documents))
    ids, mask = pack_rows([[TOKENIZER.bos, *TOKENIZER.encode(document.text)] for document in drawn], T, "whole")
    floor = sum(document.bits - STOP_BITS for document in drawn) / sum(len(document.text.encode()) for document in drawn)
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    return ids[:, :-1], torch.where(mask[:, 1:], ids[:, 1:], -1), floor


def new_weights(
    seed: int,
) -> dict[str, Tensor]:  # by the names that the package's model has
    "The weights of a model that knows nothing."
    return {name: p.detach().clone() for name, p in GPT(CONFIG).init_weights(seed).named_parameters()}


def token_losses(
    weights: dict[str, Tensor],
    x: Tensor,  # (B, T) int64 tokens
    y: Tensor,  # (B, T) int64 targets, -1 where nothing is predicted
) -> Tensor:  # (B, T) nats, 0 where nothing is predicted
    "The surprise of a model with these weights at each target."
    return torch.func.functional_call(MODEL, weights, (x, y), {"reduction": "none"})


TRAIN_X, TRAIN_Y, _ = make_rows(seed=2, documents=3000)


TABLES = {"transformer.wte.weight": "embedding_lr", "lm_head.weight": "head_lr"}  # name -> its learning rate


SETTINGS = {
    "embedding_lr": 0.5,  # AdamW
    "head_lr": 0.01,  # AdamW
    "matrix_lr": 0.02,  # of everything else
    "matrices": "muon",  # "muon" or "adamw": who trains everything else
    "betas": (0.8, 0.95),  # AdamW
    "eps": 1e-10,  # AdamW
    "weight_decay": 0.0,  # of both
    "momentum": 0.95,  # Muon
    "warmup": 0.0,  # part of the steps
    "warmdown": 0.4,  # part of the steps
    "clip": 1.0,  # the longest gradient
}


T_VALUES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5th percentile for n differences


def adamw_step(
    weight: Tensor,  # any shape
    grad: Tensor,  # same shape
    mean: Tensor,  # same shape, running mean of gradients
    square: Tensor,  # same shape, running mean of squared gradients
    step: int,  # 1 for the first update
    lr: float,  # learning rate
    betas: tuple[float, float] = (0.8, 0.95),  # how much of each mean is kept
    eps: float = 1e-10,  # added to the root of the corrected mean square
    weight_decay: float = 0.0,  # part of the weight that is taken away, times lr
) -> tuple[Tensor, Tensor, Tensor]:  # the new weight, mean and square
    "One AdamW step on one tensor; nothing that comes in is changed."
    raise NotImplementedError("adamw_step is not written yet")


def orthogonalize(
    g: Tensor,  # (rows, columns) one matrix
    steps: int = 5,  # rounds of the polynomial
) -> Tensor:  # (rows, columns), same dtype; singular values between about 0.7 and 1.2
    "Make the singular values of a matrix about equal by Newton-Schulz iteration."
    raise NotImplementedError("orthogonalize is not written yet")


def muon_step(
    weight: Tensor,  # (rows, columns)
    grad: Tensor,  # (rows, columns)
    buffer: Tensor,  # (rows, columns) running mean of gradients
    lr: float,  # learning rate
    momentum: float = 0.95,  # how much of the running mean is kept
    weight_decay: float = 0.0,  # part of the weight that is taken away, times lr
) -> tuple[Tensor, Tensor]:  # the new weight and buffer
    "One Muon step on one matrix; nothing that comes in is changed."
    raise NotImplementedError("muon_step is not written yet")


def learning_rate(
    step: int,  # 0 for the first
    total: int,  # steps of the training; the last is total - 1
    warmup: int = 0,  # steps of the rise
    warmdown: int = 0,  # steps of the fall
    final: float = 0.0,  # where the fall would arrive one step after the last, 0..1
) -> float:  # multiplies the learning rates, 0..1
    "Rise, stay, fall."
    raise NotImplementedError("learning_rate is not written yet")


def clip_gradients(
    grads: dict[str, Tensor],  # name -> gradient, any shapes
    max_norm: float,  # the longest that is let through
) -> tuple[dict[str, Tensor], float]:  # the gradients, and their length before clipping
    "Shorten all gradients together to a given length, if they are longer."
    raise NotImplementedError("clip_gradients is not written yet")


def accumulate_gradients(
    weights: dict[str, Tensor],  # by name
    micro_batches: list[tuple[Tensor, Tensor]],  # x and y (B, T) int64; B may differ
) -> tuple[float, dict[str, Tensor]]:  # the mean loss in nats a target, and its gradient for each weight
    "The loss of a batch and its gradients, one micro-batch at a time."
    raise NotImplementedError("accumulate_gradients is not written yet")


def bits_per_byte(
    losses: list[Tensor],  # nats for each target, (B, T) each; B may differ
    targets: list[Tensor],  # int64 (B, T) each, -1 where nothing is predicted
    token_bytes: Tensor,  # (V,) bytes of each token, 0 for special ones
) -> float:  # bits per byte
    "Bits that a model needs for each byte of the target text."
    raise NotImplementedError("bits_per_byte is not written yet")


def update_weights(
    weights: dict[str, Tensor],  # by name
    grads: dict[str, Tensor],  # the same names
    state: dict[str, tuple[Tensor, ...]],  # name -> (mean, square) for AdamW, (buffer,) for Muon; empty before the first step
    step: int,  # 1 for the first update
    scale: float,  # from the schedule, multiplies all learning rates
    settings: dict,  # as SETTINGS
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:  # the new weights and the new state
    "One step of every weight: AdamW for the tables, and for the matrices what the settings say."
    raise NotImplementedError("update_weights is not written yet")


def train_model(
    x: Tensor,  # (N, T) int64 tokens, N at least batch_rows
    y: Tensor,  # (N, T) int64 targets, -1 where nothing is predicted
    steps: int,  # updates
    seed: int = 0,  # of the first weights and of the order of the rows
    batch_rows: int = 8,  # rows of one step
    micro_rows: int = 8,  # rows of one micro-batch
    settings: dict | None = None,  # what is different from SETTINGS
    watch: Callable | None = None,  # called as watch(step, loss, weights) after each step, 1 for the first; None: nobody watches
) -> tuple[list[float], dict[str, Tensor]]:  # the loss of each step, before its update, and the weights at the end
    "Train a new model."
    raise NotImplementedError("train_model is not written yet")


def paired_interval(
    baseline: list[float],  # one number for each seed
    variant: list[float],  # of the same seeds, in the same order; 2 to 10 of them
) -> tuple[float, float, float]:  # mean difference, variant minus baseline, and the ends of its 95% interval
    "How much a variant differs from the baseline, by Student's t over the differences."
    raise NotImplementedError("paired_interval is not written yet")


# a4-scale


SUM = re.compile(r"(\d+) ([-+*]) (\d+) is (-?\d+)")  # number, sign, number, result


def read_records(
    text: str,  # a metrics file: JSON objects, each ended by a line break
) -> list[dict]:  # the records, oldest first
    """Read a metrics file.

    A line counts once its line break is there; what comes after the last line break is dropped. Empty lines are skipped.
    A line that is no JSON, or no object with a text under "stage" and one under "kind", raises ValueError.
    """
    raise NotImplementedError("read_records is not written yet")


def steps_once(
    records: list[dict],  # of any stage and kind, in the order in which they were written
    stage: str,  # "base", "mid", "sft" or "rl"
) -> list[dict]:  # records of kind "step" of this stage, their numbers rising
    "Each step of a stage once: of attempts that did the same steps, the latest counts."
    raise NotImplementedError("steps_once is not written yet")


def count_flops(
    vocab_size: int,  # V
    depth: int,  # L, blocks
    width: int,  # C
    heads: int,  # of queries; each is width / heads wide
    kv_heads: int,  # of keys and values, 1 .. heads
    context: int,  # T, tokens
) -> int:  # floating-point operations
    "Operations of training on one token, forward and backward."
    raise NotImplementedError("count_flops is not written yet")


def measure_speed(
    steps: list[dict],  # at least two records of steps, with "tokens" and "seconds", both counted from the beginning
) -> float:  # tokens a second, of all devices together
    "The median of the speeds between neighbouring records."
    raise NotImplementedError("measure_speed is not written yet")


def utilisation(
    speed: float,  # tokens a second of all devices together
    flops: float,  # operations for each token
    peak: float,  # operations a second of one device
    devices: int,  # how many there are
) -> float:  # a fraction: 0.45, not 45
    "Model FLOP utilisation."
    raise NotImplementedError("utilisation is not written yet")


def active_seconds(
    records: list[dict],  # of any stage and kind, each with "time" in seconds
    stage: str,  # "base", "eval", ...
) -> float:  # seconds; 0 if nothing is known
    "How long a stage has worked: from its first record to its last, without what lies before a later record of kind environment."
    raise NotImplementedError("active_seconds is not written yet")


def run_cost(
    seconds: list[float],  # active seconds of each stage
    devices: int,  # that were held during all of it
    price: float,  # dollars an hour for one device
) -> tuple[float, float]:  # device hours, dollars
    "What a cluster charges for a run."
    raise NotImplementedError("run_cost is not written yet")


def predict_hours(
    flops: float,  # operations for each token
    tokens: float,  # of the whole training
    devices: int,  # that compute together
    peak: float,  # operations a second of one device
    utilisation: float,  # part of the peak that is reached, 0..1
) -> float:  # hours
    "Predict how long a training takes."
    raise NotImplementedError("predict_hours is not written yet")


def fit_law(
    points: list[tuple[float, float]],  # (size, loss), both above 0, of at least two different sizes
    floors: list[float],  # candidates for E, rising; at least one is below the smallest loss
) -> tuple[float, float, float]:  # E, A, a
    "Fit E + A / size^a by the procedure above."
    raise NotImplementedError("fit_law is not written yet")


def resample(
    points: list[tuple[float, float]],  # at least three different ones
    repeats: int,  # how many resamples are wanted
    seed: int,  # of random.Random
) -> list[list[tuple[float, float]]]:  # `repeats` lists, each as long as `points`
    "Draw points with replacement, by the procedure above."
    raise NotImplementedError("resample is not written yet")


def percentile_interval(
    values: list[float],  # in any order, at least one; is not changed
) -> tuple[float, float]:  # the 2.5th and the 97.5th percentile
    "The range that holds the middle 95% of some values."
    raise NotImplementedError("percentile_interval is not written yet")


def wilson_interval(
    right: int,  # right answers, 0 .. count
    count: int,  # questions, at least 1
    z: float = 1.96,  # width in standard deviations; 1.96 covers 95%
) -> tuple[float, float]:  # lower and upper end, fractions in 0..1
    "The interval that holds the true accuracy with 95% probability (Wilson, 1927)."
    raise NotImplementedError("wilson_interval is not written yet")


def compare_paired(
    first: list[bool],  # right or wrong, question by question
    second: list[bool],  # of another model, on the same questions in the same order
) -> tuple[int, int, float]:  # questions that only the first got right, that only the second did, and p, 0..1
    "McNemar's exact test, two-sided."
    raise NotImplementedError("compare_paired is not written yet")


def find_differences(
    p_values: list[float],  # one for each comparison, in any order
    level: float = 0.05,  # chance of any false finding that is accepted
) -> list[bool]:  # in the same order: whether it is a finding
    "Which of several comparisons show a difference (Holm, 1979)."
    raise NotImplementedError("find_differences is not written yet")


def classify_reply(
    question: str,  # with two whole numbers in it
    answer: str,  # the right result
    reply: str,  # what the model wrote, any text at all
) -> str:  # one of CLASSES
    "What is right or wrong with the reply to a sum."
    raise NotImplementedError("classify_reply is not written yet")


def cross_table(
    before: list[str],  # a class for each question
    after: list[str],  # the same questions, another model
) -> dict[tuple[str, str], int]:  # (before, after) -> how many questions; a plain dict, without zeros
    "Count how often each pair of classes occurs."
    raise NotImplementedError("cross_table is not written yet")
