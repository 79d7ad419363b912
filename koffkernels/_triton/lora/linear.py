"""LoRA linear, forward and backward, on [M, K]: the vendor's GEMM and narrow kernels, one fused
GEMM, or the decode kernels; ``routes`` says which."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import routes
from ..shared.launch import Rows
from ..shared.operands import Delta
from ..shared.reduce import MatrixSum
from .decode import CONFIGS as DECODE
from .decode import decode_linear
from .expand import expand_
from .gemm import CONFIGS as FUSED
from .gemm import gemm_linear
from .grad import lora_grad
from .shrink import shrink


def route_of(stage: str, x: Tensor, weight: Tensor, rows: Rows) -> routes.Route:
    """Return the route of a call on x [M, K]."""
    n, k = weight.shape
    shape = routes.Shape("lora_linear", stage, x.shape[0], k, n, x.dtype, rows.ids is not None)
    return routes.choose(shape, x.device)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Return (y, s): y = x W^T + bias + scaling s b^T, s = x a^T. x is [M, K]."""
    a, b, scaling = lora
    s = shrink(x, a, None, rows)
    delta = (Delta(s, b, scaling),)
    route = route_of("forward", x, weight, rows)
    if route.name == "fused":
        return gemm_linear(x, weight, bias, delta, rows, routes.find(FUSED, route)), s
    return expand_(F.linear(x, weight, bias), delta, rows), s


def linear_inference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple, rows: Rows
) -> Tensor:
    """Return y of ``linear_forward``, where nothing is saved for backward."""
    route = route_of("forward", x, weight, rows)
    if route.name == "decode":
        return decode_linear(x, weight, bias, lora, rows, routes.find(DECODE, route))
    return linear_forward(x, weight, bias, lora, rows)[0]


def matrix_gradients(
    lora: tuple, da: MatrixSum, db: MatrixSum, needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Return the gradients of a [n, r, K], b [n, N, r] and scaling [n], None where ``needs`` says
    so, from the sums [n, r, K] and [n, r, N]."""
    a, b, scaling = lora
    dscaling = None
    if needs[2]:  # not from db, which a scaling of 0 would have made 0
        unscaled = db.total(torch.float32, None, transposed=True)
        dscaling = (unscaled * b.float()).sum((1, 2)).to(scaling.dtype)
    return [
        da.total(a.dtype, scaling, transposed=False) if needs[0] else None,
        db.total(b.dtype, scaling, transposed=True) if needs[1] else None,
        dscaling,
    ]


def linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora: tuple,
    rows: Rows,
    needs: tuple[bool, bool, bool, bool],
) -> list[Tensor | None]:
    """Return [dx, da, db, dscaling] of ``linear_forward``, None where ``needs`` says so."""
    a, b, scaling = lora
    t = shrink(dy, b.transpose(1, 2), None, rows)
    dx = None
    if needs[0]:
        delta = (Delta(t, a.transpose(1, 2), scaling),)
        route = route_of("backward", dy, weight.t(), rows)
        if route.name == "fused":
            dx = gemm_linear(dy, weight.t(), None, delta, rows, routes.find(FUSED, route))
        else:
            dx = expand_(dy @ weight, delta, rows)
    if not any(needs[1:]):
        return [dx, None, None, None]
    da, db = (lora_grad(p, q, a.shape[0], rows) for p, q in ((t, x), (s, dy)))
    return [dx, *matrix_gradients(lora, da, db, needs[1:])]
