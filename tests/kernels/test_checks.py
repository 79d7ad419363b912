"""Every refusal of a bad argument: its type, and its whole message, as a user reads it."""

import re

import pytest
import torch
from support.kernel_inputs import normal

from koffkernels import (
    GatedMLPLoRA,
    LoRA,
    Prefix,
    RowBounds,
    checks,
    gated_mlp,
    hard_concrete,
    lora_linear,
    prefix_attention,
)

WORDING = re.compile(r"^[\w.]+: [\w. ()]+ must [^;]+, got [^;]+; [^;]+$")
IDS = torch.tensor([0, -1, 1])
META = {"device": "meta"}


def lora(n=2, r=3, k=8, out=6, **changes) -> LoRA:
    return LoRA(normal(n, r, k), normal(n, out, r), torch.ones(n))._replace(**changes)


def linear(x=None, weight=None, bias=None, **extra):
    """lora_linear with good arguments, but for those given."""
    x = normal(3, 5, 8) if x is None else x
    weight = normal(6, 8) if weight is None else weight
    return lora_linear(x, weight, bias, **({"lora": lora(), "memory_ids": IDS} | extra))


def mlp(x=None, w_gate=None, w_up=None, w_down=None, **extra):
    x = normal(3, 5, 8) if x is None else x
    w_gate, w_up = (normal(12, 8) if w is None else w for w in (w_gate, w_up))
    return gated_mlp(x, w_gate, w_up, normal(8, 12) if w_down is None else w_down, **extra)


def attention(q=None, k=None, v=None, prefix=None, **extra):
    q = normal(3, 4, 5, 16) if q is None else q
    k, v = (normal(3, 2, 5, 16) if x is None else x for x in (k, v))
    prefix = Prefix(normal(2, 2, 6, 16), normal(2, 2, 6, 16), torch.tensor([6, 4]))._replace(
        **prefix or {}
    )
    return prefix_attention(q, k, v, prefix, **({"memory_ids": IDS} | extra))


def bounds(**changes) -> RowBounds:
    return RowBounds(*(torch.zeros(3, dtype=torch.int64) for _ in range(3)))._replace(**changes)


