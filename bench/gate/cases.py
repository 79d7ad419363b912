"""Every kernel at the shapes of real models: the one list of what the gate compiles.

``FILES`` has an entry for each file whose functions are called: one that yields a ``Case`` for each
of the file's configurations and each way of calling that changes the code. Kernels without
configurations are reached through the operations that launch them, so that strides and dtypes are
those of real calls.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor

from koffkernels import routes
from koffkernels._triton.shared.operands import Delta
from koffkernels.types import GatedMLPLoRA, LoRA

from . import cases_attention
from .settings import Case, Setting, configs, defaults

KERNELS = "koffkernels._triton"


def _linear(module: ModuleType, at: Setting) -> Iterator[Case]:
    """Yield forward and backward on the vendor's GEMMs: the narrow kernels as really called."""
    k, n = at.model.hidden, at.inner
    sizes = {"": (n,), "q, k, v ": (at.model.heads * at.model.head_dim, *[at.model.kv_width] * 2)}
    for name, widths in sizes.items():
        layers = [module.Linear(at.empty(n, k), None, LoRA(*at.lora(k, n))) for n in widths]
        if at.plain and name:  # ... of which one has no update
            layers[1] = layers[1]._replace(lora=None)
        updates = sum(layer.lora is not None for layer in layers)
        for m in (1, 8192):  # the shrink in several splits, and in one
            x, s, rows = at.empty(m, k), at.empty(m, updates * at.r), at.rows(m)
            run = functools.partial(module.linears_forward, x, layers, rows)
            yield Case(f"{name}forward M={m}", _vendor(run))
        trained = [layer.lora or (None, None, None) for layer in layers]
        dys = [at.empty(m, n) for n in widths]
        run = functools.partial(module.linears_backward, dys, x, s, layers, rows, True, trained)
        yield Case(f"{name}backward M={m}", _vendor(run))


def _mlp(module: ModuleType, at: Setting) -> Iterator[Case]:
    """Yield training with and without gates, LoRA on all three layers or on the last one only."""
    h, i, m = at.model.hidden, at.inner, 8192
    weights = at.empty(i, h), at.empty(i, h), at.empty(h, i)
    up, down = LoRA(*at.lora(h, i)), LoRA(*at.lora(i, h))
    x, rows, gates = at.empty(m, h), at.rows(m), at.master(i)
    calls = [(gates, GatedMLPLoRA(up, up, down))]
    if at.plain:
        calls += [(None, GatedMLPLoRA(up, up, down)), (gates, GatedMLPLoRA(up, None, None))]
        calls += [(gates, GatedMLPLoRA(None, None, down)), (gates, GatedMLPLoRA())]

    def train(gates: Tensor | None, lora: GatedMLPLoRA) -> None:
        layer = module.Layer(weights, gates, lora, rows, "silu")
        y, saved = module.mlp_forward(x, layer, True)
        trained = [part or (None, None, None) for part in lora]
        module.mlp_backward(y, x, saved, layer, (True, gates is not None), trained)

    for gates, lora in calls:
        parts = " ".join(name for name, part in zip(lora._fields, lora, strict=True) if part)
        with_gates = "no gates" if gates is None else "gates"
        run = functools.partial(train, gates, lora)
        yield Case(f"training M={m} {with_gates}, LoRA: {parts or 'none'}", _vendor(run))


def _hidden_backward(module: ModuleType, at: Setting) -> Iterator[Case]:
    """Yield what has a configuration for each chip: ranks above 32, updates on all three layers."""
    if at.r <= 32:
        return
    m, i = 8192, at.inner
    b, scaling = at.lora(at.model.hidden, i)[1:]
    a_down = at.lora(i, at.model.hidden)[0]
    wide, narrow = at.empty(m, 2 * i), at.empty(m, 2 * at.r)
    gate, up = (Delta(s, b, scaling) for s in narrow.chunk(2, dim=1))
    deltas = module.HiddenDeltas(gate, up, Delta(gate.s, a_down.transpose(1, 2), scaling))
    args = at.empty(m, i), wide.chunk(2, dim=1), at.master(i), deltas, at.rows(m), "silu"
    for config, labels in configs(module.RANK_64_CONFIGS):
        ways = {"needs_gates": True, "overwrite": True, "config": config}
        yield Case(f"M={m}", functools.partial(module.mlp_hidden_bwd, *args, **ways), **labels)


