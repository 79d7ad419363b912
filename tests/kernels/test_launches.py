"""How many kernels a decoder layer launches in its linear layers and its attention: the narrow ones
here, and torch's. Launchers run on tensors without data, so no GPU is needed."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gate.settings import MODELS, Setting, pruned
from koffkernels import GatedMLPLoRA, LoRA, Prefix, routes
from koffkernels._triton.attention.call import Call
from koffkernels._triton.attention.decode import decode
from koffkernels._triton.attention.op import backward as attention_backward
from koffkernels._triton.attention.op import forward as attention_forward
from koffkernels._triton.lora.linear import (
    Linear,
    linears_backward,
    linears_forward,
    linears_inference,
)
from koffkernels._triton.lora.op import flat
from koffkernels._triton.mlp.mlp import Layer, mlp_backward, mlp_forward, mlp_inference
from koffkernels._triton.shared import launch as common

# Of aten's operators, those that launch nothing: they make a tensor without filling it, or a view.
FREE = {"empty", "new_empty", "empty_like", "transpose", "t", "slice", "select", "split"}
FREE |= {"split_with_sizes", "unsqueeze", "permute", "view", "expand", "detach", "alias"}
MODEL = MODELS[0]
QKV, OUT = (4096, 1024, 1024), (4096,)


class Operators(TorchDispatchMode):
    """Counts what torch itself would launch."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def count(run) -> int:
    """Launches of one call."""
    with common.recording() as launches, Operators() as operators:
        run()
    return len(launches) + operators.found.total()


def setting(memories: int) -> Setting:
    return Setting(MODEL, pruned(MODEL.inner), 16, memories > 1, torch.bfloat16)


def linears(at: Setting, widths: tuple[int, ...]) -> list[Linear]:
    k = MODEL.hidden
    return [Linear(at.empty(n, k), None, LoRA(*at.lora(k, n))) for n in widths]


def step(at: Setting, widths: tuple[int, ...], rows: common.Rows) -> None:
    """Forward and backward of linear layers over one x, 8192 tokens."""
    x, layers = at.empty(8192, MODEL.hidden), linears(at, widths)
    ys, s = linears_forward(x, layers, rows)
    trained = [(layer.lora.a, layer.lora.b, None) for layer in layers]
    linears_backward(ys, x, s, layers, rows, True, trained)


def mlp_of(at: Setting, rows: common.Rows) -> Layer:
    h, i = MODEL.hidden, at.inner
    up, down = LoRA(*at.lora(h, i)), LoRA(*at.lora(i, h))
    weights = at.empty(i, h), at.empty(i, h), at.empty(h, i)
    return Layer(weights, at.master(i), GatedMLPLoRA(up, up, down), rows, "silu")


@pytest.mark.parametrize("memories", [1, 8])
@pytest.mark.parametrize("batch, most", [(1, 11), (64, 10)])
def test_launches_of_a_layer_that_decodes(batch, most, memories):
    """Two for q, k and v, two for o, four for the MLP, two for attention;
    and one more there to merge the splits of a batch that does not fill the GPU."""
    at = setting(memories)
    rows = at.rows(batch)

    def layer():
        for widths in (QKV, OUT):
            linears_inference(at.empty(batch, MODEL.hidden), linears(at, widths), rows)
        mlp_inference(at.empty(batch, MODEL.hidden), mlp_of(at, rows))
        q = at.empty(batch, MODEL.heads, 1, MODEL.head_dim)
        k, v, *learned = (at.empty(n, 8, 512, MODEL.head_dim) for n in (batch, batch, 8, 8))
        prefix = Prefix(*learned, at.empty(8, dtype=torch.int64))
        decode(Call(q, k, v, prefix, at.empty(batch, dtype=torch.int64), None, 1.0))

    with routes.force_route("decode"):
        assert count(layer) == most


@pytest.mark.parametrize("memories", [1, 8])
def test_launches_of_a_layer_in_a_training_step(memories):
    """Forward and backward, 8192 tokens: 16 for q, k and v, 12 for o, 25 for the MLP, and 7 for
    attention in one pass."""
    at, m = setting(memories), 8192
    rows = at.rows(m)

    def attention():
        sizes = (4, MODEL.heads, 2048), (4, MODEL.kv_heads, 2048), (memories, MODEL.kv_heads, 512)
        q, kv, learned = (at.empty(*size, MODEL.head_dim) for size in sizes)
        prefix = Prefix(learned, learned, at.empty(memories, dtype=torch.int64))
        ids = at.empty(4, dtype=torch.int64) if memories > 1 else None
        call = Call(q, kv, kv, prefix, ids, None, 1.0)
        o, lse = attention_forward(call, "one_pass")
        attention_backward(call, o, o, lse, (True,) * 5, "one_pass")

    def mlp():
        layer, x = mlp_of(at, rows), at.empty(m, MODEL.hidden)
        y, saved = mlp_forward(x, layer, True)
        trained = [(part.a, part.b, None) for part in layer.lora]
        mlp_backward(y, x, saved, layer, (True, True), trained)

    assert count(lambda: step(at, QKV, rows)) == 16
    assert count(lambda: step(at, OUT, rows)) == 12
    assert count(mlp) == 25
    assert count(attention) == 7


def test_without_queries_nothing_is_launched():
    """A few-query kernel would divide by their number."""
    q, kv = torch.empty(2, 4, 0, 64, device="meta"), torch.empty(2, 2, 8, 64, device="meta")
    prefix = Prefix(kv, kv, torch.empty(2, dtype=torch.int64, device="meta"))
    with common.recording() as launches:
        o, lse = attention_forward(Call(q, kv, kv, prefix, None, None, 1.0), "auto")
    assert launches == [] and o.shape == q.shape and lse.shape == (2, 4, 0)


@pytest.mark.parametrize("lead", [(), (4, 2)])
def test_rows_that_lie_too_far_apart_are_copied(lead):
    """Inside of a tile of 128 rows kernels count in 32 bits."""
    strides = [2**40, 2**38][: len(lead)]
    for distance, copied in ((2**24, True), (2**20, False)):
        x = torch.empty_strided((*lead, 128, 16), (*strides, distance, 1), device="meta")
        assert common.unit_stride(x).is_contiguous() == copied
    last = torch.empty_strided((65, 1, 16), (2**25, 2**25, 1), device="meta")  # h[:, -1:]
    assert flat(last).stride() == (16, 1)


def test_launches_of_q_and_v_which_peft_takes_by_default():
    at = setting(memories=1)
    with routes.force_route("decode"):
        x = at.empty(1, MODEL.hidden)
        assert count(lambda: linears_inference(x, linears(at, (4096, 1024)), at.rows(1))) == 2
    rows = at.rows(8192)
    assert count(lambda: step(at, (4096, 1024), rows)) == 14
    assert count(lambda: (step(at, (4096,), rows), step(at, (1024,), rows))) == 24
