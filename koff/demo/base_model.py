"""The demo's base model: tokenizer and a tiny Llama, trained once and cached."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data.blocks import pack
from .cached import made_once
from .corpus import Corpus, build_corpus, write_corpus

# Chosen so that pretraining takes about two minutes on two cores and the model uses its neurons:
# one that had more than its text needs would lose nothing by pruning, and memories win nothing.
SETTINGS: dict[str, Any] = {
    "format": 1,  # to be raised when this file makes another model of the same settings
    "corpus_seed": 0,
    "vocab_size": 2048,
    "block_size": 128,
    "batch_size": 12,
    "steps": 600,
    "learning_rate": 2e-3,
    "warmup_steps": 40,
    "weight_decay": 0.1,
    "seed": 0,
    "model": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}


def prepare_base(cache: Path, *, settings: Mapping[str, Any] = SETTINGS) -> Path:
    """Make the demo's corpus and base model, or find them in the cache.

    Args:
        cache: folder of caches; each combination of settings and corpus has a folder of its own.
        settings: sizes and rates, as ``SETTINGS``.

    Returns:
        A folder with ``base/`` (model and tokenizer) and ``data/<domain>.<split>.jsonl``.

    Raises:
        FileNotFoundError: this Python has no library source to read.
        OSError: the cache cannot be written.
    """
    corpus = build_corpus(settings["corpus_seed"])
    # The corpus is a part of the name: another Python carries other sources.
    text = json.dumps([dict(settings), corpus], sort_keys=True)
    folder = cache / f"demo-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def make(place: Path) -> None:
        place.mkdir()
        write_corpus(corpus, place / "data")
        tokenizer = train_tokenizer(corpus, settings["vocab_size"])
        model = pretrain(corpus, tokenizer, settings)
        model.save_pretrained(place / "base")
        tokenizer.save_pretrained(place / "base")

    return made_once(folder, "base/config.json", make)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training splits.

    Args:
        corpus: {domain: {split: documents}}.
        vocab_size: number of tokens, <s>, </s> and <pad> included.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for splits in corpus.values() for text in splits["train"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def pretrain(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]
) -> LlamaForCausalLM:
    """Train a small Llama from scratch on all domains in equal parts.

    Args:
        corpus: {domain: {split: documents}}.
        tokenizer: its tokenizer.
        settings: sizes and rates, as ``SETTINGS``.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(settings["seed"])
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(vocab_size=len(tokenizer), **ids, **settings["model"])
    model = LlamaForCausalLM(config).train()
    blocks = [
        pack(splits["train"], tokenizer, settings["block_size"], name=domain).blocks
        for domain, splits in corpus.items()
    ]
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    share = settings["batch_size"] // len(blocks)
    orders = [torch.randperm(len(part)) for part in blocks]
    for step in track(range(settings["steps"]), description="pretraining a base model"):
        # As many rows of each domain, in an order of its own that starts anew at its end.
        picked = [
            part[order[torch.arange(step * share, (step + 1) * share) % len(order)]]
            for part, order in zip(blocks, orders, strict=True)
        ]
        batch = torch.cat(picked)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.eval()


def _optimizer(model: LlamaForCausalLM, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    # The scales of the norms: decay would pull them towards 0, not towards the 1 they start at.
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings["learning_rate"],
        betas=(0.9, 0.95),  # as usual for language models
    )


def _rate(step: int, settings: Mapping[str, Any]) -> float:
    """Linear warm-up, then half a cosine down to 2 %: share of the learning rate."""
    if step < settings["warmup_steps"]:
        return (step + 1) / settings["warmup_steps"]
    done = (step - settings["warmup_steps"]) / (settings["steps"] - settings["warmup_steps"])
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
