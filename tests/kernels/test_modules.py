"""The modules: the same numbers as the functions, frozen bases, and state that round-trips."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.kernel_inputs import ids_of, normal, padded
from torch import nn

from koffkernels import (
    GatedMLP,
    GatedMLPLoRA,
    LoRALinear,
    Prefix,
    PrefixAttention,
    gated_mlp,
    lora_linear,
    prefix_attention,
)


def randomise(module: nn.Module) -> nn.Module:
    """LoRA starts at b = 0; tests want a delta."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return module


def mlp(memories=2, bias=False, **extra) -> GatedMLP:
    layers = (nn.Linear(8, 12, bias), nn.Linear(8, 12, bias), nn.Linear(12, 8, bias))
    return GatedMLP(*layers, memories=memories, r=3, alpha=6, **extra)


@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_module_starts_as_its_base(bias):
    base = nn.Linear(8, 6, bias)
    module, x = LoRALinear(base, memories=2, r=3), normal(4, 5, 8)
    want = F.linear(x, base.weight, base.bias)
    for kind in ("off", "mixed"):
        assert torch.equal(module(x, ids_of(kind, 4, 2)), want)
    a = module.memories.a
    assert a.abs().max() <= 8**-0.5 and a.std() > 0.4 * 8**-0.5 and not module.memories.b.any()


def test_lora_linear_module_is_the_function():
    module, x = randomise(LoRALinear(nn.Linear(8, 6), memories=2, r=4, alpha=6)), normal(4, 5, 8)
    ids, own = ids_of("mixed", 4, 2), module.memories
    lora = (own.a, own.b, torch.full((2,), 6 / 4))
    want = lora_linear(
        x, module.linear.weight, module.linear.bias, lora=type(own.lora())(*lora), memory_ids=ids
    )
    assert torch.equal(module(x, ids), want)
    assert torch.equal(LoRALinear(module.linear)(x), module.linear(x))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_mlp_module_is_the_function(activation):
    module, x = randomise(mlp(activation=activation)), normal(4, 5, 8)
    ids, gates = ids_of("mixed", 4, 2), torch.rand(12)
    layers, own = module.layers, module.lora
    want = gated_mlp(
        x,
        *(layers[name].weight for name in ("gate", "up", "down")),
        gates=gates,
        lora=GatedMLPLoRA(*(own[name].lora() for name in ("gate", "up", "down"))),
        memory_ids=ids,
        activation=activation,
    )
    assert torch.equal(module(x, gates, ids), want)


def test_gated_mlp_module_without_memories():
    module, x = mlp(memories=0), normal(4, 5, 8)
    layers = module.layers
    assert [p for p in module.parameters() if p.requires_grad] == []
    want = layers["down"](F.silu(layers["gate"](x)) * layers["up"](x))
    assert torch.equal(module(x), want)
    assert torch.equal(module(x, torch.ones(12)), want)


def test_prefix_attention_module_is_the_function():
    module = PrefixAttention(memories=2, kv_heads=2, length=5, head_dim=16)
    q, k, v, ids = (
        normal(3, 4, 7, 16),
        normal(3, 2, 7, 16),
        normal(3, 2, 7, 16),
        ids_of("mixed", 3, 2),
    )
    assert module.lengths.tolist() == [5, 5]
    for bounds in (None, padded(3, 7, 7)):
        prefix = Prefix(module.k, module.v, module.lengths)
        want = prefix_attention(q, k, v, prefix, memory_ids=ids, bounds=bounds)
        assert torch.equal(module(q, k, v, ids, bounds), want)


def inputs_of(module):
    if isinstance(module, PrefixAttention):
        return normal(3, 4, 7, 16), normal(3, 2, 7, 16), normal(3, 2, 7, 16), ids_of("mixed", 3, 2)
    gates = () if isinstance(module, LoRALinear) else (torch.rand(12),)
    return normal(3, 7, 8), *gates, ids_of("mixed", 3, 2)


MODULES = {
    "lora": lambda: LoRALinear(nn.Linear(8, 6), memories=2, r=3),
    "mlp": mlp,
    "attention": lambda: PrefixAttention(2, 2, 5, 16),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_trains_only_its_memories(name):
    module = randomise(MODULES[name]())
    module(*inputs_of(module)).square().sum().backward()
    for key, parameter in module.named_parameters():
        base = key.startswith(("linear.", "layers."))
        assert parameter.requires_grad != base, key
        assert (parameter.grad is None) == base, key


@pytest.mark.parametrize("name", MODULES)
def test_module_state_and_copies_give_the_same_numbers(name):
    module, other = randomise(MODULES[name]()), MODULES[name]()
    inputs = inputs_of(module)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(*inputs), other(*inputs))
    assert torch.equal(module(*inputs), copy.deepcopy(module)(*inputs))
    assert not [
        t for t in module.state_dict().values() if t.is_floating_point() and t.isnan().any()
    ]


@pytest.mark.parametrize("name", ["lora", "mlp"])
def test_module_in_bf16(name):
    module = randomise(MODULES[name]())
    x, *rest = inputs_of(module)
    want = module(x, *rest)
    got = module.bfloat16()(x.bfloat16(), *rest)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_gated_mlp_module_compiled():
    module = randomise(mlp())
    x, gates, ids = inputs_of(module)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x, gates, ids)
    torch.testing.assert_close(got, module(x, gates, ids))


def test_module_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="GatedMLP: gate must have no bias, got one; only bias-"):
        mlp(bias=True)
    for bad in ({"memories": 0}, {"r": 0}):
        with pytest.raises(ValueError, match="must hold at least one memory and rank, got memo"):
            LoRALinear(nn.Linear(8, 6), **bad)
