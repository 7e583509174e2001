"""Six mistakes that students make in assignment 1, and the test cells that each must fail."""

MISTAKES: list[tuple[str, str, str, str, set[str]]] = [  # what is wrong, the solution cell, old text, new text, test cells that fail
    ("changes are noted place by place, so two merges that touch are miscounted", "count-changes",
     "changes = {each: after.get(each, 0) - before.get(each, 0) for each in (*before, *after)}",
     """changes = {}
    for i in [i for i in range(len(ids) - 1) if ids[i : i + 2] == pair]:
        places = [(pair, -1)]
        if i > 0:
            places += [((ids[i - 1], pair[0]), -1), ((ids[i - 1], new), 1)]
        if i + 2 < len(ids):
            places += [((pair[1], ids[i + 2]), -1), ((new, ids[i + 2]), 1)]
        for each, by in places:
            changes[each] = changes.get(each, 0) + by""",
     {"test-changes", "test-train", "test-visits"}),
    ("of equally frequent pairs the one with the larger ids is taken", "choose-pair",
     "best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)",
     "best = max(counts, key=lambda pair: (counts[pair], pair), default=None)",
     {"test-choose", "test-train", "test-visits"}),
    ("merges are done from left to right instead of the earliest first", "merge-steps",
     "rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))",
     "i, rank = min(((i, ranks[a + b]) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks), default=(0, len(ranks)))",
     {"test-steps", "test-encode"}),
    ("each token is decoded by itself, so a character in two tokens is lost", "decode-bpe",
     'return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")',
     'return "".join(tokens[i].decode("utf-8", errors="replace") for i in ids)',
     {"test-decode"}),
    ("the end of the assistant's turn is left out of the mask", "render-conversation",
     'add([special["<|assistant_end|>"]], 1)',
     'add([special["<|assistant_end|>"]], 0)',
     {"test-mask", "test-tools"}),
    ("the names of special tokens in a text become special tokens", "render-conversation",
     'add([special["<|user_start|>"], *encode_bpe(content, tokens), special["<|user_end|>"]], 0)',
     r"""pieces = regex.split(r"(<\|\w+\|>)", content)
            body = [i for piece in pieces for i in ([special[piece]] if piece in special else encode_bpe(piece, tokens))]
            add([special["<|user_start|>"], *body, special["<|user_end|>"]], 0)""",
     {"test-special"}),
]
