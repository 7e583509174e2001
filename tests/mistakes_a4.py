"""Mistakes that students make in assignment 4, each with the tests that have to notice it."""

UNPAIRED = """
    from math import erfc

    right, wrong = sum(first) + sum(second), len(first) + len(second) - sum(first) - sum(second)
    spread = sqrt(right * wrong * 2 / max(1, len(first) + len(second)))
    tail = erfc(abs(sum(first) - sum(second)) / max(spread, 1e-9)) * 2**n / 2"""

MISTAKES: list[tuple[str, str, str, str, set[str]]] = [  # what is wrong, solution cell, old text, new text, tests that must fail
    ("the steps that a resumed run does again are counted twice", "steps-once", 'while steps and steps[-1]["step"] >= record["step"]:', "while False:", {"test-steps-once"}),
    ("the embedding counts as if it multiplied", "count-flops", "6 * (depth * block + vocab_size * width)", "6 * (depth * block + 2 * vocab_size * width)", {"test-count-flops"}),
    ("eight devices' speed is divided by one device's peak", "utilisation", "(peak * devices)", "peak", {"test-utilisation"}),
    ("candidates are judged by plain differences instead of logarithms", "fit-law", "error = sum((log(floor + scale * size**slope) - log(loss)) ** 2",
     "error = sum((floor + scale * size**slope - loss) ** 2", {"test-fit-law"}),
    ("the textbook's interval instead of Wilson's", "wilson-interval", "    scale = 1 + z * z / count", "    middle, spread, scale = p, z * sqrt(p * (1 - p) / count), 1",
     {"test-wilson-interval"}),
    ("a test that forgets who answered what", "compare-paired", "    tail = sum(comb(n, i) for i in range(min(only_first, only_second) + 1))", UNPAIRED.strip("\n"), {"test-compare-paired"}),
]
