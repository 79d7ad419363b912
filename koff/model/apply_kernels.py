"""Run the MLPs and LoRA layers of somebody else's model by koffkernels, in place and undoable.

For any causal LM of transformers, or a PEFT LoRA model on one, that knows nothing of offloading.
Classes are swapped for subclasses of the same name and nothing else changes: parameters, names and
PEFT's own bookkeeping stay where they are, so saving, loading, ``set_adapter``, ``add_adapter`` and
merging go on as before. Each forward looks at what PEFT says at that moment. Where a forward is one
that the kernels do not compute (dropout, DoRA, a base weight that is trained, ...), the original
class's runs.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from koffkernels import (
    GatedMLPLoRA,
    LoRA,
    RowGroups,
    gated_mlp,
    group_rows,
    lora_linear,
    lora_linears,
)
from koffkernels.dispatch import compute_dtype
from koffkernels.reference import ACTIVATIONS

from .arch import MLP_LINEARS, SAME_INPUT, has_one_input
from .class_swap import swap, unswap
from .few_bits import is_plain

# PEFT's name, in ``adapter_names``, for a row without an adapter.
BASE = "__base__"

_HOOKS = "hooks of somebody else"


@dataclass
class AppliedKernels:
    """What ``apply_kernels`` did; a context manager that undoes it at its end.

    Args:
        replaced: path of each module that koffkernels runs where it can, and what it became;
            ``own_code()`` says where it cannot now.
        left: path of each MLP or adapter layer that stays as it was, and why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    def own_code(self) -> dict[str, str]:
        """Ask each replaced module whether a forward would run the original's code.

        As things are now: the mode, the active adapters, what is frozen, whether gradients are on,
        hooks. A LoRA layer of an MLP that is one operation runs in it.

        Returns:
            Path of each module that would, and why.
        """
        if not self._modules:
            return dict.fromkeys(self.replaced, "undone")
        found: dict[str, str] = {}
        inside: set[nn.Module] = set()
        # In the order of named_modules, an MLP before what is in it; attentions come last.
        for path, module in zip(self.replaced, self._modules, strict=False):
            why = None if module in inside else _why_own_code(module)
            if why is not None:
                found[path] = why
            elif isinstance(module, _KernelMLP):
                inside.update(getattr(module, name) for name in MLP_LINEARS)
        return found

    def undo(self) -> None:
        """Give every module its own class back; a second call does nothing."""
        while self._modules:
            module = self._modules.pop()
            unswap(module)
            module.__dict__.pop("_koff_activation", None)

    def __enter__(self) -> AppliedKernels:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        own = self.own_code()
        lines = [
            f"{len(self.replaced) - len(own)} modules run by koffkernels now, {len(own)} replaced "
            f"but run by their own code now, {len(self.left)} left as they were"
        ]
        for why, count in Counter(own.values()).items():
            lines.append(f"  {count} by their own code: {why}")
        lines += [f"  {path}: {why}" for path, why in self.left.items()]
        return "\n".join(lines)


