"""Everything learned, and what is known about the base it was learned on: the submodule
``model.koff``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from koffkernels import group_rows

from ..errors import asker
from . import arch
from .config import MAX_SPARSITY, KoffConfig
from .decode_graph import DecodeGraphs
from .forward_context import (
    ACTIVE,
    BASE,
    ActiveMemory,
    Calls,
    ForwardContext,
    MemoryArgument,
    Running,
    Said,
    check_names,
    choose_slots,
    resolve_ids,
    said_by,
)
from .gates import Gates
from .memories import Memory, MemoryBank

LOW_PRECISION = (torch.float16, torch.bfloat16)


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
        running: the layer and the ``generate`` that the current thread runs.
        graphs: decode steps that ``generate`` captured.
        dense_widths: MLP widths before pruning.
        kept: after compaction, the kept neurons' indices of each layer.
        metadata: what ``koff.load`` read beside the model, for ``koff.save`` to keep.
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
        self.active = ActiveMemory()
        self.running = Running(Calls())
        self.graphs = DecodeGraphs()
        self.kept: list[Tensor] | None = None
        self.metadata: dict[str, Any] = {}
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

    def named(self, memory: MemoryArgument) -> MemoryArgument:
        """Return what a ``memory`` argument means here: what ``ACTIVE`` stands for in this thread
        or task, and anything else as it is."""
        if memory is not ACTIVE:
            return memory
        generation = self.running.generation
        return self.active.get() if generation is None else generation.memory

    def choose(
        self, memory: MemoryArgument, rows: int, device: torch.device
    ) -> tuple[tuple[Memory, ...], Tensor | None]:
        """Return the memories that a forward of ``rows`` rows stacks and each row's place among
        them, as in ``ForwardContext``; ``memory`` is one of ``named``."""
        generation = self.running.generation
        roster = self.memories.roster if generation is None else generation.roster
        ids = resolve_ids(memory, rows, roster.names, "memory")
        slots, local = choose_slots(ids, len(roster.names), device)
        return tuple([roster.memories[slot] for slot in slots]), local

    def context(self, memory: MemoryArgument, rows: int, device: torch.device) -> ForwardContext:
        """Return the context of one forward of ``rows`` rows; ``memory`` is one of ``named``."""
        if memory is BASE:
            return ForwardContext(said=BASE)
        memories, local = self.choose(memory, rows, device)
        self._check_filled(memory, memories, local)
        rows = None if local is None else group_rows(local, len(memories))
        context = ForwardContext(memories, rows, stacks=self.memories.stacks(memories))
        if not torch.compiler.is_compiling():  # caches are not followed there
            context.said = self.said(memory)
        if self.gates is not None and self.gates.kept_first:
            context.kept_first = self.gates
        elif self.gates is not None:
            # Drawn here and not in the layers: a layer that is recomputed must see the same sample.
            context.gates = self.gates.values()
        return context

    def said(self, memory: MemoryArgument) -> Said:
        """Return what a call said; ``memory`` is one of ``named``."""
        generation = self.running.generation
        if generation is None:
            return said_by(memory, self.memories.roster)
        if isinstance(memory, Tensor):  # of the ids that generate passes to itself, it knows more
            memory = generation.memory
        return said_by(memory, generation.roster)

    def _check_filled(
        self, memory: MemoryArgument, memories: tuple[Memory, ...], local: Tensor | None
    ) -> None:
        """Refuse memories that wait for text, if a row uses them."""
        waiting = [i for i, m in enumerate(memories) if not m.kv_filled]
        if not waiting or (self.running.generation is not None and isinstance(memory, Tensor)):
            return  # generate has looked at the ids that it passes to itself
        if isinstance(memory, Tensor) and not torch.compiler.is_compiling():
            used = local.tolist()  # all memories are stacked for ids on a GPU
            waiting = [i for i in waiting if i in used]
        if waiting:
            memories[waiting[0]].check_filled("forward")

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
    # One in few bits holds two or more weights in an element, so that it is asked for its size.
    linears = {id(x.weight): x.out_features * x.in_features for _, x in arch.sites(model)}
    total = sum(
        linears.get(id(p), p.numel())
        for name, p in model.named_parameters()
        if not name.startswith("koff.")
    )
    mlp = sum(
        linears[id(linear.weight)]
        for module in arch.mlps(model)
        for linear in arch.mlp_linears(module).values()
    )
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
        inside = is_attached(getattr(model, "module", None))  # of DDP or DataParallel
        raise ValueError(
            f"{asker()}: the model must have koff attached, got {type(model).__name__}; "
            + ("pass its .module" if inside else "call koff.attach first")
        )
    return model.koff


def the_attached(model: object) -> PreTrainedModel:
    """Return the model itself that koff is attached to, out of what torch.compile makes of it.

    Wrappers pass attributes on, so that most of koff never notices one. What copies a model, writes
    it or changes its class would do so to the wrapper.

    Raises:
        ValueError: koff is not attached, or another wrapper lies around the model.
    """
    model = getattr(model, "_orig_mod", model)
    require_attached(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{asker()}: the model must be the one that koff was attached to, got a "
            f"{type(model).__name__} around it; take it off first (PEFT: merge_and_unload() or "
            "unload())"
        )
    return model
