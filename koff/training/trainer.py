"""Learn gates and memories together: ``KoffTrainer`` on ``transformers.Trainer``."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..data.losses import token_losses
from ..errors import asked_by, require
from ..evaluation.perplexity import check_vocabulary
from ..evaluation.perplexity import evaluate as evaluate_domains
from ..model import arch
from ..model.prefill import fill_from_tokens
from ..model.state import KoffState, require_attached
from ..pruning.binarize import UNDECIDED_WARNING, binarize, sparsity
from .arguments import Settings
from .checkpointing import SafeTrainer
from .mixture import build_mixture
from .optim import clip_groups, clipped_parts, hold_constant_groups, parameter_groups
from .schedule import MixtureDataset, MixtureSampler, collate

logger = logging.getLogger("koff")

FEW_GATE_STEPS = 1000


class _ClampGates(TrainerCallback):
    """Keeps log_alpha in range after every optimiser step."""

    def __init__(self, state: KoffState):
        self.koff = state

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.koff.gates is not None and not self.koff.gates.fixed:
            self.koff.gates.clamp_()


class KoffTrainer(SafeTrainer):
    """Trains the gates and memories of an attached model; the base stays frozen.

    Loss: (1 - w) mean-token cross-entropy + w KL to the frozen model (``distillation_weight``)
    + lambda1 (s - t) + c (s - t)^2, where s is the expected share of closed gates and t the target,
    warmed up; lambda1 is ascended.

    Args:
        model: an attached model.
        args: ``TrainingArguments`` or ``KoffTrainingArguments``; a copy is used. Without
            ``max_steps``, ``num_train_epochs`` counts passes over all domains together; general
            steps come on top.
        train_datasets: domain -> documents (texts, records with "text" or "input_ids", a
            datasets.Dataset, or ``PackedBlocks``). Each memory needs the domain of its name; with
            no memories the rows use none.
        general_datasets: parts of the general mixture, or None.
        general_weights: probability of each part; None: by number of tokens.
        eval_datasets: domain -> documents for ``evaluate``, or None.
        processing_class: the tokenizer.
        callbacks: transformers callbacks.

    Raises:
        KeyError, TypeError, ValueError: domains or arguments that do not fit each other; nothing
            was written.

    Source: KOFF (arXiv 2605.29075); constraint after LLM-Shearing (arXiv 2310.06694).
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_datasets: Mapping[str, Any],
        general_datasets: Mapping[str, Any] | None = None,
        general_weights: Mapping[str, float] | None = None,
        eval_datasets: Mapping[str, Any] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        where = "KoffTrainer"
        with asked_by(where):
            state = require_attached(model)
        good, got = isinstance(args, TrainingArguments), type(args).__name__
        step = "make KoffTrainingArguments"
        require(good, where, "args", "be TrainingArguments", got, step, TypeError)
        args = copy.copy(args)
        self.settings = Settings.of(args)
        compacted = arch.widths(model) != state.dense_widths
        self.distillation_weight = self.settings.distils_by(compacted)
        open_gates = state.gates is not None and not state.gates.fixed
        step = "attach gates or memories"
        something = open_gates or len(state.memories) > 0
        require(something, where, "the model", "have something to train", "nothing", step)
        self.mixture = build_mixture(
            state,
            self.settings,
            (train_datasets, general_datasets, general_weights),
            processing_class,
            _seed(args),
        )
        for source in self.mixture.sources:
            check_vocabulary(model, source.blocks, where, f"the text of {source.name!r}")
        self.eval_datasets = eval_datasets
        rows = MixtureDataset(self.mixture, state.memories.names)
        self._set_steps(args)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # an unused memory has no gradient
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows if eval_datasets else None,
            processing_class=processing_class,
            data_collator=collate,
            callbacks=[_ClampGates(state), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False
        self._norms: list[Tensor] = []
        self._sums = torch.zeros(len(self.mixture.sources), 2, device=self.args.device)
        self._warn_few_steps()

    # ---- data ----

    def _set_steps(self, args: TrainingArguments) -> None:
        if args.max_steps <= 0:
            mixture = self.mixture
            rows = sum(len(source.blocks) for source in mixture.domains)
            per_step = (
                args.per_device_train_batch_size
                * args.gradient_accumulation_steps
                * args.world_size
            )
            steps, every = math.ceil(args.num_train_epochs * rows / per_step), mixture.general_every
            args.max_steps = max(1, steps + ((steps - 1) // (every - 1) if every > 1 else 0))

    def get_train_dataloader(self) -> DataLoader:
        """The whole run's batches, in an order that depends on the seed and the step alone."""
        args = self.args
        sampler = MixtureSampler(
            self.mixture,
            self._train_batch_size,
            args.max_steps,
            args.gradient_accumulation_steps,
            self.accelerator.num_processes,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    # ---- loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean-token cross-entropy, mixed with the divergence from the frozen model where it is
        asked for, plus the sparsity constraint while the mask is open."""
        ids, sources = inputs["input_ids"], inputs["source"]
        logits = model(input_ids=ids, memory=inputs["memory"], use_cache=False).logits
        losses, divergences = token_losses(logits, ids, self._teacher(model, ids))
        per_row = losses.mean(1)
        loss = per_row.mean()
        require(
            bool(torch.isfinite(loss)),
            "KoffTrainer",
            f"the loss at step {self.state.global_step}",
            "be finite",
            float(loss.detach()),
            "lower the learning rates or check the data",
        )
        if model.training:
            index = torch.tensor(sources, device=self._sums.device)
            values = torch.stack(
                [per_row.detach().float(), torch.ones_like(per_row, dtype=torch.float32)], 1
            )
            self._sums.index_add_(0, index, values.to(self._sums.device))
            if divergences is not None:
                weight = self.distillation_weight
                loss = (1 - weight) * loss + weight * divergences.mean()
            loss = loss + self.constraint()
        return (loss, {"logits": logits}) if return_outputs else loss

    def _teacher(self, model, ids: Tensor) -> Tensor | None:
        """Logits of the same frozen model with gates open and no memory, where a training step
        distils from it."""
        if not model.training or self.distillation_weight == 0:
            return None
        with torch.no_grad(), self.koff.bypass():
            return model(input_ids=ids, use_cache=False).logits

    def target_now(self) -> float:
        """The warmed-up target t."""
        warm = self.settings.sparsity_warmup_ratio * self.args.max_steps
        return self.koff.gates.target * min(1.0, (self.state.global_step + 1) / max(warm, 1.0))

    def constraint(self) -> Tensor | float:
        """lambda1 (s - t) + c (s - t)^2; 0 once the mask is fixed."""
        gates = self.koff.gates
        if gates is None or gates.fixed:
            return 0.0
        gap = gates.expected_sparsity() - self.target_now()
        return gates.multiplier * gap + self.settings.sparsity_penalty * gap**2

    def training_step(self, model, inputs, *args, **kwargs):
        """As transformers', after fixing the mask when its time has come."""
        at, gates = self.settings.fix_mask_at, self.koff.gates
        if at is not None and gates is not None and not gates.fixed:
            if self.state.global_step >= self._gate_steps():
                self._fix_mask(model, inputs)
        if gates is not None and gates.fixed and not len(self.koff.memories):
            self._stop()  # gates alone: nothing is left to tune
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def _stop(self) -> None:
        """End the run after this step, with a checkpoint and an evaluation if it makes any."""
        self.control.should_training_stop = True
        self.control.should_save |= self.args.save_strategy == "steps"
        self.control.should_evaluate |= self.args.eval_strategy == "steps"

    @torch.no_grad()
    def _fix_mask(self, model, inputs) -> None:
        """Binarise, and log what it did to the loss of the current batch."""
        inputs = self._prepare_inputs(dict(inputs))
        model.eval()
        soft = float(self.compute_loss(model, inputs))
        report = binarize(
            self.accelerator.unwrap_model(model), multiple_of=self.settings.width_multiple_of
        )
        hard = float(self.compute_loss(model, inputs))
        model.train()
        self.log(
            {"loss_soft_gates": soft, "loss_hard_gates": hard, "undecided_before": report.undecided}
        )
        if report.undecided > UNDECIDED_WARNING:
            logger.warning(
                "koff: %.0f %% of the gates were undecided when the mask was fixed "
                "(loss %.3f -> %.3f); train them longer or raise gate_learning_rate",
                100 * report.undecided,
                soft,
                hard,
            )

    def _gate_steps(self) -> int:
        """How many steps the gates are trained for, at least one."""
        return max(1, round((self.settings.fix_mask_at or 1.0) * self.args.max_steps))

    def _warn_few_steps(self) -> None:
        if self.koff.gates is None or self.koff.gates.fixed:
            return
        steps = self._gate_steps()
        if steps < FEW_GATE_STEPS:
            logger.warning(
                "koff: %d steps are few for the gates; about %d decide better",
                steps,
                FEW_GATE_STEPS,
            )

    # ---- optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group each for LoRA, KV, gates and the multiplier (which ascends)."""
        if self.optimizer is not None:
            return self.optimizer
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = cls(self.groups(model), **kwargs)
        require(
            "maximize" in self.optimizer.defaults,
            "KoffTrainer",
            "optim",
            "be able to maximise (the multiplier)",
            self.args.optim,
            "use adamw_torch or adamw_torch_fused",
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """transformers' scheduler for the memories; gates and multiplier keep their rates."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        hold_constant_groups(scheduler, (optimizer or self.optimizer).param_groups)
        return scheduler

    def _clip_grad_norm(self, model: nn.Module):
        """Clip each group by itself; the multiplier is left alone. Returns the norm over all."""
        self._norms = clip_groups(self.optimizer.param_groups, self.args.max_grad_norm)
        return torch.linalg.vector_norm(torch.stack([norm.float() for norm in self._norms]))

    # ---- start, logs, evaluation ----

    def start(self) -> None:
        """Fill KV memories from text where they ask for it."""
        for source in self.mixture.domains:
            if source.memory >= 0 and not self.koff.memories[source.memory].kv_filled:
                fill_from_tokens(self.model, source.name, source.blocks.flatten())

    def groups(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """One parameter group each for LoRA, KV, gates and the multiplier."""
        koff = self.accelerator.unwrap_model(model or self.model).koff
        return parameter_groups(koff, self.settings, self.args.weight_decay)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the loss per source, the last gradient norm of each part, and the sparsities,
        undecided share, multiplier and target while gates are open."""
        if "loss" in logs:
            parts = zip(clipped_parts(self.koff), self._norms, strict=True) if self._norms else ()
            norms = {f"grad_norm_{name}": float(norm) for name, norm in parts}
            logs = {**logs, **norms, **self._source_losses(), **self._sparsity_logs()}
        super().log(logs, *args, **kwargs)

    def _source_losses(self) -> dict[str, float]:
        sums = self.accelerator.reduce(self._sums.clone(), reduction="sum").tolist()
        self._sums.zero_()
        names = [source.name for source in self.mixture.sources]
        return {
            f"loss_{name}": total / rows
            for name, (total, rows) in zip(names, sums, strict=True)
            if rows
        }

    def _sparsity_logs(self) -> dict[str, float]:
        gates = self.koff.gates
        if gates is None:
            return {}
        report = sparsity(self.accelerator.unwrap_model(self.model))
        logs = {
            "sparsity_mlp": report.mlp,
            "sparsity_model": report.model,
            "sparsity_non_embedding": report.non_embedding,
            "undecided": report.undecided,
        }
        if not gates.fixed:
            logs["multiplier"] = float(gates.multiplier.detach())
            logs["sparsity_target"] = self.target_now()
        return logs

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Perplexity of every evaluation domain with its own memory (see ``koff.evaluate``)."""
        where, what, step = "KoffTrainer.evaluate", "eval_datasets", "pass domain -> documents"
        data = self.eval_datasets if eval_dataset is None else eval_dataset
        require(data is not None, where, what, "be given", "none", step)
        good, got = isinstance(data, Mapping), type(data).__name__
        require(good, where, what, "be a mapping", got, step, TypeError)
        require(len(data) > 0, where, what, "name a domain", "none", step)
        model, names = self.accelerator.unwrap_model(self.model), self.koff.memories.names
        metrics, nats = {}, []
        for domain, documents in data.items():
            memory = domain if domain in names else None
            rows = evaluate_domains(
                model,
                self.processing_class,
                {domain: documents},
                memories=[memory],
                block_size=self.settings.block_size,
                batch_size=self.args.per_device_eval_batch_size,
            )
            metrics[f"{metric_key_prefix}_{domain}_perplexity"] = rows[0].perplexity
            nats.append(math.log(rows[0].perplexity))
        metrics[f"{metric_key_prefix}_loss"] = sum(nats) / len(nats)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed
