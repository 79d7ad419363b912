"""Everything learned, and what is known about the base it was learned on: the submodule
``model.koff``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..errors import asker
from . import arch
from .config import MAX_SPARSITY, KoffConfig
from .decode_graph import DecodeGraphs
from .forward_context import (
    ACTIVE,
    ForwardContext,
    MemoryArgument,
    check_names,
    choose_slots,
    resolve_ids,
)
from .gates import Gates
from .memories import MemoryBank

LOW_PRECISION = (torch.float16, torch.bfloat16)


class _Turn:
    """A lock that one thread may take again, and that a copy of the model gets anew: a lock itself
    can be neither copied nor pickled."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return _Turn, ()


@dataclass
class Prompt:
    """What ``generate`` knows of the prompt that it has read into a static cache.

    Args:
        cache: the cache.
        first_keys: the first visible key of each row, int64 [B, 1, 1, 1]; every later one is
            visible too. None: to be looked up in the mask.
    """

    cache: Cache | None = None
    first_keys: Tensor | None = None


class KoffState(nn.Module):
    """Gates, memories and settings of an attached model.

    Args:
        model: the base model.
        config: what to learn.
        generator: of the initial gates.
        with_gates: False for a backbone that is already pruned.

    Attributes:
        config: what the model was attached with; the memories there are now may be others.
        gates: ``Gates`` or None (no sparsity, or already compacted).
        memories: ``MemoryBank``.
        active: the memory set by ``use_memory``.
        turn: held while ``generate`` runs: a model does one forward at a time, since layers leave
            the context of theirs in its modules.
        graphs: decode steps that ``generate`` captured.
        prompt: what ``generate`` knows of its prompt while it runs; else None.
        dense_widths: MLP widths before pruning.
        kept: after compaction, the kept neurons' indices of each layer.
        attention: the model's attention implementation before koff's took its place; None if it
            did not. ``trainable`` and ``hooks`` are likewise what ``detach`` undoes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: KoffConfig,
        generator: torch.Generator,
        with_gates: bool = True,
    ):
        super().__init__()
        self.config = config
        self.dense_widths = arch.widths(model)
        self.max_positions = model.config.max_position_embeddings
        self.memories = MemoryBank(arch.inverse_frequencies(model), arch.layers_without_rope(model))
        self.gates: Gates | None = None
        if config.target_sparsity > 0 and with_gates:
            target = _neuron_target(model, config.target_sparsity, config.sparsity_scope)
            self.gates = Gates(self.dense_widths, target, model.device, generator)
        self.active: MemoryArgument = None
        self.turn = _Turn()
        self.graphs = DecodeGraphs()
        self.prompt: Prompt | None = None
        self.bypassed = False
        self.kept: list[Tensor] | None = None
        self.attention: str | None = None
        self.trainable: list[str] = []
        self.hooks: list = []
        self.register_load_state_dict_pre_hook(_before_load)

    @property
    def memory_names(self) -> tuple[str, ...]:
        """Names of the memories, in order."""
        return tuple(self.memories.names)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, by name: ``state_dict`` without what it says about it."""
        return {n: t for n, t in self.state_dict().items() if not n.endswith("_extra_state")}

    def get_extra_state(self) -> Tensor:
        """Return which of the dense model's neurons are there, layer after layer: bool
        [sum of ``dense_widths``]."""
        there = [torch.ones(width, dtype=torch.bool) for width in self.dense_widths]
        for flags, kept in zip(there, self.kept or (), strict=False):
            flags.zero_()[kept] = True
        return torch.cat(there)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over which neurons a compacted model's weights are: tensors of one shape may be of
        others."""
        if self.kept is not None:
            self.kept = [there.nonzero()[:, 0] for there in state.cpu().split(self.dense_widths)]

    def check_loadable(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Refuse tensors that do not say what they mean, before any is loaded.

        Args:
            tensors: that are about to be loaded.
            prefix: of the names of koff's among them.

        Raises:
            ValueError: they do not say, or are of neurons that this model never had.
        """
        for memory in self.memories:
            memory.check_loadable(tensors, f"{prefix}memories.memory_{memory.name}.")
        if self.gates is not None:
            self.gates.check_loadable(tensors, f"{prefix}gates.")
        there = tensors.get(f"{prefix}_extra_state")
        if self.kept is None or there is None:
            return
        widths = [len(kept) for kept in self.kept]
        fits = there.shape == (sum(self.dense_widths),)
        if not fits or [int(flags.sum()) for flags in there.split(self.dense_widths)] != widths:
            raise ValueError(
                "load_state_dict: the state must be of a model that was pruned from the widths "
                f"{self.dense_widths} to {widths}, got another; load it into a copy of the model "
                "it came from"
            )

    def check(self, memory: MemoryArgument, where: str) -> None:
        """Refuse unknown memories; the number of rows is checked when they are known."""
        if isinstance(memory, (list, tuple)):
            for name in memory:
                check_names(name, self.memories.names, where)
        elif not isinstance(memory, Tensor):
            check_names(memory, self.memories.names, where)

    def choose(
        self, memory: MemoryArgument, rows: int, device: torch.device
    ) -> tuple[tuple[int, ...], Tensor | None]:
        """Return the memories that a forward of ``rows`` rows stacks and each row's place among
        them, as in ``ForwardContext``; ``memory`` is not ``ACTIVE``."""
        ids = resolve_ids(memory, rows, self.memories.names, "memory")
        return choose_slots(ids, len(self.memories), device)

    def context(self, memory: MemoryArgument, rows: int, device: torch.device) -> ForwardContext:
        """Return the context of one forward of ``rows`` rows."""
        if self.bypassed:
            return ForwardContext()
        memory = self.active if memory is ACTIVE else memory
        slots, local = self.choose(memory, rows, device)
        stacks = self.memories.stacks(slots)
        gates = self.gates
        if gates is not None and gates.kept_first:
            return ForwardContext(slots, local, kept_first=gates, stacks=stacks)
        # Drawn here and not in the layers: a layer that is recomputed must see the same sample.
        values = None if gates is None else gates.values()
        return ForwardContext(slots, local, values, stacks=stacks)

    @contextlib.contextmanager
    def using(self, memory: MemoryArgument) -> Iterator[None]:
        """Make ``memory`` the default inside the ``with`` block."""
        before, self.active = self.active, memory
        try:
            yield
        finally:
            self.active = before

    @contextlib.contextmanager
    def bypass(self) -> Iterator[None]:
        """Compute as the base model does inside the ``with`` block: gates open, no memory. This is
        how a model is its own teacher, and how a learned cache is first filled."""
        before, self.bypassed = self.bypassed, True
        try:
            yield
        finally:
            self.bypassed = before

    def _apply(self, fn, recurse: bool = True):
        """Move, but never lower the precision: a bf16 step at log_alpha 2.5 is 0.016, more than a
        learning step."""

        def move(t: Tensor) -> Tensor:
            out = fn(t)
            if t.is_floating_point() and out.dtype in LOW_PRECISION:
                return t.to(device=out.device)
            return out

        self.graphs.clear()  # it holds addresses, and memory on the device that may be left
        return super()._apply(move, recurse)


