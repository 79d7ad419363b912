"""Whole models through the Triton kernels: forward, generation and gradients equal torch's."""

import pytest
import torch
from support import activation_checkpointing
from support.models import ARCHITECTURES, attached, tokens
from support.tolerances import rms_error
from triton.runtime.interpreter import GridExecutor

import koffkernels

MIX = ["es", None, "keys"]
NEW = 3
# Each of the two layers rounds its sums (at most 300 terms) once more or in another order, each
# at most sqrt(300) 2^-24 = 1e-6; the softmax and norms in between keep that relative size.
RELATIVE = 2e-5


def with_wide_heads(architecture: str):
    """Heads of width 64, so that attention too is Triton's."""
    return attached(architecture, changes={"head_dim": 64, "num_hidden_layers": 2})


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return with_wide_heads(request.param)


@pytest.fixture
def kernels(monkeypatch):
    """The names of the kernels that ran."""
    seen, call = set(), GridExecutor.__call__

    def noted(self, *args, **kwargs):
        seen.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    return seen


def padded(ids: torch.Tensor) -> dict:
    """Three rows, the second padded on the left by four tokens."""
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def test_model_forward(model, kernels):
    inputs = padded(tokens(length=20))
    got = model(**inputs, memory=MIX).logits
    assert {"_prefix_attention_fwd_kernel", "_shrink_fwd_kernel"} <= kernels
    with koffkernels.force_backend("torch"):
        want = model(**inputs, memory=MIX).logits
    seen = inputs["attention_mask"].bool()
    assert rms_error(got[seen], want[seen]) < RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize("cache, route", [("dynamic", "vendor"), ("static", "decode")])
def test_model_generates_the_same(cache, route, kernels):
    model = with_wide_heads("llama")
    inputs = padded(tokens())
    options = dict(memory=MIX, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    if cache == "static":
        options["cache_implementation"] = "static"
    with koffkernels.force_route(route):
        got = model.generate(**inputs, **options)
    assert "_prefix_attention_group_kernel" in kernels
    assert ("_decode_mlp_up_fwd_kernel" in kernels) == (route == "decode")
    with koffkernels.force_backend("torch"):
        want = model.generate(**inputs, **options)
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_gradients(model, checkpointing, kernels):
    inputs = padded(tokens())
    model.train()
    if checkpointing:
        activation_checkpointing.enable(model)
    trained = [p for p in model.koff.parameters() if p.requires_grad]

    def gradients():
        logits = model(**inputs, memory=MIX, use_cache=False).logits
        loss = logits[inputs["attention_mask"].bool()].logsumexp(-1).mean()
        return torch.autograd.grad(loss, trained, allow_unused=True)

    torch.manual_seed(0)  # the gates draw
    got = gradients()
    assert {"_prefix_attention_prefix_grad_kernel", "_lora_grad_kernel"} <= kernels
    torch.manual_seed(0)
    with koffkernels.force_backend("torch"):
        want = gradients()
    assert sum(g is not None for g in got) > 20
    for parameter, a, b in zip(trained, got, want, strict=True):
        assert (a is None) == (b is None), parameter.shape
        if b is not None and b.abs().max() > 1e-6:
            assert rms_error(a, b) < 10 * RELATIVE, tuple(b.shape)