FROZEN = "be frozen (base weights get no gradient here), got requires_grad=True; call"
LINEAR = {
    "x: be a torch.Tensor, got list; pass a tensor": lambda: linear([1.0]),
    "x: have a floating dtype, got torch.int64; convert it with .to()": lambda: linear(
        torch.ones(3, 5, 8, dtype=torch.int64)
    ),
    "x: have 2 or 3 dimensions, got (8,); reshape it": lambda: linear(normal(8)),
    "x: have last dimension 8, got (3, 5, 7); check the layer": lambda: linear(normal(3, 5, 7)),
    "weight: have 2 dimensions, got (8,); reshape it": lambda: linear(weight=normal(8)),
    "weight: have the dtype of x (torch.float32), got torch.bfloat16; cast one of them, or use "
    "torch.autocast": lambda: linear(weight=normal(6, 8).bfloat16()),
    "weight: be on the device of x (cpu), got meta; move it with .to()": lambda: linear(
        weight=normal(6, 8).to("meta")
    ),
    f"weight: {FROZEN} weight.requires_grad_(False)": lambda: linear(
        weight=normal(6, 8).requires_grad_()
    ),
    "bias: have shape (6,), got (8,); check the layout": lambda: linear(bias=normal(8)),
    "bias: have the dtype of x (torch.float32), got torch.float64; cast one of them, or use "
    "torch.autocast": lambda: linear(bias=normal(6).double()),
    f"bias: {FROZEN} bias.requires_grad_(False)": lambda: linear(bias=normal(6).requires_grad_()),
    "lora: be a koffkernels.LoRA, got tuple; wrap it in LoRA(...)": lambda: linear(
        lora=tuple(lora())
    ),
    "lora.a: be a torch.Tensor, got NoneType; pass a tensor": lambda: linear(lora=lora(a=None)),
    "lora.a: have 2 or 3 dimensions, got (8,); reshape it": lambda: linear(lora=lora(a=normal(8))),
    "lora.b: have 2 dimensions, got (2, 6, 3); reshape it": lambda: linear(
        lora=lora(a=normal(3, 8))
    ),
    "lora.b: have shape (6, 3), got (6, 2); check the layer it belongs to": lambda: linear(
        lora=lora(a=normal(3, 8), b=normal(6, 2))
    ),
    "lora.scaling: have shape (1,), got (2,); pass alpha / r of each memory": lambda: linear(
        lora=lora(a=normal(3, 8), b=normal(6, 3))
    ),
    "lora.a: hold at least one memory and rank, got (0, 8); pass lora=None for none": (
        lambda: linear(lora=lora(a=normal(0, 8), b=normal(6, 0)))
    ),
    "lora.a: hold at least one memory and rank, got (0, 3, 8); pass lora=None for none": (
        lambda: linear(lora=lora(0))
    ),
    "lora.a: hold at least one memory and rank, got (2, 0, 8); pass lora=None for none": (
        lambda: linear(lora=lora(r=0))
    ),
    "lora.a: have shape (2, 3, 8), got (2, 3, 7); check the layer it belongs to": (
        lambda: linear(lora=lora(k=7))
    ),
    "lora.b: have shape (2, 6, 3), got (2, 5, 3); check the layer it belongs to": (
        lambda: linear(lora=lora(out=5))
    ),
    "lora.scaling: be a torch.Tensor, got float; pass a tensor": (
        lambda: linear(lora=lora(scaling=2.0))
    ),
    "lora.scaling: have shape (2,), got (3,); pass alpha / r of each memory": (
        lambda: linear(lora=lora(scaling=torch.ones(3)))
    ),
    "lora.b: be on the device of x (cpu), got meta; move it with .to()": (
        lambda: linear(lora=lora(b=torch.empty(2, 6, 3, **META)))
    ),
    "memory_ids: be given when there is more than one memory, got None with 2 memories; pass an "
    "int64 tensor with one id per row, -1 for none": lambda: linear(memory_ids=None),
    "memory_ids: be an int64 tensor, got torch.int32; convert it with .long()": (
        lambda: linear(memory_ids=IDS.int())
    ),
    "memory_ids: be an int64 tensor, got list; convert it with .long()": (
        lambda: linear(memory_ids=[0, 1, 0])
    ),
    "memory_ids: have shape (3,), got (2,); pass one number per row or memory": (
        lambda: linear(memory_ids=IDS[:2])
    ),
    "memory_ids: be on the device of the first argument (cpu), got meta; move it with .to()": (
        lambda: linear(memory_ids=IDS.to("meta"))
    ),
}


def part(**changes) -> dict:
    parts = {
        "gate": lora(out=12),
        "up": lora(out=12),
        "down": lora(k=12, out=8),
    }
    return {"lora": GatedMLPLoRA(**(parts | changes)), "memory_ids": IDS}


