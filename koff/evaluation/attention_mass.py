"""What a trained memory's learned cache is used for: the attention that a text gives it.

The attention that koff runs never has probabilities to look at: they exist piece by piece inside a
kernel. So the model is switched, for the measurement alone, to a second attention implementation
that calls koff's own and then computes the same probabilities once more, in plain torch and fp32.
Nothing in the usual path knows about it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from koffkernels import RowBounds
from koffkernels.reference import attention_weights

from ..data.blocks import pack
from ..errors import asked_by
from ..model import arch
from ..model.attention import koff_attention, koff_mask, mask_to_bounds
from ..model.state import require_attached
from .perplexity import check_sizes, evaluating

_WATCHED = "koff_watched"  # the second implementation's name in transformers' registry
# The registry is of the process, so one thread measures at a time, of whatever model.
_one_measures = threading.Lock()


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth
class PrefixMass:
    """Attention that the tokens of a text give to the learned tokens of a memory.

    Args:
        memory: name of the memory.
        mass: fp64 [L, Hq, P], mean probability per layer, head and learned token; 0 in layers
            without attention.
        tokens: number of tokens it is the mean over.
        frozen: how many of the first learned tokens were never trained.
    """

    memory: str
    mass: Tensor
    tokens: int
    frozen: int

    @property
    def heads(self) -> Tensor:
        """What each head gives to the whole prefix, [L, Hq] in 0..1."""
        return self.mass.sum(-1)

    @property
    def positions(self) -> Tensor:
        """What each learned token gets, mean of the heads, [L, P]."""
        return self.mass.mean(1)

    def share_of_first(self) -> Tensor:
        """Return, of what the prefix gets, the share of its frozen tokens, [L]; of the first token,
        if none is frozen. NaN where the prefix gets nothing.

        Frozen tokens are the attention sink: what goes there is meant for nobody.
        """
        got = self.positions
        return got[:, : max(1, self.frozen)].sum(-1) / got.sum(-1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "memory": self.memory,
            "tokens": self.tokens,
            "frozen_tokens": self.frozen,
            "heads": self.heads.tolist(),
            "positions": self.positions.tolist(),
            "share_of_first": self.share_of_first().tolist(),
        }


@asked_by("prefix_attention_mass")
def prefix_attention_mass(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Any,
    *,
    memory: str,
    block_size: int = 512,
    batch_size: int = 8,
) -> PrefixMass:
    """Measure how much attention the tokens of a text give to a memory's learned keys.

    For a query i the mass on learned token p is softmax(scale q_i [K_prefix; K]^T + mask)_p, in
    fp32; the mean is over all tokens of all blocks, whether they count in losses or not. Blocks are
    those of ``koff.evaluate``.

    Args:
        model: an attached or loaded koff model.
        tokenizer: the model's tokenizer; None if the documents are token ids.
        documents: of one domain, as ``koff.evaluate`` takes them.
        memory: name of a memory with a KV part.
        block_size: tokens per block; with the prefix at most what the model has positions for.
        batch_size: blocks per forward; probabilities of one layer take [B, Hq, T, P + T] fp32.

    Returns:
        The mean probabilities per layer, head and learned token.

    Raises:
        KeyError, TypeError, ValueError: unknown memory, one without a KV part, too little text, or
            blocks that do not fit.
    """
    state = require_attached(model)
    if not isinstance(memory, str):
        raise TypeError(f"prefix_attention_mass: memory must be a name, got {memory!r}; pass one")
    state.check(memory, "prefix_attention_mass")
    state.memories[memory].check_filled("prefix_attention_mass")
    config = state.memories[memory].kv_config
    if config is None:
        raise ValueError(
            f"prefix_attention_mass: memory {memory!r} must have a KV part, got LoRA alone; choose "
            "one trained with koff.kv"
        )
    check_sizes(model, block_size, batch_size, prefix=config.num_tokens)
    data = pack(documents, tokenizer, block_size)
    # What fills a block up behind the documents' own tokens is padding.
    real = torch.arange(block_size) < data.lengths[:, None]  # [N, T]
    masks = [None if rows.all() else rows.long() for rows in real.split(batch_size)]
    batches = zip(data.blocks.split(batch_size), masks, strict=True)
    mass, tokens = mean_mass(model, memory, batches)
    return PrefixMass(memory, mass, tokens, config.num_frozen_tokens)


def mean_mass(
    model: PreTrainedModel, memory: str, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, int]:
    """Return the mean attention on a memory's learned tokens over the tokens of some batches.

    Args:
        model: an attached koff model.
        memory: name of a memory with a KV part.
        batches: (token ids int64 [B, T], mask [B, T] with 0 at padding or None).

    Returns:
        fp64 [L, Hq, P] on the CPU, and the number of tokens, padding not counted.
    """
    # One sum per layer, [Hq, P] after the first batch. They stay on the device until the end.
    sums = [torch.zeros((), dtype=torch.float64, device=model.device)] * len(arch.layers(model))
    decoder = arch.decoder(model)  # without the head: no logits are needed
    tokens = 0
    with _watching(model, sums), evaluating(model), torch.inference_mode():
        for ids, mask in batches:
            tokens += ids.numel() if mask is None else int(mask.sum())
            mask = None if mask is None else mask.to(model.device)
            ids = ids.to(model.device)
            decoder(input_ids=ids, attention_mask=mask, memory=memory, use_cache=False)
    shape = next(t.shape for t in sums if t.dim())  # recurrent layers have added nothing
    return torch.stack([t.expand(shape) for t in sums]).cpu() / tokens, tokens


@contextlib.contextmanager
def _watching(model: PreTrainedModel, sums: list[Tensor]) -> Iterator[None]:
    """Let every attention layer add, inside, what its queries give to the prefix to its entry of
    ``sums``, summed over rows and queries: [Hq, P]."""

    measuring = threading.get_ident()

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, **kwargs):
        # The next layer sees what it always sees: the output is that of koff's own attention.
        out = koff_attention(module, query, key, value, mask, **kwargs)
        if threading.get_ident() != measuring:  # calls of other threads pass through here meanwhile
            return out
        link = module._koff
        context = link.running.context
        bounds = mask_to_bounds(mask)
        prefix = link.bank.prefix(link.layer, context.memories, context.stacks, query.dtype)
        # [B, Hq, T, P + S], the learned keys first: query [B, Hq, T, D] and key [B, Hkv, S, D] are
        # rotated already, and the prefix is moved to the positions before them.
        weights, _ = attention_weights(
            query, key, value, prefix, context.ids, bounds, kwargs.get("scaling")
        )
        given = weights[..., : prefix.k.shape[2]] * _is_token(query, bounds)
        sums[link.layer] = sums[link.layer] + given.double().sum((0, 2))
        return out

    with _one_measures:
        before = model.config._attn_implementation
        AttentionInterface.register(_WATCHED, watched)
        AttentionMaskInterface.register(_WATCHED, koff_mask)
        model.set_attn_implementation(_WATCHED)
        try:
            yield
        finally:
            model.set_attn_implementation(before)
            # The name stays in the registry, but ``watched`` must go from it: it holds on to the
            # sums.
            AttentionInterface.register(_WATCHED, koff_attention)


def _is_token(query: Tensor, bounds: RowBounds | None) -> Tensor:
    """Return whether each query is a token of its row's text and not padding, bool [B, 1, T, 1]."""
    t = torch.arange(query.shape[2], device=query.device)
    if bounds is None:  # plain causal attention: no padding
        return torch.ones_like(t, dtype=torch.bool)[None, None, :, None]
    position = bounds.query_start[:, None] + t
    inside = (position >= bounds.key_start[:, None]) & (position < bounds.key_end[:, None])
    return inside[:, None, :, None]
