"""``generate`` with a static cache on a CUDA GPU: one decode step, captured once as a CUDA graph
and replayed for every token.

A step launches hundreds of kernels that the GPU finishes sooner than Python can ask for them. A
graph asks for all of them at once, without torch.compile and its minute of compiling.

A replay repeats the kernels of its capture, with their addresses and numbers. So each thing that a
step depends on is in one of three places, and is looked at before a replay:

- tensors that the caller passes are copied into buffers of the graph;
- the cache, the weights and the stacked memories are read where they lie: they must be the same
  tensors still, and stacked memories must not have been edited;
- all else is compared: arguments, the memory, settings of the model and of torch.

What does not fit (a prompt, beams, other caches) runs as it always did.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import ModelOutput

from koffkernels import dispatch, routes

from .forward_context import ACTIVE
from .memories import MemoryBank, Stacks

if TYPE_CHECKING:
    from .state import KoffState

# A graph holds its cache's memory and the activations of one step. One generate needs one graph, so
# this many are for users who go on with caches of their own by turns.
MOST_GRAPHS = 4
# Where ``capture`` works.
DEVICES = ("cuda",)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all captures: cuBLAS keeps a workspace for every stream that it was ever called on.
    return torch.cuda.Stream(device)


def capture(step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record what ``step`` would run, without running it.

    Args:
        step: asks for kernels, and for nothing else.
        device: of all its tensors.

    Returns:
        A function that runs what was recorded, and what ``step`` returned: tensors that every
        replay writes anew.
    """

    def record(what: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        # Of another thread's calls none can end up in here, so they need not be refused.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = what()
        return graph, out

    stream = _side_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            graph, out = record(step)
        except Exception:
            # torch ends a capture that broke with its stream still current and its random
            # generator still capturing; sampling would fail from here on. A small capture that
            # goes well puts the generator right, and the ``with`` above the stream.
            record(lambda: torch.zeros((), device=device))
            raise
    return graph.replay, out


@dataclass
class _Step:
    """A captured decode step.

    Args:
        key: what it was captured under.
        cache: the cache's tensors.
        stacks: of the memories in use; held, since the graph has their addresses.
        buffers: of the tensors that are passed.
        replay: runs it.
        kind, output: class and fields of what the model returns, but for the cache: that must be
            able to die, and take this with it.
    """

    key: tuple
    cache: list[Tensor]
    stacks: Stacks | None
    buffers: dict[str, Tensor]
    replay: Callable[[], None]
    kind: type[ModelOutput]
    output: dict[str, Tensor]


class DecodeGraphs:
    """The captured decode steps of one model."""

    def __init__(self):
        self._steps: WeakKeyDictionary[Cache, _Step] = WeakKeyDictionary()
        self._setting: tuple | None = None
        # Key and stacks of the last step that ran eagerly. Kernels are compiled and memories are
        # stacked when they are first used, neither of which can be captured: so a step is captured
        # right after its like has run, and one whose arguments change from step to step never is.
        self._warm: tuple[tuple, Stacks | None] | None = None
        self._broken = False
        self._current: Cache | None = None  # what the generate that runs was given
        self._spare: Cache | None = None  # what the one before gave back

    # A copy of the model has tensors of its own, and captures its own steps.

    def __deepcopy__(self, memo) -> DecodeGraphs:
        return DecodeGraphs()

    def __reduce__(self) -> tuple:
        return DecodeGraphs, ()

    def caller(self, model: PreTrainedModel) -> Callable[..., ModelOutput]:
        """Return what ``generate`` is to call in place of the model, until it ends.

        Args:
            model: an attached model.
        """
        setting = _setting_of(model)
        if setting is None:
            return model.__call__
        if setting != self._setting:
            self.clear()
            self._setting = setting
        return functools.partial(self._call, model)

    def clear(self) -> None:
        """Drop every captured step, and whatever is kept for the next."""
        self._steps.clear()
        self._warm, self._spare, self._broken = None, None, False

    def cache_for(self, model: PreTrainedModel, fresh: Cache, rows: int | None) -> Cache:
        """Return a static cache for a generate: that of the one before if it is like ``fresh``,
        emptied, for which a step is captured already.

        Args:
            model: an attached model.
            fresh: what transformers made; nothing is allocated in it yet.
            rows: B.
        """
        old, self._spare = self._spare, None
        if old is not None and _alike(old, fresh, rows) and _setting_of(model) == self._setting:
            old.reset()
            fresh = old
        self._current = fresh
        return fresh

    def finish(self, returned: Any) -> None:
        """Keep the cache of a generate that ended, if nobody else has it.

        Args:
            returned: by generate. Token ids alone leave the cache to us; a whole output holds it.
        """
        if isinstance(returned, Tensor) and self._current in self._steps:
            self._spare = self._current
        self._current = None

    def _call(self, model: PreTrainedModel, **inputs) -> ModelOutput:
        state, cache = model.koff, inputs.get("past_key_values")
        tensors = _cache_tensors(cache)
        found = None if tensors is None else _key_of(state, inputs, tensors)
        if found is None or self._broken:
            return model(**inputs)
        key, slots = found
        step = self._steps.get(cache)
        if step is not None:
            if (
                step.key == key
                and all(map(is_, step.cache, tensors))
                and state.memories.are_stacked(slots, step.stacks)
            ):
                return _replay(step, inputs)
            del self._steps[cache]
        stacks = state.memories.stacks(slots)
        if self._warm is None or self._warm[0] != key or self._warm[1] is not stacks:
            out = model(**inputs)
            self._warm = (key, stacks)
            return out
        step = self._captured(model, inputs, key, tensors, stacks)
        return model(**inputs) if step is None else _replay(step, inputs)

    def _captured(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        key: tuple,
        tensors: list[Tensor],
        stacks: Stacks | None,
    ) -> _Step | None:
        """Capture one step; None if that failed, and nothing has changed."""
        # A capture runs nothing, so that the cache's tokens are not counted either. One that breaks
        # on the way should not have, too, but a wrong count would be a wrong text.
        counts = [t.clone() for t in tensors if t.dim() == 0]
        buffers = {name: v.clone() for name, v in inputs.items() if isinstance(v, Tensor)}
        cache = inputs["past_key_values"]
        try:
            replay, out = capture(lambda: model(**{**inputs, **buffers}), model.device)
            if not isinstance(out, ModelOutput) or set(out) != {"logits", "past_key_values"}:
                raise ValueError(f"the model must return logits and cache alone, got {set(out)}")
        # Whatever it is: a kernel that reads on the host, no memory left, a module of the user's.
        except Exception as error:
            for count, before in zip((t for t in tensors if t.dim() == 0), counts, strict=True):
                count.copy_(before)
            self.clear()
            self._broken = True  # until the setting is another
            warnings.warn(
                f"generate: this model's decode steps run without a CUDA graph, since one could "
                f"not be captured ({type(error).__name__}: {error}); disable_compile=True does not "
                "try",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        fields = {"logits": out.logits}
        step = _Step(key, tensors, stacks, buffers, replay, type(out), fields)
        while len(self._steps) >= MOST_GRAPHS:
            del self._steps[next(iter(self._steps))]
        self._steps[cache] = step
        return step


def _replay(step: _Step, inputs: dict[str, Any]) -> ModelOutput:
    # Ids, positions, bounds and memory ids are of one dtype: this is one launch.
    torch._foreach_copy_(list(step.buffers.values()), [inputs[name] for name in step.buffers])
    step.replay()
    # The logits are those of the next replay soon: generate takes a copy of the last position
    # before it calls again, and looks at nothing else.
    return step.kind(**step.output, past_key_values=inputs["past_key_values"])


def _cache_tensors(cache: Any) -> list[Tensor] | None:
    """Keys, values and count of every layer of a cache that a step can be captured on; None for any
    other."""
    if type(cache) is not StaticCache or cache.offloading:
        return None
    tensors = []
    for layer in cache.layers:
        # A layer with a window counts in a Python number, which a graph would freeze.
        if type(layer) is not StaticLayer or not layer.is_initialized:
            return None
        tensors += (layer.keys, layer.values, layer.cumulative_length)
    return tensors if all(isinstance(t, Tensor) for t in tensors) else None


def _alike(old: Cache, fresh: Cache, rows: int | None) -> bool:
    """Whether ``old``, emptied, is what ``fresh`` would become."""
    tensors = _cache_tensors(old)
    if tensors is None or type(fresh) is not StaticCache or fresh.offloading:
        return False
    keys = tensors[0]
    return (
        len(old.layers) == len(fresh.layers)
        and all(
            type(a) is type(b) and a.max_cache_len == b.max_cache_len and not b.is_initialized
            for a, b in zip(old.layers, fresh.layers, strict=True)
        )
        and keys.shape[0] == rows
        # The dtype was the model's, and will be.
        and not torch.is_autocast_enabled(keys.device.type)
        # A cache that was made in inference mode cannot be written to outside of it.
        and keys.is_inference() == torch.is_inference_mode_enabled()
    )


def _key_of(
    state: KoffState, inputs: dict[str, Any], tensors: list[Tensor]
) -> tuple[tuple, tuple[int, ...]] | None:
    """What a step depends on beside tensors, and the memories that it stacks; None for a call that
    is no plain decode step."""
    ids, keys = inputs.get("input_ids"), tensors[0]
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(keys.device.type)
        or state.bypassed
        or not isinstance(ids, Tensor)
        or tuple(ids.shape) != (keys.shape[0], 1)
    ):
        return None
    memory = inputs.get("memory", ACTIVE)
    memory = state.active if memory is ACTIVE else memory
    # A list of names becomes a tensor inside of the forward; generate passes one.
    if not (memory is None or isinstance(memory, (str, Tensor))):
        return None
    slots, _ = state.choose(memory, ids.shape[0], ids.device)
    key = [slots, torch.is_inference_mode_enabled(), keys.shape, keys.dtype]
    for name, value in inputs.items():
        if name == "past_key_values":
            continue
        if isinstance(value, Tensor):
            if value.device != keys.device:
                return None
            key.append((name, value.shape, value.dtype))
        elif value is None or isinstance(value, (bool, int, float, str)):
            if name in ("output_attentions", "output_hidden_states") and value:
                return None  # generate holds these of every step, and they would all be one
            key.append((name, type(value), value))
        else:
            return None
    return tuple(key), slots


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules but those of the memories: what is stacked of them is looked at on its own."""
    yield module
    for child in module._modules.values():
        if child is not None and not isinstance(child, MemoryBank):
            yield from _modules(child)


def _setting_of(model: PreTrainedModel) -> tuple | None:
    """Everything that stays as it is during a generate, and that a step depends on; None if a
    replay could not stand for a forward.

    It takes a millisecond, which a generate can afford and a step could not.
    """
    config, gates, device = model.config, model.koff.gates, model.device
    if device.type not in DEVICES:
        return None
    if any(getattr(config, f"output_{k}", False) for k in ("attentions", "hidden_states")):
        return None  # as in ``_key_of``
    tensors, kinds = [], []
    for module in _modules(model):
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # A replay would not run what others hang on a module. Dropout and sampled gates differ from
        # step to step, as a graph could too, but nobody decodes with them for speed.
        known = all(str(h.__module__).startswith(("koff.", "transformers.")) for h in hooks)
        if module.training or not known or "forward" in module.__dict__:
            return None
        kinds.append(type(module))
        tensors += (t for t in module._parameters.values() if t is not None)
        tensors += (t for t in module._buffers.values() if t is not None)
    # Of several GPUs only one would be captured. Sharded and quantised weights have code of their
    # own.
    if any(t.device != device or type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return None
    backends = torch.backends.cuda
    return (
        config._attn_implementation,
        None if gates is None else (gates.fixed, gates.kept_first, gates.widths),
        tuple(dispatch.choose(op, device) for op in dispatch.IMPLEMENTATIONS),
        routes.describe("gated_mlp") if device.type == "cuda" else None,  # says what is forced
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        kinds,
        [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors],
    )