MLP = {
    "activation: be one of silu, gelu, gelu_tanh, got 'relu'; choose one of these": (
        lambda: mlp(activation="relu")
    ),
    "x: have 2 or 3 dimensions, got (1, 3, 5, 8); reshape it": lambda: mlp(normal(1, 3, 5, 8)),
    "x: have last dimension 8, got (3, 5, 9); check the layer": lambda: mlp(normal(3, 5, 9)),
    "w_gate: be a torch.Tensor, got str; pass a tensor": lambda: mlp(w_gate="w"),
    "w_up: have shape (12, 8), got (8, 12); check the layout": lambda: mlp(w_up=normal(8, 12)),
    "w_down: have shape (8, 12), got (12, 8); check the layout": lambda: mlp(w_down=normal(12, 8)),
    f"w_down: {FROZEN} w_down.requires_grad_(False)": lambda: mlp(
        w_down=normal(8, 12).requires_grad_()
    ),
    "gates: have a floating dtype, got torch.bool; convert it with .to()": (
        lambda: mlp(gates=torch.ones(12, dtype=torch.bool))
    ),
    "gates: have shape (12,), got (8,); check the mask": lambda: mlp(gates=torch.ones(8)),
    "gates: be on the device of x (cpu), got meta; move it with .to()": (
        lambda: mlp(gates=torch.ones(12, **META))
    ),
    "lora: be a koffkernels.GatedMLPLoRA, got LoRA; wrap it in GatedMLPLoRA(...)": (
        lambda: mlp(lora=lora(), memory_ids=IDS)
    ),
    "lora.gate: be a koffkernels.LoRA, got int; wrap it in LoRA(...)": lambda: mlp(**part(gate=1)),
    "lora.up.a: have shape (2, 3, 8), got (2, 3, 12); check the layer it belongs to": (
        lambda: mlp(**part(up=lora(k=12, out=12)))
    ),
    "lora.down.b: have shape (2, 8, 3), got (2, 12, 3); check the layer it belongs to": (
        lambda: mlp(**part(down=lora(k=12, out=12)))
    ),
    "lora: hold equally many memories in each part, got {'gate': 2, 'up': 1, 'down': 2}; stack "
    "them alike": lambda: mlp(**part(up=lora(1, out=12))),
    "memory_ids: have shape (3,), got (4,); pass one number per row or memory": (
        lambda: mlp(**(part() | {"memory_ids": torch.zeros(4).long()}))
    ),
}
ATTENTION = {
    "q: have 4 dimensions, got (4, 5, 16); reshape it": lambda: attention(normal(4, 5, 16)),
    "q: be a torch.Tensor, got list; pass a tensor": (
        lambda: prefix_attention([1.0], normal(3, 2, 5, 16), normal(3, 2, 5, 16), None)
    ),
    "k: be a torch.Tensor, got NoneType; pass a tensor": (
        lambda: prefix_attention(normal(3, 4, 5, 16), None, None, None)
    ),
    "k: have the dtype of q (torch.float32), got torch.float16; cast it": (
        lambda: attention(k=normal(3, 2, 5, 16).half())
    ),
    "v: be on the device of q (cpu), got meta; move it with .to()": (
        lambda: attention(v=torch.ones(3, 2, 5, 16, **META))
    ),
    "k: have shape (3, 2, 5, 16), got (2, 2, 5, 16); check the layout [B, Hkv, S, D]": (
        lambda: attention(k=normal(2, 2, 5, 16))
    ),
    "v: have shape (3, 2, 5, 16), got (3, 2, 6, 16); it must match k": (
        lambda: attention(v=normal(3, 2, 6, 16))
    ),
    "q: have a multiple of 2 heads, got 3; check the heads": (
        lambda: attention(normal(3, 3, 5, 16))
    ),
    "k: hold at least as many keys as there are queries, got (3, 2, 5, 16); pass bounds for 6 "
    "queries": lambda: attention(normal(3, 4, 6, 16)),
    "bounds: be a koffkernels.RowBounds, got tuple; wrap it in RowBounds(...)": (
        lambda: attention(bounds=tuple(bounds()))
    ),
    "bounds.key_end: be an int64 or int32 tensor, got torch.float32; convert it with .long()": (
        lambda: attention(bounds=bounds(key_end=torch.ones(3)))
    ),
    "bounds.key_start: be an int64 or int32 tensor, got int; convert it with .long()": (
        lambda: attention(bounds=bounds(key_start=0))
    ),
    "bounds.query_start: have shape (3,), got (1,); pass one number per row or memory": (
        lambda: attention(bounds=bounds(query_start=torch.zeros(1).long()))
    ),
    "prefix: be a koffkernels.Prefix, got str; wrap it in Prefix(...)": lambda: prefix_attention(
        normal(3, 4, 5, 16), *(normal(3, 2, 5, 16) for _ in "kv"), "fr"
    ),
    "prefix.k: have 4 dimensions, got (2, 6, 16); reshape it": (
        lambda: attention(prefix={"k": normal(2, 6, 16)})
    ),
    "prefix.k: have shape (2, 2, 6, 16), got (2, 4, 6, 16); check the heads of the model it was "
    "made for": lambda: attention(prefix={"k": normal(2, 4, 6, 16)}),
    "prefix.v: have shape (2, 2, 6, 16), got (2, 2, 5, 16); check the heads of the model it was "
    "made for": lambda: attention(prefix={"v": normal(2, 2, 5, 16)}),
    "prefix.v: be on the device of q (cpu), got meta; move it with .to()": (
        lambda: attention(prefix={"v": torch.ones(2, 2, 6, 16, **META)})
    ),
    "prefix.k: hold at least one memory and token, got (2, 2, 0, 16); pass prefix=None instead": (
        lambda: attention(prefix={"k": normal(2, 2, 0, 16), "v": normal(2, 2, 0, 16)})
    ),
    "prefix.k: hold at least one memory and token, got (0, 2, 6, 16); pass prefix=None instead": (
        lambda: attention(prefix={"k": normal(0, 2, 6, 16), "v": normal(0, 2, 6, 16)})
    ),
    "prefix.lengths: have shape (2,), got (3,); pass one number per row or memory": (
        lambda: attention(prefix={"lengths": torch.tensor([6, 4, 2])})
    ),
    "prefix.lengths: be an int64 or int32 tensor, got list; convert it with .long()": (
        lambda: attention(prefix={"lengths": [6, 4]})
    ),
    "memory_ids: be given when there is more than one memory, got None with 2 memories; pass an "
    "int64 tensor with one id per row, -1 for none": lambda: attention(memory_ids=None),
    "scale: be a number, got a tensor; pass scale.item()": (
        lambda: attention(scale=torch.tensor(0.5))
    ),
    "scale: be a number, got str; pass None for 1 / sqrt(D)": lambda: attention(scale="x"),
    "scale: be finite, got nan; pass None for 1 / sqrt(D)": lambda: attention(scale=float("nan")),
}
HARD = {
    "log_alpha: be a torch.Tensor, got float; pass a tensor": (
        lambda: hard_concrete(1.0, sample=False)
    ),
    "u: be None unless sample=True, got a tensor; drop it or set sample=True": (
        lambda: hard_concrete(normal(3), sample=False, u=normal(3))
    ),
    "u: be a torch.Tensor, got float; pass a tensor": (
        lambda: hard_concrete(normal(3), sample=True, u=0.5)
    ),
    "u: have shape (3,), got (4,); draw one number per gate": (
        lambda: hard_concrete(normal(3), sample=True, u=normal(4))
    ),
}
CASES = [
    pytest.param(where, *message.split(": ", 1), call, id=f"{where}-{number}")
    for where, cases in (
        ("lora_linear", LINEAR),
        ("gated_mlp", MLP),
        ("prefix_attention", ATTENTION),
        ("hard_concrete", HARD),
    )
    for number, (message, call) in enumerate(cases.items())
]
TYPE_ERRORS = (
    "be a torch.Tensor",
    "be a number",
    "have a floating",
    "have the dtype",
    "be a koff",
    "be an int64",
)


