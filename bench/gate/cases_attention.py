"""The cases of prefix attention: prefill and training over long rows, and decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from koffkernels._triton.attention.call import Call
from koffkernels.types import Prefix, RowBounds

from .settings import MEMORIES, MODELS, NARROW_HEADS, Case, Setting, configs

_LENGTH = 2048
_PREFIX = 256


def call_of(
    at: Setting, rows: int, queries: int, keys: int, prefix: bool = True, bounds: bool = False
) -> Call:
    """Return a call of prefix attention with the model's heads.

    Args:
        at: gives the heads, the dtype and whether there are several memories.
        rows, queries, keys: B, T, S.
        prefix: with learned keys and values.
        bounds: rows are padded.
    """
    _, _, _, heads, kv_heads, width = at.model
    n, ids, learned, row = (MEMORIES if at.mixed else 1), None, None, None
    if prefix:
        k, v = (at.master(n, kv_heads, _PREFIX, width) for _ in "kv")
        learned = Prefix(k, v, at.empty(n, dtype=torch.int64))
        ids = at.empty(rows, dtype=torch.int64) if at.mixed else None
    if bounds:
        row = RowBounds(*(at.empty(rows, dtype=torch.int64) for _ in RowBounds._fields))
    q = at.empty(rows, queries, heads, width).transpose(1, 2)
    k, v = (at.empty(rows, keys, kv_heads, width).transpose(1, 2) for _ in "kv")
    return Call(q, k, v, learned, ids, row, width**-0.5)


def _settings(at: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield (what to say, setting): one rank is enough, and both widths of heads are met once."""
    if at.r == 16:
        yield "", at
        if at.model is MODELS[0]:
            yield f"D={NARROW_HEADS.head_dim} ", at._replace(model=NARROW_HEADS)


def _long(at: Setting) -> dict[str, Call]:
    """Return long rows, padded or not and, at some settings, without a prefix."""
    length, found = _LENGTH, {}
    for width, here in _settings(at):
        found[width] = call_of(here, 4, length, length)
        found[f"{width}padded "] = call_of(here, 4, length, length, bounds=True)
        if at.plain:
            found[f"{width}no prefix "] = call_of(here, 4, length, length, False)
            found[f"{width}no prefix, padded "] = call_of(here, 4, length, length, False, True)
    return found


def _forward(module: ModuleType, at: Setting) -> Iterator[Case]:
    for name, call in _long(at).items():
        for config, labels in configs(module.CONFIGS):
            run = functools.partial(module.one_pass, call, config)
            yield Case(f"{name}T={_LENGTH}", run, **labels)
            if call.prefix is not None and call.bounds is None:
                run = functools.partial(module.add_prefix, call, *_outputs(call), config)
                yield Case(f"prefix only {name}T={_LENGTH}", run, **labels)


def _outputs(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o and lse, as the forward lays them out."""
    from koffkernels._triton.attention.fwd import empty_output

    return empty_output(call.q)


def _after_upstream(call: Call, function: Callable[..., object], *rest: object) -> None:
    from koffkernels._triton.attention.dq import upstream

    o, lse = _outputs(call)
    function(call, upstream(o, o, lse), *rest)


def _query_grad(module: ModuleType, at: Setting) -> Iterator[Case]:
    for name, call in _long(at).items():
        for config, labels in configs(module.CONFIGS):
            labels["of"] = "_dq_"
            run = functools.partial(_after_upstream, call, module.query_grad, None, config)
            yield Case(f"{name}T={_LENGTH}", run, **labels)
            if call.prefix is not None and call.bounds is None:
                dq = torch.empty_like(call.q)
                run = functools.partial(_after_upstream, call, module.query_grad, dq, config)
                yield Case(f"prefix only {name}T={_LENGTH}", run, **labels)


def _own_grads(module: ModuleType, at: Setting) -> Iterator[Case]:
    both = True, True
    for name, call in _long(at).items():
        for config, labels in configs(module.CONFIGS):
            run = functools.partial(_after_upstream, call, module.own_grads, both, config)
            yield Case(f"{name}T={_LENGTH}", run, **labels)


def _prefix_grads(module: ModuleType, at: Setting) -> Iterator[Case]:
    both = True, True
    for name, call in _long(at).items():
        for config, labels in configs(module.CONFIGS):
            if call.prefix is not None and call.bounds is None:
                run = functools.partial(_after_upstream, call, module.prefix_grads, both, config)
                yield Case(f"{name}T={_LENGTH}", run, **labels)


def _decode(module: ModuleType, at: Setting) -> Iterator[Case]:
    calls = {}
    for width, here in _settings(at):
        calls |= {f"{width}B={rows}": call_of(here, rows, 1, _LENGTH) for rows in (1, 64)}
        calls[f"{width}B=64 padded"] = call_of(here, 64, 1, _LENGTH, bounds=True)
        if at.plain:
            calls[f"{width}B=64 no prefix"] = call_of(here, 64, 1, _LENGTH, False)
            calls[f"{width}B=4 T=4"] = call_of(here, 4, 4, _LENGTH)
    for name, call in calls.items():
        for config, labels in configs(module.GROUP_CONFIGS):
            run = functools.partial(module.decode, call, config, None)
            yield Case(name, run, **labels, of="_group_")
        for config, labels in configs(module.OWN_CONFIGS):
            run = functools.partial(module.decode, call, None, config)
            yield Case(name, run, **labels, of="_own_")


FILES: dict[str, Callable[[ModuleType, Setting], Iterator[Case]]] = {
    "attention.fwd": _forward,
    "attention.dq": _query_grad,
    "attention.dkv": _own_grads,
    "attention.prefix_grad": _prefix_grads,
    "attention.decode": _decode,
}
