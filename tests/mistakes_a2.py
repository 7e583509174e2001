"""Mistakes that students make in assignment 2, and the tests that must find each of them: those, and no others."""

MISTAKES: list[tuple[str, str, str, str, set[str]]] = [  # what is wrong, solution cell, old text, new text, tests that must fail
    ("epsilon is added to the root instead of under it", "rms-norm",
     "(x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()", "1 / (x.square().mean(dim=-1, keepdim=True).sqrt() + EPS)", {"test-rms-norm"}),
    ("neighbours are paired instead of halves", "apply-rotary",
     "a, b = x.chunk(2, dim=-1)", "a, b = x[..., ::2], x[..., 1::2]", {"test-apply-rotary"}),
    ("the mask lets each query see one position of its future", "causal-mask",
     "tril(keys - queries)", "tril(keys - queries + 1)", {"test-causal-mask"}),
    ("query heads share in the order 0, 1, 0, 1", "share-heads",
     "x.repeat_interleave(heads // x.size(1), dim=1)", "x.repeat(1, heads // x.size(1), 1, 1)", {"test-share-heads"}),
    ("the MLP reads the stream without normalisation", "block",
     "mlp(rms_norm(x), ", "mlp(x, ", {"test-block"}),
    ("new tokens are placed from position 0 on, whatever is in the cache", "decode-step",
     "(cos[before:], sin[before:])", "(cos[: ids.size(1)], sin[: ids.size(1)])", {"test-decode"}),
]
