"""Mistakes such as students make in assignment 3, and the tests that each must fail: one for its idea, and those that put everything together."""
MISTAKES: list[tuple[str, str, str, str, set[str]]] = [  # what is wrong, the cell, the right text, the wrong text, tests that fail
    ("AdamW's corrections are one step ahead", "adamw-step",
     "mean_hat = mean / (1 - betas[0] ** step)\n    square_hat = square / (1 - betas[1] ** step)",
     "mean_hat = mean / (1 - betas[0] ** (step + 1))\n    square_hat = square / (1 - betas[1] ** (step + 1))",
     {"test-adamw-correction", "test-adamw-ten-steps"}),
    ("epsilon stands inside the root", "adamw-step", "(square_hat.sqrt() + eps)", "(square_hat + eps).sqrt()", {"test-adamw-ten-steps"}),
    ("the matrix is not made small before the first round", "orthogonalize", "    x = x / (x.norm() + 1e-7)\n", "", {"test-orthogonalize"}),
    ("the learning rate arrives at zero in the last step", "learning-rate", "(total - step) / warmdown", "(total - 1 - step) / warmdown", {"test-warmdown"}),
    ("each gradient is clipped by its own length", "clip-gradients",
     "return {name: scale * g for name, g in grads.items()}, norm",
     "return {name: min(1.0, max_norm / (g.norm().item() + 1e-6)) * g for name, g in grads.items()}, norm",
     {"test-clip"}),
    ("a mean of means over micro-batches", "accumulate",
     "part = token_losses(weights, x, y).sum() / total",
     "part = token_losses(weights, x, y).sum() / (y >= 0).sum().clamp(min=1) / len(micro_batches)",
     {"test-accumulate-uneven"}),
]
