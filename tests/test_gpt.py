"""The model against an independent implementation."""
import pytest
import torch

from nanochat import attention
from nanochat.attention import has_onednn, project
from nanochat.gpt import GPT, GPTConfig, SoftcapLoss, loss_chunk

transformers = pytest.importorskip("transformers", minversion="5.0")

NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def their_name(name):
    if name == "lm_head.weight":
        return name
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"model.layers.{layer}.{NAMES[part]}.weight"


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_logits_equal_those_of_transformers(heads, kv_heads):
    config = GPTConfig(vocab_size=128, depth=3, width=64, heads=heads, kv_heads=kv_heads, context=32)
    ours = GPT(config).init_weights(seed=1)
    with torch.no_grad():
        for weight in ours.parameters():
            if weight.abs().sum() == 0:
                weight.normal_(0, 0.2)
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=256,
        max_position_embeddings=32, rms_norm_eps=torch.finfo(torch.float32).eps, attn_implementation="eager")).eval()
    missing = theirs.load_state_dict({their_name(name): w for name, w in ours.state_dict().items()}, strict=False)
    assert not missing.unexpected_keys and not [k for k in missing.missing_keys if "rotary" not in k]
    ids = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("ignored", (0.0, 0.6, 0.99))
def test_loss_equals_cross_entropy_of_the_logits_and_so_do_gradients(ignored):
    model = GPT(GPTConfig(vocab_size=100, depth=2, width=32, heads=2, kv_heads=1, context=100)).init_weights(seed=2)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    generator = torch.Generator().manual_seed(3)
    ids, targets = (torch.randint(0, 100, (4, 100), generator=generator) for _ in range(2))
    targets[torch.rand(4, 100, generator=generator) < ignored] = -1  # so that what is left is more or less than 128
    gradients = []
    for loss in (model(ids, targets), torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1)):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(*gradients))  # float32 rounds to a part of the largest, here up to 25


@pytest.mark.parametrize("asks", [True, False], ids=["oneDNN", "as PyTorch chooses"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_the_loss_of_a_large_vocabulary_in_several_chunks(asks, dtype, tolerance, monkeypatch):
    if asks and not has_onednn():
        pytest.skip("this processor, or this PyTorch, has no oneDNN to ask")
    monkeypatch.setattr(attention, "has_onednn", lambda: asks)
    generator = torch.Generator().manual_seed(4)
    h, weight = torch.randn(300, 64, generator=generator).to(dtype).requires_grad_(), (2 * torch.randn(20_000, 64, generator=generator)).to(dtype).requires_grad_()
    targets, chunk = torch.randint(-1, 20_000, (300,), generator=generator), loss_chunk(20_000, "cpu")
    targets[::7] = -1
    assert 300 % chunk and 300 > 2 * chunk and chunk * weight.numel() > attention.LARGE
    exact = torch.nn.functional.cross_entropy(15 * torch.tanh(h.double() @ weight.double().T / 15), targets, ignore_index=-1, reduction="sum")
    loss = SoftcapLoss.apply(h, weight, targets, 15.0, chunk)
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, (h, weight)), torch.autograd.grad(exact, (h, weight))):
        assert (ours.double() - theirs.double()).abs().max() <= 3 * tolerance * theirs.abs().max()


@pytest.mark.parametrize("asks", [True, False], ids=["oneDNN", "as PyTorch chooses"])
@pytest.mark.parametrize("shape", [(3, 50, 40), (1, 40), (40,), (2, 0, 40), (300, 40)], ids=str)
def test_products_and_their_gradients_equal_the_formula(asks, shape, monkeypatch):
    if asks and not has_onednn():
        pytest.skip("this processor, or this PyTorch, has no oneDNN to ask")
    monkeypatch.setattr(attention, "has_onednn", lambda: asks)
    monkeypatch.setattr(attention, "LARGE", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    wide = torch.randn(40, 30, generator=generator)
    for weight in (wide.T.contiguous().requires_grad_(), wide.T.detach().requires_grad_()):  # as it is stored, and as a view of another
        y, expected = project(x, weight), x.double() @ weight.double().T
        gradient = torch.randn(y.shape, generator=generator)
        ours, theirs = (torch.autograd.grad(out, (x, weight), gradient.to(out.dtype)) for out in (y, expected))
        torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(project(x, weight), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", ["autocast", "bfloat16", "float64", "compiled", "meta", "small"])
def test_only_large_products_of_float32_on_a_cpu_are_given_to_onednn(changed, monkeypatch):
    monkeypatch.setattr(attention, "multiply_onednn", lambda *_: pytest.fail("oneDNN was asked"))
    monkeypatch.setattr(attention, "LARGE", 10**9 if changed == "small" else 1)
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(changed, torch.float32)
    x, weight = (torch.ones(4, 8, dtype=dtype, device="meta" if changed == "meta" else "cpu") for _ in range(2))
    if changed == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", torch.bfloat16, enabled=changed == "autocast"):
        assert project(x, weight).dtype == (torch.bfloat16 if changed in ("autocast", "bfloat16") else dtype)
