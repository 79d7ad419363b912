"""hard_concrete: the formula, its gradient, and the statistics of its samples."""

import math

import pytest
import torch
from support.kernel_inputs import ALL, FP
from support.oracle import check, run

from koffkernels import hard_concrete, open_probability
from koffkernels.hard_concrete import U_MIN


def alphas(*shape, dtype=torch.float32):
    return torch.linspace(-6, 6, math.prod(shape), dtype=torch.float64).to(dtype).view(shape)


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,)], ids=str)
@pytest.mark.parametrize("sample", [False, True])
def test_hard_concrete_oracle(sample, shape, dtype):
    u = torch.rand(shape, dtype=torch.float64) * 0.98 + 0.01 if sample else None

    def call(t):
        return hard_concrete(t["a"], sample=sample, u=None if u is None else u.to(t["a"].dtype))

    check(call, {"a": alphas(*shape, dtype=dtype)}, dtype)


def test_hard_concrete_is_the_published_formula():
    a, u = alphas(33, dtype=torch.float64), torch.rand(33, dtype=torch.float64)
    for i in range(33):
        noise = math.log(u[i]) - math.log(1 - u[i])
        soft, hard = (1 / (1 + math.exp(-x)) for x in (a[i], (noise + a[i]) / (2 / 3)))
        for got, s in (
            (hard_concrete(a, sample=False)[i], soft),
            (hard_concrete(a, sample=True, u=u)[i], hard),
        ):
            assert abs(float(got) - min(1.0, max(0.0, 1.2 * s - 0.1))) < 1e-12


@pytest.mark.parametrize("sample", [False, True])
def test_hard_concrete_gradcheck(sample):
    a = alphas(11, dtype=torch.float64).requires_grad_()
    u = torch.rand(11, dtype=torch.float64) if sample else None
    assert torch.autograd.gradcheck(lambda a: hard_concrete(a, sample=sample, u=u), a)


@pytest.mark.parametrize("dtype", ALL)
def test_hard_concrete_samples_stay_in_range_and_have_finite_gradients(dtype):
    a = alphas(20_001, dtype=dtype).requires_grad_()
    z = hard_concrete(a, sample=True)
    z.sum().backward()
    assert z.dtype == dtype and 0 <= z.min() and z.max() <= 1
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("value", [-1e4, -90.0, 90.0, 1e4])
@pytest.mark.parametrize("sample", [False, True])
def test_hard_concrete_extremes(sample, value):
    a = torch.full((9,), value, requires_grad=True)
    z = hard_concrete(a, sample=sample)
    z.sum().backward()
    assert torch.equal(z, torch.full((9,), float(value > 0)))
    assert not a.grad.any()


@pytest.mark.parametrize("u", [U_MIN, 1 - U_MIN, 0.0, 1.0])
def test_hard_concrete_extreme_noise(u):
    a = alphas(33).requires_grad_()
    z = hard_concrete(a, sample=True, u=torch.full((33,), u))
    z.sum().backward()
    assert torch.isfinite(z).all() and torch.isfinite(a.grad).all()


def test_hard_concrete_open_probability_is_the_share_of_open_samples():
    for value in (-3.0, 0.0, 1.0, 2.5):
        a = torch.full((200_000,), value)
        share = (hard_concrete(a, sample=True) > 0).double().mean()
        want = open_probability(a[:1].double()).item()
        assert abs(share - want) < 4 * math.sqrt(want * (1 - want) / 200_000)  # 4 sigma


def test_hard_concrete_draws_from_the_default_generator():
    a = alphas(50)
    torch.manual_seed(3)
    first, second = hard_concrete(a, sample=True), hard_concrete(a, sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, hard_concrete(a, sample=True))
    assert not torch.equal(first, second)


def test_hard_concrete_without_sampling_draws_nothing():
    before = torch.get_rng_state()
    hard_concrete(alphas(5), sample=False)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sample", [False, True])
def test_hard_concrete_compiled(sample):
    u = torch.rand(9) if sample else None
    compiled = torch.compile(hard_concrete, fullgraph=True, backend="aot_eager")
    got, want = (
        run(lambda t, f=f: f(t["a"], sample=sample, u=u), {"a": alphas(9)})
        for f in (compiled, hard_concrete)
    )
    torch.testing.assert_close(got, want)


def test_hard_concrete_compiled_draws_anew_each_call():
    compiled = torch.compile(hard_concrete, fullgraph=True, backend="aot_eager")
    a = torch.zeros(64)
    assert not torch.equal(compiled(a, sample=True), compiled(a, sample=True))


def test_open_probability_keeps_shape_dtype_and_gradient():
    a = alphas(3, 5, dtype=torch.float64).requires_grad_()
    p = open_probability(a)
    assert p.shape == a.shape and p.dtype == a.dtype
    assert torch.autograd.gradcheck(open_probability, a)