def apply_kernels(model: nn.Module) -> AppliedKernels:
    """Let koffkernels run the gated MLPs and the LoRA layers of a model, in place.

    A gated MLP, down(act(gate(x)) * up(x)), becomes one operation with the LoRA of its three layers
    in it; a PEFT LoRA layer becomes one with its base layer, and with the others among q, k and v
    where the architecture is known to call them with one x. The results agree with the original's
    to rounding; where PEFT keeps adapters in fp32 under a 16-bit base, the update is computed in
    the base's dtype. Base weights get no gradient from the kernels: a layer whose base weights are
    trained runs its original code.

    Args:
        model: a causal LM of transformers, or a PEFT model with LoRA adapters on one: one or
            several, active or not, mixed in a batch by ``adapter_names``.

    Returns:
        What was replaced, what of it would run its own code now and why, and what was left and why;
        ``undo()``, or the end of a ``with`` block, restores the model.

    Raises:
        TypeError: not a module.
        ValueError: nothing in the model can be replaced, or kernels were applied to it already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"koff.apply_kernels: the model must be a torch.nn.Module, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    done = AppliedKernels()
    for path, module in model.named_modules():
        if isinstance(module, _OWN) or hasattr(module, "_koff"):
            raise ValueError(
                f"koff.apply_kernels: the model must not run on koffkernels already, got {path}; "
                "undo() the first call, or detach koff"
            )
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            reason, mixin, name = _unfit_linear(module), _KernelLinear, "LoRALinear"
        elif all(hasattr(module, linear) for linear in MLP_LINEARS):
            activation = _activation(module)
            reason, mixin, name = _unfit_mlp(module, activation), _KernelMLP, "GatedMLP"
            if reason is None:
                module._koff_activation = activation
        else:
            continue
        if reason is not None:
            done.left[path] = reason
            continue
        swap(module, mixin)
        done.replaced[path] = name
        done._modules.append(module)
    for module in model.modules():
        together = len(_of_one_input(module)) > 1 and has_one_input(module)
        if together and _patched(module) is None:
            swap(module, _KernelAttention)
            done._modules.append(module)
    if not done.replaced:
        found = "; ".join(f"{path}: {why}" for path, why in done.left.items())
        raise ValueError(
            f"koff.apply_kernels: the model must have gated MLPs ({', '.join(MLP_LINEARS)}) or "
            f"PEFT LoRA layers, got none that fits in {type(model).__name__}"
            + (f" ({found})" if found else "")
            + "; use it as it is"
        )
    return done


# ---- what can be replaced ----


def _unfit_linear(layer: BaseTunerLayer) -> str | None:
    """Why a layer of PEFT is left as it is."""
    if type(layer) is not PeftLinear:  # quantised bases, other methods, parametrised weights
        return f"{type(layer).__module__}.{type(layer).__name__} is not PEFT's plain LoRA layer"
    if type(layer.base_layer) is not nn.Linear or not is_plain(layer.base_layer):
        return f"its base is a {type(layer.base_layer).__name__}, not a plain torch.nn.Linear"
    if layer.fan_in_fan_out:
        return "its weight is stored transposed (fan_in_fan_out)"
    return _patched(layer) or _patched(layer.base_layer)


def _patched(module: nn.Module) -> str | None:
    # accelerate's hooks for a spread or offloaded model, and kernel patches, are bound like this.
    if "forward" in module.__dict__:
        return f"the forward of its {type(module).__name__} was replaced by somebody else"
    return None


def _activation(mlp: nn.Module) -> str | None:
    """The kernels' name of an MLP's activation, found by its values."""
    act = getattr(mlp, "act_fn", None)
    if not callable(act):
        return None
    x = torch.linspace(-4, 4, 33)
    found = (name for name, f in ACTIVATIONS.items() if torch.allclose(f(x), act(x), atol=1e-6))
    return next(found, None)


@torch.no_grad()
def _unfit_mlp(mlp: nn.Module, activation: str | None) -> str | None:
    """Why a module with gate, up and down is left as it is."""
    linears = [getattr(mlp, name) for name in MLP_LINEARS]
    for name, linear in zip(MLP_LINEARS, linears, strict=True):
        if isinstance(linear, BaseTunerLayer):
            reason = _unfit_linear(linear)
        else:
            reason = _patched(linear)
        if reason is not None:
            return f"{name}: {reason}"
        base = _base(linear)
        if type(base) is not nn.Linear or base.bias is not None or not is_plain(base):
            return f"{name} is not a plain torch.nn.Linear without bias"
    if activation is None:
        return "its activation is not one of " + ", ".join(ACTIVATIONS)
    if reason := _patched(mlp):
        return reason
    # Three layers of these names say nothing of how they are put together; two tokens do.
    gate, up, down = linears
    weight = _base(gate).weight
    if weight.is_meta:
        return "its weights are not loaded yet"
    x = torch.randn(1, 2, weight.shape[1], device=weight.device).to(weight.dtype)
    training = mlp.training
    mlp.eval()  # no dropout between the two
    same = torch.allclose(mlp(x), down(mlp.act_fn(gate(x)) * up(x)), rtol=1e-3, atol=1e-5)
    mlp.train(training)
    return None if same else "it does not compute down(act(gate(x)) * up(x))"


# ---- what PEFT says in this forward ----


class _Unfit(Exception):
    """This forward is not one that the kernels compute; the original's code runs. It says why."""


