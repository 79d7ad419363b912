"""koff: knowledge offloading. One sparse backbone of a frozen LLM and swappable memories (LoRA
adapters and learned KV caches)."""

import koffkernels as _koffkernels  # noqa: F401, I001  reads KOFF_BACKEND before triton comes

from .analysis import PrefixMass, prefix_attention_mass
from .attach import attach, detach, use_memory
from .compact import compact
from .config import KoffConfig, KVConfig, LoRAConfig
from .edit import add_memory, import_memory, remove_memory
from .evaluate import EvalRow, evaluate
from .export import export_merged
from .io import load, save
from .masking import BinarizeReport, SparsityReport, binarize, sparsity
from .push import push_to_hub
from .train import KoffTrainer
from .training_args import KoffTrainingArguments
from .version import __version__

__all__ = [
    "BinarizeReport",
    "EvalRow",
    "KVConfig",
    "KoffConfig",
    "KoffTrainer",
    "KoffTrainingArguments",
    "LoRAConfig",
    "PrefixMass",
    "SparsityReport",
    "__version__",
    "add_memory",
    "attach",
    "binarize",
    "compact",
    "detach",
    "evaluate",
    "export_merged",
    "import_memory",
    "load",
    "prefix_attention_mass",
    "push_to_hub",
    "remove_memory",
    "save",
    "sparsity",
    "use_memory",
]
