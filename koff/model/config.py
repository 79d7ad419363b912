"""What to learn: the sparsity, the memories and their parts."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import asked_by, asker
from .arch import LINEARS, architecture

# Instead of names, which differ between architectures.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's word for it
MLP_LINEAR = "mlp-linear"
KV_INITS = ("text", "tokens", "normal")
SCOPES = ("mlp", "model")
# P(z > 0) at the lower clamp of log_alpha is 4.7 %: no gate can be expected to be closed more often
# than this (docs/math.md).
MAX_SPARSITY = 0.953
# A memory's name is a folder's and a part of parameters' names: no dot (a path of modules), nothing
# that a file system may refuse or that leads elsewhere, and well below 255 bytes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_memory_name(name: object) -> str:
    """Return a memory name; refuse one that could not be a folder's and a parameter's everywhere.

    Raises:
        TypeError, ValueError: no string, or an illegal one.
    """
    if not isinstance(name, str):
        raise TypeError(f"{asker()}: a memory name must be a string, got {name!r}; rename it")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{asker()}: a memory name must be 1 to 64 letters, digits, '-' or '_', starting with "
            f"a letter or digit, got {name!r}; rename it"
        )
    return name


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int, too


def _check_count(name: str, value: object) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(
            f"{asker()}: {name} must be a whole number of at least 1, got {value!r}; change it"
        )


def _check_finite(name: str, value: object) -> None:
    number = isinstance(value, float) or _is_whole(value)
    # Compared, since math.isfinite fails on a whole number that no float holds.
    if not number or not abs(value) <= sys.float_info.max:
        raise TypeError(f"{asker()}: {name} must be a finite number, got {value!r}; change it")


def _check_names(name: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Iterable):
        step = f"write ({value!r},)" if isinstance(value, str) else "change it"
        raise TypeError(f"{asker()}: {name} must be a sequence of names, got {value!r}; {step}")


def from_dict(cls: type, values: Any):
    """Return a config dataclass made from a mapping.

    Raises:
        TypeError, ValueError: not a mapping, or a key that ``cls`` lacks (the nearest one is
            suggested).
    """
    if not isinstance(values, dict):
        raise TypeError(f"{asker()}: it must be a mapping, got {type(values).__name__}; check it")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            step = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"{asker()}: a key must be known, got {key!r}; {step}")
    return cls(**values)


@dataclass(frozen=True)
class LoRAConfig:
    """The LoRA part of every memory: delta W = alpha / r * B A on each target layer.

    Args:
        r: rank. The higher, the more is won back: docs/experiments.md, 3 and 6.
        alpha: scaling numerator, as in PEFT; alpha / r = 2 in all experiments.
        target_modules: names of the linear layers that carry it, as the model and PEFT have them,
            or "all-linear" for all, as in the paper. The default, "mlp-linear", is the MLP's: where
            neurons are removed, and at equal parameters they won back more than all
            (docs/experiments.md, 5).
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear", "mlp-linear"] = MLP_LINEAR

    @asked_by("LoRAConfig")
    def __post_init__(self) -> None:
        _check_count("r", self.r)
        _check_finite("alpha", self.alpha)
        if self.alpha <= 0:
            raise ValueError(f"LoRAConfig: alpha must be positive, got {self.alpha}; change it")
        if self.target_modules in (ALL_LINEAR, MLP_LINEAR):
            return
        _check_names("target_modules", self.target_modules)
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules:
            raise ValueError(
                "LoRAConfig: target_modules must name a layer, got none; use lora=None"
            )
        for name in self.target_modules:
            if name not in LINEARS:
                raise ValueError(
                    f"LoRAConfig: target_modules must name linear layers, got {name!r}; choose "
                    f"among {', '.join(LINEARS)}, or write {ALL_LINEAR!r}"
                )

    def on(self, model: PreTrainedModel) -> LoRAConfig:
        """Return this config with the names that a model's linear layers have.

        Args:
            model: of a supported architecture.

        Raises:
            ValueError: a name that the model lacks.
        """
        entry = architecture(model.config.model_type)
        named = {ALL_LINEAR: entry.linears, MLP_LINEAR: entry.mlp_linears}
        targets = named.get(self.target_modules, self.target_modules)
        for name in targets:
            if name not in entry.linears:
                raise ValueError(
                    f"{asker()}: target_modules must name linear layers of this model, got "
                    f"{name!r}; {entry.model_type} has {', '.join(entry.linears)}"
                )
        return dataclasses.replace(self, target_modules=targets)


