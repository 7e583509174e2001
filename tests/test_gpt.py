"""The model against independent references: plain PyTorch in float64, transformers, a batch without padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nanochat.attention import apply_rotary, attend, rms_norm
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig, SoftcapLoss

SHAPES = [(4, 4), (4, 2), (4, 1)]  # heads, heads of keys and values


def make_model(heads=4, kv_heads=2, vocab_size=97, depth=2, width=64, context=80, seed=0):
    "A model in which no weight is zero, so that every part has a say."
    model = GPT(GPTConfig(vocab_size, depth, width, heads, kv_heads, context)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5, generator=generator)
    return model


def naive_logits(model, ids):
    "The architecture once more, written from its description, with no code of the package."
    c, weights = model.config, dict(model.named_parameters())
    T, D = ids.size(1), c.width // c.heads
    eps = torch.finfo(torch.float32).eps

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    dtype = weights["lm_head.weight"].dtype
    angles = torch.arange(T, dtype=dtype)[:, None] * 10_000 ** (-torch.arange(D // 2, dtype=dtype) / (D // 2))
    turn = torch.exp(-1j * angles)[:, None]

    def place(x):
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return norm(torch.cat([z.real, z.imag], -1))

    x = norm(weights["transformer.wte.weight"][ids])
    for i in range(c.depth):
        part = f"transformer.h.{i}."
        h = norm(x)
        q = place((h @ weights[part + "attn.c_q.weight"].T).unflatten(-1, (c.heads, D)))
        k = place((h @ weights[part + "attn.c_k.weight"].T).unflatten(-1, (c.kv_heads, D)))
        v = (h @ weights[part + "attn.c_v.weight"].T).unflatten(-1, (c.kv_heads, D))
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
        x = x + y @ weights[part + "attn.c_proj.weight"].T
        x = x + (norm(x) @ weights[part + "mlp.c_fc.weight"].T).clamp(min=0) ** 2 @ weights[part + "mlp.c_proj.weight"].T
    return 15 * torch.tanh(norm(x) @ weights["lm_head.weight"].T / 15)


@pytest.mark.parametrize("heads,kv_heads", SHAPES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_and_gradients_equal_the_plain_model(heads, kv_heads, dtype, tolerance):
    model = make_model(heads, kv_heads).to(dtype)
    model.cos, model.sin = (table.to(dtype) for table in exact_tables(model.config))
    ids = torch.randint(0, 97, (3, 71))  # 70 positions: more than one block, the last one not full
    targets = ids[:, 1:].clone()
    targets[0, :30] = -1
    ours = model(ids[:, :-1], targets)
    naive = F.cross_entropy(naive_logits(model, ids[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert abs(ours - naive) < tolerance
    for (name, _), a, b in zip(model.named_parameters(), *(torch.autograd.grad(x, list(model.parameters())) for x in (ours, naive))):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name
    per_token = model(ids[:, :-1], targets, reduction="none")
    assert per_token.shape == targets.shape and (per_token[0, :30] == 0).all()
    assert abs(per_token.sum() / model(ids[:, :-1], targets, reduction="sum") - 1) < 1e-6  # logits are float32 here
    with torch.no_grad():
        assert abs(model(ids[:, :-1], targets) - naive) < 1e-4


def exact_tables(config):
    "Rotary tables in float64."
    half = config.width // config.heads // 2
    angles = torch.arange(config.context, dtype=torch.float64)[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    return angles[:, None].cos(), angles[:, None].sin()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_softcap_loss(chunk, size):
    h = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    weight = (size * torch.randn(33, 8, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(-1, 33, (64,))
    naive = F.cross_entropy(15 * torch.tanh(h @ weight.T / 15), targets, ignore_index=-1, reduction="sum")
    ours = SoftcapLoss.apply(h, weight, targets, 15.0, chunk)
    assert torch.allclose(naive, ours, rtol=1e-10)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (h, weight)) for loss in (naive, ours))):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


def test_softcap_loss_survives_extremes():
    h, weight = torch.full((2, 4), 1e4, requires_grad=True), torch.tensor([[1e3] * 4, [-1e3] * 4, [0.0] * 4], requires_grad=True)
    loss = SoftcapLoss.apply(h, weight, torch.tensor([0, 1]), 15.0, 2)  # logits 15, -15, 0: the best and the worst guess
    expected = F.cross_entropy(torch.tensor([[15.0, -15.0, 0.0]] * 2), torch.tensor([0, 1]), reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, weight)))


@pytest.mark.parametrize("T", [2, 63, 64, 65, 200])
@pytest.mark.parametrize("heads,kv_heads", SHAPES)
def test_attention_in_blocks(T, heads, kv_heads):
    q, k, v = (torch.randn(2, n, T, 16, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    q, k, v = (t.requires_grad_() for t in (rms_norm(q), rms_norm(k), v))
    gradient = torch.randn(2, heads, T, 16, dtype=torch.float64)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = attend(q, k, v)
    assert type(ours.grad_fn).__name__ == "BlockedAttentionBackward"  # or we would compare PyTorch with itself
    assert torch.allclose(plain, ours, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), gradient) for y in (plain, ours))):
        assert torch.allclose(a, b, atol=1e-11)


def test_first_loss_is_ln_v():
    for config in (GPTConfig(512, 2, 64, 2, 1, 32), GPTConfig(1024, 4, 128, 4, 4, 64)):
        ids = torch.randint(0, config.vocab_size, (4, 33))
        assert abs(GPT(config).init_weights()(ids[:, :-1], ids[:, 1:]) / math.log(config.vocab_size) - 1) < 1e-5


def test_initial_spread():
    model = GPT(GPTConfig(1000, 2, 256, 4, 2, 32)).init_weights(3)
    for name, p in model.named_parameters():
        fan_out, fan_in = p.shape
        expected = 1.0 if "wte" in name else 0.0 if "c_proj" in name or "lm_head" in name else min(1, (fan_out / fan_in) ** 0.5) / fan_in**0.5
        assert p.std().item() == pytest.approx(expected, rel=0.03), name
    again = GPT(model.config).init_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.transformer.wte.weight, GPT(model.config).init_weights(4).transformer.wte.weight)


@pytest.mark.parametrize("position", [0, 1, 40, 69])
def test_causality(position):
    model, ids = make_model(), torch.randint(0, 97, (2, 70))
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 97
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(dim=-1).all()


def test_sizes_of_d20():
    config = GPTConfig.from_depth(20)
    assert (config.width, config.heads, config.kv_heads, config.vocab_size, config.context) == (1280, 10, 10, 65_536, 2048)
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == 560_988_160


@pytest.mark.parametrize("config", [GPTConfig(320, 2, 64, 2, 2, 64), GPTConfig(320, 3, 96, 4, 1, 50), GPTConfig.from_depth(4)])
def test_flops_equal_those_counted(config):
    with torch.device("meta"):
        model, ids = GPT(config), torch.zeros(2, config.context, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert counter.get_total_flops() == model.flops_per_token() * ids.numel()


@pytest.mark.parametrize("heads,kv_heads", SHAPES)
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 5, 1], [1, 20, 3]])
def test_cached_equals_whole(heads, kv_heads, lengths):
    model, more = make_model(heads, kv_heads), 6
    rows = [torch.randint(0, 97, (length + more,)) for length in lengths]
    prompts = torch.nn.utils.rnn.pad_sequence([row[:-more] for row in rows], batch_first=True)
    with torch.no_grad():
        whole = [model(row[None])[0] for row in rows]
        cache = model.new_cache(len(rows), max(lengths) + more)
        h = model.logits(model.hidden(prompts, cache))
        for b, length in enumerate(lengths):
            assert torch.allclose(h[b, :length], whole[b][:length], atol=1e-5)
        cache.set_lengths(lengths)
        for step in (0, 1, 2):  # one token at a time
            logits = model.logits(model.hidden(torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None], cache))
            for b, n in enumerate(lengths):
                assert torch.allclose(logits[b, 0], whole[b][n + step], atol=1e-5)
        logits = model.logits(model.hidden(torch.stack([row[n + 3 :] for row, n in zip(rows, lengths)]), cache))  # three at once
        for b, n in enumerate(lengths):
            assert torch.allclose(logits[b], whole[b][n + 3 :], atol=1e-5)
        assert cache.lengths.tolist() == [n + more for n in lengths]


def test_cache_keeps_and_repeats_rows():
    model = make_model()
    rows, last = torch.randint(0, 97, (3, 8)), torch.randint(0, 97, (2, 1))
    with torch.no_grad():
        cache = model.new_cache(3, 10)
        model.hidden(rows, cache)
        cache.set_lengths([8, 5, 2])
        cache.keep([2, 0])
        logits = model.logits(model.hidden(last, cache))[:, 0]
        assert torch.allclose(logits[0], model(torch.cat([rows[2, :2], last[0]])[None])[0, -1], atol=1e-5)
        assert torch.allclose(logits[1], model(torch.cat([rows[0], last[1]])[None])[0, -1], atol=1e-5)


def test_cache_refuses_more_than_it_holds():
    model = make_model()
    cache = model.new_cache(1, 4)
    with pytest.raises(AssertionError, match="5 positions in a cache for 4"):
        model.hidden(torch.zeros(1, 5, dtype=torch.int64), cache)


def test_rotary_turns_backwards():
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    angle = torch.tensor(0.5)
    assert torch.allclose(apply_rotary(x, angle.cos(), angle.sin()).flatten(), torch.tensor([angle.cos(), -angle.sin()]))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_transformers(kv_heads):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = make_model(4, kv_heads, vocab_size=128, depth=3, context=96)
    c = model.config
    config = transformers.NanoChatConfig(vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=4 * c.width,
                                         num_hidden_layers=c.depth, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                                         max_position_embeddings=c.context, rms_norm_eps=torch.finfo(torch.float32).eps)
    theirs = transformers.NanoChatForCausalLM(config).eval()
    names = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "attn.c_q": "self_attn.q_proj",
             "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, hf in names.items():
            name = name.replace(ours, hf)
        state[name] = tensor
    theirs.load_state_dict(state)
    ids = torch.randint(0, 128, (2, 96))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("change,message", [
    ({"width": 100, "heads": 3}, "--width 102"), ({"heads": 4, "kv_heads": 3}, "kv_heads"), ({"width": 36, "heads": 4, "kv_heads": 4}, "--width 40"),
    ({"depth": 0}, "depth must be at least 1"),
])
def test_impossible_sizes(change, message):
    sizes = {"vocab_size": 300, "depth": 1, "width": 64, "heads": 1, "kv_heads": 1, "context": 16} | change
    if "kv_heads" not in change:
        sizes["kv_heads"] = sizes["heads"]
    with pytest.raises(UserError, match=message):
        GPTConfig(**sizes)


def test_too_long_a_row():
    with pytest.raises(UserError, match="81 tokens don't fit into a context of 80"):
        make_model()(torch.zeros(1, 81, dtype=torch.int64))


def test_autocast_is_close_and_flows_in_bfloat16():
    model, ids = make_model(width=128), torch.randint(0, 97, (4, 65))
    full = model(ids[:, :-1], ids[:, 1:])
    seen = []
    handle = model.transformer.h[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        short = model(ids[:, :-1], ids[:, 1:])
    handle.remove()
    assert seen == [torch.bfloat16] and short.dtype == torch.float32
    assert abs(short / full - 1) < 0.02
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) for loss in (full, short)]
    assert gradients[1].dtype == torch.float32 and F.cosine_similarity(*gradients, dim=0) > 0.99


def test_learns_a_batch_by_heart():
    model, ids = GPT(GPTConfig(128, 2, 64, 2, 2, 32)).init_weights(), torch.randint(0, 128, (2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
