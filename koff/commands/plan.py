"""What a recipe will take before anything of it is loaded: memory, steps, time and disk; and what
to change where it does not fit."""

from __future__ import annotations

import dataclasses
import datetime
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import asked_by
from ..storage.space import SMALL_FILES, size_text
from ..training.footprint import Counted, Sizes, StepShape, count_step, kept_by_forward, sizes_of
from .recipe import Recipe
from .tables import millions

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
# Below these a change costs more than it saves: a text is cut into pieces too short to learn from,
# a LoRA no longer holds what pruning took.
_SHORTEST, _LOWEST_RANK = 256, 4
_MOST_DEVICES = 64
# Parameters of a base from which `koff train` begins with a plan: of a smaller one, counting takes
# longer than it is worth.
WORTH_COUNTING = 10**8


@dataclass(frozen=True)
class Peaks:
    """Bytes that one device holds at once: when gates and memories are attached and caches filled,
    in a training step, while neurons are removed, and while the model is written."""

    attach: int
    step: int
    compact: int
    save: int

    @property
    def most(self) -> int:
        """The largest of them."""
        return max(dataclasses.astuple(self))


@dataclass(frozen=True)
class Change:
    """One change of a recipe, and the peak with it and all that stand before it.

    Args:
        change: as an override of a recipe, or a way to start it.
        costs: what is paid for it.
        peak: bytes.
    """

    change: str
    costs: str
    peak: int


