"""Memories: per domain a LoRA adapter and a learned KV cache, kept as separate fp32 parameters.

Stacking for the kernels happens inside the call, over just the memories that the call uses, so that
a memory that no row used has ``grad is None`` after backward. Without autograd the stacks go into
a cache, where they stay until a parameter changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from koffkernels import LoRA, Prefix

from .arch import HALVES, KVShape, Site, StateShape, site_key, site_of
from .config import KVConfig, LoRAConfig
from .recurrent import Start, StateWeights


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
        bound = width_in**-0.5  # what Kaiming's formula comes to with a = sqrt 5
        a = (torch.rand(r, width_in, generator=generator) * 2 - 1) * bound
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(width_out, r, device=device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return a and b."""
        found = self._parameters  # every layer of every training step asks, and getattr is slow
        if "a" in found:
            return found["a"], found["b"]
        return self.a, self.b  # where somebody, as FSDP does, has put others in their place


class KVWeights(nn.Module):
    """Learned cache of one layer: k, v [Hkv, P, D].

    Keys are held as they are on disk, post-RoPE at positions 0..P-1, and rotated to -P..-1 inside
    the forward: then save and load are bit-equal. Rotated once at loading and back at saving, they
    would not be. The first ``frozen`` tokens are buffers and never trained.
    """

    def __init__(
        self, kv_heads: int, tokens: int, frozen: int, head_dim: int, device: torch.device
    ):
        super().__init__()
        shape = (kv_heads, tokens - frozen, head_dim)
        self.k = nn.Parameter(torch.zeros(shape, device=device))
        self.v = nn.Parameter(torch.zeros(shape, device=device))
        # Without frozen tokens they are empty, and not saved: all empty tensors have the address 0,
        # by which accelerate takes them for one tied tensor and leaves all but one out of a file.
        for name in ("k_frozen", "v_frozen"):
            zeros = torch.zeros(kv_heads, frozen, head_dim, device=device)
            self.register_buffer(name, zeros, persistent=frozen > 0)

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return k and v [Hkv, P - frozen, D]."""
        found = self._parameters  # see ``LoRAWeights.matrices``
        return (found["k"], found["v"]) if "k" in found else (self.k, self.v)

    def frozen(self) -> tuple[Tensor, Tensor]:
        """Return k and v [Hkv, frozen, D]."""
        found = self._buffers  # see ``LoRAWeights.matrices``
        if "k_frozen" in found:
            return found["k_frozen"], found["v_frozen"]
        return self.k_frozen, self.v_frozen

    def full(self) -> tuple[Tensor, Tensor]:
        """Return k and v [Hkv, P, D] with the frozen tokens in front."""
        if self.k_frozen.shape[1] == 0:
            return self.k, self.v
        return torch.cat([self.k_frozen, self.k], 1), torch.cat([self.v_frozen, self.v], 1)

    @torch.no_grad()
    def fill_(self, k: Tensor, v: Tensor) -> None:
        """Copy keys and values [Hkv, P, D] into the parameters, in place."""
        frozen = self.k_frozen.shape[1]
        self.k_frozen.copy_(k[:, :frozen])
        self.v_frozen.copy_(v[:, :frozen])
        self.k.copy_(k[:, frozen:])
        self.v.copy_(v[:, frozen:])

    def parts(self) -> dict[str, Tensor]:
        """Return the whole tensors by the names that they have on disk."""
        keys, values = self.full()
        return {"keys": keys, "values": values}

    def draw_(self, std: float, generator: torch.Generator) -> None:
        """Fill with N(0, std), in place."""
        heads, trained, width = self.k.shape
        shape = (2, heads, trained + self.k_frozen.shape[1], width)
        self.fill_(*torch.randn(shape, generator=generator) * std)

    def take_(self, layer: Any) -> None:
        """Take over what a cache of one row kept of this layer, in place."""
        # Keys post-RoPE at positions 0..P-1, which is what a memory stores.
        self.fill_(layer.keys[0], layer.values[0])


class NoWeights(nn.Module):
    """Stands for a layer that a memory has nothing for: a recurrent one without
    ``KVConfig.recurrent_state``."""

    def parts(self) -> dict[str, Tensor]:
        """Return no tensors."""
        return {}

    def fill_(self) -> None:
        """Do nothing."""

    def draw_(self, std: float, generator: torch.Generator) -> None:
        """Do nothing."""

    def take_(self, layer: Any) -> None:
        """Do nothing."""


class Memory(nn.Module):
    """One memory.

    Args:
        name: as the user knows it.
        lora: its LoRA config, or None.
        kv: its KV config, or None.
        linear_shapes: (K, N) of every linear layer that carries LoRA.
        cache_shapes: of each layer, what ``arch.cache_shapes`` says of it.
        device: where the parameters live.
        generator: of the initial values.

    Attributes:
        lora: ``LoRAWeights`` by ``site_key``; see ``lora_at`` and ``sites``.
        kv: of each layer ``KVWeights`` or, if it is recurrent, ``StateWeights`` or ``NoWeights``;
            empty without a KV part.
        kv_filled: False while the KV part waits for text to be filled from.
    """

    def __init__(
        self,
        name: str,
        lora: LoRAConfig | None,
        kv: KVConfig | None,
        linear_shapes: dict[Site, tuple[int, int]],
        cache_shapes: list[KVShape | StateShape],
        device: torch.device,
        generator: torch.Generator,
    ):
        super().__init__()
        self.name = name
        self.lora_config = lora
        self.kv_config = kv
        self.lora = nn.ModuleDict()
        if lora is not None:
            for site, (width_in, width_out) in linear_shapes.items():
                weights = LoRAWeights(lora.r, width_in, width_out, device, generator)
                self.lora[site_key(site)] = weights
        self.kv = nn.ModuleList()
        self.kv_filled = kv is None
        if kv is not None:
            for shape in cache_shapes:
                if isinstance(shape, KVShape):
                    sizes = (shape.heads, kv.num_tokens, kv.num_frozen_tokens, shape.width)
                    weights = KVWeights(*sizes, device)
                else:
                    weights = StateWeights(*shape, device) if kv.recurrent_state else NoWeights()
                # Drawn also where a prefill will take its place: what comes after it in the stream
                # of a seed is then the same for every init.
                weights.draw_(kv.init_std, generator)
                self.kv.append(weights)
            self.kv_filled = kv.init == "normal"
        self.register_load_state_dict_pre_hook(_before_load)

    def lora_at(self, site: Site) -> LoRAWeights | None:
        """Return the LoRA of one linear layer; None if this memory has none there."""
        # Every layer of every training step asks for every memory, and torch's getattr is slow. Not
        # str(site): torch.compile traces this.
        key, lora = site_key(site), self._modules["lora"]
        if type(lora) is nn.ModuleDict:
            return lora._modules.get(key)
        return lora[key] if key in lora else None  # somebody's wrapper of it

    def matrices(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """Return A [r, K] and B [N, r] on one linear layer; None if this memory has none there.

        Gate and up of a model that has both in one linear layer get its A and their half of its B.
        """
        weights = self.lora_at(site)
        if weights is not None:
            return weights.matrices()
        if site.linear not in HALVES:
            return None
        whole, half = HALVES[site.linear]
        weights = self.lora_at(Site(site.layer, whole))
        return None if weights is None else (weights.a, weights.b.chunk(2)[half])

    def sites(self) -> Iterator[tuple[Site, LoRAWeights]]:
        """Yield every site that has a LoRA, and the LoRA."""
        for key, weights in self.lora.items():
            yield site_of(key), weights

    def check_filled(self, where: str) -> None:
        """Refuse to use this memory while its KV part waits for text: it is noise until then.

        Raises:
            ValueError: it does; ``where`` says who asked.
        """
        if not self.kv_filled:
            raise ValueError(
                f"{where}: the KV part of memory {self.name!r} must be filled, got one that waits "
                "for text; train it with KoffTrainer, or use KVConfig(init='tokens')"
            )

    def check_finite(self, where: str) -> None:
        """Refuse NaN and infinity: kernels multiply a memory by 0 for tokens that do not use it,
        which keeps it from them only as long as its numbers are finite.

        Raises:
            ValueError: there are some; ``where`` says who asked.
        """
        finite = [t.isfinite().all() for t in (*self.parameters(), *self.buffers())]
        if finite and not bool(torch.stack(finite).all()):  # read back once, of all tensors
            raise ValueError(
                f"{where}: memory {self.name!r} must be finite, got NaN or infinity; lower the "
                "learning rates and train it again"
            )

    # What ``state_dict`` says of the tensors beside their values, and ``load_state_dict`` takes
    # over. A tensor, since formats like safetensors hold nothing else.

    def get_extra_state(self) -> Tensor:
        """Return whether the KV part is filled, and the LoRA's alpha (0 without one): fp64 [2]."""
        alpha = 0.0 if self.lora_config is None else self.lora_config.alpha
        return torch.tensor([self.kv_filled, alpha], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take both over: a LoRA computes what it did only with its own alpha."""
        filled, alpha = state.tolist()
        self.kv_filled = bool(filled)
        if self.lora_config is not None and self.lora_config.alpha != alpha:
            self.lora_config = dataclasses.replace(self.lora_config, alpha=alpha)

    def check_loadable(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Refuse a learned cache of which nobody knows whether it is filled. If it is not, training
        begins by overwriting it.

        Args:
            tensors: that are about to be loaded.
            prefix: of the names of this memory among them.

        Raises:
            ValueError: they do not say.
        """
        given = any(name.startswith(f"{prefix}kv.") for name in tensors)
        if given and f"{prefix}_extra_state" not in tensors:
            raise ValueError(
                f"load_state_dict: a learned cache must come with {prefix}_extra_state, which says "
                "whether it is filled, got none; add it: torch.tensor([1.0, alpha]) with the "
                "LoRA's alpha, [0.0, alpha] for one that still waits for text"
            )

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.lora_config.alpha / self.lora_config.r

    @property
    def length(self) -> int:
        """Prefix tokens P; 0 without a KV part."""
        return self.kv_config.num_tokens if self.kv_config is not None else 0


def crossed(name: str, lora_of: Memory | None, kv_of: Memory | None) -> Memory:
    """Return a memory made of the LoRA of one memory and the learned cache of another, which it
    shares with them.

    Args:
        name: of the result.
        lora_of, kv_of: None: without that part.
    """
    like = lora_of or kv_of
    device = next(like.parameters()).device if like else torch.device("cpu")
    made = Memory(name, None, None, {}, [], device, torch.Generator())
    if lora_of is not None:
        made.lora_config, made.lora = lora_of.lora_config, lora_of.lora
    if kv_of is not None:
        made.kv_config, made.kv, made.kv_filled = kv_of.kv_config, kv_of.kv, kv_of.kv_filled
    return made


def _before_load(memory: Memory, tensors: Mapping[str, Tensor], prefix: str, *_) -> None:
    """Hook of ``load_state_dict``."""
    memory.check_loadable(tensors, prefix)


_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers change parameters without counting their versions up, so count the steps too.
register_optimizer_step_post_hook(_count_step)


def _edits(tensors: list[Tensor]) -> list[int]:
    """How often each tensor was edited in place, by torch's count."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        # Inference tensors have no count; they cannot be edited outside of inference mode.
        return [-1 if t.is_inference() else t._version for t in tensors]


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the current stream of a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int | None:
    """Return the number of the current thread's current stream on a GPU; None without a GPU, and
    during a capture, which has a stream of its own for what is known of another."""
    if device.type != "cuda" or is_capturing(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream


class Stacks:
    """What layers have stacked, without autograd, of the memories of one forward: made when a layer
    first asks, and valid until a tensor of these memories changes.

    Args:
        modules: everything whose tensors the stacks are made of.

        stream: of the device, on which they are made; see ``stream_of``.

    Attributes:
        lora: the LoRA of each site and dtype that was asked for; None where no memory has one.
        prefix: the learned cache of each layer and dtype that was asked for; None likewise.
        start: the learned start of each recurrent layer that was asked for; None likewise.
    """

    def __init__(self, modules: Iterable[nn.Module], stream: int | None = None):
        self.stream = stream
        self.lora: dict[tuple[Site, torch.dtype | None], LoRA | None] = {}
        self.prefix: dict[tuple[int, torch.dtype | None], Prefix | None] = {}
        self.start: dict[int, Start | None] = {}
        # The dictionaries and not the tensors, since assigning a parameter replaces it in there.
        self._holders = [
            holder for m in modules for holder in (m._parameters, m._buffers) if len(holder)
        ]
        self._tensors = [t for holder in self._holders for t in holder.values()]
        self._made_from = self._versions()

    def _versions(self) -> tuple[int, list[int], list[int]]:
        """What changes when one of the tensors does. An in-place edit through ``.data`` leaves no
        trace at all: it is not seen until something else changes."""
        tensors = [t for holder in self._holders for t in holder.values()]
        return _optimizer_steps, _edits(tensors), [t.data_ptr() for t in tensors]

    def valid(self) -> bool:
        """Return whether every tensor is still the one that was, and unedited."""
        return self._versions() == self._made_from

    def unedited(self) -> bool:
        """Return whether the tensors that the stacks were made of are unedited, which is the
        cheaper half of ``valid``: others may have taken their places."""
        steps, edits, _ = self._made_from
        return steps == _optimizer_steps and _edits(self._tensors) == edits

    def bytes(self) -> int:
        """Return what the stacks hold, views of single memories included."""
        # Lists at once: another thread's forward may be adding to them.
        found = [list(part.values()) for part in (self.lora, self.prefix, self.start)]
        stacks = [stack for part in found for stack in part]
        return sum(t.nbytes for stack in stacks if stack is not None for t in stack)


class _StackCache:
    """The ``Stacks`` of each mix of memories that forwards used, the last used last."""

    def __init__(self):
        self.mixes: dict[tuple[Memory, ...], Stacks] = {}
        self.lock = threading.Lock()

    # A copy of the model has parameters of its own, and makes its own stacks.

    def __deepcopy__(self, memo) -> _StackCache:
        return _StackCache()

    def __reduce__(self) -> tuple:
        return _StackCache, ()


class Roster(NamedTuple):
    """The memories of a model at one moment, in order; a memory's position is its id."""

    names: tuple[str, ...] = ()
    memories: tuple[Memory, ...] = ()


_MOST_TURNS = 64  # mixes of lengths of which a bank keeps cosines and sines


class MemoryBank(nn.Module):
    """All memories of a model.

    Args:
        inverse_frequencies: [R / 2], of the model's RoPE.
        without_rope: numbers of the layers whose keys know no positions.

    Attributes:
        roster: the memories. It is replaced as a whole, so that a call that took it at its
            beginning understands names and ids by it to its end.
    """

    def __init__(self, inverse_frequencies: Tensor, without_rope: frozenset[int] = frozenset()):
        super().__init__()
        self._without_rope = without_rope
        self.roster = Roster()
        self._stacks = _StackCache()
        self._constants: dict[tuple, Tensor] = {}
        self._turns: dict[tuple, tuple] = {}
        self.register_buffer(
            "inverse_frequencies", inverse_frequencies.detach().clone(), persistent=False
        )

    def add(self, memory: Memory) -> None:
        """Append a memory. Its module name is mangled, so that names such as "keys" or "training"
        work."""
        self.add_module(f"memory_{memory.name}", memory)
        names, memories = self.roster
        self.roster = Roster((*names, memory.name), (*memories, memory))

    def remove(self, name: str) -> Memory:
        """Take a memory out, and return it."""
        memory = self[name]
        others = [m for m in self.roster.memories if m is not memory]
        self.roster = Roster(tuple(m.name for m in others), tuple(others))
        delattr(self, f"memory_{name}")
        self._stacks = _StackCache()  # or it would be held on to
        return memory

    @property
    def names(self) -> list[str]:
        """Names of the memories, in order."""
        return list(self.roster.names)

    @contextlib.contextmanager
    def only(self, memory: Memory) -> Iterator[None]:
        """Hold one new memory alone inside the ``with`` block.

        The others are out of the model meanwhile, so that nothing can reach them. They come back
        after it, and the new one stays, as the last, if the block ends well.
        """
        others = [self.remove(name) for name in self.names]
        self.add(memory)
        stays = []
        try:
            yield
            stays = [memory]
        finally:
            self.remove(memory.name)
            for back in (*others, *stays):  # the model may have moved while they were out
                self.add(back.to(self.inverse_frequencies.device))

    def __getitem__(self, which: str | int) -> Memory:
        names, memories = self.roster
        return memories[which if isinstance(which, int) else names.index(which)]

    def __iter__(self) -> Iterator[Memory]:
        return iter(self.roster.memories)

    def __len__(self) -> int:
        return len(self.roster.names)

    def stacks(self, memories: tuple[Memory, ...]) -> Stacks | None:
        """Return where the layers of a forward find and leave what they stack of these memories.

        The same object comes back as long as its memories do not change: asking once per forward
        takes the place of a look at the parameters in every layer.

        Args:
            memories: those of the forward.

        Returns:
            None with autograd, where a stack belongs to one backward, while compiling, where it is
            part of a graph, and on another stream of a GPU than the one it is made on, which would
            read it without waiting: then every layer makes its own.

        Raises:
            ValueError: one of these memories is not finite, or no longer.
        """
        if not memories or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        mixes, stream = self._stacks.mixes, stream_of(self.inverse_frequencies.device)
        with self._stacks.lock:
            found = mixes.pop(memories, None)
            if found is None or not found.valid():
                # Every memory alone and all of them together fit, as often as they come by turns;
                # of other mixes, those that were not used for the longest time are dropped.
                # Of the roster, and not of the modules: another thread may be adding one.
                held_by = [p for memory in self.roster.memories for p in memory.parameters()]
                most = 2 * sum(p.nbytes for p in held_by)
                held = sum(mix.bytes() for mix in mixes.values())
                while mixes and held > most:
                    held -= mixes.pop(next(iter(mixes))).bytes()
                if not is_capturing(self.inverse_frequencies.device):
                    for memory in memories:
                        memory.check_finite("forward")  # reads back, which a capture cannot
                modules = [self, *(m for memory in memories for m in memory.modules())]
                found = Stacks(modules, stream)
            mixes[memories] = found
        return found if stream is None or stream == found.stream else None

    def are_stacked(self, memories: tuple[Memory, ...], stacks: Stacks | None) -> bool:
        """Return whether ``stacks`` is what ``stacks(memories)`` would give, as far as can be said
        in no time: a tensor that was exchanged and not edited is found by the next call of that.

        Args:
            memories: those of the forward.
            stacks: that were given for these; None if there are none.
        """
        if not memories:
            return stacks is None
        with self._stacks.lock:  # another thread's forward takes its mix out for a moment
            kept = self._stacks.mixes.get(memories)
        return kept is stacks and stacks.unedited()

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """A small tensor, made once: making one on a GPU waits for everything the GPU still has to
        do, and every layer of every training step would."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            # A traced tensor is of one graph, an inference tensor is refused by autograd.
            return torch.tensor(values, device=device)
        # The type too: a scaling of 8.0 is found under a length of 8, and is no length.
        key = (values, type(values[0]), device)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, device=device)
        return self._constants[key]

    def lora(
        self,
        site: Site,
        memories: tuple[Memory, ...],
        stacks: Stacks | None = None,
        dtype: torch.dtype | None = None,
    ) -> LoRA | None:
        """Return the stacked LoRA of one linear layer for the given memories.

        Args:
            site: of the linear layer.
            memories: M of them.
            stacks: of this forward, with the same memories; None: make it anew.
            dtype: that the layer computes in. What ``stacks`` keeps is rounded to it if it has 16
                bits: the layer would round it in every call, and read twice the bytes for it.

        Returns:
            a [M, r, K], b [M, N, r], scaling [M], with zeros where a memory has a lower rank or no
            LoRA there; of one memory without ``stacks`` a [r, K], b [N, r]. None if none of them
            has one.
        """
        # With autograd in spite of ``stacks`` where somebody switched it on below the boundary.
        if stacks is None or torch.is_grad_enabled():
            return self._make_lora(site, memories)
        key = site, dtype
        if key not in stacks.lora:  # two threads may both make it, and get the same
            made = self._make_lora(site, memories)
            if made is not None:
                made = made.stacked()  # once, and not in every forward
                made = made._replace(a=_rounded(made.a, dtype), b=_rounded(made.b, dtype))
            stacks.lora[key] = made
        return stacks.lora[key]

    def _make_lora(self, site: Site, memories: tuple[Memory, ...]) -> LoRA | None:
        found = [memory.matrices(site) for memory in memories]
        like = next((pair for pair in found if pair is not None), None)
        if like is None:
            return None
        ranks = {0 if pair is None else pair[0].shape[0] for pair in found}
        if len(ranks) == 1:
            a, b = zip(*found, strict=True)
        else:
            a, b = (
                [_padded(pair and pair[part], part, max(ranks), like[part]) for pair in found]
                for part in (0, 1)  # of A the rank is dimension 0, of B it is 1
            )
        scaling = tuple(
            [
                0.0 if pair is None else memory.scaling
                for pair, memory in zip(found, memories, strict=True)
            ]
        )
        if len(memories) == 1:  # as they are: a view of each would be one more node of autograd
            return LoRA(a[0], b[0], self._constant(scaling, a[0].device))
        return LoRA(torch.stack(a), torch.stack(b), self._constant(scaling, a[0].device))

    def prefix(
        self,
        layer: int,
        memories: tuple[Memory, ...],
        stacks: Stacks | None = None,
        dtype: torch.dtype | None = None,
    ) -> Prefix | None:
        """Return the stacked learned cache of one layer, keys moved to positions -P..-1.

        Args:
            layer: its number.
            memories: M of them.
            stacks: of this forward, with the same memories; None: make it anew.
            dtype: of the queries; see ``lora``.

        Returns:
            k, v [M, Hkv, P, D] with zeros behind a shorter prefix, and lengths [M]; None if no
            memory has one.
        """
        if stacks is None or torch.is_grad_enabled():
            return self._make_prefix(layer, memories)
        key = layer, dtype
        if key not in stacks.prefix:
            made = self._make_prefix(layer, memories)
            if made is not None:  # rounded behind the rotation, as in training
                made = made._replace(k=_rounded(made.k, dtype), v=_rounded(made.v, dtype))
            stacks.prefix[key] = made
        return stacks.prefix[key]

    def _make_prefix(self, layer: int, memories: tuple[Memory, ...]) -> Prefix | None:
        lengths = tuple(memory.length for memory in memories)
        if not any(lengths):
            return None
        weights = [
            memory.kv[layer] if p else None for memory, p in zip(memories, lengths, strict=True)
        ]
        longest = max(lengths)
        configs = [memory.kv_config for memory in memories]
        if configs.count(configs[0]) == len(configs):
            k, v = _full(weights)
        else:
            like = next(w for w in weights if w is not None).k
            found = [(None, None) if w is None else w.full() for w in weights]
            k, v = (_stack([_padded(pair[i], 1, longest, like) for pair in found]) for i in (0, 1))
        if layer not in self._without_rope:
            k = turned(k, *self._angles(lengths, k))
        return Prefix(k, v, self._constant(lengths, k.device))

    def _angles(self, lengths: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [M, 1, 1, R] that move memories of these lengths to where they stand,
        made once for all layers."""
        frequencies = self.inverse_frequencies

        def make() -> tuple[Tensor, Tensor]:
            shift = -self._constant(lengths, like.device)[:, None, None, None]
            return angles(shift, frequencies, like.dtype)

        # What a capture makes is the graph's, and another stream would read what this one has only
        # begun to make.
        graphed = torch.compiler.is_compiling() or is_capturing(like.device)
        if graphed or torch.is_inference_mode_enabled():
            return make()
        key = (lengths, like.dtype, stream_of(like.device))
        made_from = (frequencies, _edits([frequencies]))
        found = self._turns.get(key)
        if found is None or found[0][0] is not frequencies or found[0][1] != made_from[1]:
            if len(self._turns) >= _MOST_TURNS:  # mixes of memories of many lengths
                self._turns.clear()
            found = self._turns[key] = made_from, make()
        return found[1]

    def start(
        self, layer: int, memories: tuple[Memory, ...], stacks: Stacks | None = None
    ) -> Start | None:
        """Return the stacked learned start of one recurrent layer.

        Args:
            layer: its number.
            memories: M of them.
            stacks: of this forward, with the same memories; None: make it anew.

        Returns:
            state [M, Hv, Dk, Dv] and conv [M, C, K - 1], zeros where a memory has none; None if no
            memory has one.
        """
        if stacks is None or torch.is_grad_enabled():
            return self._make_start(layer, memories)
        if layer not in stacks.start:
            stacks.start[layer] = self._make_start(layer, memories)
        return stacks.start[layer]

    def _make_start(self, layer: int, memories: tuple[Memory, ...]) -> Start | None:
        found = [memory.kv[layer] if memory.length else None for memory in memories]
        weights = [w if isinstance(w, StateWeights) else None for w in found]
        like = next((w for w in weights if w is not None), None)
        if like is None:
            return None
        state = [torch.zeros_like(like.state) if w is None else w.state for w in weights]
        conv = [torch.zeros_like(like.conv) if w is None else w.conv for w in weights]
        return Start(_stack(state), _stack(conv))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)  # one: a view, no copy


