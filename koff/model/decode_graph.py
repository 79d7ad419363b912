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

Several generates may run side by side, in threads. A step is captured for one cache, so each of
them replays graphs of its own, with buffers of its own. Captures alone need the device to
themselves.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import ModelOutput

from koffkernels import dispatch, routes

from .forward_context import ACTIVE, Generation
from .memories import Memory, MemoryBank, Stacks, stream_of

if TYPE_CHECKING:
    from .state import KoffState

# A graph holds its cache's memory and the activations of one step. One generate needs one graph, so
# this many are for users who go on with caches of their own by turns.
MOST_GRAPHS = 4
# Where ``capture`` works.
DEVICES = ("cuda",)


class _Alone:
    """Lets a capture run while no other generate of this process does.

    While torch captures, its random generator of the device works for the capture alone, and
    whoever samples a token elsewhere gets an error.
    """

    def __init__(self):
        self._lock = threading.Lock()  # held during a capture
        self._generates = 0

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Count one generate inside the ``with`` block; wait for a capture to end before it."""
        with self._lock:
            self._generates += 1
        try:
            yield
        finally:
            with self._lock:
                self._generates -= 1

    @contextlib.contextmanager
    def capturing(self) -> Iterator[bool]:
        """Let no generate begin inside the ``with`` block; gives whether only the caller's runs."""
        with self._lock:
            yield self._generates == 1


ALONE = _Alone()


