"""koff: knowledge offloading. One sparse backbone of a frozen LLM and swappable memories (LoRA
adapters and learned KV caches).

A name of ``koff`` is imported when it is first used: torch, transformers and peft take seconds to
import, and ``koff --help`` or a misspelt option needs none of them.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .model import auto_classes
from .model.when_imported import when_imported
from .version import __version__

if TYPE_CHECKING:  # the same names for editors and type checkers, which do not run __getattr__
    from .data.sources import Completion, DataSource
    from .evaluation.attention_mass import PrefixMass, prefix_attention_mass
    from .evaluation.perplexity import EvalRow, evaluate
    from .manage import add_memory, import_memory, remove_memory
    from .model.apply_kernels import AppliedKernels, apply_kernels
    from .model.attach import attach, detach, use_memory
    from .model.config import KoffConfig, KVConfig, LoRAConfig
    from .pruning.binarize import BinarizeReport, SparsityReport, binarize, sparsity
    from .pruning.compact import compact
    from .storage.export import export_merged
    from .storage.export_gguf import export_gguf
    from .storage.push import push_to_hub
    from .storage.save_load import load, save
    from .training.arguments import KoffTrainingArguments
    from .training.trainer import KoffTrainer

_HOMES = {
    "data.sources": ("Completion", "DataSource"),
    "evaluation.attention_mass": ("PrefixMass", "prefix_attention_mass"),
    "evaluation.perplexity": ("EvalRow", "evaluate"),
    "manage": ("add_memory", "import_memory", "remove_memory"),
    "model.apply_kernels": ("AppliedKernels", "apply_kernels"),
    "model.attach": ("attach", "detach", "use_memory"),
    "model.config": ("KVConfig", "KoffConfig", "LoRAConfig"),
    "pruning.binarize": ("BinarizeReport", "SparsityReport", "binarize", "sparsity"),
    "pruning.compact": ("compact",),
    "storage.export": ("export_merged",),
    "storage.export_gguf": ("export_gguf",),
    "storage.push": ("push_to_hub",),
    "storage.save_load": ("load", "save"),
    "training.arguments": ("KoffTrainingArguments",),
    "training.trainer": ("KoffTrainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    """Import a public name from its home; Python asks here for names that are not there yet."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return __all__


# Triton's interpreter cannot be switched on once triton is imported, which transformers or peft may
# do before the first name of koff is used. Any other value of KOFF_BACKEND can be read later.
if os.environ.get("KOFF_BACKEND") == "interpret":
    import koffkernels  # noqa: F401

auto_classes.announce()


def _guard(trainer: Any) -> None:
    importlib.import_module(".model.plain_trainer", __name__).guard(trainer)


# A Trainer that is not koff's says before its first step what its checkpoints would leave out.
when_imported("transformers.trainer", _guard)
