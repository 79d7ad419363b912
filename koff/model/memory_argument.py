"""The model's boundary: the ``memory`` argument becomes the forward's context here, and nowhere
else."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel, StoppingCriteria
from transformers.masking_utils import create_masks_for_generate

from .attention import NAME, next_bounds
from .decode_graph import ALONE
from .forward_context import (
    ACTIVE,
    ForwardContext,
    Generation,
    MemoryArgument,
    Said,
    goes_on,
    resolve_ids,
)
from .head import Measure, at_head
from .state import KoffState


@dataclass
class Boundary:
    """Forward pre-hook of the decoder: replaces ``memory`` by the context that its layers pass on.

    Args:
        state: the model's koff state.
        parameters: names of the decoder's forward parameters, in order.
        config: the model's config.
    """

    state: KoffState
    parameters: tuple[str, ...]
    config: PretrainedConfig

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        memory = kwargs.pop("memory", ACTIVE)
        for name in ("adapter_names", "memories"):  # transformers drops what it does not know
            if kwargs.get(name) is not None:
                raise TypeError(
                    f"forward: the memory of each row must be given as memory, got {name}; pass "
                    "memory= a name, or a list with a name or None for each row"
                )
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        state = self.state
        context = state.context(state.named(memory), inputs.shape[0], inputs.device)
        mask = kwargs.get("attention_mask")
        if (
            state.running.generation is not None
            and isinstance(mask, Tensor)
            and mask.dtype == torch.int64
            and mask.shape[1:] == (1, 1, 1)
        ):
            # From ``create_masks_for_generate``. Completed here and not there, so that a captured
            # step does it: the cache's length is a tensor, and stays where it is.
            past = kwargs["past_key_values"].get_seq_length()
            kwargs["attention_mask"] = next_bounds(mask, past, inputs.shape[1])
        # A list: torch.compile cannot trace max over a generator.
        longest = max([0, *[memory.length for memory in context.memories]])
        cache = kwargs.get("past_key_values")
        if cache is not None and not torch.compiler.is_compiling():
            _check_cache(cache, context.said, inputs.shape[0], longest > 0)
        if longest:
            # Only ours knows of the prefix. A longer name that begins like it is the one by which
            # ``koff.prefix_attention_mass`` watches ours.
            chosen = self.config._attn_implementation
            if not chosen.startswith(NAME):
                raise ValueError(
                    f"forward: the attention implementation must be {NAME!r} for memories with a "
                    f"KV part, got {chosen}; undo set_attn_implementation: any other would leave "
                    "the learned cache out"
                )
            if kwargs.get("output_attentions"):
                warnings.warn(
                    "forward: attention over a learned cache has no probabilities to give, so "
                    "output_attentions gives none; koff.prefix_attention_mass sums them up",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._say_rows_are_whole(kwargs, inputs)
            self._position_ids(kwargs, inputs.shape[1])
            # generate has looked before its first token.
            if not torch.compiler.is_compiling() and state.running.generation is None:
                self._check_positions(context, longest, inputs.shape[1], kwargs)
        return (), {**kwargs, "koff_context": context}

    @staticmethod
    def _say_rows_are_whole(kwargs: dict, inputs: Tensor) -> None:
        """Give rows without a mask one of ones: while compiling, transformers cannot look and takes
        every maskless row for packed documents, which a prefix does not allow."""
        given = any(kwargs.get(k) is not None for k in ("attention_mask", "position_ids"))
        if torch.compiler.is_compiling() and not given and kwargs.get("past_key_values") is None:
            kwargs["attention_mask"] = torch.ones(
                inputs.shape[:2], dtype=torch.int64, device=inputs.device
            )

    def _check_positions(
        self, context: ForwardContext, longest: int, tokens: int, kwargs: dict
    ) -> None:
        """Refuse rows whose prefix and tokens, padding not counted, exceed the model's
        positions."""
        cache, limit = kwargs.get("past_key_values"), self.config.max_position_embeddings
        past = 0 if cache is None else cache.get_seq_length()
        # A static cache counts in a tensor, which would have to be read.
        if not isinstance(past, int) or longest + past + tokens <= limit:
            return
        # Near the limit, it is worth a look at each row.
        positions, ids = kwargs.get("position_ids"), context.ids
        used = past + tokens if positions is None else positions.max(-1).values + 1
        lengths = torch.tensor([*[memory.length for memory in context.memories], 0])  # -1: the last
        prefix = lengths[0 if ids is None else ids.cpu()]
        total = torch.where(prefix > 0, prefix + torch.as_tensor(used).cpu(), 0)
        if int(total.max()) > limit:
            row = int(total.argmax())
            prefix = int(prefix.expand_as(total).flatten()[row])
            raise ValueError(
                f"forward: prefix + sequence must fit max_position_embeddings ({limit}), "
                f"got {prefix} + {int(total.max()) - prefix}; shorten the sequence or the memory"
            )

    @staticmethod
    def _position_ids(kwargs: dict, tokens: int) -> None:
        """Left-padded rows start at position 0 at their first real token, or the prefix would stand
        too far away."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _check_cache(cache: Cache, said: Said, rows: int, prefix: bool) -> None:
    """Refuse to go on with a cache that began otherwise.

    Args:
        cache: that the call was given.
        said: by the call.
        rows: B.
        prefix: whether the call has a learned prefix.
    """
    if hasattr(cache, "_koff"):
        if not goes_on(cache._koff, said, rows) and int(cache.get_seq_length()) != 0:
            raise ValueError(
                "forward: past_key_values must go on under the memory that they began with, got a "
                f"cache of {_in_words(cache._koff)} and memory {_in_words(said)}; begin with an "
                "empty cache"
            )
    # One that comes filled from elsewhere may begin with a prefix of its own, at positions that we
    # cannot know.
    elif prefix and (past := int(cache.get_seq_length())) != 0:
        raise ValueError(
            "forward: past_key_values must be empty or come from this model, got a cache that "
            f"already holds {past} tokens; do not add a prefix to the cache yourself; pass memory= "
            "and koff puts it in front"
        )


