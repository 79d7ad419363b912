"""koff: knowledge offloading. One sparse backbone of a frozen LLM and swappable memories (LoRA + learned KV cache)."""

from .attach import attach, detach, use_memory
from .config import KoffConfig, KVConfig, LoRAConfig
from .version import __version__

__all__ = ["KVConfig", "KoffConfig", "LoRAConfig", "__version__", "attach", "detach", "use_memory"]
