"""Where kernels are compiled: layers of four models, dense and pruned, and calls of their shapes.

Tensors are on the "meta" device: shapes and dtypes without data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from koffkernels._triton.shared.config import Config, default_name
from koffkernels._triton.shared.launch import Rows

ARCHS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEMORIES = 3


class Model(NamedTuple):
    """Widths of one layer: hidden, MLP neurons, query and key-value heads, head width."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """Outputs of the key and of the value projection."""
        return self.kv_heads * self.head_dim


# From the config.json of each model on the Hugging Face hub.
MODELS = (
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128),
    Model("Llama-3.2-3B", 3072, 8192, 24, 8, 128),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128),
    Model("Qwen3-4B", 2560, 9728, 32, 8, 128),
)

# The same for heads of width 64, which none of these has.
NARROW_HEADS = Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64)


class Setting(NamedTuple):
    """What a file's cases are made for.

    Args:
        model: the layer's widths.
        inner: MLP neurons kept: all of the model's, or a multiple of 64 after pruning.
        r: LoRA rank.
        mixed: memory ids are given; otherwise every token uses memory 0.
        dtype: of x and the base weights.
    """

    model: Model
    inner: int
    r: int
    mixed: bool
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """The setting at which ways of calling that are rare are compiled, once per dtype."""
        return self.r == 16 and not self.mixed

    @property
    def name(self) -> str:
        """For people: "Llama-3.1-8B I=11904 r=16 mixed"."""
        mixed = " mixed" if self.mixed else ""
        return f"{self.model.name} I={self.inner} r={self.r}{mixed}"

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of this shape without data, of the setting's dtype unless given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def master(self, *shape: int) -> Tensor:
        """Return the same in fp32, as memories and gates are stored."""
        return self.empty(*shape, dtype=torch.float32)

    def rows(self, m: int) -> Rows:
        """Return the memories of m tokens: of a decode step of m sequences, or of 8 long ones; or
        one memory."""
        sequences = m if m <= 64 else 8
        ids = self.empty(sequences, dtype=torch.int64) if self.mixed else None
        return Rows(ids, m // sequences)

    def lora(self, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (a, b, scaling) of a k -> n layer."""
        count = MEMORIES if self.mixed else 1
        return self.master(count, self.r, k), self.master(count, n, self.r), self.master(count)


class Case(NamedTuple):
    """One call of a launcher.

    Args:
        where: what it is called for, for people ("M=8192").
        run: the call, without arguments.
        config: name of the shipped configuration.
        archs: the chips that this configuration is for.
        of: part of the names of the kernels that take this configuration; others have their own.
    """

    where: str
    run: Callable[[], object]
    config: str = "default"
    archs: tuple[str, ...] = ARCHS
    of: str = ""


def pruned(inner: int, removed: float = 0.17) -> int:
    """Return how many neurons are left of ``inner``, a multiple of 64; not of 128 for two of the
    models, so that tiles that do not divide the width are compiled too."""
    return int(inner * (1 - removed)) // 64 * 64


def settings(models: Iterable[Model] = MODELS, ranks: Iterable[int] = (16, 64)) -> list[Setting]:
    """Return all combinations of model, dense or pruned, rank, one or several memories, and
    dtype."""
    found = []
    for model, r in itertools.product(models, ranks):
        for inner in (model.inner, pruned(model.inner)):
            for mixed, dtype in itertools.product((False, True), DTYPES.values()):
                found.append(Setting(model, inner, r, mixed, dtype))
    return found


def subset() -> list[Setting]:
    """Return the settings that show most of each kernel's code: pruned, bf16, with memory ids and
    without. The second way is not a part of the first: what is absent there can fail to compile."""
    found = settings(MODELS[:1], (16,))
    return [s for s in found if s.inner != s.model.inner and s.dtype == torch.bfloat16]


def defaults(table: dict[str, Config]) -> list[Config]:
    """Return the configurations of a file's table that are some chip's default."""
    names = {default_name(table, int(arch.removeprefix("sm_"))) for arch in ARCHS}
    return [config for name, config in table.items() if name in names]


def configs(table: dict[str, Config]) -> Iterator[tuple[Config, dict[str, Any]]]:
    """Yield each shipped configuration of a file's table, with what it says about its cases."""
    for name, config in table.items():
        archs = tuple(f"sm_{number}" for number in config.archs or ())
        yield config, {"config": name, "archs": archs or ARCHS}
