"""How much memory a training run takes, counted before it runs.

A step is run as training runs it, forward, loss and backward, through the same layers and the same
autograd functions; only that its tensors have shapes and no values (torch's ``FakeTensorMode``). A
mode of torch's dispatcher sees every operator, and with it when each storage is made and when it
is freed, so what autograd keeps and what is there for a moment alone need no formulas, and no
architecture needs its own. The operators are those of a CPU.

What they do differs between layers only by kind, so a model of few layers is run at two depths, and
every number is continued along the straight line through both. The peaks of a step are continued
apart, since a peak may move from one part of a step to another as a model grows deeper:

    teacher, forward, loss, backward through all layers but the first, backward through the first.

Two parts are not run, as they would take longer than all others together: the loss, which goes
through its pieces one by one (``_Loss`` stands for it), and the optimiser, which holds two moments
of each value that is trained, and makes nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from koffkernels.dispatch import compute_dtype

from ..data.losses import AT_ONCE, PIECE_CPU, Head
from ..model import arch
from ..model.attach import FewBitsMixin, attach
from ..model.class_swap import swap, unswap
from ..model.config import KoffConfig
from ..model.few_bits import stored_bytes
from ..model.forward_context import BASE
from ..model.prefill import fill_from_tokens
from ..model.state import count_weights
from .settings import enable_checkpointing

# Whole numbers and truth values are real tensors up to this length: code asks ids, lengths and
# masks for their values, and goes one way or another.
_SMALL = 1 << 20
_EXACT = (torch.bool, torch.int32, torch.int64)

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class Ledger(TorchDispatchMode):
    """Keeps account of the storages that exist.

    Args:
        fake: the mode in which tensors have no values.

    Attributes:
        live: bytes of those made inside the mode that are not freed.
        peak: the most there were since it was last set.
        flops: multiplications and additions of matrix products and attention.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self.live = self.peak = self.flops = 0
        self._known: dict[int, Any] = {}

    def restart(self) -> None:
        """Begin to look for the peak anew."""
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a tensor is, which is asked most of all
            return func(*args, **kwargs)
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = None
        if taken and all(map(_is_exact, taken)):
            with _disable_current_modes():
                out = func(*args, **kwargs)
            if not all(map(_is_exact, _tensors(out))):
                out = tree_map_only(Tensor, self._fake.from_tensor, out)
        else:
            out = func(*args, **kwargs)
            if not taken and all(_may_be_exact(t) for t in _tensors(out)):  # made of nothing
                with _disable_current_modes():
                    out = func(*args, **kwargs)
        self.flops += _flops(func._overloadpacket, args, kwargs, out)
        for tensor in _tensors(out):
            self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # one object for each storage, as long as that lives
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _may_be_exact(tensor: Tensor) -> bool:
    return tensor.dtype in _EXACT and tensor.numel() <= _SMALL