@dataclass(frozen=True)
class Setting:
    """What the memory of a run depends on: the part of a recipe that changes are made to."""

    sizes: Sizes
    shape: StepShape
    counted: Counted
    devices: int = 1
    sharded: bool = False

    @property
    def weights(self) -> int:
        """Bytes of the base on one device. Sharded, three layers are whole at once, one that runs,
        what it came in and the next one, and the head is whole from its first use to the end of a
        step."""
        if not self.sharded:
            return self.sizes.weights
        return self.shard + 3 * self.sizes.layer + self.sizes.tail

    @property
    def shard(self) -> int:
        """Bytes of the base that a device holds all the time."""
        return -(-self.sizes.weights // (self.devices if self.sharded else 1))

    @property
    def learned(self) -> int:
        """Bytes of gates and memories, in fp32."""
        return 4 * self.sizes.trained

    @property
    def optimiser(self) -> int:
        """Bytes of Adam's two moments."""
        return 2 * self.learned

    @property
    def peaks(self) -> Peaks:
        """The peaks of one device."""
        sizes, prefix = self.sizes, 4 * self.sizes.prefix
        there = self.weights + self.learned
        if self.sharded:
            # The narrow model is made on the CPU; a device gathers one tensor after the other.
            kept = self.shard + self.learned
            # The head comes first where it is tied, and is there twice until it is unpacked.
            first = kept + 2 * sizes.tail
            return Peaks(
                attach=max(first, there + self.counted.prefill),
                step=self.optimiser + max(first, there + self.counted.peak),
                compact=self.optimiser + kept + max(sizes.matrix, sizes.tail),
                save=self.optimiser + kept,
            )
        # DDP reduces gradients in buckets of its own.
        buckets = self.learned if self.devices > 1 else 0
        narrow = sizes.dense - sizes.removed * sizes.dtype
        # Matrix by matrix: each is there twice for a moment, when the mask orders the neurons.
        # Narrowed, the second one is smaller.
        compact = there + self.optimiser + sizes.matrix
        if self.shape.few_bits:
            # Each takes the place of one in few bits. What comes out is measured.
            measured = self.counted.peaks["teacher"] + self.counted.loss
            compact = narrow + self.learned + self.optimiser + max(sizes.matrix, measured)
        return Peaks(
            attach=there + self.counted.prefill,
            step=there + self.optimiser + buckets + self.counted.peak,
            compact=compact,
            # A cache is put together from its frozen and its trained tokens.
            save=narrow + self.learned + self.optimiser + prefix,
        )


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes are those of one device.

    Args:
        model: of the recipe.
        setting: what memory depends on.
        kept: bytes of activations that the forward leaves for the backward without and with
            activation checkpointing.
        steps, tokens: of the run, tokens of all devices together.
        flops: of the whole run on one device: matrix products and attention.
        rate: at which a matrix product runs, per second; measured here, or given.
        checkpoint, checkpoints: bytes of one, and how many there are at once.
        output: bytes of the model and its memories on disk.
        memory: what a device has, or None.
        changes: what makes it fit, in order; () where it does.
        fits: None where no memory was named; with ``changes``, whether these are enough.
    """

    model: str
    setting: Setting
    kept: tuple[int, int]
    steps: int
    tokens: int
    flops: int
    rate: float
    checkpoint: int
    checkpoints: int
    output: int
    memory: int | None = None
    changes: tuple[Change, ...] = ()
    fits: bool | None = None

    @property
    def seconds(self) -> float:
        """At the rate of a matrix product: the run takes longer."""
        return self.flops / self.rate

    def headline(self) -> str:
        """Return the plan in one line."""
        return (
            f"{millions(self.setting.sizes.trained)} parameters learn, at most "
            f"{size_text(self.setting.peaks.most)} at once, {self._time()} or longer"
        )

    def _time(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(1, round(self.seconds)))

    def facts(self) -> dict[str, str]:
        """Return it as names and values, ready to print."""
        sizes, shape, peaks = self.setting.sizes, self.setting.shape, self.setting.peaks
        whole, part = map(size_text, self.kept)
        sharded = {}
        if self.setting.sharded:
            # Every process gathers the base there and narrows its own copy.
            gathered = sizes.weights + sizes.matrix + self.setting.learned
            sharded = {
                "of these, its shard": size_text(self.setting.shard),
                "CPU memory of each process, in the end": size_text(gathered),
            }
        return {
            "parameters, base": f"{sizes.parameters:,}",
            "parameters, removed at the target": f"{sizes.removed:,}",
            "parameters, each memory": f"{sizes.memory:,} x {sizes.memories}",
            "parameters, gates": f"{sizes.gates:,}",
            "weights": size_text(self.setting.weights),
            **sharded,
            "gates and memories, fp32": size_text(self.setting.learned),
            "of these, learned caches": size_text(4 * sizes.prefix * sizes.memories),
            "optimiser": size_text(self.setting.optimiser),
            "gradients": size_text(self.setting.counted.gradients),
            "activations": f"{whole} without checkpointing" if shape.checkpointing else whole,
            "activations, with checkpointing": part,
            "loss": size_text(self.setting.counted.loss),
            "peak, attach": size_text(peaks.attach),
            "peak, training step": size_text(peaks.step),
            "peak, compact": size_text(peaks.compact),
            "peak, save": size_text(peaks.save),
            "steps": f"{self.steps:,}",
            "tokens": f"{self.tokens:,}",
            "FLOPs, each device": f"{self.flops:.3g}",
            "time, at least": str(self._time()),
            "at the rate of a matrix product": f"{self.rate / 1e12:.3g} TFLOP/s",
            "on disk, one checkpoint": f"{size_text(self.checkpoint)} (up to {self.checkpoints})",
            "on disk, the result": size_text(self.output),
        }

    def advice(self) -> list[str]:
        """Return lines that say whether it fits, and what to change if not."""
        if self.memory is None:
            return []
        have, peak = size_text(self.memory), size_text(self.setting.peaks.most)
        if self.fits and not self.changes:
            return [f"It fits: at most {peak} of {have}."]
        if not self.changes:
            return [
                f"It does not fit: it takes {peak}, and a device has {have}; take a smaller model."
            ]
        lines = [f"It does not fit: it takes {peak}, and a device has {have}. Change, in turn:"]
        for change in self.changes:
            lines.append(f"  {change.change}: {size_text(change.peak)}; costs {change.costs}")
        lines.append("Then it fits." if self.fits else "That is not enough: take a smaller model.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, bytes and counts as numbers."""
        setting = self.setting
        return {
            "model": self.model,
            "devices": setting.devices,
            "fsdp": setting.sharded,
            "parameters": {
                "base": setting.sizes.parameters,
                "removed": setting.sizes.removed,
                "memory": setting.sizes.memory,
                "memories": setting.sizes.memories,
                "gates": setting.sizes.gates,
                "trained": setting.sizes.trained,
            },
            "bytes": {
                "weights": setting.weights,
                "shard": setting.shard,
                "learned": setting.learned,
                "prefix": 4 * setting.sizes.prefix * setting.sizes.memories,
                "optimiser": setting.optimiser,
                "gradients": setting.counted.gradients,
                "activations": self.kept[0],
                "activations_with_checkpointing": self.kept[1],
                "loss": setting.counted.loss,
            },
            "peaks": dataclasses.asdict(setting.peaks),
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "flops_per_second": self.rate,
            "seconds": self.seconds,
            "disk": {
                "checkpoint": self.checkpoint,
                "checkpoints": self.checkpoints,
                "output": self.output,
            },
            "memory": self.memory,
            "fits": self.fits,
            "changes": [dataclasses.asdict(change) for change in self.changes],
        }


def bytes_from(text: str) -> int:
    """Return what a size like "24GB", "12 GiB" or "800MB" means, in bytes.

    Raises:
        ValueError: anything else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if found is not None:
        number, unit, binary = found.groups()
        size = round(float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()])
    if size < 1:
        raise ValueError(
            f"koff plan: --memory must be a size such as 24GB or 24GiB, got {text!r}; correct it"
        )
    return size


@asked_by("koff plan")
def plan(
    recipe: Recipe,
    config: PreTrainedConfig,
    *,
    memory: int | None = None,
    devices: int = 1,
    rate: float | None = None,
    fsdp: bool = False,
) -> Plan:
    """Count what a recipe will take; no weights and no data are loaded.

    Args:
        recipe: the recipe.
        config: of its model, as ``check_model`` returns it.
        memory: bytes that each device has; None: nothing is compared.
        devices: how many train together, each on rows of its own.
        rate: floating-point operations per second of one device; None: that of a matrix product on
            this machine.
        fsdp: whether they share the base, as ``koff train --fsdp`` has them.

    Raises:
        TypeError, ValueError: a recipe that cannot be attached to such a model.
    """
    if devices < 1:
        raise ValueError(f"koff plan: --devices must be at least 1, got {devices}; raise it")
    if fsdp and devices == 1:
        raise ValueError(
            "koff plan: --fsdp must have several --devices to share the base, got 1; raise it"
        )
    if fsdp and recipe.quantization is not None:
        raise ValueError(
            "koff plan: --fsdp must have a plain base, got quantization: "
            f"{recipe.quantization}; leave one of them out"
        )
    train = recipe.train
    dtype = _dtype(recipe, config)
    saved = saved_dtype(recipe, config)  # now: transformers writes a model's dtype into its config
    sizes = sizes_of(config, recipe.koff, dtype, recipe.quantization, saved)
    shape = StepShape(
        train.batch_size,
        train.block_size,
        checkpointing=train.activation_checkpointing,
        distils=train.distils_by(False) > 0,
        accumulates=train.gradient_accumulation > 1,
        mixed=train.batching == "mixed",
        autocast=train.bf16,
        few_bits=recipe.quantization is not None,
    )
    counted = count_step(config, recipe.koff, dtype, shape)
    other = replace(shape, checkpointing=not shape.checkpointing)
    kept = [counted.kept, kept_by_forward(config, recipe.koff, dtype, other)]
    setting = Setting(sizes, shape, counted, devices, fsdp)
    micro_batches = train.steps * train.gradient_accumulation
    flops = micro_batches * counted.flops
    if train.fix_mask_at is not None and recipe.koff.target_sparsity:
        # From then on the removed neurons are left out: in the forward, in the backward's gradient
        # for the layer's input, and in a recomputation.
        passes = 3 if shape.checkpointing else 2
        narrow = micro_batches - round(micro_batches * train.fix_mask_at)
        flops -= narrow * passes * 2 * shape.rows * shape.tokens * sizes.removed
    learned = 4 * sizes.trained
    # As ``room_for`` has them: a new one is there before the oldest goes, and one is made that is
    # not asked for.
    made = train.steps // train.save_every + 1 if train.save_every else 0
    found = Plan(
        model=recipe.model,
        setting=setting,
        kept=tuple(reversed(kept) if shape.checkpointing else kept),
        steps=train.steps,
        tokens=micro_batches * shape.rows * shape.tokens * devices,
        flops=flops,
        rate=rate or _measured_rate(dtype),
        checkpoint=3 * learned + SMALL_FILES,
        checkpoints=min(made, train.keep_checkpoints + 1) + 1,
        output=sizes.dense - sizes.removed * sizes.dtype + 4 * sizes.memories * sizes.memory,
        memory=memory,
    )
    if memory is None:
        return found
    if setting.peaks.most <= memory:
        return replace(found, fits=True)
    changes = _changes(recipe, config, dtype, saved, setting, memory)
    return replace(found, changes=changes, fits=bool(changes) and changes[-1].peak <= memory)


def _changes(
    recipe: Recipe,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    saved: torch.dtype,
    now: Setting,
    memory: int,
) -> tuple[Change, ...]:
    """Return what to change, the cheapest first, until it fits or nothing is left."""
    changes: list[Change] = []
    train, koff = recipe.train, recipe.koff

    def fits() -> bool:
        return now.peaks.most <= memory

    def took(change: str, costs: str) -> None:
        changes.append(Change(change, costs, now.peaks.most))

    def with_shape(**parts: Any) -> Setting:
        shape = replace(now.shape, **parts)
        return replace(now, shape=shape, counted=count_step(config, koff, dtype, shape))

    def largest(values: list[int], make: Callable[[int], Setting]) -> tuple[int, Setting]:
        """The largest value that fits, or the smallest of all."""
        smallest = make(values[-1])
        if smallest.peaks.most <= memory:
            for value in values[:-1]:
                made = make(value)
                if made.peaks.most <= memory:
                    return value, made
        return values[-1], smallest

    if not now.shape.checkpointing:
        now = with_shape(checkpointing=True)
        took("train.activation_checkpointing=true", "a second forward pass of every layer")
    if not fits() and now.shape.rows > 1:
        whole = now.shape.rows
        rows, now = largest(
            [n for n in range(whole - 1, 0, -1) if whole % n == 0],
            lambda n: with_shape(rows=n, accumulates=True),
        )
        times = train.gradient_accumulation * whole // rows
        took(
            f"train.batch_size={rows} train.gradient_accumulation={times}",
            "smaller matrix products; a step stays the same",
        )
    is_plain = recipe.quantization is None and recipe.gguf_file is None
    if not fits() and is_plain and not now.sharded:
        # Only where it is enough: nothing can be sharded with it.
        few = with_shape(few_bits=True)
        for name, bits in (("int8", "8"), ("nf4", "4")):
            few = replace(few, sizes=sizes_of(config, koff, dtype, name, saved))
            if few.peaks.most <= memory:
                now = few
                took(f"quantization={name}", f"a base rounded to {bits} bits while it trains")
                break
    if not fits() and now.shape.tokens > _SHORTEST:
        halves = [now.shape.tokens >> n for n in range(1, 20)]
        tokens, now = largest(
            [n for n in halves if n >= _SHORTEST] or [_SHORTEST], lambda n: with_shape(tokens=n)
        )
        took(f"train.block_size={tokens}", "shorter contexts to learn from; half the tokens")
    if not fits() and now.shape.distils:
        now = with_shape(distils=False)
        took("train.distillation_weight=0", "less of what pruning loses is won back")
    if not fits() and koff.lora is not None and koff.lora.r > _LOWEST_RANK and koff.memories:

        def with_rank(rank: int) -> Setting:
            nonlocal koff
            alpha = recipe.koff.lora.alpha * rank / recipe.koff.lora.r  # the same scaling
            koff = replace(koff, lora=replace(koff.lora, r=rank, alpha=alpha))
            sizes = sizes_of(config, koff, dtype, recipe.quantization, saved)
            return replace(now, sizes=sizes, counted=count_step(config, koff, dtype, now.shape))

        ranks = [koff.lora.r >> n for n in range(1, 20)]
        rank, now = largest([r for r in ranks if r >= _LOWEST_RANK] or [_LOWEST_RANK], with_rank)
        alpha = recipe.koff.lora.alpha * rank / recipe.koff.lora.r
        took(f"koff.lora.r={rank} koff.lora.alpha={alpha:g}", "memories that hold less")
    counts = [n for n in (2**i for i in range(1, 7)) if now.devices < n <= _MOST_DEVICES]
    counts = [now.devices, *counts] if now.devices > 1 and not now.sharded else counts
    if not fits() and counts and not now.shape.few_bits:
        for devices in counts:
            now = replace(now, devices=devices, sharded=True)
            if fits():
                break
        took(f"FSDP over {now.devices} devices", "devices, and what goes between them")
    return tuple(changes)


def _dtype(recipe: Recipe, config: PreTrainedConfig) -> torch.dtype:
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def saved_dtype(recipe: Recipe, config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that the base of a recipe is saved in; one that trains in few bits takes the
    weights of its checkpoint."""
    return _dtype(replace(recipe, dtype="auto") if recipe.quantization else recipe, config)


def _measured_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return how many floating-point operations a second a large matrix product does on this
    machine's accelerator, or on its processor without one."""
    accelerator = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if accelerator else torch.device("cpu")
    size = 4096 if accelerator else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        if accelerator:
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    run(1)
    times = max(1, round(seconds / max(run(1), 1e-6)))
    return times * 2 * size**3 / run(times)
