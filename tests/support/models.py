"""Tiny random models of every supported architecture, and memories that really do something."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3_5Config, Qwen3_5ForConditionalGeneration

import koff
from koff.model import arch

VOCAB = 97
NAMES = ("en", "keys", "es")
# Those that most tests go through; tests/model/test_architectures.py goes through all.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
HYBRID = "qwen3_5_text"  # has recurrent layers among those with attention

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# What an architecture has that others have not. An entry in arch.py without one here is tested too.
_OWN = {
    "llama": dict(hidden_size=64, intermediate_size=96, tie_word_embeddings=True),
    "qwen2": dict(num_key_value_heads=4),  # one kv head per query head; biases
    "qwen3": dict(head_dim=16),  # which is not hidden / heads
    # Recurrent layers with two value heads for each key head; RoPE on a quarter of a head.
    "qwen3_5_text": dict(
        full_attention_interval=2,  # a layer with attention between two recurrent ones
        head_dim=16,
        tie_word_embeddings=True,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
    ),
    "mistral": dict(sliding_window=None),
    "granite": dict(
        attention_multiplier=0.4,  # not D ** -0.5, which would be 0.29
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "phi3": dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
    ),
}


def tiny(architecture: str, **changes) -> PreTrainedModel:
    """A model of three layers, in eval mode."""
    config, cls = arch.stock_classes(architecture)
    own = _OWN.get(architecture, {})
    torch.manual_seed(0)
    model = cls(config(**{**_COMMON, **own, **changes}))
    with torch.no_grad():  # initial biases are zero and would hide a lost one
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
    return model.eval()


def multimodal() -> PreTrainedModel:
    """A Qwen3.5 as it is published: the language model of ``tiny`` and a vision part."""
    text = tiny(HYBRID).config.to_dict()
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48)
    tied = dict(tie_word_embeddings=True)
    config = Qwen3_5Config(text_config=text, vision_config=vision, **tied)
    return Qwen3_5ForConditionalGeneration(config).eval()


def perturb(model: PreTrainedModel, std: float = 0.2) -> PreTrainedModel:
    """Give every learned parameter a random shift: a LoRA with B = 0 proves nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.koff.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def redraw(model: PreTrainedModel) -> PreTrainedModel:
    """Draw what memories have learned anew, so that all differ from each other and from none."""
    torch.manual_seed(1)
    with torch.no_grad():
        for memory in model.koff.memories:
            for parameter in memory.parameters():
                parameter.normal_(std=0.3)
    return model


def attached(architecture: str, *, shift: bool = True, changes: dict | None = None, **config):
    """A tiny model with koff attached, in eval mode, its memories perturbed."""
    config = {
        "memories": NAMES,
        "lora": koff.LoRAConfig(r=4, alpha=6, target_modules="all-linear"),
        "kv": koff.KVConfig(num_tokens=7, init="tokens"),
        **config,
    }
    model = koff.attach(tiny(architecture, **(changes or {})), koff.KoffConfig(**config))
    return (perturb(model) if shift else model).eval()


def tokens(rows: int = 3, length: int = 11, seed: int = 3) -> torch.Tensor:
    """Random token ids without the special ones, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def same(a, b):
    """Whether the same names have bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
