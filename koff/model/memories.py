"""Memories: per domain a LoRA adapter and a learned KV cache, kept as separate fp32 parameters.

Stacking for the kernels happens inside the call, over just the memories that the call uses, so that
a memory that no row used has ``grad is None`` after backward. Without autograd the stacks are kept
between calls until a parameter changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from koffkernels import LoRA, Prefix

from .config import KVConfig, LoRAConfig


class LoRAWeights(nn.Module):
    """LoRA of one linear layer: a [r, K] uniform as in PEFT (Kaiming, sqrt 5), b [N, r] zero."""

    def __init__(
        self,
        r: int,
        width_in: int,
        width_out: int,
        device: torch.device,
        generator: torch.Generator,
    ):
        super().__init__()
        bound = width_in**-0.5
        a = (torch.rand(r, width_in, generator=generator) * 2 - 1) * bound
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(width_out, r, device=device))


class KVWeights(nn.Module):
    """Learned cache of one layer: k, v [Hkv, P, D], post-RoPE keys at positions 0..P-1 as on disk.

    The first ``frozen`` tokens are buffers and never trained.
    """

    def __init__(
        self, kv_heads: int, tokens: int, frozen: int, head_dim: int, device: torch.device
    ):
        super().__init__()
        shape = (kv_heads, tokens - frozen, head_dim)
        self.k = nn.Parameter(torch.zeros(shape, device=device))
        self.v = nn.Parameter(torch.zeros(shape, device=device))
        self.register_buffer("k_frozen", torch.zeros(kv_heads, frozen, head_dim, device=device))
        self.register_buffer("v_frozen", torch.zeros(kv_heads, frozen, head_dim, device=device))

    def full(self) -> tuple[Tensor, Tensor]:
        """k and v with the frozen tokens in front."""
        return torch.cat([self.k_frozen, self.k], 1), torch.cat([self.v_frozen, self.v], 1)

    @torch.no_grad()
    def fill_(self, k: Tensor, v: Tensor) -> None:
        """Copy keys and values [Hkv, P, D] into the parameters, in place."""
        frozen = self.k_frozen.shape[1]
        self.k_frozen.copy_(k[:, :frozen])
        self.v_frozen.copy_(v[:, :frozen])
        self.k.copy_(k[:, frozen:])
        self.v.copy_(v[:, frozen:])


class Memory(nn.Module):
    """One memory.

    Args:
        name: as the user knows it.
        lora: its LoRA config, or None.
        kv: its KV config, or None.
        linear_shapes: site -> (K, N) of every linear layer that carries LoRA.
        num_layers, kv_heads, head_dim: of the model.
        device: where the parameters live.
        generator: of the initial values.
    """

    def __init__(
        self,
        name: str,
        lora: LoRAConfig | None,
        kv: KVConfig | None,
        linear_shapes: dict[str, tuple[int, int]],
        kv_shape: tuple[int, int, int],
        device: torch.device,
        generator: torch.Generator,
    ):
        super().__init__()
        self.name, self.lora_config, self.kv_config = name, lora, kv
        self.lora = nn.ModuleDict()
        if lora is not None:
            for site, (width_in, width_out) in linear_shapes.items():
                self.lora[site] = LoRAWeights(lora.r, width_in, width_out, device, generator)
        num_layers, kv_heads, head_dim = kv_shape
        self.kv = nn.ModuleList()
        self.kv_filled = kv is None
        if kv is not None:
            args = (kv_heads, kv.num_tokens, kv.num_frozen_tokens, head_dim, device)
            self.kv.extend(KVWeights(*args) for _ in range(num_layers))
            for weights in self.kv:
                noise = (
                    torch.randn(2, kv_heads, kv.num_tokens, head_dim, generator=generator)
                    * kv.init_std
                )
                weights.fill_(noise[0].to(device), noise[1].to(device))
            self.kv_filled = kv.init == "normal"

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.lora_config.alpha / self.lora_config.r

    @property
    def length(self) -> int:
        """Prefix tokens P; 0 without a KV part."""
        return self.kv_config.num_tokens if self.kv_config is not None else 0


_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers change parameters without counting their versions up, so count the steps too.
register_optimizer_step_post_hook(_count_step)


def _versions(tensors: list[Tensor]) -> tuple:
    # Inference tensors have no version; they cannot be changed in place outside of inference mode.
    versions = ((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
    return (_optimizer_steps, *versions)


class _Kept:
    """A few results made without autograd, each valid until one of the tensors it was made from
    changes."""

    def __init__(self, limit: int = 8):
        self.entries: dict[tuple, tuple[tuple, object]] = {}
        self.limit = limit

    def get(self, key: tuple, tensors: list[Tensor], make):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        versions = _versions(tensors)
        found = self.entries.get(key)
        if found is None or found[0] != versions:
            if len(self.entries) >= self.limit:
                self.entries.clear()
            found = self.entries[key] = (versions, make())
        return found[1]

    def __deepcopy__(self, memo) -> _Kept:
        return _Kept(self.limit)

    def __getstate__(self) -> dict:
        return {"entries": {}, "limit": self.limit}


class MemoryBank(nn.Module):
    """All memories of a model, in order; a memory's position is its id."""

    def __init__(self, inverse_frequencies: Tensor):
        super().__init__()
        self.names: list[str] = []
        self._kept = _Kept(limit=4096)
        self._constants: dict[tuple, Tensor] = {}
        self.register_buffer(
            "inverse_frequencies", inverse_frequencies.detach().clone(), persistent=False
        )

    def add(self, memory: Memory) -> None:
        """Append a memory. Its module name is mangled, so that names such as "keys" or "training"
        work."""
        self.names.append(memory.name)
        self.add_module(f"memory_{memory.name}", memory)

    def remove(self, name: str) -> Memory:
        """Take a memory out."""
        self.names.remove(name)
        memory = getattr(self, f"memory_{name}")
        delattr(self, f"memory_{name}")
        self._kept = _Kept(self._kept.limit)
        return memory

    @contextlib.contextmanager
    def only(self, memory: Memory) -> Iterator[None]:
        """Hold one new memory alone inside the ``with`` block; the others come back after it, and
        the new one stays, as the last, if the block ends well."""
        others = [self.remove(name) for name in tuple(self.names)]
        self.add(memory)
        stays = []
        try:
            yield
            stays = [memory]
        finally:
            self.remove(memory.name)
            for back in (*others, *stays):
                self.add(back.to(self.inverse_frequencies.device))

    def __getitem__(self, which: str | int) -> Memory:
        name = self.names[which] if isinstance(which, int) else which
        return getattr(self, f"memory_{name}")

    def __iter__(self):
        return (self[name] for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """A small tensor, kept: making one on a GPU waits for everything the GPU still has to do,
        and every layer of every training step would."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return torch.tensor(values, device=device)  # of a kind that must not be kept
        key = (values, device)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, device=device)
        return self._constants[key]

    def lora(self, site: str, slots: tuple[int, ...]) -> LoRA | None:
        """The stacked LoRA of one linear layer for the given memories; None if none of them has one
        there."""
        weights = [self[slot].lora[site] if site in self[slot].lora else None for slot in slots]
        present = [w for w in weights if w is not None]
        if not present:
            return None

        def make() -> LoRA:
            rank = max(w.a.shape[0] for w in present)
            a = [_padded(w and w.a, 0, rank, present[0].a) for w in weights]
            b = [_padded(w and w.b, 1, rank, present[0].b) for w in weights]
            scaling = tuple(
                0.0 if w is None else self[slot].scaling
                for w, slot in zip(weights, slots, strict=True)
            )
            return LoRA(_stack(a), _stack(b), self._constant(scaling, a[0].device))

        return self._kept.get((site, slots), [t for w in present for t in (w.a, w.b)], make)

    def prefix(self, layer: int, slots: tuple[int, ...]) -> Prefix | None:
        """The stacked learned cache of one layer, keys moved to positions -P..-1; None if no memory
        has one."""
        lengths = tuple(self[slot].length for slot in slots)
        if not any(lengths):
            return None
        weights = [
            self[slot].kv[layer] if p else None for slot, p in zip(slots, lengths, strict=True)
        ]
        present = [w for w in weights if w is not None]

        def make() -> Prefix:
            longest = max(lengths)
            k, v = [], []
            for w, p in zip(weights, lengths, strict=True):
                key, value = (None, None) if w is None else w.full()
                key = None if key is None else rotate(key, -p, self.inverse_frequencies)
                like = present[0].k
                k.append(_padded(key, 1, longest, like))
                v.append(_padded(value, 1, longest, like))
            return Prefix(_stack(k), _stack(v), self._constant(lengths, k[0].device))

        tensors = [t for w in present for t in (w.k, w.v, w.k_frozen, w.v_frozen)]
        return self._kept.get((layer, slots), [*tensors, self.inverse_frequencies], make)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _padded(tensor: Tensor | None, dim: int, size: int, like: Tensor) -> Tensor:
    """``tensor`` with zeros appended to ``size`` along ``dim``; all zeros of ``like``'s other sizes
    if None."""
    missing = size - (0 if tensor is None else tensor.shape[dim])
    if missing == 0:
        return tensor
    shape = list(like.shape)
    shape[dim] = missing
    zeros = like.new_zeros(shape)
    return zeros if tensor is None else torch.cat([tensor, zeros], dim)


def rotate(keys: Tensor, shift: int, inverse_frequencies: Tensor) -> Tensor:
    """Move post-RoPE keys by ``shift`` positions: a pure rotation, so scaled RoPE (yarn) keeps its
    factor.

    Args:
        keys: [..., P, D], fp32.
        shift: positions to add; may be negative.
        inverse_frequencies: [D / 2].

    Returns:
        Keys at their old position + shift, same shape and dtype. Angles are taken in fp64.

    Source: RoFormer (arXiv 2104.09864), relative form of the rotation; half-split layout as in
    transformers.
    """
    angle = inverse_frequencies.double() * shift
    cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
    low, high = keys.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