@pytest.mark.parametrize(("where", "what", "rest", "call"), CASES)
def test_checks_refuse(where, what, rest, call):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == f"{where}: {what} must {rest}"
    assert WORDING.match(str(error.value))
    assert error.type is (TypeError if rest.startswith(TYPE_ERRORS) else ValueError)


def test_checks_accept_good_arguments():
    linear()
    mlp()
    mlp(gates=torch.ones(12), **part())
    attention()
    attention(bounds=bounds(), prefix={"lengths": torch.tensor([6, 4], dtype=torch.int32)})
    linear(lora=None, memory_ids=None)


def test_checks_weights_of_any_dtype_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        linear(weight=normal(6, 8).bfloat16())
        mlp(w_up=normal(12, 8).bfloat16(), gates=torch.ones(12))


@pytest.mark.parametrize(("ids", "seen"), [([0, 1, 2], "0..2"), ([-2, 0, 0], "-2..0")])
def test_checks_ids_on_request(ids, seen, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_IDS", True)
    for call in (linear, attention):
        call()
        with pytest.raises(ValueError) as error:
            call(memory_ids=torch.tensor(ids))
        message = str(error.value).split(": ", 1)[1]
        assert message == f"memory_ids must lie in -1..1, got {seen}; check the names"


def test_refuse_has_the_one_wording():
    with pytest.raises(KeyError, match="a: b must c, got d; e"):
        checks.refuse("a", "b", "c", "d", "e", KeyError)
