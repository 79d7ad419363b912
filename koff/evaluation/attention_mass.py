"""What a trained memory's learned cache is used for: the attention that a text gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from koffkernels import RowBounds
from koffkernels.reference import attention_weights

from ..data.blocks import pack
from ..errors import asked_by, require
from ..model import arch
from ..model.attention import koff_attention, koff_mask, mask_to_bounds
from ..model.state import require_attached
from .perplexity import check_sizes, evaluating

_WHERE = "prefix_attention_mass"
_WATCHED = "koff_watched"


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth
class PrefixMass:
    """Attention that the tokens of a text give to the learned tokens of a memory.

    Args:
        memory: name of the memory.
        mass: fp64 [L, Hq, P], mean probability per layer, head and learned token.
        tokens: number of tokens it is the mean over.
        frozen: how many of the first learned tokens were never trained.
    """

    memory: str
    mass: Tensor
    tokens: int
    frozen: int

    @property
    def heads(self) -> Tensor:
        """[L, Hq]: what each head gives to the whole prefix, in 0..1."""
        return self.mass.sum(-1)

    @property
    def positions(self) -> Tensor:
        """[L, P]: what each learned token gets, mean of the heads."""
        return self.mass.mean(1)

    def share_of_first(self) -> Tensor:
        """[L]: of what the prefix gets, the share of its frozen tokens (of the first token, if none
        is frozen); NaN where the prefix gets nothing."""
        got = self.positions
        return got[:, : max(1, self.frozen)].sum(-1) / got.sum(-1)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return {
            "memory": self.memory,
            "tokens": self.tokens,
            "frozen_tokens": self.frozen,
            "heads": self.heads.tolist(),
            "positions": self.positions.tolist(),
            "share_of_first": self.share_of_first().tolist(),
        }


def prefix_attention_mass(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Any,
    *,
    memory: str,
    block_size: int = 512,
    batch_size: int = 8,
) -> PrefixMass:
    """Measures how much attention the tokens of a text give to a memory's learned keys.

    For a query i the mass on learned token p is softmax(scale q_i [K_prefix; K]^T + mask)_p, in
    fp32; the mean is over all tokens of all blocks. Blocks are those of `koff.evaluate`.

    Args:
        model: an attached or loaded koff model.
        tokenizer: the model's tokenizer.
        documents: as `koff.data.pack` takes them.
        memory: name of a memory with a KV part.
        block_size: tokens per block; with the prefix at most what the model has positions for.
        batch_size: blocks per forward; probabilities of one layer take [B, Hq, T, P + T] fp32.

    Returns:
        The mean probabilities per layer, head and learned token.

    Raises:
        KeyError, TypeError, ValueError: unknown memory, one without a KV part, too little text, or
            blocks that do not fit.
    """
    with asked_by(_WHERE):
        state = require_attached(model)
    require(
        isinstance(memory, str), _WHERE, "memory", "be a name", repr(memory), "pass one", TypeError
    )
    state.check(memory, _WHERE)
    config = state.memories[memory].kv_config
    rule, step = "have a KV part", "choose one trained with koff.kv"
    require(config is not None, _WHERE, f"memory {memory!r}", rule, "LoRA alone", step)
    check_sizes(model, block_size, batch_size, _WHERE)
    blocks = pack(documents, tokenizer, block_size, name="documents").blocks
    mass, tokens = mean_mass(model, memory, ((ids, None) for ids in blocks.split(batch_size)))
    return PrefixMass(memory, mass, tokens, config.num_frozen_tokens)


def mean_mass(
    model: PreTrainedModel, memory: str, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, int]:
    """Mean attention on a memory's learned tokens over the tokens of some batches.

    Args:
        model: an attached koff model.
        memory: name of a memory with a KV part.
        batches: (token ids int64 [B, T], mask [B, T] with 0 at padding or None).

    Returns:
        fp64 [L, Hq, P] on the CPU, and the number of tokens, padding not counted.
    """
    sums = [torch.zeros((), dtype=torch.float64, device=model.device)] * len(arch.layers(model))
    decoder, tokens = arch.decoder(model), 0  # no logits are needed
    with _watching(model, sums), evaluating(model), torch.inference_mode():
        for ids, mask in batches:
            tokens += ids.numel() if mask is None else int(mask.sum())
            mask = None if mask is None else mask.to(model.device)
            ids = ids.to(model.device)
            decoder(input_ids=ids, attention_mask=mask, memory=memory, use_cache=False)
    return torch.stack(sums).cpu() / tokens, tokens


@contextlib.contextmanager
def _watching(model: PreTrainedModel, sums: list[Tensor]) -> Iterator[None]:
    """Inside, every attention layer adds what its queries give to the prefix to its entry of
    ``sums``, summed over rows and queries: [Hq, P]."""

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, **kwargs):
        out = koff_attention(module, query, key, value, mask, **kwargs)
        link, bounds = module._koff, mask_to_bounds(mask)
        context = link.scope.context
        prefix = link.bank.prefix(link.scope.index, context.slots, context.stacks)
        scale = kwargs.get("scaling")
        weights, _ = attention_weights(query, key, value, prefix, context.ids, bounds, scale)
        given = weights[..., : prefix.k.shape[2]] * _is_token(query, bounds)
        sums[link.scope.index] = sums[link.scope.index] + given.double().sum((0, 2))
        return out

    before = model.config._attn_implementation
    AttentionInterface.register(_WATCHED, watched)
    AttentionMaskInterface.register(_WATCHED, koff_mask)
    model.set_attn_implementation(_WATCHED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(_WATCHED, koff_attention)  # lets go of the sums


def _is_token(query: Tensor, bounds: RowBounds | None) -> Tensor:
    """bool [B, 1, T, 1]: whether a query is a token of its row's text and not padding."""
    t = torch.arange(query.shape[2], device=query.device)
    if bounds is None:
        return torch.ones_like(t, dtype=torch.bool)[None, None, :, None]
    position = bounds.query_start[:, None] + t
    inside = (position >= bounds.key_start[:, None]) & (position < bounds.key_end[:, None])
    return inside[:, None, :, None]
