"""Every kernel at the shapes of real models: the one list of what the gate compiles.

``FILES`` has an entry for each file whose functions are called: one that yields a ``Case`` for each
of the file's configurations and each way of calling that changes the code. Kernels without
configurations are reached through the operations that launch them, so that strides and dtypes are
those of real calls. Tensors are on the "meta" device: shapes and dtypes without data.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import routes
from ..types import GatedMLPLoRA, LoRA
from .common import Rows

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


# From the config.json of each model on the Hugging Face hub.
MODELS = (
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128),
    Model("Llama-3.2-3B", 3072, 8192, 24, 8, 128),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128),
    Model("Qwen3-4B", 2560, 9728, 32, 8, 128),
)


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
        """A tensor of this shape without data, of the setting's dtype unless given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def master(self, *shape: int) -> Tensor:
        """The same in fp32, as memories and gates are kept."""
        return self.empty(*shape, dtype=torch.float32)

    def rows(self, m: int) -> Rows:
        """Memories of m tokens: a decode step of m sequences, or 8 long ones; or one memory."""
        sequences = m if m <= 64 else 8
        ids = self.empty(sequences, dtype=torch.int64) if self.mixed else None
        return Rows(ids, m // sequences)

    def lora(self, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, scaling) of a k -> n layer."""
        count = MEMORIES if self.mixed else 1
        return self.master(count, self.r, k), self.master(count, n, self.r), self.master(count)


class Case(NamedTuple):
    """One call of a launcher.

    Args:
        where: what it is called for, for people ("M=8192").
        run: the call, without arguments.
        config: name of the shipped configuration.
        archs: the chips that this configuration is for.
    """

    where: str
    run: Callable[[], object]
    config: str = "default"
    archs: tuple[str, ...] = ARCHS


def pruned(inner: int, removed: float = 0.17) -> int:
    """Neurons left of ``inner``, a multiple of 64; not of 128 for two of the models, so that tiles
    that do not divide the width are compiled too."""
    return int(inner * (1 - removed)) // 64 * 64


def settings(models: Iterable[Model] = MODELS, ranks: Iterable[int] = (16, 64)) -> list[Setting]:
    """All combinations of model, dense or pruned, rank, one or several memories, and dtype."""
    found = []
    for model, r in itertools.product(models, ranks):
        for inner in (model.inner, pruned(model.inner)):
            for mixed, dtype in itertools.product((False, True), DTYPES.values()):
                found.append(Setting(model, inner, r, mixed, dtype))
    return found


def subset() -> list[Setting]:
    """One setting that shows most of each kernel's code: pruned, several memories, bf16."""
    found = settings(MODELS[:1], (16,))
    return [s for s in found if s.inner != s.model.inner and s.mixed and s.dtype == torch.bfloat16]


def _configs(module: ModuleType) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each shipped configuration, with what it says about its cases."""
    for name, config in module.CONFIGS.items():
        archs = tuple(f"sm_{number}" for number in config.archs or ())
        yield config, {"config": name, "archs": archs or ARCHS}


def _linear(module: ModuleType, at: Setting) -> Iterator[Case]:
    """Forward and backward on the vendor's GEMMs: the narrow kernels as they are really called."""
    k, n = at.model.hidden, at.inner
    lora, weight = at.lora(k, n), at.empty(n, k)
    for m in (1, 8192):  # the shrink in several splits, and in one
        x, dy, s, rows = at.empty(m, k), at.empty(m, n), at.empty(m, at.r), at.rows(m)
        run = functools.partial(module.linear_forward, x, weight, None, lora, rows)
        yield Case(f"forward M={m}", _vendor(run))
    run = functools.partial(module.linear_backward, dy, x, s, weight, lora, rows, (True,) * 4)
    yield Case(f"backward M={m}", _vendor(run))


def _mlp(module: ModuleType, at: Setting) -> Iterator[Case]:
    """Training with and without gates, LoRA on all three layers or on the last one only."""
    h, i, m = at.model.hidden, at.inner, 8192
    weights = at.empty(i, h), at.empty(i, h), at.empty(h, i)
    up, down = LoRA(*at.lora(h, i)), LoRA(*at.lora(i, h))
    x, rows, gates = at.empty(m, h), at.rows(m), at.master(i)
    calls = [(gates, GatedMLPLoRA(up, up, down))]
    if at.plain:
        calls += [(None, GatedMLPLoRA(up, up, down)), (gates, GatedMLPLoRA(up, None, None))]
        calls += [(gates, GatedMLPLoRA(None, None, down)), (gates, GatedMLPLoRA())]

    def train(gates: Tensor | None, lora: GatedMLPLoRA) -> None:
        y, kept = module.mlp_forward(x, weights, gates, lora, rows, "silu", True)
        trains = [[part is not None] * 3 for part in lora]
        needs = True, gates is not None, trains
        module.mlp_backward(y, x, kept, weights, gates, lora, rows, "silu", needs)

    for gates, lora in calls:
        parts = " ".join(name for name, part in zip(lora._fields, lora, strict=True) if part)
        with_gates = "no gates" if gates is None else "gates"
        run = functools.partial(train, gates, lora)
        yield Case(f"training M={m} {with_gates}, LoRA: {parts or 'none'}", _vendor(run))


def _vendor(call: Callable[[], object]) -> Callable[[], object]:
    """The call, on the route that takes the vendor's GEMMs."""

    def run() -> object:
        with routes.force_route("vendor"):
            return call()

    return run


def _decode_linear(module: ModuleType, at: Setting) -> Iterator[Case]:
    hidden, inner = at.model.hidden, at.inner
    weights = {"down": (inner, hidden), "query": (hidden, at.model.heads * at.model.head_dim)}
    first = next(iter(module.CONFIGS.values()))
    for (config, labels), (name, (k, n)) in itertools.product(_configs(module), weights.items()):
        calls = [(m, None, at.lora(k, n)) for m in (1, 32, 64)]  # the three sizes of a token tile
        if at.plain and config is first:
            calls += [(1, at.empty(n), at.lora(k, n)), (1, at.empty(n), None), (1, None, None)]
        for m, bias, lora in calls:
            args = at.empty(m, k), at.empty(n, k), bias, lora, at.rows(m), config
            yield Case(f"{name} M={m}", functools.partial(module.decode_linear, *args), **labels)


def _decode_mlp(module: ModuleType, at: Setting) -> Iterator[Case]:
    k, n = at.model.hidden, at.inner
    gates, lora, first = at.master(n), at.lora(k, n), next(iter(module.CONFIGS.values()))
    for config, labels in _configs(module):
        calls = [(m, gates, lora, lora) for m in (1, 32, 64)]
        if at.plain and config is first:
            calls += [(1, None, lora, lora), (1, gates, None, None), (1, None, None, None)]
            calls += [(1, None, lora, None), (1, None, None, lora)]
        for m, *rest in calls:
            args = at.empty(m, k), at.empty(n, k), at.empty(n, k), *rest, at.rows(m), "silu", config
            yield Case(f"M={m}", functools.partial(module.decode_mlp_up, *args), **labels)


FILES: dict[str, Callable[[ModuleType, Setting], Iterator[Case]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "decode_linear": _decode_linear,
    "decode_mlp": _decode_mlp,
}


def module_named(name: str) -> ModuleType:
    """The kernel file of this name."""
    return importlib.import_module(f"{__package__}.{name}")


def cases(at: Setting) -> Iterator[tuple[str, Case]]:
    """(file, case) for every file in ``FILES``."""
    for name, generate in FILES.items():
        for case in generate(module_named(name), at):
            yield name, case


def all_kernels() -> set[tuple[str, str]]:
    """(file, kernel) of every jitted function of this folder whose name ends in ``_kernel``."""
    import triton

    found = set()
    for info in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        module = module_named(info.name)
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", None) == module.__name__
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction) and mine:
                found.add((info.name, name))
    return found
