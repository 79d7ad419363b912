"""How many variants of each kernel a decode compiles: what changes from step to step, and with the
batch, must not be compiled in."""

import contextlib

import pytest
import torch

from bench.gate import compiling
from bench.gate.settings import MODELS, Setting
from koffkernels import GatedMLPLoRA, LoRA, routes
from koffkernels._triton.shared import launch as common
from koffkernels._triton.shared.operands import per_head

MOST = 3
BATCHES = range(1, 65)


def setting(mixed: bool) -> Setting:
    model = MODELS[0]
    return Setting(model, model.inner, 16, mixed, torch.bfloat16)


def mlp(at: Setting, m: int) -> None:
    from koffkernels._triton.mlp.mlp import Layer, mlp_inference

    h, i = at.model.hidden, at.inner
    weights = at.empty(i, h), at.empty(i, h), at.empty(h, i)
    up, down = LoRA(*at.lora(h, i)), LoRA(*at.lora(i, h))
    lora, gates = GatedMLPLoRA(up, up, down), at.master(i)
    mlp_inference(at.empty(m, h), Layer(weights, gates, lora, at.rows(m), "silu"))


def linear(at: Setting, m: int) -> None:
    from koffkernels._triton.lora.linear import Linear, linears_inference

    k, n = at.model.hidden, at.model.heads * at.model.head_dim
    x, weight, rows = at.empty(m, k), at.empty(n, k), at.rows(m)
    linears_inference(x, [Linear(weight, None, LoRA(*at.lora(k, n)))], rows)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("route", ["vendor", "decode"])
@pytest.mark.parametrize("call", [mlp, linear])
def test_variants_of_every_batch(call, route, mixed):
    """Batches of 1 to 64 tokens: at most three variants of each kernel, and of the one that an MLP
    launches in two ways, for its down projection and for A alone, of each way."""
    at = setting(mixed)
    with routes.force_route(route), common.recording() as launches:
        for m in BATCHES:
            call(at, m)
    alone = [launch for launch in launches if launch.args.get("w_ptr", 0) is None]
    others = [launch for launch in launches if launch.args.get("w_ptr", 0) is not None]
    assert bool(alone) == (call is mlp and route == "decode") and others
    for found in (compiling.variants(alone), compiling.variants(others)):
        assert max(found.values(), default=0) <= MOST, found


def test_variants_are_told_apart():
    """The count sees what triton compiles in: divisibility by 16, the number 1, types."""
    from koffkernels._triton.shared.reduce import sum_partials

    def count(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, int]:
        with common.recording() as launches:
            for shape in shapes:
                sum_partials(torch.empty(shape, device="meta"), dtype)
        return compiling.variants(launches)

    name = "koffkernels._triton.shared.reduce._sum_partials_kernel"
    assert count((2, 32), (3, 48), (1, 64)) == {name: 1}
    assert count((2, 32), (2, 33), (2, 1)) == {name: 3}
    with common.recording() as launches:
        for dtype in (torch.float32, torch.float16):
            sum_partials(torch.empty(2, 32, device="meta"), dtype)
    assert compiling.variants(launches) == {name: 2}


def attention(at: Setting, rows: int, keys: int, bounds: bool) -> None:
    from bench.gate.cases_attention import call_of
    from koffkernels._triton.attention.decode import decode

    decode(call_of(at, rows, 1, keys, bounds=bounds))


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_variants_of_a_growing_context(mixed, bounds):
    """64 steps of one batch."""
    with common.recording() as launches:
        for step in range(64):
            attention(setting(mixed), 8, 100 + step, bounds)
    found = compiling.variants(launches)
    assert found and max(found.values()) <= MOST, found


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_variants_of_attention_of_every_batch(mixed, bounds):
    """Batches of 1 to 64 rows."""
    with common.recording() as launches:
        for rows in BATCHES:
            attention(setting(mixed), rows, 500, bounds)
    found = compiling.variants(launches)
    assert found and max(found.values()) <= MOST, found


def test_fp32_is_multiplied_as_torch_is_set_to(monkeypatch):
    """By either of torch's two ways of setting it; reading the old after the new is an error."""
    assert common.precision(torch.float32) == "ieee"
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    with pytest.raises(RuntimeError):
        torch.backends.cuda.matmul.allow_tf32  # noqa: B018
    assert common.precision(torch.float32) == "tf32"
    assert common.precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("operand", [False, True])
def test_a_launch_makes_the_gpu_of_its_tensors_the_current_one(monkeypatch, operand):
    entered, ran = [], []
    monkeypatch.setattr(common, "_several_gpus", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "device", lambda d: entered.append(d) or contextlib.nullcontext()
    )
    monkeypatch.setattr(common.direct, "launch", lambda *call: ran.append(call))
    x = torch.empty(2, 2, 2, 2, device="meta")
    args = {"ids_ptr": None, "M": 4, "x_ptr": per_head(x) if operand else x}
    common.launch(None, (3,), **args, num_warps=8)
    assert entered == [torch.device("meta")]
    assert ran == [(None, (3,), args, (8, 2, 255, False))]