def _full(weights: list[KVWeights]) -> tuple[Tensor, Tensor]:
    """Return k and v [M, Hkv, P, D] of memories of equal sizes, stacked before the frozen tokens
    come to the front: fewer operators where there are many."""
    k, v = map(_stack, zip(*[w.trained() for w in weights], strict=True))
    if weights[0].frozen()[0].shape[1] == 0:
        return k, v
    k_frozen, v_frozen = map(_stack, zip(*[w.frozen() for w in weights], strict=True))
    return torch.cat([k_frozen, k], 2), torch.cat([v_frozen, v], 2)


def _rounded(stack: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``stack`` in a dtype of 16 bits; as it is for any other, or one of no more bits than its
    own."""
    narrower = dtype in (torch.bfloat16, torch.float16) and stack.element_size() > 2
    return stack.to(dtype) if narrower else stack


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


def angles(
    shift: int | Tensor, inverse_frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what ``turned`` takes for a rotation by ``shift`` [..., 1] positions: cosines and
    signed sines [..., R] of the R dimensions that turn."""
    # In fp32 an angle of some hundred turns would keep too few digits of what is left of it.
    angle = inverse_frequencies.double() * shift
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return keys [..., P, D] rotated by angles [..., R] in their first R dimensions."""
    size = cos.shape[-1]
    part = keys if size == keys.shape[-1] else keys[..., :size]
    # The halves change places: low cos - high sin, high cos + low sin. By few operators, since
    # every layer of every training step does this, forward and backward.
    part = part * cos + part.roll(size // 2, -1) * sin
    return part if size == keys.shape[-1] else torch.cat([part, keys[..., size:]], -1)


def rotate(keys: Tensor, shift: int, inverse_frequencies: Tensor) -> Tensor:
    """Return post-RoPE keys moved by ``shift`` positions: a pure rotation, so scaled RoPE (yarn)
    keeps its factor.

    Args:
        keys: [..., P, D], fp32.
        shift: positions to add; may be negative.
        inverse_frequencies: [R / 2], of the first R of the D dimensions. Partial RoPE leaves the
            others alone, wherever a key stands.

    Returns:
        Keys at their old position + shift, same shape and dtype. Angles are taken in fp64.

    Source: RoFormer (arXiv 2104.09864), relative form of the rotation; half-split layout as in
    transformers.
    """
    return turned(keys, *angles(shift, inverse_frequencies, keys.dtype))
