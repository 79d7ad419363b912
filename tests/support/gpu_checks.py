"""An operation on a device against the fp64 oracle on the CPU, by route."""

import contextlib

import torch
from support.gpu_cases import BUILDERS, NAMES, Case, attention_case
from support.oracle import compare, run, run_oracle, typical_of
from support.tolerances import BACKWARD, FORWARD

from koffkernels.routes import force_route

DEVICE = torch.device("cuda")
OPS = ("lora_linear", "gated_mlp", "prefix_attention")
# A shape of each operation that its kernels tile with a rest (of attention: a name).
TYPICAL = {
    "lora_linear": ((9, 33), 64, 160, 3, 8),
    "gated_mlp": ((9, 33), 64, 160, 3, 8),
    "prefix_attention": "longer",
}


def build(op: str, shape, dtype: str, **options) -> Case:
    """The case of an operation at a shape (of attention: a name)."""
    if op == "prefix_attention":
        return attention_case(shape, NAMES[dtype], **options)
    return BUILDERS[op](shape, NAMES[dtype])


def routed(route: str):
    """Force a route."""
    return contextlib.nullcontext() if route == "automatic" else force_route(route)


def attended_by(vendor: str):
    """Force whose attention the vendor's route takes."""
    from koffkernels._triton.attention import vendor as vendors

    return vendors.forced(vendor)


def check(case: Case, dtype: str, route: str = "automatic", call=None) -> None:
    """Output and gradients on the device against the oracle's on the CPU."""
    with routed(route):
        output, grads = run(call or case.call, case.on(DEVICE), case.frozen)
    want, want_grads = run_oracle(case.call, case.tensors, case.frozen)
    theirs = run(case.eager, case.on(DEVICE), case.frozen) if case.eager else (None, {})
    compare("output", output, want, NAMES[dtype], FORWARD, theirs[0])
    assert set(grads) == set(want_grads)
    for name, grad in grads.items():
        if want_grads[name] is None:
            assert grad is None or not grad.any(), f"gradient of {name}: should be none or zero"
            continue
        assert grad is not None, f"gradient of {name} is missing"
        assert grad.dtype == case.tensors[name].dtype and grad.device.type == DEVICE.type
        typical = typical_of(name, case.tensors, want_grads)
        compare(name, grad, want_grads[name], NAMES[dtype], BACKWARD, theirs[1].get(name), typical)
