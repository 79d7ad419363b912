"""Recurrent layers (Qwen3.5) under a memory: what a memory learns for them is exactly what a text
would leave behind, whatever it is batched with and however the batch is read."""

import copy

import pytest
import torch
from support import activation_checkpointing
from support.models import HYBRID, attached, multimodal, perturb, tiny, tokens
from torch.nn import functional as F
from transformers import DynamicCache

import koff
from koff.evaluation.attention_mass import mean_mass
from koff.model.attach import new_memory
from koff.model.memories import KVWeights, NoWeights
from koff.model.prefill import fill_from_tokens
from koff.model.recurrent import Start, StateWeights, put_before, run_from

MIX = ["es", None, "keys"]
# fp32, three layers: sums of up to ~100 products reordered, 2^-24 each, logits of size ~1.
FP32 = 1e-5


def with_texts(length=9, **changes):
    """A model whose memories are what it caches of three texts, and the texts by name."""
    kv = koff.KVConfig(length, "tokens", num_frozen_tokens=min(1, length - 1))
    changes = {"initializer_range": 0.05, **changes}
    config = dict(lora=None, target_sparsity=0, shift=False, changes=changes)
    model = attached(HYBRID, kv=kv, **config)
    texts = {name: tokens(1, length, seed=i) for i, name in enumerate(model.koff.memory_names)}
    for name, text in texts.items():
        fill_from_tokens(model, name, text)
    return model, texts | {None: tokens(1, 0)}


def padded(ids, starts):
    """The rows with as many tokens of padding in front as ``starts`` says, and the mask."""
    width = ids.shape[1] + max(starts)
    # Not the pad token, whose embedding is zero in a new model: padding must not be seen at all.
    rows, mask = torch.full((len(ids), width), 5), torch.zeros(len(ids), width)
    for row, start in enumerate(starts):
        rows[row, start : start + ids.shape[1]] = ids[row]
        mask[row, start:] = 1
        mask[row, start + ids.shape[1] :] = 0
    return rows, mask.long()


