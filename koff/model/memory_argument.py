"""The model's boundary: the ``memory`` argument becomes the forward's context here, and nowhere
else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .attention import NAME, next_bounds
from .decode_graph import ALONE
from .forward_context import ACTIVE, Generation, MemoryArgument, resolve_ids
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
            self._say_rows_are_whole(kwargs, inputs)
            self._check_lengths(longest, inputs.shape[1], kwargs.get("past_key_values"))
            self._position_ids(kwargs, inputs.shape[1])
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

    def _check_lengths(self, prefix: int, tokens: int, cache) -> None:
        if torch.compiler.is_compiling():
            return
        past = 0 if cache is None else cache.get_seq_length()
        # A cache that comes filled from elsewhere may begin with a prefix of its own, at positions
        # that we cannot know. One that came empty, or out of this model, is marked as ours.
        if cache is not None and not getattr(cache, "_koff", False):
            if int(past) != 0:
                raise ValueError(
                    "forward: past_key_values must be empty or come from this model, got a cache "
                    f"that already holds {int(past)} tokens; do not add a prefix to the cache "
                    "yourself; pass memory= and koff puts it in front"
                )
            cache._koff = True
        limit = self.config.max_position_embeddings
        # A static cache counts in a tensor, which would have to be read; generate keeps its limit.
        if isinstance(past, int) and prefix + past + tokens > limit:
            raise ValueError(
                f"forward: prefix + sequence must fit max_position_embeddings ({limit}), "
                f"got {prefix} + {past + tokens}; shorten the sequence or the memory"
            )

    @staticmethod
    def _position_ids(kwargs: dict, tokens: int) -> None:
        """Left-padded rows start at position 0 at their first real token, or the prefix would stand
        too far away."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def tag_cache(module: nn.Module, args: tuple, output) -> None:
    """Forward hook of the decoder: remember that the cache it returns is its own."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and not torch.compiler.is_compiling():
        cache._koff = True


class KoffModelMixin:
    """Adds ``memory`` to forward and generate, and refuses to write half of a model."""

    koff: KoffState

    @staticmethod
    def forward_with_signature(cls: type) -> Callable:
        """Return ``cls.forward`` with a ``memory`` argument that generate and Trainer can see: both
        look at the signature, and drop or refuse what is not in it."""
        base = cls.forward

        @functools.wraps(base)
        def forward(self, *args, memory: MemoryArgument = ACTIVE, **kwargs):
            if memory is not ACTIVE:
                kwargs["memory"] = memory
            return base(self, *args, **kwargs)

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

        Args:
            inputs, args, kwargs: as transformers'.
            memory: a name or None for all rows, or a list with one entry per row.

        Raises:
            KeyError, TypeError, ValueError: unknown memories, not one entry per row, prompts that
                are padded on the right, or guidance with memories mixed.
        """
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((t for t in given if t is not None), None)
        _refuse_right_padding(prompt, kwargs.get("attention_mask"), self.generation_config)
        state, returned = self.koff, None
        memory, roster = state.named(memory), state.memories.roster
        memory = memory.cpu() if isinstance(memory, Tensor) else memory  # to look at it
        rows = 1 if prompt is None else len(prompt)
        ids = resolve_ids(memory, rows, roster.names, "generate")
        if isinstance(ids, list) and len(set(ids)) <= 1:
            ids = ids[0] if ids else -1
        if isinstance(ids, int):  # the same for every row, however beams multiply them
            memory = None if ids < 0 else roster.names[ids]
        else:
            _refuse_second_forwards(args, kwargs, self.generation_config)
            # A tensor, since generate repeats the rows of tensors for beams and samples.
            kwargs["memory"] = torch.tensor(ids, device=self.device)
        before, generation = state.running.generation, Generation(memory, roster)
        state.running.generation = generation
        try:
            with ALONE.generating():
                returned = super().generate(inputs, *args, **kwargs)
                return returned
        finally:
            state.running.generation = before
            # Somebody's own loop may keep whatever it saw.
            state.graphs.finish(generation, None if "custom_generate" in kwargs else returned)

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
    # The method of the class that the mixin stands in front of.
    super(KoffModelMixin, model).save_pretrained(directory, state_dict=state_dict)


def _refuse_second_forwards(args: tuple, kwargs: dict, own: Any) -> None:
    """Classifier-free guidance runs forwards of its own, which get no ``memory`` argument."""
    given = kwargs.get("generation_config") or (args[0] if args else None) or own
    scale = kwargs.get("guidance_scale", getattr(given, "guidance_scale", None))
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