def _before_load(state: KoffState, tensors: Mapping[str, Tensor], prefix: str, *_) -> None:
    """Hook of ``load_state_dict``."""
    state.check_loadable(tensors, prefix)


def count_weights(model: PreTrainedModel) -> dict[str, int]:
    """Return the numbers of base weights: total, mlp (what pruning all neurons would remove),
    embedding (in and out)."""
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("koff."))
    mlp = sum(w.numel() for module in arch.mlps(model) for w in arch.mlp_weights(module))
    tables = {  # by identity: tied ones are the same parameter, and count once
        id(m.weight): m.weight.numel()
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    return {"total": total, "mlp": mlp, "embedding": sum(tables.values())}


def _neuron_target(model: PreTrainedModel, target: float, scope: str) -> float:
    """The share of MLP neurons that removes ``target`` of ``scope``."""
    weights = count_weights(model)
    share = target if scope == "mlp" else target * weights["total"] / weights["mlp"]
    if share > MAX_SPARSITY:
        raise ValueError(
            f"target_sparsity: the share of MLP neurons that it means (scope {scope!r}) must be at "
            f"most {MAX_SPARSITY}, got {share:.3f}; lower the target"
        )
    return share


def is_attached(model: object) -> bool:
    """Return whether koff is attached to the model."""
    return isinstance(getattr(model, "koff", None), KoffState)


def require_attached(model: object) -> KoffState:
    """Return the model's koff state.

    Raises:
        ValueError: koff is not attached.
    """
    if not is_attached(model):
        raise ValueError(
            f"{asker()}: the model must have koff attached, got {type(model).__name__}; call "
            "koff.attach first"
        )
    return model.koff
