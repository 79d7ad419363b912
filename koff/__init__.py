"""koff: knowledge offloading. One sparse backbone of a frozen LLM and swappable memories (LoRA
adapters and learned KV caches)."""

from .attach import attach, detach, use_memory
from .compact import compact
from .config import KoffConfig, KVConfig, LoRAConfig
from .masking import BinarizeReport, SparsityReport, binarize, sparsity
from .version import __version__

__all__ = [
    "BinarizeReport",
    "KVConfig",
    "KoffConfig",
    "LoRAConfig",
    "SparsityReport",
    "__version__",
    "attach",
    "binarize",
    "compact",
    "detach",
    "sparsity",
    "use_memory",
]
