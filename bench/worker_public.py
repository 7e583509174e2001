"""The public nanochat, from a checkout that comes first on the path: its model, its optimizers, its engine, its learning rates."""
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import torch
from torch import Tensor
from worker import ModelWorker, cooldown, serve

from nanochat.gpt import GPT, GPTConfig  # theirs

REFERENCE_BATCH = 2**19  # tokens of the batch that the learning rates of 2026 were found for


class Public(ModelWorker):
    "Theirs: the checkout of October 2025 has two optimizers, that of 2026 has one, more parameters, and its own schedules."
    dynamic = False  # as its script compiles

    def __init__(self, job: dict):
        self.modern = hasattr(GPT, "setup_optimizer")
        super().__init__(job)

    def build(self, shape: dict[str, int]) -> GPT:
        if self.job.get("parameters"):
            shape = self.fit_width(shape, self.job["parameters"])
        model = self.make(shape).to(self.device)
        model.init_weights()
        if self.modern:  # it casts by itself
            self.autocast = nullcontext()
        elif self.dtype == torch.float32:  # on a GPU its embedding is bfloat16, which only autocast can multiply
            model.transformer.wte.float()
        return model

    def make(self, shape: dict[str, int]) -> GPT:
        "Their model of these sizes, before its weights are drawn."
        sizes = {"sequence_len": shape["context"], "vocab_size": shape["vocab_size"], "n_layer": shape["depth"], "n_head": shape["heads"],
                 "n_kv_head": shape["kv_heads"], "n_embd": shape["width"]}
        if "window_pattern" in {field.name for field in fields(GPTConfig)}:
            from nanochat.flash_attention import USE_FA3

            sizes["window_pattern"] = "SSSL" if USE_FA3 else "L"  # what its script recommends without its own kernel
        return GPT(GPTConfig(**sizes))

    def fit_width(
        self,
        shape: dict[str, int],
        parameters: int,  # to come near to
    ) -> dict[str, int]:
        "The same depth, as wide as gives the nearest number of parameters."
        def count(width: int) -> int:
            with torch.device("meta"):
                return sum(p.numel() for p in self.make(shape | {"width": width}).parameters())

        step = 8 * shape["heads"]
        return shape | {"width": min(range(step, shape["width"] + step, step), key=lambda width: abs(count(width) - parameters))}

    def load(self, weights: dict[str, Tensor]) -> bool:
        result = self.model.load_state_dict(weights, strict=False)
        return not result.missing_keys and not result.unexpected_keys

    def flops(self) -> int:
        return self.model.estimate_flops()

    def prepare_training(self) -> None:
        self.decay = 0.0
        if not self.modern:
            self.optimizers = self.model.setup_optimizers()  # its script says the same as its function
        elif not self.job.get("scaled"):
            self.optimizers = [self.model.setup_optimizer()]
        else:  # as its script does: for the batch's size, and for the tokens that a model of this size would be trained on
            reference = self.job["shape"] | {"depth": 12, "width": 768, "heads": 6, "kv_heads": 6}
            with torch.device("meta"):
                wanted = [model.num_scaling_params() for model in (self.make(reference), self.model)]
            ratio = math.prod((counts["transformer_matrices"] + counts["lm_head"]) ** sign for counts, sign in zip(wanted, (1, -1)))
            scale = math.sqrt(self.job["batch"] * (self.rows["train"].size(1) - 1) / REFERENCE_BATCH)
            self.decay = 0.28 * scale * ratio
            self.optimizers = [self.model.setup_optimizer(0.008 * scale, 0.3 * scale, 0.02 * scale, self.decay, 0.5 * scale)]

    def forward(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return self.compute(x, y, loss_reduction=reduction)

    def update(self, step: int, progress: float) -> None:
        if not self.modern:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate, momentum, decay = self.schedule(step, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
                if "momentum" in group:
                    group["momentum"] = momentum
                    if self.modern:
                        group["weight_decay"] = decay
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def schedule(self, step: int, progress: float) -> tuple[float, float, float]:  # of the rate, Muon's momentum, Muon's weight decay
        "What their scripts do over a training."
        if not self.modern:
            return cooldown(progress, 0.2), 0.85 + 0.1 * min(1.0, step / 300), 0.0
        ends = max(0.0, progress - 0.35) / 0.65  # the part of the cooldown that is behind us
        momentum = 0.85 + 0.12 * min(1.0, step / 400) if step < 400 or not ends else 0.97 - 0.07 * ends
        return min((step + 1) / 40, cooldown(progress, 0.65, 0.05)), momentum, self.decay * 0.5 * (1 + math.cos(math.pi * progress))

    def write(self, prompt: list[int], batch: int, new: int, note: Callable[[int], None]) -> None:
        from nanochat.engine import Engine

        V = self.job["shape"]["vocab_size"]  # special tokens are beyond the vocabulary, so that nothing stops early
        tokenizer = SimpleNamespace(encode_special=lambda name: V + 1, get_bos_token_id=lambda: V)
        for column, _ in Engine(self.model, tokenizer).generate(prompt, num_samples=batch, max_tokens=new, temperature=0.0):
            note(column[0])


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    serve(Public)