@functools.lru_cache(maxsize=256)
def _kept_constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Autograd refuses a tensor of inference mode, and a later training step may find it here.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor, made once: making one on a GPU waits for all that the GPU still has to do.

    By its dtype, too: ids (0, 1) and scalings (0.0, 1.0) are equal tuples.
    """
    if torch.compiler.is_compiling():  # a traced tensor belongs to one graph
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept_constant(values, dtype, device)


def _base(linear: nn.Module) -> nn.Module:
    return linear.base_layer if isinstance(linear, PeftLinear) else linear


def _hooked(module: nn.Module) -> bool:
    """Whether somebody waits for a module's call, its output or gradient, or for those of all
    modules. Hooks on its input are told apart: PEFT has its own there."""
    waits = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(waits or _has_any_global_hook()) or "forward" in module.__dict__


def _frozen(linear: nn.Module) -> nn.Linear:
    """The base layer, whose weight the kernels take without calling it."""
    base = _base(linear)
    if type(base) is not nn.Linear:  # PEFT may put a layer of another method there later
        raise _Unfit(f"a {type(base).__module__}.{type(base).__name__} in place of a Linear")
    if _hooked(base) or base._forward_pre_hooks:
        raise _Unfit(_HOOKS)
    if torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()):
        raise _Unfit("a base weight is trained")
    return base


def _names_in_hooks(linear: nn.Module) -> Sequence[str] | None:
    """The ``adapter_names`` that PEFT's hooks would give to a layer that is computed before, or
    without, being called."""
    names = None
    if _hooked(linear):
        raise _Unfit(_HOOKS)
    for hook in linear._forward_pre_hooks.values():
        keywords = getattr(hook, "keywords", None) or {}
        if set(keywords) != {"adapter_names"}:
            raise _Unfit(_HOOKS)
        names = keywords["adapter_names"]
    return names


def _in_use(names: Sequence[str]) -> list[str]:
    """The adapters of a mixed batch, in the order in which its rows name them first."""
    return [name for name in dict.fromkeys(names) if name != BASE]


def _rows(names: Sequence[str] | None, x: Tensor) -> RowGroups | None:
    """The number of each row's adapter among those in use, -1 for none, as rows that are sorted."""
    if names is None:
        return None
    names = tuple(names)
    return (_rows_of if torch.compiler.is_compiling() else _kept_rows)(names, x.device)


def _rows_of(names: tuple[str, ...], device: torch.device) -> RowGroups:
    used = _in_use(names)
    ids = [-1 if name == BASE else used.index(name) for name in names]
    with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
        if device.type == "cpu":
            return group_rows(torch.tensor(ids), len(used))
        # Once made they are there for every stream; what kernels make is there for theirs.
        return RowGroups(torch.tensor(ids, device=device))


_kept_rows = functools.lru_cache(maxsize=256)(_rows_of)


