"""koff's own settings of a training run, and those of transformers that koff cannot honour.

A recipe has them too, and reading one needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# transformers' default learning rate: any other value was set by somebody who expects it to count.
_UNSET_LEARNING_RATE = 5e-5

# The default w of (1 - w) cross-entropy + w KL. Mixed, the two win back more of what pruning loses
# than either alone, and a wrong memory hurts less (docs/experiments.md, 1 and 3).
DISTILLATION_WEIGHT = 0.7

MASKS = ("learned", "random", "magnitude", "saliency")


@dataclass
class Settings:
    """koff's own settings of a run, and their defaults.

    Args:
        gate_learning_rate: of log_alpha.
        lora_learning_rate: of the LoRA matrices; ``weight_decay`` applies to them only.
        kv_learning_rate: of the learned caches.
        multiplier_learning_rate: of the ascent on the Lagrange multiplier.
        sparsity_penalty: c of lambda1 (s - t) + c (s - t)^2.
        saliency_batches: on so many of the first batches the saliency of every neuron is measured,
            by which its gate starts (``koff.training.saliency``). 0: gates start all alike, open.
        sparsity_warmup_ratio: share of the steps over which the target t rises from 0 where gates
            start all alike; by saliency they start at the target.
        general_every: every n-th step runs on the general mixture; 0 never.
        batching: "mixed" (each row its own memory) or "single" (each batch one domain).
        no_memory_rows: share of the rows that go without a memory, in 0..1, until the mask is
            fixed: the backbone then stays a model of its own, for ``memory=None`` and for memories
            that come later.
        distractor_rows: share of the domains' rows, in 0..1, that have the memory of another
            domain: a wrong memory then costs less, and the own one gains a little less
            (docs/experiments.md, 8).
        mask: "learned" together with the memories; or fixed before the first step, which trains the
            memories alone: "random", by "magnitude" (``koff.pruning.scores``) or by "saliency".
        fix_mask_at: share of the steps after which a mask that is learned is binarised and only the
            memories are tuned; None leaves binarising to the caller.
        width_multiple_of: as ``multiple_of`` of ``koff.binarize``.
        block_size: tokens per training row.
        distillation_weight: w in 0..1; the loss is (1 - w) cross-entropy + w KL to the same frozen
            model with its gates open and no memory. 0: no second forward. None: 0.7, but 0 for a
            compacted model, whose unpruned self is gone.
    """

    # Adam moves a gate by about this much per step: from 2.5, where log_alpha starts, to -1.6,
    # where a gate is as likely closed as open, takes some forty steps.
    gate_learning_rate: float = 0.1
    # For 6 M parameters 4e-3 was best (docs/experiments.md, 2 and 3); large models want less.
    lora_learning_rate: float = 1e-3
    # The best of the same experiments. A cache's gradient is a tenth of LoRA's (entry 4), but Adam
    # divides that out.
    kv_learning_rate: float = 1e-2
    # A tenth of the gates' rate, so that the gates follow the multiplier and do not chase it.
    multiplier_learning_rate: float = 0.01
    # What pulls before the multiplier has grown: a slope of 2 where a tenth is missing.
    sparsity_penalty: float = 10.0
    # Asked for the whole sparsity at once, gates would close before they know which matter.
    sparsity_warmup_ratio: float = 0.2
    saliency_batches: int = 16
    general_every: int = 4
    batching: Literal["mixed", "single"] = "mixed"
    no_memory_rows: float = 0.3
    distractor_rows: float = 0.0
    mask: Literal["learned", "random", "magnitude", "saliency"] = "learned"
    # With the rates above, half of the run for tuning won back more than 30 % of it at half of them
    # (docs/experiments.md, 2).
    fix_mask_at: float | None = 0.5
    # Kept widths that fill the tiles of a GEMM on every device.
    width_multiple_of: int = 64
    block_size: int = 512
    distillation_weight: float | None = None

    @classmethod
    def of(cls, args: TrainingArguments) -> Settings:
        """Return the settings in ``args``, checked; plain ``TrainingArguments`` get the defaults.

        Raises:
            ValueError: an illegal value, or a transformers setting that koff cannot honour.
        """
        given = {name: getattr(args, name) for name in OWN_FIELDS if hasattr(args, name)}
        settings = cls(**given)
        settings._check()
        _check_transformers_settings(args)
        return settings

    def distils_by(self, compacted: bool) -> float:
        """Return the weight w of a run on a compacted model, or on one with all its neurons.

        Raises:
            ValueError: ``distillation_weight`` is positive for a compacted model.
        """
        weight = self.distillation_weight
        if weight is None:
            return 0.0 if compacted else DISTILLATION_WEIGHT
        if compacted and weight:
            raise ValueError(
                "KoffTrainer: distillation_weight must be None or 0 for a compacted model (the "
                f"unpruned one is gone), got {weight}; leave it out"
            )
        return weight

    def _check(self) -> None:
        for name in (
            "gate_learning_rate",
            "lora_learning_rate",
            "kv_learning_rate",
            "multiplier_learning_rate",
            "sparsity_penalty",
        ):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"KoffTrainingArguments: {name} must be a finite number of at least 0, got "
                    f"{value!r}; change it"
                )
        for name in ("sparsity_warmup_ratio", "no_memory_rows", "distractor_rows"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"KoffTrainingArguments: {name} must lie in 0..1, got {value}; change it"
                )
        weight = self.distillation_weight
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(
                "KoffTrainingArguments: distillation_weight must be None or lie in 0..1, got "
                f"{weight}; change it"
            )
        if self.fix_mask_at is not None and not 0 < self.fix_mask_at <= 1:
            raise ValueError(
                "KoffTrainingArguments: fix_mask_at must be None or lie in (0, 1], got "
                f"{self.fix_mask_at}; change it"
            )
        if self.batching not in ("mixed", "single"):
            raise ValueError(
                "KoffTrainingArguments: batching must be 'mixed' or 'single', got "
                f"{self.batching!r}; choose one"
            )
        if self.mask not in MASKS:
            raise ValueError(
                f"KoffTrainingArguments: mask must be one of {', '.join(MASKS)}, got "
                f"{self.mask!r}; choose one"
            )
        if self.mask == "saliency" and self.saliency_batches == 0:
            raise ValueError(
                "KoffTrainingArguments: saliency_batches must be at least 1 for mask='saliency', "
                "got 0; 16 is usual"
            )
        for name, least in (
            ("saliency_batches", 0),
            ("general_every", 0),
            ("width_multiple_of", 1),
            ("block_size", 2),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"KoffTrainingArguments: {name} must be a whole number of at least {least}, "
                    f"got {value!r}; change it"
                )


OWN_FIELDS = tuple(field.name for field in dataclasses.fields(Settings))


def checkpointing_name(args: TrainingArguments | type[TrainingArguments]) -> str:
    """Return what the installed transformers calls activation checkpointing in its arguments."""
    new = "activation_checkpointing"  # 5.17 has the other one, and from 5.23 on that one warns
    return new if hasattr(args, new) else "gradient_checkpointing"


def enable_checkpointing(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Switch activation checkpointing on, in place, as transformers does when it trains."""
    from transformers import TrainingArguments  # at run time: a recipe is read without it

    name = checkpointing_name(TrainingArguments)
    getattr(model, f"{name}_enable")({"use_reentrant": reentrant})