def unpadded(logits, starts, length):
    return torch.stack([logits[row, s : s + length] for row, s in enumerate(starts)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_gates_and_no_memory_are_bit_equal_and_detach_restores(dtype):
    plain, ids = tiny(HYBRID).to(dtype), tokens()
    logits, classes = plain(ids).logits, [type(m) for m in plain.modules()]
    config = koff.KoffConfig(("a",), kv=koff.KVConfig(5, "tokens"))
    model = koff.attach(plain, config).eval()
    assert torch.equal(model(ids, memory=None).logits, logits)
    assert koff.detach(perturb(model)) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(ids).logits, logits)


# 2 tokens leave zeros among the convolution's three last inputs; the delta rule works in chunks of
# 64 tokens.
@pytest.mark.parametrize(("length", "more"), [(9, 11), (2, 1), (1, 5), (70, 130)])
@torch.no_grad()
def test_a_memory_of_a_text_gives_the_logits_of_the_text(length, more):
    model, texts = with_texts(length)
    ids = tokens(3, more)
    ours = model(ids, memory="keys").logits
    plain = koff.detach(copy.deepcopy(model))
    whole = plain(torch.cat([texts["keys"].expand(3, -1), ids], 1)).logits[:, length:]
    assert (ours - whole).abs().max() < FP32
    assert (ours - model(ids).logits).abs().max() > 0.01
    # Each half alone is another text: the states without the keys, and the keys without the states.
    for kind in (StateWeights, KVWeights):
        half = copy.deepcopy(model)
        for weights in half.koff.memories["keys"].kv:
            if isinstance(weights, kind):
                weights.fill_(*(torch.zeros_like(t) for t in weights.parts().values()))
        assert (half(ids, memory="keys").logits - whole).abs().max() > 100 * FP32


@torch.no_grad()
def test_generating_under_a_memory_of_a_text_is_generating_behind_the_text():
    # The head of a tied model repeats the last token, whatever came before.
    model, texts = with_texts(initializer_range=0.2, tie_word_embeddings=False)
    ids, starts = tokens(), (4, 0, 2)
    options = dict(max_new_tokens=8, do_sample=False)
    behind = [
        model.generate(torch.cat([texts[name], ids[row : row + 1]], 1), **options)[0, -8:]
        for row, name in enumerate(MIX)
    ]
    got = model.generate(ids, memory=MIX, **options)
    assert torch.equal(got[:, 11:], torch.stack(behind))
    assert not torch.equal(got, model.generate(ids, **options))
    rows, mask = torch.full((3, 15), 5), torch.zeros(3, 15, dtype=torch.long)
    for row, start in enumerate(starts):  # texts of different lengths, padded on the left
        rows[row, start:] = torch.cat([tokens(1, 4 - start, seed=9)[0], ids[row]])
        mask[row, start:] = 1
    behind = [
        model.generate(torch.cat([texts[name], rows[row : row + 1, start:]], 1), **options)[0, -8:]
        for row, (name, start) in enumerate(zip(MIX, starts, strict=True))
    ]
    for kind in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        got = model.generate(rows, attention_mask=mask, memory=MIX, **options, **kind)
        assert torch.equal(got[:, 15:], torch.stack(behind)), kind
    beams = model.generate(rows, attention_mask=mask, memory=MIX, num_beams=3, **options)
    for row, (name, start) in enumerate(zip(MIX, starts, strict=True)):
        text = torch.cat([texts[name], rows[row : row + 1, start:]], 1)
        alone = model.generate(text, num_beams=3, **options)[0, -8:]
        assert torch.equal(beams[row, 15:], alone)


@torch.no_grad()
def test_mixed_and_padded_rows_equal_rows_alone():
    model, ids = attached(HYBRID), tokens()
    alone = torch.cat([model(ids[r : r + 1], memory=name).logits for r, name in enumerate(MIX)])
    assert (model(ids, memory=MIX).logits - alone).abs().max() < FP32
    base = koff.detach(copy.deepcopy(model))(ids).logits
    assert (alone[0] - base[0]).abs().max() > 0.01 and (alone[2] - base[2]).abs().max() > 0.01
    for starts in ((4, 0, 2), (0, 6, 9), (0, 0, 0)):  # the last: padding on the right alone
        rows, mask = padded(ids, starts)
        rows, mask = F.pad(rows, (0, 2), value=5), F.pad(mask, (0, 2))
        got = model(rows, attention_mask=mask, memory=MIX).logits
        assert (unpadded(got, starts, 11) - alone).abs().max() < FP32


@pytest.mark.parametrize("cuts", [(5,), (3, 9), (2, 4, 6), (8, 9, 10, 12)])
@torch.no_grad()
def test_a_text_read_in_pieces_equals_one_forward(cuts):
    model, ids, starts = attached(HYBRID), tokens(), (4, 0, 8)
    rows, mask = padded(ids, starts)
    whole = model(rows, attention_mask=mask, memory=MIX).logits
    cache, got = None, []
    for begin, end in zip((0, *cuts), (*cuts, 19), strict=True):
        out = model(
            rows[:, begin:end],
            attention_mask=mask[:, :end],
            memory=MIX,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        got.append(out.logits)
    got = unpadded(torch.cat(got, 1), starts, 11)
    assert (got - unpadded(whole, starts, 11)).abs().max() < FP32


@pytest.mark.parametrize("cache", [None, "empty"])
def test_a_forward_writes_into_no_memory(cache):
    model = attached(HYBRID)
    before = copy.deepcopy(model.koff.state_dict())
    with torch.no_grad():
        for ids in (tokens(2, 1), tokens(2, 4)):
            past = None if cache is None else DynamicCache(config=model.config)
            out = model(ids, memory="en", past_key_values=past, use_cache=True)
            model(ids[:, :1], memory="en", past_key_values=out.past_key_values)
    assert all(torch.equal(t, before[name]) for name, t in model.koff.state_dict().items())


def test_without_the_switch_only_attention_has_a_prefix():
    kv = koff.KVConfig(7, "tokens", recurrent_state=False)
    model, ids = attached(HYBRID, kv=kv), tokens()
    for name in model.koff.memory_names:
        kinds = [type(weights).__name__ for weights in model.koff.memories[name].kv]
        assert kinds == ["NoWeights", "KVWeights", "NoWeights"]
    mixed = model(ids, memory=MIX).logits
    for row, name in enumerate(MIX):
        alone = model(ids[row : row + 1], memory=name).logits[0]
        assert (mixed[row] - alone).abs().max() < FP32
    assert isinstance(attached(HYBRID).koff.memories["en"].kv[0], StateWeights)
    assert not any(isinstance(w, NoWeights) for w in attached("qwen3").koff.memories["en"].kv)


@torch.no_grad()
def test_memories_with_and_without_states_mix():
    model, ids = attached(HYBRID), tokens()
    generator = torch.Generator().manual_seed(5)
    kinds = {
        "keys_only": (None, koff.KVConfig(12, "normal", recurrent_state=False)),
        "lora_only": (koff.LoRAConfig(r=2), None),
    }
    for name, (lora, kv) in kinds.items():
        model.koff.memories.add(new_memory(model, name, lora, kv, generator))
        for p in model.koff.memories[name].parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    names = ["keys_only", "en", "lora_only"]
    mixed = model(ids, memory=names).logits
    for row, name in enumerate(names):
        alone = model(ids[row : row + 1], memory=name).logits[0]
        assert (mixed[row] - alone).abs().max() < FP32


@torch.no_grad()
def test_a_learned_state_that_is_not_finite_is_refused():
    model, ids = attached(HYBRID), tokens()
    model.koff.memories["es"].kv[0].state[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="memory 'es' must be finite, got NaN or infinity"):
        model(ids, memory=MIX)


def by_the_formula(module, x, state, conv, mask):
    """The docstring of ``run_from``, one row and one token after another."""
    out = torch.zeros_like(x)
    group, size = module.num_v_heads // module.num_k_heads, module.conv_kernel_size
    for row in range(len(x)):
        s, window = state[row], conv[row]
        for t in range(x.shape[1]):
            if not mask[row, t]:
                continue
            window = torch.cat([window, module.in_proj_qkv(x[row, t])[:, None]], 1)[:, -size:]
            mixed = F.silu((window * module.conv1d.weight[:, 0]).sum(1))
            sizes = [module.key_dim, module.key_dim, module.value_dim]
            q, k, v = (p.view(-1, w) for p, w in zip(mixed.split(sizes), (8, 8, 12), strict=True))
            q, k = (F.normalize(p, dim=-1).repeat_interleave(group, 0) for p in (q, k))
            beta = module.in_proj_b(x[row, t]).sigmoid()[:, None]
            a = F.softplus(module.in_proj_a(x[row, t]) + module.dt_bias)
            s = s * (-module.A_log.exp() * a).exp()[:, None, None]
            s = s + k[:, :, None] * (beta * (v - torch.einsum("hkv,hk->hv", s, k)))[:, None]
            y = torch.einsum("hkv,hk->hv", s, q) / 8**0.5
            gate = module.in_proj_z(x[row, t]).view(-1, 12)
            y = y * (y.pow(2).mean(-1, keepdim=True) + module.norm.variance_epsilon).rsqrt()
            out[row, t] = module.out_proj((module.norm.weight * y * F.silu(gate)).flatten())
    return out


def test_values_and_gradients_are_those_of_the_formula():
    module = tiny(HYBRID, initializer_range=0.3).model.layers[0].linear_attn.requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]])
    x = torch.randn(3, 6, 48, generator=generator)
    state = torch.randn(3, 4, 8, 12, generator=generator)
    conv = torch.randn(3, 80, 3, generator=generator)
    weight = torch.randn(3, 6, 48, generator=generator) * mask[:, :, None]
    found = []
    for run in (
        lambda *start: run_from(module, x, Start(*start), None, mask),
        lambda *start: by_the_formula(module, x, *start, mask),
    ):
        start = [t.clone().requires_grad_() for t in (state, conv)]
        out = run(*start) * mask[:, :, None]
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), start)])
    for ours, wanted in zip(*found, strict=True):
        # Some thirty roundings of 2^-24 on the way, and the normalisation's epsilon of 1e-6.
        assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()
        assert wanted.abs().max() > 1e-3