def _lora(layer: nn.Module, names: Sequence[str] | None, x: Tensor) -> LoRA | None:
    """The update that a layer adds in this forward, None for none.

    Without ``names`` the active adapters, which PEFT adds up: they are one LoRA whose rank is the
    sum of theirs. With ``names`` one LoRA for each adapter in use, of the highest rank among them.
    """
    if not isinstance(layer, PeftLinear):
        return None
    if names is not None and (layer.merged or layer.disable_adapters or len(names) != len(x)):
        raise _Unfit("adapter_names that PEFT refuses")
    if layer.disable_adapters:
        if layer.merged:
            raise _Unfit("an adapter is merged and disabled")  # PEFT unmerges first
        return None
    if layer.merged:
        return None
    wanted = layer.active_adapters if names is None else _in_use(names)
    present = [name for name in wanted if name in layer.lora_A]
    for name in present:
        dropout = layer.lora_dropout[name]
        plain = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0.0
        a, b = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__
            raise _Unfit("DoRA" if variant.startswith("Dora") else f"PEFT's {variant}")
        if b.bias is not None:
            raise _Unfit("a LoRA bias")
        if not plain:
            raise _Unfit("LoRA dropout in training")
        if any(_hooked(linear) or linear._forward_pre_hooks for linear in (a, b)):
            raise _Unfit(_HOOKS)
    if not present:
        return None
    a = {name: layer.lora_A[name].weight for name in present}
    b = {name: layer.lora_B[name].weight for name in present}
    first = a[present[0]]
    if names is None:
        if len(present) == 1:
            scaling = _constant((layer.scaling[present[0]],), torch.float32, x.device)
            return LoRA(first, b[present[0]], scaling)
        scaled = [b[name] * layer.scaling[name] for name in present]
        ones = _constant((1.0,), torch.float32, x.device)
        return LoRA(torch.cat(list(a.values())), torch.cat(scaled, 1), ones)
    rank = max(weight.shape[0] for weight in a.values())
    none = first.new_zeros(0, first.shape[1]), first.new_zeros(layer.out_features, 0)
    pairs = [(a[name], b[name]) if name in a else none for name in wanted]
    scaling = tuple(float(layer.scaling.get(name, 0.0)) for name in wanted)
    return LoRA(
        torch.stack([F.pad(one, (0, 0, 0, rank - one.shape[0])) for one, _ in pairs]),
        torch.stack([F.pad(one, (0, rank - one.shape[1])) for _, one in pairs]),
        _constant(scaling, torch.float32, x.device),
    )


def _linear_parts(
    layer: nn.Module, names: Sequence[str] | None, x: Tensor
) -> tuple[nn.Linear, LoRA | None]:
    """What the kernels take of a LoRA layer."""
    return _frozen(layer), _lora(layer, names, x)


def _mlp_parts(
    mlp: nn.Module, x: Tensor
) -> tuple[list[Tensor], GatedMLPLoRA, Sequence[str] | None]:
    """What the kernels take of a gated MLP: weights, LoRA, and the adapters' names."""
    linears = [getattr(mlp, name) for name in MLP_LINEARS]
    weights = [_frozen(linear).weight for linear in linears]
    names = [_names_in_hooks(linear) for linear in linears]
    mixed = next((found for found in names if found is not None), None)
    return weights, GatedMLPLoRA(*(_lora(linear, mixed, x) for linear in linears)), mixed


def _why_own_code(module: nn.Module) -> str | None:
    """Why a forward of a replaced module would run the original's code now, None if not."""
    if not isinstance(module, _OWN) or "forward" in module.__dict__:
        return "its forward was replaced by somebody else"
    x = next(module.parameters()).new_empty(0)  # of it only the device counts without names
    try:
        if isinstance(module, _KernelMLP):
            _mlp_parts(module, x)
        elif _linear_parts(module, None, x)[1] is None:
            return "no active LoRA (merged, disabled or none)"
    except _Unfit as unfit:
        return str(unfit)
    return None


# ---- q, k and v ----


def _of_one_input(module: nn.Module) -> dict[str, nn.Module]:
    """Those of q, k and v that are LoRA layers run by koffkernels and lie right in a module."""
    found = {name: module._modules.get(name) for name in SAME_INPUT}
    return {name: linear for name, linear in found.items() if isinstance(linear, _KernelLinear)}


def _how(x: Tensor, names: Sequence[str] | None) -> tuple:
    """What two calls with the same x must have in common to have been one.

    Whether somebody wrote into x, autograd counts, but not in inference mode.
    """
    counted = not (torch.compiler.is_compiling() or x.is_inference())
    version = x._version if counted else None
    return version, torch.is_grad_enabled(), compute_dtype(x, x), names