def _in_words(said: Said) -> str:
    return repr(list(said) if isinstance(said, tuple) else said)


def tag_cache(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Forward hook of the decoder: remember under which memory the cache that it returns began."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and not torch.compiler.is_compiling():
        cache._koff = kwargs["koff_context"].said


class KoffModelMixin:
    """Adds ``memory`` to forward and generate, and refuses to write half of a model."""

    koff: KoffState

    @staticmethod
    def forward_with_signature(cls: type) -> Callable:
        """Return ``cls.forward`` with a ``memory`` argument that generate and Trainer can see: both
        look at the signature, and drop or refuse what is not in it. What only koff asks for is not
        in it: ``instead_of_logits``, a function that is called with the last hidden states and the
        head (see ``head.Measure``), and whose result is the forward's."""
        base = cls.forward

        @functools.wraps(base)
        def forward(
            self,
            *args,
            memory: MemoryArgument = ACTIVE,
            instead_of_logits: Measure | None = None,
            **kwargs,
        ):
            if memory is not ACTIVE:
                kwargs["memory"] = memory
            call = base
            if instead_of_logits is not None:
                call = functools.partial(at_head, base, instead_of_logits)
            if torch.compiler.is_compiling():  # what runs later is not this
                return call(self, *args, **kwargs)
            running = self.koff.running
            running.begin()
            try:
                return call(self, *args, **kwargs)
            finally:
                running.end()

        signature = inspect.signature(base)
        parameters = list(signature.parameters.values())
        new = inspect.Parameter("memory", inspect.Parameter.KEYWORD_ONLY, default=ACTIVE)
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        forward.__signature__ = signature.replace(
            parameters=[*parameters[:at], new, *parameters[at:]]
        )
        return forward

    def generate(self, inputs=None, *args, memory: MemoryArgument = ACTIVE, **kwargs):
        """Generate as transformers does, with a memory; also side by side in several threads.

        Texts end where a row's learned tokens, prompt and new tokens together reach the model's
        ``max_position_embeddings``.

        Args:
            inputs, args, kwargs: as transformers'.
            memory: a name or None for all rows, or a list with one entry per row.

        Raises:
            KeyError, TypeError, ValueError: unknown memories or such as wait for text, not one
                entry per row, prompts that are padded on the right or leave no room for a token, or
                guidance with memories mixed.
        """
        with ALONE.generating():
            return self._generate(inputs, args, memory, kwargs)

    def _generate(self, inputs: Tensor | None, args: tuple, memory: MemoryArgument, kwargs: dict):
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((t for t in given if t is not None), None)
        _refuse_right_padding(prompt, kwargs.get("attention_mask"), self.generation_config)
        state, returned = self.koff, None
        memory, roster = state.named(memory), state.memories.roster
        memory = memory.cpu() if isinstance(memory, Tensor) else memory  # to look at it
        rows = 1 if prompt is None else len(prompt)
        ids = resolve_ids(memory, rows, roster.names, "generate")
        ids = [ids] * rows if isinstance(ids, int) else ids
        used = [roster.memories[i] if i >= 0 else None for i in ids]
        for one in {*used} - {None}:
            one.check_filled("generate")
        if len({*used}) > 1:
            _refuse_second_forwards(args, kwargs, self.generation_config)
            # A tensor, since generate repeats the rows of tensors for beams and samples.
            kwargs["memory"] = torch.tensor(ids, device=self.device)
        else:  # the same for every row, however beams multiply them
            memory = used[0].name if used and used[0] is not None else None
        generation = Generation(memory, roster)
        prefixes = [0 if one is None else one.length for one in used]
        if any(prefixes):
            generation.rooms = self._rooms(prefixes, prompt, args, kwargs)
        state.running.begin()
        before, state.running.generation = state.running.generation, generation
        try:
            returned = super().generate(inputs, *args, **kwargs)
            return returned
        finally:
            state.running.generation = before
            state.running.end()
            # Somebody's own loop may keep whatever it saw.
            state.graphs.finish(generation, None if "custom_generate" in kwargs else returned)

    def _rooms(
        self, prefixes: list[int], prompt: Tensor | None, args: tuple, kwargs: dict
    ) -> tuple[int | None, ...]:
        """Return how many tokens fit behind each row's prefix and prompt, None for a row without a
        prefix; refuse rows where none fits."""
        limit, rooms = self.config.max_position_embeddings, []
        lengths = _real_tokens(prompt, args, kwargs, self.generation_config)
        for prefix, length in zip(prefixes, lengths, strict=True):
            rooms.append(limit - prefix - length if prefix else None)
            if prefix and rooms[-1] < 1:
                raise ValueError(
                    "generate: prefix + prompt must leave room for a token within "
                    f"max_position_embeddings ({limit}), got {prefix} + {length}; shorten the "
                    "prompt or the memory"
                )
        return tuple(rooms)

    def _prepare_generated_length(self, *args, **kwargs):
        """As transformers', but no row goes on beyond the positions that its prefix leaves: where
        nobody asked for a length, transformers ends there too, but counts no prefix."""
        config = super()._prepare_generated_length(*args, **kwargs)
        generation = self.koff.running.generation
        rooms = () if generation is None else generation.rooms
        most = config.max_length - kwargs["input_ids_length"]
        least = min([room for room in rooms if room is not None], default=most)
        if least >= most:
            return config
        if config.max_new_tokens is not None or not kwargs["has_default_max_length"]:
            warnings.warn(
                f"generate: the text of row {rooms.index(least)} ends after {least} new tokens, "
                "where its prefix and text together reach max_position_embeddings "
                f"({self.config.max_position_embeddings})",
                RuntimeWarning,
                stacklevel=4,
            )
        rooms = [most if room is None else min(room, most) for room in rooms]
        if config._pad_token_tensor is None:  # then rows can only end together
            rooms = [least]
        if len({*rooms}) > 1:
            ends = [room + kwargs["input_ids_length"] for room in rooms]
            generation.ends = torch.tensor(ends, device=self.device)
        config.max_length = max(rooms) + kwargs["input_ids_length"]
        return config

    def _get_stopping_criteria(self, *args, **kwargs):
        """As transformers', and for each row the end of its positions."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        generation = self.koff.running.generation
        if generation is not None and generation.ends is not None:
            criteria.append(_EndOfPositions(generation.ends))
        return criteria

    def init_continuous_batching(self, *args, **kwargs):
        """As transformers', without a memory: its batches run in a thread of their own, which no
        memory would reach."""
        if self.koff.named(ACTIVE) is not None:
            raise ValueError(
                "generate_batch: the memory must be None, got one from use_memory or generate; use "
                "generate, which takes one per row"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def get_compiled_call(self, compile_config):
        """Return what ``generate`` calls in each step where transformers would compile: with a
        static cache on a GPU. Without a ``compile_config`` that is a CUDA graph of one step.

        Args:
            compile_config: of torch.compile, for those who ask for it; then as transformers'.
        """
        if compile_config is not None:
            return super().get_compiled_call(compile_config)
        generation = self.koff.running.generation
        if generation is None:
            return self.__call__
        if generation.decoding is None:
            generation.decoding = self.koff.graphs.decoding(self)
        return generation.decoding or self.__call__

    def _prepare_static_cache(self, *args, **kwargs):
        """As transformers', or the cache of the last generate, whose decode step is captured."""
        fresh = super()._prepare_static_cache(*args, **kwargs)
        generation = self.koff.running.generation
        if generation is None:
            return fresh
        cache = self.koff.graphs.cache_for(self, fresh, kwargs.get("batch_size"))
        generation.static_cache = cache
        return cache

    def create_masks_for_generate(self, *args, **kwargs):
        """The masks of a step of ``generate`` with a static cache.

        What a mask says behind the prompt is known: generate appends ones. So a step of one token
        takes over the first keys of its rows, instead of some twenty small kernels and a look at
        their result.
        """
        generation, cache = self.koff.running.generation, kwargs.get("past_key_values")
        tokens = kwargs["inputs_embeds"].shape[1]
        read = generation is not None and generation.prompt_cache is cache is not None
        if read and tokens == 1 and generation.first_keys is not None:
            return generation.first_keys
        masks = create_masks_for_generate(*args, **kwargs)
        if isinstance(masks, dict) and len(masks) == 1:
            # All layers are of one kind, and take the mask itself, too.
            (only,) = masks.values()
            masks = masks if only is None else only
        if generation is not None and (tokens > 1 or not read):
            mask = kwargs.get("attention_mask")
            generation.prompt_cache, generation.first_keys = cache, None
            # A row that ends in padding has a hole in front of its next token, which must be found.
            whole = mask is None or bool((mask[:, -1] != 0).all())
            if whole and isinstance(masks, Tensor) and masks.dtype == torch.int64:
                generation.first_keys = masks[..., :1].contiguous()
        return masks

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Refuse to leave memories or a mask out; write a model that has neither.

        transformers' format holds the backbone alone, and what is learned would be gone without a
        word. A model whose memories were all removed, and whose mask is compacted or was never
        there, is nothing but its backbone: that is written as transformers does it.

        Args:
            save_directory, args, kwargs: as transformers'.

        Raises:
            ValueError: there are memories or gates; nothing is written.
        """
        self._refuse_half("save_pretrained", "koff.save({}, folder)")
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id, *args, **kwargs):
        """Refuse to leave memories or a mask out, as ``save_pretrained`` does; push a model that
        has neither.

        Args:
            repo_id, args, kwargs: as transformers'.

        Raises:
            ValueError: there are memories or gates; nothing is sent.
        """
        self._refuse_half("push_to_hub", "koff.push_to_hub({}, repo_id)")
        return super().push_to_hub(repo_id, *args, **kwargs)

    def _refuse_half(self, asked: str, instead: str) -> None:
        names, gates = self.koff.memories.names, self.koff.gates
        left_out = []
        if names:
            left_out.append(f"memories {', '.join(names)}")
        if gates is not None:
            left_out.append("a mask" if gates.fixed else "gates")
        if left_out:
            whole = instead.format("model" if gates is None else "koff.compact(model)")
            raise ValueError(
                f"{asked}: the model must be its backbone alone, got {' and '.join(left_out)}, "
                f"which transformers would leave out; call {whole}, or koff.detach(model) first "
                "for the base alone"
            )


def write_backbone(
    model: PreTrainedModel, directory: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the backbone of an attached model, and nothing that is learned, as transformers does.

    This is for code that writes the rest itself; ``model.save_pretrained`` would refuse.

    Args:
        model: an attached model.
        directory: where; created if needed.
        state_dict: what to write in place of the backbone's own tensors.
    """
    if state_dict is None:
        state_dict = {k: v for k, v in model.state_dict().items() if not k.startswith("koff.")}
    # The method of the class that the mixin stands in front of. Under the model's own names, also
    # where it came out of a checkpoint of another layout, as a multimodal one has it: in that the
    # language model alone would not be found again.
    super(KoffModelMixin, model).save_pretrained(
        directory, state_dict=state_dict, save_original_format=False
    )


class _EndOfPositions(StoppingCriteria):
    """Ends each row where its prefix and its text fill the model's positions.

    Args:
        ends: the length of ``input_ids`` at which each row ends, int64 [B].
    """

    eos_token_id = None  # that there is one makes transformers pad the rows that have ended

    def __init__(self, ends: Tensor):
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        ends = self.ends.repeat_interleave(len(input_ids) // len(self.ends))  # beams
        return (ends <= input_ids.shape[1]).to(input_ids.device)


def _setting(name: str, args: tuple, kwargs: dict, own: Any) -> Any:
    """What a setting of ``generate`` will be; ``own`` is the model's generation config."""
    given = kwargs.get("generation_config") or (args[0] if args else None) or own
    return kwargs.get(name, getattr(given, name, None))


def _refuse_second_forwards(args: tuple, kwargs: dict, own: Any) -> None:
    """Classifier-free guidance runs forwards of its own, which get no ``memory`` argument."""
    scale = _setting("guidance_scale", args, kwargs, own)
    if scale not in (None, 1, 1.0):
        raise ValueError(
            f"generate: guidance_scale must be 1 or None for rows of different memories, got "
            f"{scale}; generate each memory's rows apart"
        )


def _refuse_right_padding(prompt: Tensor | None, mask: Tensor | None, config) -> None:
    """New tokens would be put behind the padding, at positions that the text never had."""
    if prompt is None or 0 in prompt.shape:
        return
    pad, ends = config.pad_token_id, config.eos_token_id
    if mask is not None and tuple(mask.shape) == tuple(prompt.shape[:2]):
        padded = bool((mask[:, -1] == 0).any())
    elif prompt.dim() == 2 and prompt.shape[0] > 1 and pad is not None:
        # Without a mask, by the pad token, unless it also ends texts: it may be the prompt's own.
        ends = ends if isinstance(ends, list) else [ends]
        padded = pad not in ends and bool((prompt[:, -1] == pad).any())
    else:
        padded = False
    if padded:
        raise ValueError(
            "generate: the prompts must be padded on the left, got rows that end in padding; set "
            "tokenizer.padding_side = 'left'"
        )


def _real_tokens(prompt: Tensor | None, args: tuple, kwargs: dict, own: Any) -> list[int]:
    """Return how many tokens each row of a prompt has, padding not counted."""
    if prompt is None:
        return [1]  # the one that begins a text
    mask = kwargs.get("attention_mask")
    if mask is None and prompt.dim() == 2:
        # As transformers guesses: by the pad token, unless it also ends texts.
        pad, ends = (_setting(k, args, kwargs, own) for k in ("pad_token_id", "eos_token_id"))
        if pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
            mask = prompt != pad
    return [prompt.shape[1]] * len(prompt) if mask is None else mask.sum(-1).tolist()
