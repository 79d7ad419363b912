"""Runs one operation in its own dtype and in the fp64 oracle, and compares results and gradients.

A case is a dict of named tensors and a function ``call(tensors) -> output`` that passes them to
a public function. Floating tensors become leaves; strides, views and casts are made inside call.
"""

from collections.abc import Callable, Iterable

import torch
from support.tolerances import BACKWARD, EAGER_FACTOR, FEW, FORWARD, TOLERANCE, rms_error, slack
from torch import Tensor

import koffkernels

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensor]


def leaves_of(tensors: Tensors, frozen: Iterable[str] = (), dtype=None) -> Tensors:
    """Fresh leaves with the same values; floating ones train unless frozen."""
    made = {}
    for name, value in tensors.items():
        made[name] = value.detach().clone()
        if value.is_floating_point():
            made[name] = made[name].to(dtype or value.dtype)
            made[name].requires_grad_(name not in frozen)
    return made


def cotangent_for(output: Tensor) -> Tensor:
    """A random upstream gradient that is the same for every dtype (a multiple of 1/8)."""
    generator = torch.Generator().manual_seed(5)
    draw = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return ((draw * 8).round() / 8).to(output.device)


def run(call: Call, tensors: Tensors, frozen: Iterable[str] = (), dtype=None):
    """(output, {name: gradient or None}) of fresh leaves."""
    leaves = leaves_of(tensors, frozen, dtype)
    output = call(leaves)
    trained = {n: t for n, t in leaves.items() if t.requires_grad}
    if not output.requires_grad:
        return output, {}
    output.backward(cotangent_for(output).to(output.dtype))
    return output.detach(), {name: leaf.grad for name, leaf in trained.items()}


def run_oracle(call: Call, tensors: Tensors, frozen: Iterable[str] = ()):
    """The same in fp64 by koffkernels.reference."""
    with koffkernels.force_backend("reference"):
        return run(call, tensors, frozen, torch.float64)


def check(
    call: Call,
    tensors: Tensors,
    dtype: torch.dtype,
    frozen: Iterable[str] = (),
    eager: Call | None = None,
) -> None:
    """Compare output and every gradient with the oracle's and, if given, with the errors that
    ``eager`` makes in the same dtype."""
    output, grads = run(call, tensors, frozen)
    want, want_grads = run_oracle(call, tensors, frozen)
    assert set(grads) == set(want_grads)
    reference = run(eager, tensors, frozen) if eager else (None, {})
    compare("output", output, want, dtype, FORWARD, reference[0])
    for name, grad in grads.items():
        if want_grads[name] is None:
            assert grad is None or not grad.any(), f"gradient of {name}: should be none or zero"
            continue
        assert grad is not None, f"gradient of {name} is missing"
        assert grad.dtype == tensors[name].dtype, f"gradient of {name}: dtype {grad.dtype}"
        typical = typical_of(name, tensors, want_grads)
        compare(name, grad, want_grads[name], dtype, BACKWARD, reference[1].get(name), typical)


def typical_of(name: str, tensors: Tensors, want_grads: Tensors) -> Tensor | None:
    """The size of the gradient of LoRA scalings when its terms do not cancel; None for others.

    delta = s b a x is linear in s and in a, so ds = sum(da * a) / s: one number of some thousand
    terms of both signs, typically sqrt(sum((da * a)^2)) / s, but as small as they happen to cancel.
    An error of da relative to da's rms gives an error of ds relative to this.
    """
    part, _, field = name.rpartition(".")
    a, da = tensors.get(f"{part}.a"), want_grads.get(f"{part}.a")
    if field != "scaling" or da is None:
        return None
    terms = da * a.to(da)
    return terms.square().sum((-2, -1)).sqrt() / tensors[name].to(da)


def compare(name, got, want, dtype, direction, eager=None, typical=None) -> None:
    """One tensor against the oracle's, and against eager's error where there is one."""
    error = rms_error(got, want, typical)
    limit = TOLERANCE[dtype, direction] * (slack(want) if typical is None else 1.0)
    assert error <= limit, f"{name}: {direction} error {error:.3g}, limit {limit:.3g} ({dtype})"
    if eager is not None and want.numel() > FEW:  # of a few numbers, who is nearer is luck
        theirs = rms_error(eager, want)
        limit = EAGER_FACTOR[direction] * theirs
        assert error <= limit, f"{name}: {direction} error {error:.3g}, eager's is {theirs:.3g}"


def assert_same(first, second) -> None:
    """Two results of ``run`` are equal bit for bit."""
    assert torch.equal(first[0], second[0])
    assert set(first[1]) == set(second[1])
    for name, grad in first[1].items():
        other = second[1][name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name