def _is_exact(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and _may_be_exact(tensor)


def _flops(packet, args, kwargs, out) -> int:
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    # Products of scores' size: scores and output; backward the scores anew, and four gradients.
    # (torch 2.11's own formula takes no keys of fewer heads than the queries.)
    if packet is _ATTENTION:
        q, k = args[:2]
        return 2 * 2 * q.numel() * k.shape[2]
    if packet is _ATTENTION_BACKWARD:
        _, q, k = args[:3]
        return 5 * 2 * q.numel() * k.shape[2]
    return 0


@contextlib.contextmanager
def without_values() -> Iterator[Ledger]:
    """Let every tensor made in the block have a shape and no values, and yield the ledger of
    them."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), fake, Ledger(fake) as ledger:
        # koffkernels asks where two weights lie, to see whether they are one.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield ledger


class _Loss(torch.autograd.Function):
    """What ``token_losses`` makes and keeps of hidden states [N, d]: their gradient, which the
    backward pass scales, and beside it the products of one piece and some fp32 of a part of it."""

    @staticmethod
    def forward(ctx, states: Tensor, teacher: Tensor | None, head: Head | None) -> Tensor:
        gradient = torch.empty_like(states)
        size, products = states.shape[1], None
        if head is not None:
            head = head.to(compute_dtype(states, head.weight))
            size = len(head.weight)
            piece = min(len(states), max(1, AT_ONCE // size))
            products = head.weight.new_empty(1 if teacher is None else 2, piece, size)
        # At most: logits, log-softmax and gradient, the teacher's and its probabilities, and what
        # is left of the part before.
        part = min(len(states), max(1, PIECE_CPU // size))
        states.new_empty(7, part, size, dtype=torch.float32)
        del products  # only now
        ctx.save_for_backward(gradient)
        return states.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, d_total: Tensor):
        (gradient,) = ctx.saved_tensors
        return torch.empty_like(gradient), None, None


def _loss_flops(states: Tensor, teacher: Tensor | None, head: Head | None) -> int:
    """Of the head's products: the logits, the teacher's, and the gradient for the states."""
    if head is None:
        return 0
    return 2 * states.numel() * len(head.weight) * (2 if teacher is None else 3)


class _InFewBits(nn.Linear):
    """Stands for a linear layer in few bits: its weight is made whenever it is used."""

    @property
    def weight(self) -> Tensor:
        return torch.empty_like(self._parameters["weight"])


@dataclass(frozen=True)
class StepShape:
    """One micro-batch of a run.

    Args:
        rows, tokens: of the batch.
        checkpointing: whether layers keep their inputs alone.
        distils: whether there is a second forward for the teacher.
        accumulates: whether gradients of earlier micro-batches are there.
        mixed: whether each row may have its own memory.
        autocast: mixed precision, as ``bf16`` of a recipe has it.
        few_bits: whether linear layers are dequantised where they are used.
    """

    rows: int
    tokens: int
    checkpointing: bool = False
    distils: bool = True
    accumulates: bool = False
    mixed: bool = True
    autocast: bool = False
    few_bits: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a model is, attached; bytes where nothing else is said.

    Args:
        parameters: of the base.
        removed: of these, what the mask takes away.
        gates: learned parameters of the gates.
        memory: learned parameters of one memory; ``prefix`` of it is its learned cache.
        memories: how many there are.
        dtype: bytes of one value of the base, as it is saved.
        weights: of the base, as it trains.
        dense: of the base as it is saved, but for what the mask takes away.
        layer: of one decoder layer of the base, the largest.
        matrix: of the largest matrix of an MLP.
        mlp: parameters of the MLPs' linear layers.
        tail: of what FSDP keeps whole through a step: the output head, and the embeddings beside it
            where they are the same.
    """

    parameters: int
    removed: int
    gates: int
    memory: int
    prefix: int
    memories: int
    dtype: int
    weights: int
    dense: int
    layer: int
    matrix: int
    mlp: int
    tail: int

    @property
    def trained(self) -> int:
        """Number of parameters that learn."""
        return self.gates + self.memories * self.memory


@dataclass(frozen=True)
class Counted:
    """What a run of one micro-batch came to: bytes beyond those that are there before it.

    Args:
        kept: what the forward leaves for the backward.
        peaks: the most within each part of a step.
        prefill: the most while a learned cache is filled from text.
        gradients: what the backward leaves.
        flops: of the micro-batch.
    """

    kept: int
    peaks: dict[str, int]
    prefill: int
    gradients: int
    flops: int

    @property
    def peak(self) -> int:
        """The most of all parts."""
        return max(self.peaks.values())

    @property
    def loss(self) -> int:
        """Bytes that the loss adds to what the forward keeps, before the backward pass."""
        return max(0, self.peaks["loss"] - self.kept)


def sizes_of(
    config: PreTrainedConfig,
    koff: KoffConfig,
    dtype: torch.dtype,
    quantization: str | None = None,
    saved: torch.dtype | None = None,
) -> Sizes:
    """Return the sizes of a model with gates and memories attached; no weights are loaded.

    Args:
        config: of the base.
        koff: what is attached.
        dtype: of the base.
        quantization: that its linear layers are in, as in a recipe.
        saved: the dtype that the base is saved in; None: the same.

    Raises:
        TypeError, ValueError: as ``koff.attach``.
    """
    with without_values():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        counts = count_weights(model)
        saved, weights = saved or dtype, _bytes(model.parameters())
        if quantization is not None:
            linears = [linear for _, linear in arch.sites(model)]
            weights -= _bytes(linear.weight for linear in linears)
            weights += sum(stored_bytes(linear, quantization, dtype) for linear in linears)
        layer = max(_bytes(layer.parameters()) for layer in arch.layers(model))
        matrix = max(w.numel() for mlp in arch.mlps(model) for w in arch.mlp_weights(mlp))
        attach(model, _as_normal(koff))
        state = model.koff
        memories = list(state.memories)
        gates, target = 0, 0.0
        if state.gates is not None:
            gates, target = state.gates.neurons + 1, state.gates.target
        return Sizes(
            parameters=counts["total"],
            removed=round(target * counts["mlp"]),
            gates=gates,
            memory=sum(p.numel() for p in memories[0].parameters()) if memories else 0,
            prefix=sum(p.numel() for p in memories[0].kv.parameters()) if memories else 0,
            memories=len(memories),
            dtype=saved.itemsize,
            weights=weights,
            dense=counts["total"] * saved.itemsize,
            layer=layer,
            matrix=matrix * saved.itemsize,
            mlp=counts["mlp"],
            tail=_tail(model),
        )


def _tail(model: PreTrainedModel) -> int:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    # transformers puts tied embeddings into a group of FSDP's, and the head into the model's own,
    # and each of them gathers the weight for itself.
    return _bytes(head.parameters()) * (2 if head.weight is embeddings.weight else 1)


def kept_by_forward(
    config: PreTrainedConfig, koff: KoffConfig, dtype: torch.dtype, shape: StepShape
) -> int:
    """Return the bytes that the forward of a micro-batch leaves for its backward; arguments as
    ``count_step``."""
    return _count(config, koff, dtype, replace(shape, distils=False), backward=False).kept


def count_step(
    config: PreTrainedConfig, koff: KoffConfig, dtype: torch.dtype, shape: StepShape
) -> Counted:
    """Return what a micro-batch takes, on a model whose gates are open.

    Args:
        config: of the base.
        koff: what is attached.
        dtype: of the base.
        shape: of the micro-batch.
    """
    return _count(config, koff, dtype, shape, backward=True)


def _count(
    config: PreTrainedConfig,
    koff: KoffConfig,
    dtype: torch.dtype,
    shape: StepShape,
    backward: bool,
) -> Counted:
    """Run few layers at two depths, and go on from there to the true one."""
    layers = config.num_hidden_layers
    period = _period(config)
    few = max(2, period)
    if few + period >= layers:
        return _run(config, koff, dtype, shape, backward)
    # The share of the neurons only decides how many gates close, which costs nothing here. Of all
    # weights it might be one that so few layers cannot reach.
    koff = replace(koff, sparsity_scope="mlp")
    a, b = (_run(_of_layers(config, n), koff, dtype, shape, backward) for n in (few, few + period))

    def at_depth(x: int, y: int) -> int:
        return max(0, x + (y - x) * (layers - few) // period)

    return Counted(
        kept=at_depth(a.kept, b.kept),
        peaks={part: at_depth(a.peaks[part], b.peaks[part]) for part in a.peaks},
        prefill=at_depth(a.prefill, b.prefill),
        gradients=at_depth(a.gradients, b.gradients),
        flops=at_depth(a.flops, b.flops),
    )


def _run(
    config: PreTrainedConfig,
    koff: KoffConfig,
    dtype: torch.dtype,
    shape: StepShape,
    backward: bool,
) -> Counted:
    """Attach, fill a cache, and run one micro-batch, without values."""
    with without_values() as ledger:
        model = attach(AutoModelForCausalLM.from_config(config, dtype=dtype), _as_normal(koff))
        if shape.few_bits:
            for _, linear in arch.sites(model):
                link = linear._koff
                unswap(linear)
                linear.__class__ = _InFewBits
                swap(linear, FewBitsMixin, link)
        names = model.koff.memory_names
        before = ledger.live
        ledger.restart()
        if names and koff.kv is not None and koff.kv.init != "normal":
            fill_from_tokens(model, names[0], torch.zeros(koff.kv.num_tokens, dtype=torch.int64))
        prefill = ledger.peak - before
        model.train()
        if shape.checkpointing:
            enable_checkpointing(model)
        learned = [p for p in model.koff.parameters() if p.requires_grad]
        if shape.accumulates:
            for p in learned:
                p.grad = torch.zeros_like(p)
        before, flops, peaks, kept = ledger.live, ledger.flops, {}, 0

        def part_ends(name: str) -> None:
            peaks[name] = max(0, ledger.peak - before)
            ledger.restart()

        ledger.restart()
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64)
        # Of each row all positions but the last count.
        counted = torch.arange(1, ids.numel() + 1).remainder(shape.tokens).nonzero()[:, 0]
        teacher = None

        def loss_of(states: Tensor, head: Head | None) -> Tensor:
            nonlocal kept
            there = 0 if teacher is None else teacher.untyped_storage().nbytes()
            kept = ledger.live - before - there
            part_ends("forward")
            states = states.flatten(0, 1)[counted]
            taught = None if teacher is None else teacher.flatten(0, 1)[counted]
            ledger.flops += _loss_flops(states, taught, head)
            return _Loss.apply(states, taught, head)

        def forward(memory: Any, measure: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=shape.autocast):
                return model(
                    input_ids=ids, memory=memory, use_cache=False, instead_of_logits=measure
                )

        if shape.distils:
            with torch.no_grad():
                teacher = forward(BASE, lambda states, head: states)
        part_ends("teacher")
        _at_first_layer(model, lambda: part_ends("backward"))
        rows = [names[i % len(names)] if names else None for i in range(shape.rows)]
        loss = forward(rows if shape.mixed else rows[0], loss_of)
        if model.koff.gates is not None:
            loss = loss + model.koff.gates.expected_sparsity()
        part_ends("loss")
        teacher = None  # what the loss needed of it is done
        if backward:
            loss.backward()
            part_ends("first")
        grads = _bytes(p.grad for p in learned if p.grad is not None)
        return Counted(kept, peaks, prefill, grads, ledger.flops - flops)


def _at_first_layer(model: PreTrainedModel, call: Callable[[], None]) -> None:
    """Call when the backward pass comes to what the first layer gave."""

    def forward_hook(module, args, out) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: call())

    arch.layers(model)[0].register_forward_hook(forward_hook)


def _as_normal(koff: KoffConfig) -> KoffConfig:
    """Return the same, but that caches are not filled from text: ``_run`` does so where it
    counts."""
    if koff.kv is None:
        return koff
    return replace(koff, kv=replace(koff.kv, init="normal"))


def _of_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the configuration of the first layers alone."""
    config, whole = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def _period(config: PreTrainedConfig) -> int:
    """Return after how many layers their kinds repeat."""
    layers = config.num_hidden_layers
    lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == layers]
    kinds = list(zip(*lists, strict=True)) or [()] * layers
    return next(
        p for p in range(1, layers + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds))
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
