"""What to learn: the sparsity, the memories and their parts."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import require
from .arch import LINEARS, MLP_LINEARS

ALL_LINEAR = "all-linear"  # PEFT's word for it
KV_INITS = ("text", "tokens", "normal")
SCOPES = ("mlp", "model")
# P(z > 0) at the lower clamp of log_alpha is 4.7 %: no gate can be expected to be closed more often
# than this.
MAX_SPARSITY = 0.953
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_memory_name(name: object, where: str) -> str:
    """Refuse a memory name that could not be a folder name and a parameter name on every
    platform."""
    require(
        isinstance(name, str),
        where,
        "a memory name",
        "be a string",
        repr(name),
        "rename it",
        TypeError,
    )
    require(
        _NAME.fullmatch(name) is not None,
        where,
        "a memory name",
        "be 1 to 64 letters, digits, '-' or '_', starting with a letter or digit",
        repr(name),
        "rename it",
    )
    return name


def _positive_int(where: str, name: str, value: object) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(good, where, name, "be a whole number of at least 1", repr(value), "change it")


def _number(where: str, name: str, value: object) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and abs(value) <= sys.float_info.max  # math.isfinite fails on a huge whole number
    require(good, where, name, "be a finite number", repr(value), "change it", TypeError)


def _sequence(where: str, name: str, value: object) -> None:
    good = isinstance(value, Iterable) and not isinstance(value, str)
    step = f"write ({value!r},)" if isinstance(value, str) else "change it"
    require(good, where, name, "be a sequence of names", repr(value), step, TypeError)


def from_dict(cls: type, values: Any, where: str):
    """Build a config dataclass from a mapping, refusing unknown keys.

    Raises:
        TypeError, ValueError: not a mapping, or a key that ``cls`` lacks (the nearest one is
            suggested).
    """
    require(
        isinstance(values, dict),
        where,
        "it",
        "be a mapping",
        type(values).__name__,
        "check it",
        TypeError,
    )
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        near = difflib.get_close_matches(str(key), known, n=1)
        step = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        require(key in known, where, "a key", "be known", repr(key), step)
    return cls(**values)


@dataclass(frozen=True)
class LoRAConfig:
    """The LoRA part of every memory: delta W = alpha / r * B A on each target layer.

    Args:
        r: rank. The higher, the more is won back: docs/experiments.md, 3 and 6.
        alpha: scaling numerator, as in PEFT; alpha / r = 2 in all experiments.
        target_modules: names of the linear layers that carry it, or "all-linear" for all seven, as
            in the paper. The default is the MLP's three: where neurons are removed, and at equal
            parameters they won back more than all seven (docs/experiments.md, 5).
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = MLP_LINEARS

    def __post_init__(self) -> None:
        where = "LoRAConfig"
        _positive_int(where, "r", self.r)
        _number(where, "alpha", self.alpha)
        require(self.alpha > 0, where, "alpha", "be positive", self.alpha, "change it")
        if self.target_modules == ALL_LINEAR:
            object.__setattr__(self, "target_modules", LINEARS)
        _sequence(where, "target_modules", self.target_modules)
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        require(
            len(self.target_modules) > 0,
            where,
            "target_modules",
            "name a layer",
            "none",
            "use lora=None",
        )
        for name in self.target_modules:
            near = f"choose among {', '.join(LINEARS)}, or write {ALL_LINEAR!r}"
            require(
                name in LINEARS,
                where,
                "target_modules",
                "name linear layers",
                repr(name),
                near,
            )


@dataclass(frozen=True)
class KVConfig:
    """The learned-cache part of every memory: keys and values [Hkv, P, D] per layer.

    Args:
        num_tokens: P, how many learned tokens stand before the sequence. Rows and cache together
            should fit the length the base was pretrained at: beyond it a cache does more harm than
            good, however it is trained (docs/experiments.md, 4).
        init: "text" (prefill of the first P training tokens of the domain, done by KoffTrainer; the
            one used in the experiments), "tokens" (prefill of random token ids) or "normal".
        init_std: standard deviation for "normal".
        num_frozen_tokens: how many of the first tokens are never trained (the attention sink).
    """

    num_tokens: int = 128
    init: str = "text"
    init_std: float = 0.02
    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        where = "KVConfig"
        _positive_int(where, "num_tokens", self.num_tokens)
        require(
            self.init in KV_INITS,
            where,
            "init",
            f"be one of {', '.join(KV_INITS)}",
            repr(self.init),
            "choose one",
        )
        _number(where, "init_std", self.init_std)
        require(self.init_std > 0, where, "init_std", "be positive", self.init_std, "change it")
        frozen = self.num_frozen_tokens
        require(
            isinstance(frozen, int) and 0 <= frozen < self.num_tokens,
            where,
            "num_frozen_tokens",
            f"lie in 0..{self.num_tokens - 1}",
            frozen,
            "leave at least one token to train",
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

    def __post_init__(self) -> None:
        self._check_memories()
        self._check_sparsity()
        good = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        rule = "be a whole number"
        require(good, "KoffConfig", "seed", rule, repr(self.seed), "change it", TypeError)
        for name, kind in (("lora", LoRAConfig), ("kv", KVConfig)):
            value = getattr(self, name)
            good = value is None or isinstance(value, kind)
            rule = f"be a {kind.__name__} or None"
            require(good, "KoffConfig", name, rule, repr(value), "change it", TypeError)
        require(
            not self.memories or self.lora is not None or self.kv is not None,
            "KoffConfig",
            "memories",
            "have a LoRA or a KV part",
            "lora=None and kv=None",
            "give one, or use memories=() for gates alone",
        )
        require(
            bool(self.memories) or self.target_sparsity > 0,
            "KoffConfig",
            "it",
            "learn something",
            "no memories and target_sparsity=0",
            "name memories or set a sparsity",
        )

    def _check_memories(self) -> None:
        where = "KoffConfig"
        _sequence(where, "memories", self.memories)
        object.__setattr__(self, "memories", tuple(self.memories))
        for name in self.memories:
            check_memory_name(name, where)
        distinct = len(set(self.memories)) == len(self.memories)
        require(distinct, where, "memories", "differ", self.memories, "rename one")

    def _check_sparsity(self) -> None:
        where = "KoffConfig"
        _number(where, "target_sparsity", self.target_sparsity)
        require(
            0 <= self.target_sparsity <= MAX_SPARSITY,
            where,
            "target_sparsity",
            f"lie in 0..{MAX_SPARSITY} (no gate can be closed more surely)",
            self.target_sparsity,
            "change it",
        )
        known, got = self.sparsity_scope in SCOPES, repr(self.sparsity_scope)
        require(known, where, "sparsity_scope", f"be one of {', '.join(SCOPES)}", got, "choose one")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types."""
        values = dataclasses.asdict(self)
        values["memories"] = list(self.memories)
        if self.lora is not None:
            values["lora"]["target_modules"] = list(self.lora.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KoffConfig:
        """Inverse of ``to_dict``; unknown keys are errors."""
        values = dict(values)
        for name, kind in (("lora", LoRAConfig), ("kv", KVConfig)):
            if values.get(name) is not None:
                values[name] = from_dict(kind, values[name], f"KoffConfig.{name}")
        return from_dict(cls, values, "KoffConfig")
