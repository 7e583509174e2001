"""This repository's model, optimizer, loader and engine."""
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from worker import ModelWorker, serve

from nanochat.dataloader import Echo, RowLoader, RowStore
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import lr_schedule, muon_momentum
from nanochat.pretrain import BaseConfig
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.train import accumulate_gradients, build_optimizer


class Ours(ModelWorker):
    "Ours."

    def build(self, shape: dict[str, int]) -> GPT:
        return GPT(GPTConfig(**shape)).init_weights(seed=self.job.get("seed", 0))

    def load(self, weights: dict[str, Tensor]) -> bool:
        self.model.load_state_dict(weights)
        return True

    def prepare_training(self) -> None:
        self.cfg = BaseConfig(precision=self.job["precision"], **self.job.get("settings", {}))
        self.optimizer = build_optimizer(self.model, replace(self.cfg, precision="auto"))  # Newton-Schulz in what is fast here, as peers do
        rows = self.rows["train"].numpy()
        echo = Echo(self.cfg.echo_tokens // (rows.shape[1] - 1), self.cfg.echo_part, self.cfg.echo_length)  # as run_pretrain makes it
        self.loader = RowLoader(RowStore(1, lambda _: (rows, None)), self.job["batch"], device=self.device, echo=echo)

    def batch(self) -> tuple[Tensor, Tensor]:
        return next(self.loader)

    def forward(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        if reduction == "none":
            return self.compute(x, y, reduction="none")
        return self.compute(x, y, reduction="sum") / (y >= 0).sum()

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        return accumulate_gradients(self.compute, [(x, y)], self.autocast)

    def update(self, step: int, progress: float) -> None:
        self.optimizer.reduce_gradients()
        self.optimizer.clip_gradients(self.cfg.clip)
        scale = lr_schedule(progress, 1.0, self.cfg.warmup, self.cfg.cooldown)
        self.optimizer.apply(lr_scale=scale, momentum=muon_momentum(step))
        self.optimizer.zero_grad()

    def write(self, prompt: list[int], batch: int, new: int, note: Callable[[int], None]) -> None:
        V = self.job["shape"]["vocab_size"]  # special tokens are beyond the vocabulary, so that nothing stops early
        special = {name: V + i for i, name in enumerate(SPECIAL_TOKENS)}
        tokenizer = SimpleNamespace(bos=V, special=special, vocab_size=V + len(special))
        for column, _ in Engine(self.model, tokenizer).generate(prompt, batch, new, temperature=0):
            note(column[0])


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    serve(Ours)
