"""Random models of a stated shape, and the FLOPs of their forward."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # seconds, which what needs a shape alone can do without
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model.

    Args:
        hidden, intermediate, layers, heads, kv_heads, vocab: as in ``LlamaConfig``.
        rows, tokens: the batch it is measured on.
    """

    hidden: int = 1024
    intermediate: int = 3584
    layers: int = 8
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 8192
    rows: int = 8
    tokens: int = 512

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def record(self) -> dict[str, int]:
        """The shape as a dict, for a result file."""
        return asdict(self)


# From their config.json: Llama-3.2-3B and Llama-3.1-8B.
LLAMA_3B = Shape(3072, 8192, 28, 24, 8, 128256)
LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256)


def of_layers(shape: Shape, layers: int) -> Shape:
    """A model of fewer layers and true widths; its table of tokens shrinks with them, so that every
    part keeps its share of the weights."""
    vocab = round(shape.vocab * layers / shape.layers / 64) * 64
    return replace(shape, layers=layers, vocab=vocab)


def llama_config(shape: Shape, **settings: Any) -> LlamaConfig:
    """The configuration of a Llama of this shape with sdpa attention; settings: of its own."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        attn_implementation="sdpa",
        **settings,
    )


def llama(shape: Shape, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights (untied), sdpa attention, the same for the same seed."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(shape, max_position_embeddings=4096)).to(dtype)


def batch(shape: Shape, seed: int) -> Tensor:
    """Random token ids [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, shape.vocab, (shape.rows, shape.tokens), generator=generator)


def forward_flops(shape: Shape, widths: list[int]) -> int:
    """Multiplications and additions of every matmul of one forward on one batch.

    Args:
        shape: the model and its batch.
        widths: MLP neurons of each layer.

    Returns:
        2 x the multiply-adds of the attention's four linear layers, its scores and their product
        with the values (the causal half), the three MLP layers and the language-model head.
    """
    positions = shape.rows * shape.tokens
    kv_width = shape.kv_heads * shape.head_dim
    linears = shape.hidden * (2 * shape.hidden + 2 * kv_width)
    scores = 2 * shape.hidden * (shape.tokens + 1) // 2
    mlp = sum(3 * shape.hidden * width for width in widths)
    head = shape.hidden * shape.vocab
    return 2 * positions * (len(widths) * (linears + scores) + mlp + head)


@torch.no_grad()
def vary(model: PreTrainedModel, seed: int) -> None:
    """Give the gates of an attached model random values, in place; layers differ in how much they
    are to lose, as they do after training."""
    for index, log_alpha in enumerate(model.koff.gates.log_alpha):
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        values = torch.randn(log_alpha.shape, generator=generator) + 0.1 * (index % 4)
        log_alpha.copy_(values)
