"""Hard concrete gates (Louizos et al. 2018, "Learning Sparse Neural Networks through L0
Regularization")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import dispatch
from .checks import check_device, check_shape, check_tensor, refuse, shape_of

# Louizos et al. use these in all their experiments: the temperature, and the interval to which s is
# stretched, so that z is exactly 0 or 1 with some probability.
BETA = 2.0 / 3.0
LOW, HIGH = -0.1, 1.1
U_MIN = 1e-6  # log(u) and log(1 - u) stay finite in fp32
# P(z > 0) = sigmoid(log_alpha + OPEN_SHIFT); follows from z > 0 <=> s > -LOW / (HIGH - LOW).
OPEN_SHIFT = -BETA * math.log(-LOW / HIGH)


def hard_concrete(log_alpha: Tensor, *, sample: bool, u: Tensor | None = None) -> Tensor:
    """Return gate values z = clamp(1.2 s - 0.1, 0, 1) with s = sigmoid((logit(u) + log_alpha) /
    beta), beta = 2/3, when sampling, and s = sigmoid(log_alpha) otherwise.

    Args:
        log_alpha: any shape, fp32 (fp64 in tests).
        sample: draw z (training) or give the deterministic gate (evaluation before binarising).
        u: uniform noise of log_alpha's shape in [1e-6, 1 - 1e-6]; drawn from torch's default
            generator if None.

    Returns:
        z in [0, 1], shape and dtype of log_alpha, differentiable in log_alpha.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or ``u`` given without ``sample``.

    Source: Louizos et al. 2018, equations 10 to 12; reference:
    ``koffkernels.reference.hard_concrete``.
    """
    where = "hard_concrete"
    check_tensor(where, "log_alpha", log_alpha, tuple(range(0, 5)))
    if u is not None and not sample:
        refuse(where, "u", "be None unless sample=True", "a tensor", "drop it or set sample=True")
    if sample and u is None:
        u = torch.empty_like(log_alpha, requires_grad=False).uniform_(U_MIN, 1.0 - U_MIN)
    if u is not None:
        check_tensor(where, "u", u, (log_alpha.dim(),))
        check_shape(where, "u", u, shape_of(log_alpha), "draw one number per gate")
        check_device(where, "u", u, log_alpha, "log_alpha")
    run = dispatch.implementation("hard_concrete", log_alpha.device)
    return run(log_alpha, u, BETA, LOW, HIGH)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z > 0) = sigmoid(log_alpha - beta log(0.1 / 1.1)) of each gate, elementwise.

    Args:
        log_alpha: any shape, floating.

    Returns:
        Probabilities of log_alpha's shape and dtype, differentiable.

    Source: Louizos et al. 2018, equation 12.
    """
    return torch.sigmoid(log_alpha + OPEN_SHIFT)
