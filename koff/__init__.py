"""koff: knowledge offloading. One sparse backbone of a frozen LLM and swappable memories (LoRA
adapters and learned KV caches)."""

import koffkernels as _koffkernels  # noqa: F401, I001  reads KOFF_BACKEND before triton comes

from .evaluation.attention_mass import PrefixMass, prefix_attention_mass
from .model.attach import attach, detach, use_memory
from .pruning.compact import compact
from .model.config import KoffConfig, KVConfig, LoRAConfig
from .manage import add_memory, import_memory, remove_memory
from .evaluation.perplexity import EvalRow, evaluate
from .storage.export import export_merged
from .storage.save_load import load, save
from .pruning.binarize import BinarizeReport, SparsityReport, binarize, sparsity
from .storage.push import push_to_hub
from .training.trainer import KoffTrainer
from .training.arguments import KoffTrainingArguments
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
