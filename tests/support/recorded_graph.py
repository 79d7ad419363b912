"""A CUDA graph on the CPU: ``capture`` records every operation that a step runs, and a replay runs
them again on the same tensors, with the same numbers, into the same results.

So whatever a real graph would freeze is frozen here, too, and what it cannot do is refused: reading
values on the host, and copying new ones from it.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from koff.model import decode_graph, forward_context
from koff.model.memory_argument import KoffModelMixin
from koffkernels._torch import gated_mlp, lora_linear, prefix_attention, rows

_aten = torch.ops.aten
_FORBIDDEN = {
    _aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.masked_select,
    _aten.lift_fresh, _aten._unique2,
}  # fmt: skip


class Forbidden(RuntimeError):
    """A step did what a captured one cannot."""


def _refuse(*_):
    raise Forbidden("a captured step must not read values on the host")


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.made: set[int] = set()  # storages of results; all are held, so none comes twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in _FORBIDDEN:
            raise Forbidden(f"a captured step must not call {function}")
        given = zip(function._schema.arguments, args, strict=False)
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value) if written else ():
                if t.untyped_storage().data_ptr() not in self.made:
                    self.before.append((t, t.clone()))
        out = function(*args, **kwargs)
        passed = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        fresh = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in passed]
        self.made.update(t.untyped_storage().data_ptr() for t in fresh)
        self.operations.append((function, args, kwargs, out, fresh))
        return out

    def undo(self) -> None:
        """A capture runs nothing: put back what was written, and leave results meaningless."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        for *_, fresh in self.operations:
            for t in fresh:
                t.fill_(torch.nan if t.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, out, fresh in self.operations:
            again = function(*args, **kwargs)
            if fresh:
                for old, new in zip(_tensors(out), _tensors(again), strict=True):
                    old.copy_(new)


def _tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def capture(step, device):
    """``koff.model.decode_graph.capture`` for the CPU."""
    recorder = _Recorder()
    plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}
    try:
        for name in plain:
            setattr(Tensor, name, _refuse)
        with recorder:
            out = step()
    finally:
        for name, method in plain.items():
            setattr(Tensor, name, method)
        recorder.undo()
    return recorder.replay, out


class _Traced:
    """``torch`` for a module that asks it whether it is being compiled: plain torch's kernels then
    do on the CPU what they do on a GPU, and look at no values."""

    compiler = SimpleNamespace(is_compiling=lambda: True)

    def __getattr__(self, name: str):
        return getattr(torch, name)


def use(monkeypatch, on_capture=lambda: None, on_replay=lambda: None) -> None:
    """Let ``generate`` decode through recorded graphs on the CPU.

    Args:
        monkeypatch: takes it back.
        on_capture, on_replay: called after each.
    """

    def counting(step, device):
        replay, out = capture(step, device)
        on_capture()
        return lambda: (replay(), on_replay()), out

    def auto(model, model_kwargs, generation_config):  # as transformers decides on a GPU
        cache = model_kwargs.get("past_key_values")
        return not generation_config.disable_compile and isinstance(cache, StaticCache)

    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(decode_graph, "capture", counting)
    monkeypatch.setattr(KoffModelMixin, "_valid_auto_compile_criteria", auto, raising=False)
    monkeypatch.setattr(forward_context, "_on_host", lambda ids: False)  # as with ids on a GPU
    # The package has a function of this module's name.
    group_rows = importlib.import_module("koffkernels.group_rows")
    for module in (group_rows, rows, lora_linear, prefix_attention, gated_mlp):
        monkeypatch.setattr(module, "torch", _Traced())