def test_put_before_moves_the_inputs_behind_the_padding():
    conv, inputs = torch.tensor([[[1.0, 2, 3]]]).expand(4, 1, 3), torch.zeros(4, 1, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    inputs[mask[:, None] == 1] = 7.0
    assert put_before(conv, inputs, mask)[:, 0].tolist() == [
        [1, 2, 3, 7, 7, 7, 7],
        [0, 1, 2, 3, 7, 7, 7],
        [0, 0, 0, 1, 2, 3, 7],
        [0, 0, 0, 0, 1, 2, 3],
    ]


def loss_of(model, ids, memory, **kwargs):
    logits = model(ids, memory=memory, use_cache=False, **kwargs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_plain_ones(reentrant):
    model, ids = attached(HYBRID, target_sparsity=0).train(), tokens()
    loss_of(model, ids, MIX).backward()
    plain = {name: p.grad for name, p in model.koff.named_parameters()}
    used = [f"memories.memory_{name}." for name in ("es", "keys")]
    for name, grad in plain.items():  # an unused memory has no gradient, a used one has all
        assert (grad is not None) == name.startswith(tuple(used)), name
        assert grad is None or grad.abs().max() > 0, name
    model.zero_grad()
    activation_checkpointing.enable(model, reentrant)
    with koff.use_memory(model, "en"):
        loss = loss_of(model, ids, MIX)
    loss.backward()
    for name, p in model.koff.named_parameters():
        assert plain[name] is None or torch.equal(p.grad, plain[name]), name


def test_training_with_a_cache_gives_the_same_gradients():
    model, ids = attached(HYBRID, target_sparsity=0).train(), tokens()
    grads = []
    for use_cache in (False, True):
        model.zero_grad()
        model(ids, memory=MIX, use_cache=use_cache).logits.logsumexp(-1).mean().backward()
        grads.append(model.koff.memories["es"].kv[0].state.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().max() > 0


@pytest.mark.slow
def test_compiled_forward_equals_eager():
    changes = dict(num_hidden_layers=2)  # one layer of each kind
    model, ids = attached(HYBRID, changes=changes), tokens()
    wanted = model(ids, memory=MIX, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(ids, memory=MIX, use_cache=False).logits
    assert (got - wanted).abs().max() < FP32


def test_bf16_is_as_near_to_fp32_as_bf16_can_be():
    model, ids = attached(HYBRID).to(torch.bfloat16), tokens()
    assert {p.dtype for p in model.koff.parameters()} == {torch.float32}
    wide = copy.deepcopy(model).float()(ids, memory=MIX).logits
    error = (model(ids, memory=MIX).logits.float() - wide).norm() / wide.norm()
    assert error < 0.05  # a few bf16 roundings (2^-8 each) per layer, three layers


def test_attention_mass_is_of_the_layers_with_attention():
    model = attached(HYBRID, lora=None, target_sparsity=0)
    mass, count = mean_mass(model, "en", [(tokens(), None)])
    assert mass.shape == (3, 4, 7) and count == 33
    given = mass.sum((1, 2))
    assert given[1] > 0 and given[[0, 2]].abs().max() == 0


def test_packed_documents_are_refused_under_a_memory():
    model, ids = attached(HYBRID), tokens()
    ends = torch.tensor([0, 5, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match="the rows must be one text each when a recurrent state"):
        model(ids, memory="en", cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_the_language_model_of_a_multimodal_checkpoint_is_attached_to(tmp_path):
    from transformers import AutoModelForCausalLM

    whole = multimodal()
    own = koff.KoffConfig(("a",), target_sparsity=0, kv=koff.KVConfig(5, "tokens"))
    with pytest.raises(ValueError, match="got the multimodal Qwen3_5ForConditionalGeneration; lo"):
        koff.attach(whole, own)
    whole.save_pretrained(tmp_path / "whole")
    model = koff.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), own)
    assert model.config.model_type == HYBRID
    ids = tokens()
    assert (model(ids, memory=None).logits - whole(ids).logits).abs().max() < FP32
    again = koff.load(koff.save(perturb(model), tmp_path / "out"))
    assert torch.equal(again(ids, memory="a").logits, model(ids, memory="a").logits)