@functools.cache
def _side_stream(device: torch.device, replayed_on: int | None) -> torch.cuda.Stream:
    # cuBLAS keeps a workspace for every stream that it was ever called on. So one does for all
    # captures that are replayed on one stream, but no two streams may write to one workspace.
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

    stream = _side_stream(device, stream_of(device))
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
        setting: of the model, as ``_setting_of`` has it: one object for all that are equal.
        key: what it was captured under.
        cache: the cache's tensors.
        stacks: of the memories in use; held, since the graph has their addresses.
        buffers: of the tensors that are passed.
        replay: runs it.
        kind, output: class and fields of what the model returns, but for the cache: that must be
            able to die, and take this with it.
        user: the generate that replays it; None between two.
    """

    setting: tuple
    key: tuple
    cache: list[Tensor]
    stacks: Stacks | None
    buffers: dict[str, Tensor]
    replay: Callable[[], None]
    kind: type[ModelOutput]
    output: dict[str, Tensor]
    user: Decoding | None = None


class DecodeGraphs:
    """The captured decode steps of one model, and the static cache that waits for the next
    generate."""

    def __init__(self):
        self.lock = threading.Lock()  # held while any of these changes
        self.steps: WeakKeyDictionary[Cache, _Step] = WeakKeyDictionary()
        self.spare: Cache | None = None
        self._setting: tuple | None = None  # the one that was used last
        self._broken: tuple | None = None  # the one under which a capture failed

    # A copy of the model has tensors of its own, and captures its own steps.

    def __deepcopy__(self, memo) -> DecodeGraphs:
        return DecodeGraphs()

    def __reduce__(self) -> tuple:
        return DecodeGraphs, ()

    def decoding(self, model: PreTrainedModel) -> Decoding | None:
        """Return what one generate is to call for its steps in place of the model; None if no step
        of it can be captured.

        Args:
            model: an attached model.
        """
        setting = _setting_of(model)
        if setting is None:
            return None
        with self.lock:
            if setting != self._setting:
                self._clear()
                self._setting = setting
            if self._broken is not None:
                return None
            return Decoding(self, model, self._setting)

    def clear(self) -> None:
        """Drop every captured step, and whatever is kept for the next."""
        with self.lock:
            self._clear()

    def _clear(self) -> None:
        self.steps.clear()
        self.spare, self._broken = None, None

    def give_up(self, setting: tuple) -> None:
        """Capture no more under a setting; another one is tried again."""
        with self.lock:
            self._clear()
            self._setting = self._broken = setting

    def cache_for(self, model: PreTrainedModel, fresh: Cache, rows: int | None) -> Cache:
        """Return a static cache for a generate: that of an earlier one if it is like ``fresh``,
        emptied, for which a step is captured already.

        Args:
            model: an attached model.
            fresh: what transformers made; nothing is allocated in it yet.
            rows: B.
        """
        with self.lock:
            old, self.spare = self.spare, None
            step = None if old is None else self.steps.get(old)
        if step is not None and _alike(old, fresh, rows) and _setting_of(model) == step.setting:
            old.reset()
            return old
        return fresh

    def finish(self, generation: Generation, returned: Any) -> None:
        """Let go of the step of a generate that ended, and keep its cache if nobody else has it.

        Args:
            generation: that ended.
            returned: by generate. Token ids alone leave the cache to us; a whole output holds it.
        """
        cache, decoding = generation.static_cache, generation.decoding
        with self.lock:
            if decoding is not None and decoding.step is not None:
                decoding.step.user = None
            if isinstance(returned, Tensor) and cache in self.steps:
                self.spare = cache


class Decoding:
    """The decode steps of one generate: called in place of the model.

    Args:
        graphs: of the model.
        model: an attached model.
        setting: of the model.
    """

    def __init__(self, graphs: DecodeGraphs, model: PreTrainedModel, setting: tuple):
        self._graphs, self._model, self._setting = graphs, model, setting
        self.step: _Step | None = None
        # Key and stacks of the last step that ran eagerly. Kernels are compiled and memories are
        # stacked when they are first used, neither of which can be captured: so a step is captured
        # right after its like has run, and one whose arguments change from step to step never is.
        self._warm: tuple[tuple, Stacks | None] | None = None
        self._broken = False

    def __call__(self, **inputs) -> ModelOutput:
        model = self._model
        state, cache = model.koff, inputs.get("past_key_values")
        tensors = _cache_tensors(cache)
        found = None if tensors is None else _key_of(state, inputs, tensors)
        if found is None or self._broken:
            return model(**inputs)
        key, memories = found
        if self.step is None:
            self._take(cache)
        step = self.step
        if step is not None:
            if (
                step.key == key
                and all(map(is_, step.cache, tensors))
                and state.memories.are_stacked(memories, step.stacks)
            ):
                return _replay(step, inputs)
            self._drop(cache)
        stacks = state.memories.stacks(memories)
        if memories and stacks is None:  # another stream has them, and a graph would hold none
            return model(**inputs)
        if self._warm is None or self._warm[0] != key or self._warm[1] is not stacks:
            out = model(**inputs)
            self._warm = (key, stacks)
            return out
        with ALONE.capturing() as alone:
            # With others beside it, this generate goes on without a graph until it is alone.
            if alone and self._make_room():
                self._capture(inputs, key, tensors, stacks)
        return model(**inputs) if self.step is None else _replay(self.step, inputs)

    def _take(self, cache: Cache) -> None:
        """Take over the step that an earlier generate captured for this cache."""
        with self._graphs.lock:
            step = self._graphs.steps.get(cache)
            if step is not None and step.user is None and step.setting is self._setting:
                self.step, step.user = step, self

    def _drop(self, cache: Cache) -> None:
        self.step = None
        with self._graphs.lock:
            self._graphs.steps.pop(cache, None)

    def _make_room(self) -> bool:
        """Drop the oldest steps, so that one more can be kept; False if others use them all."""
        with self._graphs.lock:
            steps = self._graphs.steps
            for cache, step in list(steps.items()):
                if len(steps) < MOST_GRAPHS:
                    break
                if step.user is None:
                    del steps[cache]
            return len(steps) < MOST_GRAPHS

    def _capture(
        self, inputs: dict[str, Any], key: tuple, tensors: list[Tensor], stacks: Stacks | None
    ) -> None:
        """Capture one step; if that fails, nothing has changed."""
        model = self._model
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
            self._broken = True
            self._graphs.give_up(self._setting)
            warnings.warn(
                f"generate: this model's decode steps run without a CUDA graph, since one could "
                f"not be captured ({type(error).__name__}: {error}); disable_compile=True does not "
                "try",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        fields = {"logits": out.logits}
        self.step = _Step(
            self._setting, key, tensors, stacks, buffers, replay, type(out), fields, user=self
        )
        with self._graphs.lock:
            self._graphs.steps[cache] = self.step


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
) -> tuple[tuple, tuple[Memory, ...]] | None:
    """What a step depends on beside tensors, and the memories that it stacks; None for a call that
    is no plain decode step."""
    ids, keys = inputs.get("input_ids"), tensors[0]
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(keys.device.type)
        or not isinstance(ids, Tensor)
        or tuple(ids.shape) != (keys.shape[0], 1)
    ):
        return None
    memory = state.named(inputs.get("memory", ACTIVE))
    # A list of names becomes a tensor inside of the forward; generate passes one.
    if not (memory is None or isinstance(memory, (str, Tensor))):
        return None
    memories, _ = state.choose(memory, ids.shape[0], ids.device)
    key = [
        memories,
        stream_of(keys.device),
        torch.is_inference_mode_enabled(),
        keys.shape,
        keys.dtype,
    ]
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
    return tuple(key), memories


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
    # A replay would not run what others hang on a module, or on all modules.
    if device.type not in DEVICES or _has_any_global_hook():
        return None
    if any(getattr(config, f"output_{k}", False) for k in ("attentions", "hidden_states")):
        return None  # as in ``_key_of``
    tensors, kinds = [], []
    for module in _modules(model):
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # Dropout and sampled gates differ from step to step, as a graph could too, but nobody
        # decodes with them for speed.
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
        dispatch.tf32(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        kinds,
        [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors],
    )
