"""`transformers.NanoChatForCausalLM` with torch's AdamW and its own `generate`."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NanoChatConfig, NanoChatForCausalLM, StoppingCriteriaList
from worker import ModelWorker, cooldown, serve

NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def translate(
    name: str,  # of a weight in our files
) -> str:  # in transformers'
    "The other name of a weight."
    if not name.startswith("transformer.h."):
        return name.replace("transformer.wte", "model.embed_tokens")
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"model.layers.{layer}.{NAMES[part]}.weight"


class Transformers(ModelWorker):
    "Hugging Face's."

    def build(self, shape: dict[str, int]) -> NanoChatForCausalLM:
        model = NanoChatForCausalLM(NanoChatConfig(
            vocab_size=shape["vocab_size"], hidden_size=shape["width"], intermediate_size=4 * shape["width"], num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], max_position_embeddings=shape["context"],
            rms_norm_eps=torch.finfo(torch.float32).eps, bos_token_id=None, eos_token_id=None, pad_token_id=None))
        return model.float()

    def load(self, weights: dict[str, Tensor]) -> bool:
        self.model.load_state_dict({translate(name): weight for name, weight in weights.items()})
        return True

    def prepare_training(self) -> None:
        self.lr = self.job.get("lr", 1e-3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.model.train()

    def forward(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.compute(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction=reduction)

    def update(self, step: int, progress: float) -> None:
        if self.job.get("clip"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job["clip"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(cooldown(progress, 0.4), (step + 1) / 20)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def write(self, prompt: list[int], batch: int, new: int, note: Callable[[int], None]) -> None:
        def seen(ids: Tensor, scores: Tensor, **_) -> Tensor:  # a stopping criterion is called after every token
            note(int(ids[0, -1]))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        ids = torch.tensor([prompt] * batch, device=self.device)
        self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                            stopping_criteria=StoppingCriteriaList([seen]))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    serve(Transformers)