@dataclass
class _Ahead:
    """The outputs of an attention's LoRA layers that were computed with another one's, before they
    are called.

    Args:
        linears: the attention's LoRA layers, by name.
        x: the input of the first call; the outputs are for this very tensor. None: before it.
        how: of that call.
        outputs: those that nobody asked for yet.
    """

    linears: dict[str, nn.Module]
    x: Tensor | None = None
    how: tuple = ()
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def take(self, linear: nn.Module, x: Tensor, names: Sequence[str] | None) -> Tensor | None:
        """Return a layer's output for x if it is there, and keep it no longer."""
        if self.x is not x:
            return None
        name = next((name for name, other in self.linears.items() if other is linear), None)
        return self.outputs.pop(name, None) if self.how == _how(x, names) else None

    def begin(
        self, linear: nn.Module, lora: LoRA, x: Tensor, names: Sequence[str] | None
    ) -> Tensor | None:
        """Return a layer's output for x, and keep those of the others; None where it is alone.

        Others are those that PEFT would let add a LoRA to the same x, and that nobody waits for.
        """
        if self.x is not None:
            return None  # it is not called as an attention calls it
        found: dict[str, tuple[nn.Linear, LoRA]] = {}
        for name, other in self.linears.items():
            try:
                if _names_in_hooks(other) != names:
                    continue
                part = lora if other is linear else _lora(other, names, x)
                if part is not None:
                    found[name] = _frozen(other), part
            except _Unfit:
                continue
        own = next((name for name in found if self.linears[name] is linear), None)
        if own is None or len(found) == 1:
            return None
        bases, parts = zip(*found.values(), strict=True)
        ys = lora_linears(
            x,
            [base.weight for base in bases],
            [base.bias for base in bases],
            lora=parts,
            memory_ids=_rows(names, x),
        )
        self.x, self.how = x, _how(x, names)
        self.outputs = dict(zip(found, ys, strict=True))
        return self.outputs.pop(own)


class _Running(threading.local):
    """What runs in the current thread.

    Attributes:
        ahead: of the attention that runs; None outside of one.
    """

    # In __init__, since torch.compile would take a default of the class for the value.
    def __init__(self):
        self.ahead: _Ahead | None = None


_running = _Running()


class _KernelAttention:
    """An attention of whose q, k and v those with a LoRA are one operation, while it runs."""

    def forward(self, *args, **kwargs):
        outer, _running.ahead = _running.ahead, _Ahead(_of_one_input(self))
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.ahead = outer  # and what nobody asked for goes, also after an error


class _KernelLinear:
    """A PEFT LoRA layer as one operation with its base, or with its neighbours too."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names, ahead = kwargs.get("adapter_names"), _running.ahead
        try:
            if args or set(kwargs) - {"adapter_names"}:
                raise _Unfit("arguments beside x")
            y = None if ahead is None else ahead.take(self, x, names)
            if y is not None:
                return y
            base, lora = _linear_parts(self, names, x)
        except _Unfit:
            return super().forward(x, *args, **kwargs)
        if lora is None:
            return base(x)
        y = None if ahead is None else ahead.begin(self, lora, x, names)
        if y is not None:
            return y
        return lora_linear(x, base.weight, base.bias, lora=lora, memory_ids=_rows(names, x))


class _KernelMLP:
    """A gated MLP as one operation with the LoRA of its three layers."""

    _koff_activation: str

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        try:
            if args or kwargs:
                raise _Unfit("arguments beside x")
            weights, lora, mixed = _mlp_parts(self, x)
        except _Unfit:
            return super().forward(x, *args, **kwargs)
        rows = None if lora == (None, None, None) else _rows(mixed, x)
        return gated_mlp(x, *weights, lora=lora, memory_ids=rows, activation=self._koff_activation)


_OWN = (_KernelLinear, _KernelMLP, _KernelAttention)