def _vendor(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call, on the route that takes the vendor's GEMMs."""

    def run() -> object:
        with routes.force_route("vendor"):
            return call()

    return run


def _decode_linear(module: ModuleType, at: Setting) -> Iterator[Case]:
    hidden, inner = at.model.hidden, at.inner
    first = next(iter(module.CONFIGS.values()))

    def layer(k: int, n: int, bias: bool = False, lora: bool = True) -> module.Linear:
        given = LoRA(*at.lora(k, n)) if lora else None
        return module.Linear(at.empty(n, k), at.empty(n) if bias else None, given)

    query = hidden, at.model.heads * at.model.head_dim
    key = hidden, at.model.kv_width
    layers = {
        "down": [layer(inner, hidden)],
        "query": [layer(*query)],
        "q, k, v": [layer(*query), layer(*key), layer(*key)],
    }
    for config, labels in configs(module.CONFIGS):
        calls = [(name, m, found) for name, found in layers.items() for m in (1, 32, 64)]
        if at.plain and config is first:
            calls += [("query, bias", 1, [layer(*query, bias=True)])]
            calls += [("query, no LoRA", 1, [layer(*query, bias, False)]) for bias in (True, False)]
            with_bias = [layer(*query, bias=True), layer(*key, lora=False), layer(*key, bias=True)]
            calls += [("q, k, v, LoRA of q and v", 1, with_bias)]
            calls += [("k, v, LoRA of v", 1, [layer(*key, lora=False), layer(*key)])]
        for name, m, found in calls:  # 1, 32 and 64 are the three sizes of a token tile
            x = at.empty(m, found[0].weight.shape[1])
            run = functools.partial(module.decode_linears, x, found, at.rows(m), config)
            yield Case(f"{name} M={m}", run, **labels)


def _decode_mlp(module: ModuleType, at: Setting) -> Iterator[Case]:
    k, n = at.model.hidden, at.inner
    gates, lora, first = at.master(n), LoRA(*at.lora(k, n)), next(iter(module.CONFIGS.values()))
    for config, labels in configs(module.CONFIGS):
        calls = [(m, gates, lora, lora) for m in (1, 32, 64)]
        if at.plain and config is first:
            calls += [(1, None, lora, lora), (1, gates, None, None), (1, None, None, None)]
            calls += [(1, None, lora, None), (1, None, None, lora)]
        for m, *rest in calls:
            args = at.empty(m, k), at.empty(n, k), at.empty(n, k), *rest, at.rows(m), "silu", config
            yield Case(f"M={m}", functools.partial(module.decode_mlp_up, *args), **labels)


def _gemm_linear(module: ModuleType, at: Setting) -> Iterator[Case]:
    """Yield forward, and input gradient: of a slice, with W read across, onto what is there."""
    k, n, m, usual = at.model.hidden, at.inner, 8192, defaults(module.CONFIGS)
    rows, weight, bias = at.rows(m), at.empty(n, k), at.empty(n)
    a, b, scaling = at.lora(k, n)
    s = at.empty(m, 2 * at.r)[:, : at.r]
    update, back = module.Delta(s, b, scaling), module.Delta(s, a.transpose(1, 2), scaling)
    x, dy, dx = at.empty(m, k), at.empty(m, 2 * n)[:, :n], at.empty(m, k)
    for config, labels in configs(module.CONFIGS):
        calls = [("forward", x, weight, None, (update,), None)]
        calls += [("backward onto", dy, weight.t(), None, (back, back), dx)]
        if config in usual:
            calls += [("backward", dy, weight.t(), None, (), None)]
            calls += [("backward", dy, weight.t(), None, (back,), None)]
        if at.plain and config in usual:
            calls += [("forward, bias", x, weight, bias, (update,), None)]
            calls += [("forward, no LoRA", x, weight, None, (), None)]
        for name, *call, onto in calls:
            run = functools.partial(module.gemm_linear, *call, rows, config, onto)
            yield Case(f"{name} M={m}", run, **labels)


def _gemm_mlp(module: ModuleType, at: Setting) -> Iterator[Case]:
    k, n, m, usual = at.model.hidden, at.inner, 8192, defaults(module.CONFIGS)
    x, weights, rows, gates = at.empty(m, k), (at.empty(n, k),) * 2, at.rows(m), at.master(n)
    s, (_, b, scaling) = at.empty(m, 2 * at.r), at.lora(k, n)
    deltas = [module.Delta(part, b, scaling) for part in (s[:, : at.r], s[:, at.r :])]
    for config, labels in configs(module.CONFIGS):
        calls = [(gates, *deltas, True), (gates, *deltas, False)]
        if at.plain and config in usual:
            calls += [(None, *deltas, True), (gates, None, None, True), (None, None, None, False)]
        for *call, keep in calls:
            args = x, *weights, *call, rows, "silu", config, keep
            yield Case(f"M={m} keep={keep}", functools.partial(module.gemm_mlp_up, *args), **labels)


FILES: dict[str, Callable[[ModuleType, Setting], Iterator[Case]]] = {
    "lora.linear": _linear,
    "mlp.mlp": _mlp,
    "mlp.hidden_bwd": _hidden_backward,
    "lora.decode": _decode_linear,
    "mlp.decode": _decode_mlp,
    "lora.gemm": _gemm_linear,
    "mlp.gemm": _gemm_mlp,
    **cases_attention.FILES,
}


def module_named(name: str) -> ModuleType:
    """Return the kernel file of this name, folder and file: "lora.shrink"."""
    return importlib.import_module(f"{KERNELS}.{name}")


def cases(at: Setting) -> Iterator[tuple[str, Case]]:
    """Yield (file, case) for every file in ``FILES``."""
    for name, generate in FILES.items():
        for case in generate(module_named(name), at):
            yield name, case


def all_kernels() -> set[tuple[str, str]]:
    """Return (file, kernel) of every jitted function whose name ends in ``_kernel``."""
    import triton

    found = set()
    folder = importlib.import_module(KERNELS)
    for info in pkgutil.walk_packages(folder.__path__, f"{KERNELS}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", None) == module.__name__
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction) and mine:
                found.add((info.name.removeprefix(f"{KERNELS}."), name))
    return found