@dataclass(frozen=True)
class KVConfig:
    """The learned-cache part of every memory: keys and values [Hkv, P, D] of each layer with
    attention, and the state that each recurrent layer starts from (docs/math.md).

    Args:
        num_tokens: P, how many learned tokens stand before the sequence. Rows and cache together
            should fit the length the base was pretrained at: beyond it a cache does more harm than
            good, however it is trained (docs/experiments.md, 4).
        init: "text" (prefill of the first P training tokens of the domain, done by KoffTrainer; the
            one used in the experiments), "tokens" (prefill of random token ids) or "normal".
        init_std: standard deviation for "normal".
        num_frozen_tokens: how many of the first tokens are never trained. Models use the first
            token of a text as a sink for attention that has nowhere to go; one frozen token leaves
            it to them, as in Cartridges (arXiv 2506.06266).
        recurrent_state: whether the layers that keep a state instead of keys and values (three of
            four in Qwen3.5) have a learned one, too. Without it only layers with attention see the
            prefix, and a prefill does not stand for its text. Other models have no such layer.
    """

    num_tokens: int = 128
    init: str = "text"
    init_std: float = 0.02
    num_frozen_tokens: int = 1
    recurrent_state: bool = True

    @asked_by("KVConfig")
    def __post_init__(self) -> None:
        _check_count("num_tokens", self.num_tokens)
        if self.init not in KV_INITS:
            raise ValueError(
                f"KVConfig: init must be one of {', '.join(KV_INITS)}, got {self.init!r}; "
                "choose one"
            )
        _check_finite("init_std", self.init_std)
        if self.init_std <= 0:
            raise ValueError(f"KVConfig: init_std must be positive, got {self.init_std}; change it")
        frozen = self.num_frozen_tokens
        if not isinstance(frozen, int) or not 0 <= frozen < self.num_tokens:
            raise ValueError(
                f"KVConfig: num_frozen_tokens must lie in 0..{self.num_tokens - 1}, got {frozen}; "
                "leave at least one token to train"
            )
        if not isinstance(self.recurrent_state, bool):
            raise TypeError(
                f"KVConfig: recurrent_state must be true or false, got {self.recurrent_state!r}; "
                "change it"
            )


@dataclass(frozen=True)
class KoffConfig:
    """Which memories to learn beside which mask.

    Args:
        memories: their names; () learns gates alone.
        target_sparsity: share to remove, 0 to 0.953; 0 attaches no gates. What 0.2 and 0.4 cost and
            what memories win back: docs/experiments.md, 6.
        sparsity_scope: of what it is the share: "mlp" (of the MLP neurons, the paper's s*) or
            "model" (of all weights).
        lora: LoRA part of each memory, or None.
        kv: learned-cache part of each memory, or None.
        seed: of the initial gates and memories.
    """

    memories: tuple[str, ...] = ()
    target_sparsity: float = 0.2
    sparsity_scope: str = "mlp"
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    kv: KVConfig | None = field(default_factory=KVConfig)
    seed: int = 0

    @asked_by("KoffConfig")
    def __post_init__(self) -> None:
        _check_names("memories", self.memories)
        object.__setattr__(self, "memories", tuple(self.memories))
        for name in self.memories:
            check_memory_name(name)
        if len(set(self.memories)) < len(self.memories):
            raise ValueError(f"KoffConfig: memories must differ, got {self.memories}; rename one")
        _check_finite("target_sparsity", self.target_sparsity)
        if not 0 <= self.target_sparsity <= MAX_SPARSITY:
            raise ValueError(
                f"KoffConfig: target_sparsity must lie in 0..{MAX_SPARSITY} (no gate can be closed "
                f"more surely), got {self.target_sparsity}; change it"
            )
        if self.sparsity_scope not in SCOPES:
            raise ValueError(
                f"KoffConfig: sparsity_scope must be one of {', '.join(SCOPES)}, "
                f"got {self.sparsity_scope!r}; choose one"
            )
        if not _is_whole(self.seed):
            raise TypeError(
                f"KoffConfig: seed must be a whole number, got {self.seed!r}; change it"
            )
        for name, kind in (("lora", LoRAConfig), ("kv", KVConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"KoffConfig: {name} must be a {kind.__name__} or None, got {value!r}; "
                    "change it"
                )
        if self.memories and self.lora is None and self.kv is None:
            raise ValueError(
                "KoffConfig: memories must have a LoRA or a KV part, got lora=None and kv=None; "
                "give one, or use memories=() for gates alone"
            )
        if not self.memories and self.target_sparsity == 0:
            raise ValueError(
                "KoffConfig: it must learn something, got no memories and target_sparsity=0; "
                "name memories or set a sparsity"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a nested dict of JSON types."""
        values = dataclasses.asdict(self)
        values["memories"] = list(self.memories)
        if self.lora is not None:
            targets = self.lora.target_modules
            values["lora"]["target_modules"] = (
                targets if isinstance(targets, str) else list(targets)
            )
        return values

    @classmethod
    @asked_by("KoffConfig")
    def from_dict(cls, values: dict[str, Any]) -> KoffConfig:
        """Return the config that ``to_dict`` wrote down; unknown keys are errors."""
        values = dict(values)
        for name, kind in (("lora", LoRAConfig), ("kv", KVConfig)):
            if values.get(name) is not None:
                with asked_by(f"KoffConfig.{name}"):
                    values[name] = from_dict(kind, values[name])
        return from_dict(cls, values)