def _check_transformers_settings(args: TrainingArguments) -> None:
    """Refuse what transformers offers and koff could not honour, or would have to ignore."""
    if args.learning_rate != _UNSET_LEARNING_RATE:
        raise ValueError(
            "KoffTrainer: learning_rate must not be set (gates, LoRA and KV have rates of their "
            f"own), got {args.learning_rate}; set lora_learning_rate, kv_learning_rate and "
            "gate_learning_rate of KoffTrainingArguments"
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "KoffTrainer: load_best_model_at_end must be False (memories and mask belong to the "
            "last step), got True; resume from a checkpoint instead"
        )
    # These two follow the loss, and have no function per group that gates could be held out of.
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            "KoffTrainer: lr_scheduler_type must be a function of the step, got "
            f"{args.lr_scheduler_type!s}; choose linear, cosine, constant, ..."
        )
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "KoffTrainer: ddp_find_unused_parameters must be True or left out (a memory that no "
            "row used has no gradient, nor has a gate once the mask is fixed), got False; leave it "
            "out"
        )
    name = checkpointing_name(args)
    reentrant = (getattr(args, f"{name}_kwargs") or {}).get("use_reentrant", False)
    if getattr(args, name) and reentrant and args.world_size > 1:
        raise ValueError(
            f"KoffTrainer: use_reentrant of {name}_kwargs must be False on several processes (DDP "
            "does not see what a reentrant layer uses), got True; leave it out"
        )
    minimum = (args.lr_scheduler_kwargs or {}).get("min_lr")
    if minimum is not None:
        raise ValueError(
            "KoffTrainer: min_lr of lr_scheduler_kwargs must not be set (rates differ by group), "
            f"got {minimum}; set min_lr_rate, a share of each rate"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(
                f"KoffTrainer: {name} must be 'steps' or 'no' (the run is one mixture without "
                "epochs), got 'epoch'; count steps"
            )
    for name in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    ):
        if getattr(args, name) < 1:
            raise ValueError(
                f"KoffTrainer: {name} must be at least 1, got {getattr(args, name)}; raise it"
            )
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise ValueError(
            "KoffTrainer: max_steps or num_train_epochs must be positive, got "
            f"{args.max_steps} and {args.num_train_epochs}; set one of them"
        )
    refused = {
        "label_smoothing_factor": (
            bool(args.label_smoothing_factor),
            "leave it out: distillation_weight is koff's soft target",
        ),
        "train_sampling_strategy": (
            args.train_sampling_strategy != "random",
            "leave it out: rows are of equal length, and in koff's own order",
        ),
        "fp16": (args.fp16, "use bf16=True, or load the base in float16"),
        "deepspeed": (bool(args.deepspeed), "its checkpoints are pickles; use DDP or FSDP"),
        "push_to_hub": (args.push_to_hub, "koff.save the trained model and upload that folder"),
        "use_liger_kernel": (args.use_liger_kernel, "its patched MLPs would bypass the gates"),
        "more than one GPU in a process": (args.n_gpu > 1, "start one process per GPU: torchrun"),
    }
    for name, (given, step) in refused.items():
        if given:
            raise ValueError(f"KoffTrainer: {name} must not be used, got {given}; {step}")
