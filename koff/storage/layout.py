"""Which file of a saved folder is which. Nothing is opened here.

out/  config.json  generation_config.json  model.safetensors     the backbone
      modeling_koff.py                     only if layers differ in width
      tokenizer files  README.md           README.md is the model card
      koff.json                            the manifest
      memories/<name>/memory.json  lora/   a memory: PEFT LORA
                                   kv/     and PEFT CARTRIDGE, or one of them; of a model with
                                           recurrent layers cache.json and cache.safetensors
      .koff-committed/                     a whole new version, on its way into place
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

MARKER = "koff.json"  # a folder that has it holds a saved model
CONFIG, GENERATION = "config.json", "generation_config.json"
# One file, or transformers' shards: model-00001-of-00002.safetensors.
WEIGHTS = re.compile(r"model[A-Za-z0-9_-]*\.safetensors")
INDEX = "model.safetensors.index.json"
CARD = "README.md"
MEMORIES, MEMORY = "memories", "memory.json"
LORA, KV = "lora", "kv"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CACHE_WEIGHTS, CACHE_CONFIG = "cache.safetensors", "cache.json"  # where PEFT has no format
COMMITTED = ".koff-committed"


def current(directory: str | Path) -> Path:
    """Return where the saved model of a folder is: in it or, if a save was interrupted after its
    commit, in the complete new version inside it."""
    directory = Path(directory)
    committed = directory / COMMITTED
    return committed if committed.is_dir() and not committed.is_symlink() else directory


def weight_names(names: Iterable[str]) -> list[str]:
    """Return which of these files hold the backbone's weights."""
    return [name for name in names if WEIGHTS.fullmatch(name)]


def backbone_names(names: Iterable[str]) -> list[str]:
    """Return which files make the backbone: its config, which must be there, and which of these.

    Args:
        names: the files of a manifest.
    """
    return [CONFIG, *(name for name in names if name == GENERATION or WEIGHTS.fullmatch(name))]


def memory_names(names: Iterable[str], memory: str) -> list[str]:
    """Return which of these files lie in a memory's folder."""
    return [name for name in names if name.startswith(f"{MEMORIES}/{memory}/")]


def memory_parts(names: Iterable[str], memory: str) -> set[str]:
    """Return which of ``LORA`` and ``KV`` a memory has, as these files say."""
    names = memory_names(names, memory)
    return {
        part
        for part in (LORA, KV)
        if any(name.startswith(f"{MEMORIES}/{memory}/{part}/") for name in names)
    }


def tokenizer_names(names: Iterable[str]) -> list[str]:
    """Return which of these files make the tokenizer: those that nothing else accounts for.

    A tokenizer's files have many names, which are transformers' affair. Code is none of them: it is
    never run, and does not travel over the hub.
    """
    names = list(names)
    others = {*backbone_names(names), CARD, INDEX}
    return [
        name
        for name in names
        if name not in others and not name.endswith(".py") and not name.startswith(f"{MEMORIES}/")
    ]
