"""Settings of a training run beyond transformers' own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ..errors import require

_HF_LEARNING_RATE = 5e-5
DISTILLATION_WEIGHT = 0.7
_RATES = (
    "gate_learning_rate",
    "lora_learning_rate",
    "kv_learning_rate",
    "multiplier_learning_rate",
    "sparsity_penalty",
)


@dataclass
class Settings:
    """koff's own settings of a run, and their defaults.

    Args:
        gate_learning_rate: of log_alpha.
        lora_learning_rate: of the LoRA matrices; ``weight_decay`` applies to them only. For 6 M
            parameters 4e-3 was best (docs/experiments.md, 2 and 3); large models want less.
        kv_learning_rate: of the learned caches; 1e-2 was best (same experiments).
        multiplier_learning_rate: of the ascent on the Lagrange multiplier.
        sparsity_penalty: c of lambda1 (s - t) + c (s - t)^2.
        sparsity_warmup_ratio: share of the steps over which the target t rises from 0.
        general_every: every n-th step runs on the general mixture; 0 never.
        batching: "mixed" (each row its own memory) or "single" (each batch one domain).
        fix_mask_at: share of the steps after which the mask is binarised and only the memories are
            tuned; None leaves binarising to the caller. The half is docs/experiments.md, 2.
        width_multiple_of: as ``multiple_of`` of ``koff.binarize``.
        block_size: tokens per training row.
        distillation_weight: w in 0..1; the loss is (1 - w) cross-entropy + w KL to the same frozen
            model with its gates open and no memory. 0: no second forward. None: 0.7
            (docs/experiments.md, 1 and 3), but 0 for a compacted model: its unpruned self is gone.
    """

    gate_learning_rate: float = 0.1
    lora_learning_rate: float = 1e-3
    kv_learning_rate: float = 1e-2
    multiplier_learning_rate: float = 0.01
    sparsity_penalty: float = 10.0
    sparsity_warmup_ratio: float = 0.2
    general_every: int = 4
    batching: Literal["mixed", "single"] = "mixed"
    fix_mask_at: float | None = 0.5
    width_multiple_of: int = 64
    block_size: int = 512
    distillation_weight: float | None = None

    @classmethod
    def of(cls, args: TrainingArguments) -> Settings:
        """Read and check the settings; plain ``TrainingArguments`` get the defaults.

        Raises:
            ValueError: an illegal value, or a transformers setting that koff cannot honour.
        """
        given = {name: getattr(args, name) for name in OWN_FIELDS if hasattr(args, name)}
        settings = cls(**given)
        settings._check()
        _check_foreign(args)
        return settings

    def distils_by(self, compacted: bool) -> float:
        """``distillation_weight`` of a run on a compacted model, or on one with all its neurons.

        Raises:
            ValueError: it is positive for a compacted model.
        """
        weight = self.distillation_weight
        if weight is None:
            return 0.0 if compacted else DISTILLATION_WEIGHT
        require(
            not (compacted and weight),
            "KoffTrainer",
            "distillation_weight",
            "be None or 0 for a compacted model (the unpruned one is gone)",
            weight,
            "leave it out",
        )
        return weight

    def _check(self) -> None:
        where = "KoffTrainingArguments"
        for name in _RATES:
            value: Any = getattr(self, name)
            good = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            require(good, where, name, "be a finite number of at least 0", repr(value), "change it")
        ratio = self.sparsity_warmup_ratio
        require(0 <= ratio <= 1, where, "sparsity_warmup_ratio", "lie in 0..1", ratio, "change it")
        weight = self.distillation_weight
        rule = "be None or lie in 0..1"
        good = weight is None or 0 <= weight <= 1
        require(good, where, "distillation_weight", rule, weight, "change it")
        at = self.fix_mask_at
        require(
            at is None or 0 < at <= 1,
            where,
            "fix_mask_at",
            "be None or lie in (0, 1]",
            at,
            "change it",
        )
        known = self.batching in ("mixed", "single")
        require(
            known, where, "batching", "be 'mixed' or 'single'", repr(self.batching), "choose one"
        )
        for name, least in (("general_every", 0), ("width_multiple_of", 1), ("block_size", 2)):
            value = getattr(self, name)
            good = isinstance(value, int) and value >= least
            require(
                good,
                where,
                name,
                f"be a whole number of at least {least}",
                repr(value),
                "change it",
            )


OWN_FIELDS = tuple(f.name for f in dataclasses.fields(Settings))


@dataclass
class KoffTrainingArguments(Settings, TrainingArguments):
    """transformers' ``TrainingArguments`` with koff's ``Settings``.

    ``learning_rate`` is not used: gates, LoRA, KV and the multiplier have rates of their own. The
    learning-rate scheduler acts on LoRA and KV; gates and multiplier keep theirs. ``max_grad_norm``
    clips each group by itself.
    """

    adam_beta2: float = 0.95
    report_to: None | str | list[str] = "none"

    @property
    def device(self) -> torch.device:
        """As transformers', but one CPU has no index: torch 2.11 cannot load an optimiser to the
        "cpu:0" that ranks without an accelerator get."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def _check_foreign(args: TrainingArguments) -> None:
    where = "KoffTrainer"
    require(
        args.learning_rate == _HF_LEARNING_RATE,
        where,
        "learning_rate",
        "not be set (gates, LoRA and KV have rates of their own)",
        args.learning_rate,
        "set lora_learning_rate, kv_learning_rate and gate_learning_rate of KoffTrainingArguments",
    )
    require(
        not args.load_best_model_at_end,
        where,
        "load_best_model_at_end",
        "be False (memories and mask belong to the last step)",
        True,
        "resume from a checkpoint instead",
    )
    scheduler, minimum = args.lr_scheduler_type, (args.lr_scheduler_kwargs or {}).get("min_lr")
    rule, step = "be a function of the step", "choose linear, cosine, constant, ..."
    good = scheduler not in ("reduce_lr_on_plateau", "greedy")
    require(good, where, "lr_scheduler_type", rule, str(scheduler), step)
    rule, step = "not be set (rates differ by group)", "set min_lr_rate, a share of each rate"
    require(minimum is None, where, "min_lr of lr_scheduler_kwargs", rule, minimum, step)
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        rule, got = "be 'steps' or 'no' (the run is one mixture without epochs)", "'epoch'"
        require(getattr(args, name) != "epoch", where, name, rule, got, "count steps")
    refused = {
        "fp16": (args.fp16, "use bf16=True, or load the base in float16"),
        "deepspeed": (bool(args.deepspeed), "its checkpoints are pickles; use DDP or FSDP"),
        "push_to_hub": (args.push_to_hub, "koff.save the trained model and upload that folder"),
        "use_liger_kernel": (args.use_liger_kernel, "its patched MLPs would bypass the gates"),
        "more than one GPU in a process": (args.n_gpu > 1, "start one process per GPU: torchrun"),
    }
    for name, (given, step) in refused.items():
        require(not given, where, name, "not be used", given, step)
