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
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from koffkernels import GatedMLPLoRA, LoRA, RowGroups, gated_mlp, group_rows, lora_linear
from koffkernels.reference import ACTIVATIONS

from .arch import MLP_LINEARS
from .class_swap import swap, unswap

# PEFT's name, in ``adapter_names``, for a row without an adapter.
BASE = "__base__"


@dataclass
class AppliedKernels:
    """What ``apply_kernels`` did; a context manager that undoes it at its end.

    Args:
        replaced: path of each module that koffkernels now runs, and what it became.
        left: path of each MLP or adapter layer that stays as it was, and why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

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
        lines = [
            f"{len(self.replaced)} modules run by koffkernels, {len(self.left)} left as they were"
        ]
        lines += [f"  {path}: {why}" for path, why in self.left.items()]
        return "\n".join(lines)


def apply_kernels(model: nn.Module) -> AppliedKernels:
    """Let koffkernels run the gated MLPs and the LoRA layers of a model, in place.

    A gated MLP, down(act(gate(x)) * up(x)), becomes one operation with the LoRA of its three layers
    in it; a PEFT LoRA layer becomes one with its base layer. The results agree with the original's
    to rounding; where PEFT keeps adapters in fp32 under a 16-bit base, the update is computed in
    the base's dtype. Base weights get no gradient from the kernels: a layer whose base weights are
    trained runs its original code.

    Args:
        model: a causal LM of transformers, or a PEFT model with LoRA adapters on one: one or
            several, active or not, mixed in a batch by ``adapter_names``.

    Returns:
        What was replaced, and what was left and why; ``undo()``, or the end of a ``with`` block,
        restores the model.

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
        if isinstance(module, (_KernelLinear, _KernelMLP)) or hasattr(module, "_koff"):
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
    if type(layer.base_layer) is not nn.Linear:
        return f"its base is a {type(layer.base_layer).__name__}, not a torch.nn.Linear"
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
        if type(_base(linear)) is not nn.Linear or _base(linear).bias is not None:
            return f"{name} is not a torch.nn.Linear without bias"
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
    """This forward is not one that the kernels compute; the original's code runs."""


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
    """Whether somebody waits for a module's output or gradient. Hooks on its input are told apart:
    PEFT has its own there."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _frozen(linear: nn.Module) -> nn.Linear:
    """The base layer, whose weight the kernels take without calling it."""
    base = _base(linear)
    if _hooked(base) or base._forward_pre_hooks or "forward" in base.__dict__:
        raise _Unfit
    if torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()):
        raise _Unfit
    return base


def _names_in_hooks(linear: nn.Module) -> Sequence[str] | None:
    """The ``adapter_names`` that PEFT's hooks would give to a layer, which the fused MLP does not
    call."""
    names = None
    if _hooked(linear):
        raise _Unfit
    for hook in linear._forward_pre_hooks.values():
        keywords = getattr(hook, "keywords", None) or {}
        if set(keywords) != {"adapter_names"}:
            raise _Unfit
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
        return group_rows(torch.tensor(ids, device=device), len(used))


_kept_rows = functools.lru_cache(maxsize=256)(_rows_of)


def _lora(layer: nn.Module, names: Sequence[str] | None, x: Tensor) -> LoRA | None:
    """The update that a layer adds in this forward, None for none.

    Without ``names`` the active adapters, which PEFT adds up: they are one LoRA whose rank is the
    sum of theirs. With ``names`` one LoRA for each adapter in use, of the highest rank among them.
    """
    if not isinstance(layer, PeftLinear):
        return None
    if names is not None and (layer.merged or layer.disable_adapters or len(names) != len(x)):
        raise _Unfit  # PEFT has something to say about it
    if layer.disable_adapters:
        if layer.merged:
            raise _Unfit  # PEFT unmerges first
        return None
    if layer.merged:
        return None
    wanted = layer.active_adapters if names is None else _in_use(names)
    present = [name for name in wanted if name in layer.lora_A]
    for name in present:
        dropout = layer.lora_dropout[name]
        plain = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0.0
        a, b = layer.lora_A[name], layer.lora_B[name]
        hooked = any(_hooked(linear) or linear._forward_pre_hooks for linear in (a, b))
        if name in layer.lora_variant or b.bias is not None or not plain or hooked:
            raise _Unfit
    if not present:
        return None
    a = {name: layer.lora_A[name].weight for name in present}
    b = {name: layer.lora_B[name].weight for name in present}
    first = a[present[0]]
    if names is None:
        if len(present) == 1:
            scaling = _constant((layer.scaling[present[0]],), torch.float32, x.device)
            return LoRA(first[None], b[present[0]][None], scaling)
        scaled = [b[name] * layer.scaling[name] for name in present]
        ones = _constant((1.0,), torch.float32, x.device)
        return LoRA(torch.cat(list(a.values()))[None], torch.cat(scaled, 1)[None], ones)
    rank = max(weight.shape[0] for weight in a.values())
    none = first.new_zeros(0, first.shape[1]), first.new_zeros(layer.out_features, 0)
    pairs = [(a[name], b[name]) if name in a else none for name in wanted]
    scaling = tuple(float(layer.scaling.get(name, 0.0)) for name in wanted)
    return LoRA(
        torch.stack([F.pad(one, (0, 0, 0, rank - one.shape[0])) for one, _ in pairs]),
        torch.stack([F.pad(one, (0, rank - one.shape[1])) for _, one in pairs]),
        _constant(scaling, torch.float32, x.device),
    )


class _KernelLinear:
    """A PEFT LoRA layer as one operation with its base."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = kwargs.get("adapter_names")
        try:
            if args or set(kwargs) - {"adapter_names"}:
                raise _Unfit
            base, lora = _frozen(self), _lora(self, names, x)
        except _Unfit:
            return super().forward(x, *args, **kwargs)
        if lora is None:
            return base(x)
        return lora_linear(x, base.weight, base.bias, lora=lora, memory_ids=_rows(names, x))


class _KernelMLP:
    """A gated MLP as one operation with the LoRA of its three layers."""

    _koff_activation: str

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        linears = [getattr(self, name) for name in MLP_LINEARS]
        try:
            if args or kwargs:
                raise _Unfit
            weights = [_frozen(linear).weight for linear in linears]
            names = [_names_in_hooks(linear) for linear in linears]
            mixed = next((found for found in names if found is not None), None)
            lora = GatedMLPLoRA(*(_lora(linear, mixed, x) for linear in linears))
        except _Unfit:
            return super().forward(x, *args, **kwargs)
        rows = None if lora == (None, None, None) else _rows(mixed, x)
        return gated_mlp(x, *weights, lora=lora, memory_ids=rows, activation=self._koff_activation)
