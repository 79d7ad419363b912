"""LoRA linear layers over one x, forward and backward, on [M, K]: the vendor's GEMMs and narrow
kernels, fused GEMMs, or the decode kernels; ``routes`` says which.

There are one to three layers, some of them with an update. The narrow kernels are launched once for
all: x is read once for every s, and one launch adds every update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import routes
from ...types import LoRA
from ..shared.launch import Rows
from ..shared.operands import Delta, Linear
from ..shared.reduce import MatrixSum, totals
from .decode import CONFIGS as DECODE
from .decode import decode_linears
from .expand import expand_, expand_each_
from .gemm import CONFIGS as FUSED
from .gemm import gemm_linear
from .grad import lora_grad, lora_grads
from .shrink import shrink, shrink_each

# a, b and scaling of an update as they were given, [r, K] and [N, r] of one memory too; None for
# those that get no gradient.
Trained = Sequence[Tensor | None]


def route_of(stage: str, x: Tensor, weights: Sequence[Tensor], rows: Rows) -> routes.Route:
    """Return the route of a call on x [M, .] and weights [., K], whose outputs lie side by side."""
    m, k, n = x.shape[0], weights[0].shape[1], sum(weight.shape[0] for weight in weights)
    if stage == "backward":  # dy W reduces over N
        k, n = n, k
    mixed, several = rows.ids is not None, len(weights) > 1
    shape = routes.Shape("lora_linear", stage, m, k, n, x.dtype, mixed, several)
    return routes.choose(shape, x.device)


def updates(s: Tensor | None, parts: Sequence[tuple[Tensor, Tensor] | None]) -> list[Delta | None]:
    """Return the updates of layers whose s lie side by side [M, sum of ranks].

    Args:
        s: what ``shrink`` returned; None without any update.
        parts: of each layer b [n, N, r] and scaling [n], or None for no update.
    """
    if s is None:
        return [None for _ in parts]
    ranks = [part[0].shape[2] for part in parts if part is not None]
    columns = iter(s.split_with_sizes(ranks, 1) if len(ranks) > 1 else (s,))
    return [None if part is None else Delta(next(columns), *part) for part in parts]


def _present(deltas: Sequence[Delta | None]) -> tuple[Delta, ...]:
    return tuple(delta for delta in deltas if delta is not None)


def linears_forward(x: Tensor, layers: Sequence[Linear], rows: Rows) -> tuple[list[Tensor], Tensor]:
    """Return (each y = x W^T + bias + scaling s b^T, all s = x a^T side by side). x is [M, K]."""
    loras = [layer.lora for layer in layers]
    s = shrink(x, [lora.a for lora in loras if lora is not None], rows)
    deltas = updates(s, [None if lora is None else (lora.b, lora.scaling) for lora in loras])
    route = route_of("forward", x, [layer.weight for layer in layers], rows)
    if route.name == "fused":
        config = routes.find(FUSED, route)
        ys = [
            gemm_linear(x, layer.weight, layer.bias, _present([delta]), rows, config)
            for layer, delta in zip(layers, deltas, strict=True)
        ]
        return ys, s
    ys = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    updated = [y for y, delta in zip(ys, deltas, strict=True) if delta is not None]
    expand_each_(updated, _present(deltas), rows)
    return ys, s


def linears_inference(x: Tensor, layers: Sequence[Linear], rows: Rows) -> list[Tensor]:
    """Return the ys of ``linears_forward``, where nothing is saved for backward."""
    route = route_of("forward", x, [layer.weight for layer in layers], rows)
    if route.name == "decode":
        return decode_linears(x, layers, rows, routes.find(DECODE, route))
    return linears_forward(x, layers, rows)[0]


def matrix_gradients(
    loras: Sequence[LoRA],
    das: Sequence[MatrixSum],
    dbs: Sequence[MatrixSum],
    trained: Sequence[Trained],
) -> list[list[Tensor | None]]:
    """Return the gradients of what is trained, from the sums [n, r, K] for each a and [n, r, N] for
    each b; the sums of all a are cut alike, and those of all b."""
    found: list[list[Tensor | None]] = [[None, None, None] for _ in loras]
    for part, sums in ((0, das), (1, dbs)):
        those = [i for i, given in enumerate(trained) if given[part] is not None]
        for i in those:
            like = trained[i][part]
            found[i][part] = torch.empty_like(like, memory_format=torch.contiguous_format)
        if those:
            totals(
                [sums[i] for i in those],
                [found[i][part] for i in those],
                [loras[i].scaling for i in those],
                transposed=part == 1,
            )
    for i, (lora, given) in enumerate(zip(loras, trained, strict=True)):
        if given[2] is not None:  # not from db, which a scaling of 0 would have made 0
            unscaled = dbs[i].total(torch.float32, None, transposed=True)
            found[i][2] = (unscaled * lora.b.float()).sum((1, 2)).to(lora.scaling.dtype)
    return found


def _input_gradient(
    dys: Sequence[Tensor], t: Tensor, layers: Sequence[Linear], rows: Rows
) -> Tensor:
    """Return dx = the sum of dy W + scaling t a."""
    deltas = updates(
        t,
        [
            None if layer.lora is None else (layer.lora.a.transpose(1, 2), layer.lora.scaling)
            for layer in layers
        ],
    )
    route = route_of("backward", dys[0], [layer.weight for layer in layers], rows)
    if route.name == "fused":
        config, dx = routes.find(FUSED, route), None
        for dy, layer, delta in zip(dys, layers, deltas, strict=True):
            own = _present([delta])
            dx = gemm_linear(dy, layer.weight.t(), None, own, rows, config, onto=dx)
        return dx
    dx = dys[0] @ layers[0].weight
    for dy, layer in zip(dys[1:], layers[1:], strict=True):
        dx.addmm_(dy, layer.weight)  # torch.addmm would copy its first argument
    return expand_(dx, _present(deltas), rows)


def linears_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    layers: Sequence[Linear],
    rows: Rows,
    needs_x: bool,
    trained: Sequence[Trained],
) -> list[Tensor | None]:
    """Return [dx, then da, db and dscaling of each layer] of ``linears_forward``, None where there
    is no need."""
    found: list[list[Tensor | None]] = [[None, None, None] for _ in layers]
    updated = [i for i, layer in enumerate(layers) if layer.lora is not None]
    loras = [layers[i].lora for i in updated]
    matrices = [lora.b.transpose(1, 2) for lora in loras]
    t = shrink_each([dys[i] for i in updated], matrices, rows)
    dx = _input_gradient(dys, t, layers, rows) if needs_x else None
    if any(part is not None for given in trained for part in given):
        memories, ranks = loras[0].a.shape[0], [lora.a.shape[1] for lora in loras]
        das = lora_grad(t, x, memories, rows).by_rank(ranks)
        pairs = zip(s.split(ranks, 1), (dys[i] for i in updated), strict=True)
        dbs = lora_grads(list(pairs), memories, rows)
        gradients = matrix_gradients(loras, das, dbs, [trained[i] for i in updated])
        for i, three in zip(updated, gradients, strict=True):
            found[i] = three
    return [dx, *(gradient for three in found for gradient in three)]
