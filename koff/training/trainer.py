"""Learn gates and memories together: ``KoffTrainer`` on ``transformers.Trainer``.

The file follows a run: what is checked before it, how it starts or goes on, what a step does and
how the mask is fixed amid the steps, the optimiser, the logs, and what is measured and saved in the
end. How checkpoints are written is in ``checkpointing``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import synchronize_rng_states
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..data.losses import Head, token_losses
from ..data.records import IGNORED
from ..errors import asked_by
from ..evaluation.perplexity import evaluate as evaluate_domains
from ..model import arch
from ..model.forward_context import BASE
from ..model.prefill import fill_from_tokens
from ..model.sharding import accelerate_shards, is_sharded
from ..model.state import KoffState, require_attached
from ..pruning.binarize import binarize, check_multiple, sparsity
from ..pruning.scores import neuron_magnitude, random_scores
from ..storage.lock import locked
from ..storage.processes import one_writes
from ..storage.save_load import save
from ..storage.space import check_room
from .checkpoint import last_complete
from .checkpointing import CheckpointingTrainer
from .mixture import build_mixture
from .optim import average_gradients, clip_groups, hold_constant_groups, parameter_groups
from .resume_checks import check_resume
from .saliency import neuron_saliency
from .schedule import Mixture, MixtureDataset, MixtureSampler, collate
from .settings import Settings, checkpointing_name, enable_checkpointing
from .stopping import SIGNALS, StopSignals
from .streams import resume_streams, write_streams

logger = logging.getLogger("koff")

# A rule of thumb for gates that start all alike: with fewer steps more of them are undecided when
# the mask is fixed, and rounding them costs more.
FEW_GATE_STEPS = 1000
# Nats by which the loss may rise when the gates are rounded to a mask, without a warning. The share
# of undecided gates does not say it: of gates that started all alike 3 % were undecided, as nearly
# all were open, and the loss rose by 0.3 (docs/experiments.md, 7).
ROUNDING_WARNING = 0.05


class KoffTrainer(CheckpointingTrainer):
    """Trains the gates and memories of an attached model; the base stays frozen.

    Loss: (1 - w) cross-entropy + w KL to the frozen model (``distillation_weight``), both the mean
    over the tokens that count, + lambda1 (s - t) + c (s - t)^2, where s is the expected share of
    closed gates and t the target, warmed up; lambda1 is ascended.

    Args:
        model: an attached model.
        args: ``TrainingArguments`` or ``KoffTrainingArguments``; a copy is used. Without
            ``max_steps``, ``num_train_epochs`` counts passes over all domains together; general
            steps come on top.
        train_datasets: domain -> its documents: texts, records with "text", "messages", "prompt"
            and "completion", or "input_ids" and "labels", a ``datasets.Dataset`` of these, a
            ``koff.DataSource``, or the ``PackedBlocks`` that ``koff.data.blocks.pack`` made of them
            (both: ``from koff.data.blocks import PackedBlocks, pack``). Each memory needs the
            domain of its name; with no memories the rows use none.
        general_datasets: parts of the general mixture, or None.
        general_weights: probability of each part; None: by number of tokens.
        eval_datasets: domain -> documents for ``evaluate``, or None.
        processing_class: the tokenizer; None if the documents are token ids.
        callbacks: transformers callbacks.

    Raises:
        KeyError, TypeError, ValueError: domains or arguments that do not fit each other; nothing
            was written.

    Source: KOFF (arXiv 2605.29075); constraint after LLM-Shearing (arXiv 2310.06694).
    """

    @asked_by("KoffTrainer")
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
        state = require_attached(model)
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"KoffTrainer: args must be TrainingArguments, got {type(args).__name__}; make "
                "KoffTrainingArguments"
            )
        args = copy.copy(args)  # changed below; the caller's own stay as they are
        # Koff's own way to stop (``stopping``) is asked for by transformers' name, and takes the
        # place of its callback.
        self._stops_on_signals, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        self.settings = Settings.of(args)
        compacted = arch.widths(model) != state.dense_widths
        self.distillation_weight = self.settings.distils_by(compacted)
        # As the run begins; one that resumes may find its mask fixed.
        open_gates = state.gates is not None and not state.gates.fixed
        self._learns_mask = open_gates and self.settings.mask == "learned"
        if not open_gates and not len(state.memories):
            raise ValueError(
                "KoffTrainer: the model must have something to train, got nothing; attach gates "
                "or memories"
            )
        if open_gates and (self.settings.mask != "learned" or self.settings.fix_mask_at):
            check_multiple(state.dense_widths, state.gates.target, self.settings.width_multiple_of)
        own = {id(p) for p in state.parameters()}
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
        if others:  # they would get gradients, and no optimiser that steps by them
            raise ValueError(
                "KoffTrainer: all but gates and memories must be frozen, got requires_grad on "
                f"{others[:3]}{' and more' if len(others) > 3 else ''}; call requires_grad_(False) "
                "on them, or train them by a loop of your own"
            )
        if not any(p.requires_grad for p in state.parameters()):
            raise ValueError(
                "KoffTrainer: gates or memories must require gradients, got all of them frozen; "
                "call model.koff.requires_grad_(True) (PEFT freezes whatever is not its own)"
            )
        self._refuse_other_shards(model, args)
        self.mixture = build_mixture(
            model,
            self.settings,
            train_datasets,
            general_datasets,
            general_weights,
            processing_class,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        self.eval_datasets = eval_datasets
        if args.max_steps <= 0:
            args.max_steps = _steps_of_epochs(args, self.mixture)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # an unused memory has no gradient
        # transformers would read each micro-batch's loss back, twice, to leave what is not finite
        # out of the logged mean. Such a loss ends the run here (``training_step``), so there is
        # never anything to leave out.
        args.logging_nan_inf_filter = False
        rows = MixtureDataset(self.mixture, state.memories.names)
        use_cache = model.config.use_cache
        self._few_bits = arch.is_few_bits(model)
        with _like_one_with_adapters(model) if self._few_bits else contextlib.nullcontext():
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                # ``evaluate`` reads eval_datasets; transformers only wants to see that there is
                # one.
                eval_dataset=rows if eval_datasets else None,
                processing_class=processing_class,
                data_collator=collate,
                callbacks=[_GateSteps(state), *(callbacks or [])],
            )
        self.args.enable_jit_checkpoint = self._stops_on_signals
        self._signals = StopSignals()
        # The signal by which the last ``train`` stopped early, with a checkpoint; None if it did
        # not.
        self.stopped_by: signal.Signals | None = None
        # transformers switches it off for the training, and in every config that is saved after it.
        # Nothing here needs that: our forwards say what they want.
        model.config.use_cache = use_cache
        ignored = []
        if state.gates is not None:
            # The constraint uses it outside of DDP's forward, where DDP would not expect it. Its
            # gradient s - t needs no reduction: it is the same on every rank.
            ignored.append("koff.gates.multiplier")
        if self._few_bits:
            # Of the same checkpoint on every rank, and not always of a kind that can be sent.
            ignored += [f"{arch.site_path(site, model)}.weight" for site, _ in arch.sites(model)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        # transformers is to count the labels of a step's micro-batches, on all ranks, for
        # ``compute_loss``, and not to divide what that returns.
        self.model_accepts_loss_kwargs = True
        # Loss summed up, and number of tokens that count, of each source since the last log:
        # [sources, 2]. On the device, where adding to it waits for nothing.
        self._source_sums = torch.zeros(len(self.mixture.sources), 2, device=self.args.device)
        self._step_loss: Tensor | float = 0.0  # of the optimizer step's micro-batches so far
        self._group_names: list[str] = []  # of the optimizer's groups
        # Of each streamed source: the last row of this process that was trained on.
        self._bookmarks: dict[str, str] = {}
        self._norms: dict[str, Tensor] = {}  # of the last gradient, before clipping
        self._bound: dict[str, Any] = {}  # see _take_bound
        alike = self._learns_mask and not self.settings.saliency_batches
        few = self._gate_steps() < FEW_GATE_STEPS
        if alike and few and self.is_world_process_zero():
            logger.warning(
                "koff: %d steps are few for gates that start all alike; start them by "
                "saliency_batches, or give them about %d",
                self._gate_steps(),
                FEW_GATE_STEPS,
            )

    def _refuse_other_shards(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        """Refuse what FSDP and the model would make of each other, before anything is made."""
        self._loaded_in_shards = is_sharded(model)
        if self._loaded_in_shards:
            if not (args.fsdp or accelerate_shards()):
                raise ValueError(
                    "KoffTrainer: a model that was loaded in shards must be trained with FSDP, got "
                    "a run without; give fsdp=True"
                )
            # transformers' Trainer writes no checkpoints of such a model, since its optimiser's
            # state would lie in shards. Here that state is of what is learned, whole everywhere.
            model._is_distributed_loading_by_transformers = False

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', and let FSDP shard the frozen base alone.

        What is learned is small. Whole on every rank it is the same as under DDP and in a single
        process: its kernels, its optimiser, its checkpoints. And a memory whose domain only some
        ranks had in their rows would make FSDP wait for the others for ever.

        Raises:
            ValueError: a way to spread a model over processes that koff cannot honour.
        """
        super().create_accelerator_and_postprocess()
        spread = getattr(self.accelerator, "parallelism_config", None)
        for name in ("tp", "cp", "sp"):
            if getattr(spread, f"{name}_enabled", False):
                raise ValueError(
                    f"KoffTrainer: {name}_size of parallelism_config must be 1, got a larger one; "
                    "use DDP or FSDP"
                )
        if (self.args.fsdp or self._loaded_in_shards) and not self.is_fsdp_enabled:
            # accelerate passes over FSDP on CPUs, and in a single process.
            count = self.args.world_size
            raise ValueError(
                "KoffTrainer: FSDP must have several processes with an accelerator each, got "
                f"{count} {'process' if count == 1 else 'processes'} on {self.args.device.type}; "
                "leave fsdp out, load the base whole, and each process holds it"
            )
        if not self.is_fsdp_enabled:
            return
        if self._few_bits:
            raise ValueError(
                "KoffTrainer: the base must be plain under FSDP, got one in few bits; use DDP, "
                "which needs the base whole on each GPU, or load it in 16 bits"
            )
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"KoffTrainer: FSDP must be of version 2, got {plugin.fsdp_version}; set version "
                "to 2 in fsdp_config (accelerate launch: --fsdp_version 2)"
            )
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "KoffTrainer: cpu_ram_efficient_loading of FSDP must be False (what is learned is "
                "not sharded, and must be there on every rank), got True; leave it out, and load "
                "the base in shards: from_pretrained(..., distributed_config=...)"
            )
        plugin.ignored_modules = "koff"  # by its name: the accelerator comes before the model
        if self._loaded_in_shards:
            # Nothing is left to wrap, and accelerate would not find the layers by their names.
            plugin.auto_wrap_policy = None
        if plugin.mixed_precision_policy is not None:
            # The forward returns losses, which stay in fp32 however low its products are.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None
            )

    # ---- the run starts, or goes on from a checkpoint ----

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As transformers', after filling caches from text or checking the checkpoint.

        With ``enable_jit_checkpoint`` SIGTERM and Ctrl-C end the run behind the step in which they
        come, with a checkpoint, on all processes if one hears it; ``stopped_by`` then says which.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one of
                ``args.output_dir``. It is checked wholly before anything of it is used.
            kwargs: as transformers'.

        Raises:
            FileNotFoundError, ValueError: no complete checkpoint, or one that is damaged, hostile
                or of another model; another run in ``args.output_dir``; or a loss that is not
                finite.
            OSError: the disk has no room for a checkpoint.
        """
        self.stopped_by = None
        with self._signals.listening() if self._stops_on_signals else contextlib.nullcontext():
            if resume_from_checkpoint:
                resume_from_checkpoint = self._checked_checkpoint(resume_from_checkpoint)
                self._bookmarks = resume_streams(
                    resume_from_checkpoint, self.mixture.sources, self._rows_per_step()
                )
            else:
                self._bookmarks = {}
                self._fill_caches()
                self._start_gates()
            self._step_loss = 0.0  # an earlier run may have been interrupted amid a step
            model = self.accelerator.unwrap_model(self.model)
            with self._folder_held():
                vars(model).update(self._bound)
                try:
                    result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                finally:
                    self._bound = _take_bound(model)
        if self.stopped_by is None:
            self._signals.pass_on()
        return result

    @contextlib.contextmanager
    def _folder_held(self) -> Iterator[None]:
        """Keep other runs out of the folder for checkpoints, if there will be any; there must be
        room for one."""
        folder = Path(self.args.output_dir)
        with contextlib.ExitStack() as held:
            if self.args.save_strategy != "no" or self._stops_on_signals:
                with asked_by("KoffTrainer"), one_writes(f"the run in {folder}"):
                    if self.args.should_save:
                        held.enter_context(locked(folder))
                        check_room("a checkpoint", self.checkpoint_bytes(), folder)
            yield

    def _checked_checkpoint(self, wanted: str | Path | bool) -> str:
        """Return the path of a checkpoint that fits this run, down to the optimiser's moments."""
        path = last_complete(self.args.output_dir) if wanted is True else Path(wanted)
        if path is None:
            raise ValueError(
                f"resume: {self.args.output_dir} must hold a complete checkpoint, got none; train "
                "without resume_from_checkpoint"
            )
        groups = list(self._parameter_groups().values())
        check_resume(path, self.koff, groups)
        return str(path)

    def _fill_caches(self) -> None:
        """Fill the KV memories that are initialised from text, each from its domain's first
        tokens."""
        for source in self.mixture.domains:
            if source.memory >= 0 and not self.koff.memories[source.memory].kv_filled:
                need = self.koff.memories[source.memory].length
                fill_from_tokens(self.model, source.name, source.blocks.opening(need))

    def _start_gates(self) -> None:
        """Start the gates by how much each neuron matters on the run's first batches; or, where the
        mask is not learned, fix it."""
        gates, settings = self.koff.gates, self.settings
        if gates is None or gates.fixed:
            return
        if settings.mask == "learned":
            if settings.saliency_batches:
                gates.start_(self._saliency())
            return
        if settings.mask == "saliency":
            scores = self._saliency()
        elif settings.mask == "magnitude":
            scores = neuron_magnitude(self.model)
        else:
            scores = random_scores(self.koff.dense_widths, self.koff.config.seed)
        binarize(self.model, scores=scores, multiple_of=settings.width_multiple_of)

    def _saliency(self) -> list[Tensor]:
        """Return the saliency of every neuron on the run's first batches, of all ranks."""
        ranks = self.accelerator.num_processes
        first, last = self.accelerator.process_index, self.settings.saliency_batches * ranks
        picks = itertools.islice(self._sampler(), first, last, ranks)
        batches = (collate([self.train_dataset[index] for index in pick]) for pick in picks)
        if getattr(self.args, checkpointing_name(self.args)):
            # transformers switches it on only when it trains, and this would keep all that a step
            # does not. Layers recompute in training mode alone, and a reentrant checkpoint knows
            # ``backward`` alone.
            enable_checkpointing(self.accelerator.unwrap_model(self.model).train())
        # As accelerate will wrap the model's forward, once it prepares it.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            saliency = neuron_saliency(self.model, batches, self.accelerator.reduce)
        self._check_finite(float(sum(s.sum() for s in saliency)))
        return saliency

    def _rows_per_step(self) -> int:
        """Return the rows of an optimiser step, on all ranks."""
        ranks = self.accelerator.num_processes
        return self._train_batch_size * self.args.gradient_accumulation_steps * ranks

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As for every checkpoint, with the places in the streams."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # Of the first process, whose rows come first: no other is behind it.
            write_streams(
                output_dir or self.args.output_dir,
                self.mixture.sources,
                self._bookmarks,
                self._rows_per_step(),
            )

    def _sampler(self) -> MixtureSampler:
        return MixtureSampler(
            self.mixture,
            self._train_batch_size,
            self.args.max_steps,
            self.args.gradient_accumulation_steps,
            self.accelerator.num_processes,
            gate_steps=self._gate_steps() if self._learns_mask else 0,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return the whole run's batches, in an order that depends on the seed and the step
        alone."""
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler(),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    # ---- a step ----

    def training_step(self, model, inputs, *args, **kwargs):
        """As transformers' (one micro-batch, forward and backward), after fixing the mask when its
        time has come.

        Raises:
            ValueError: the loss of the optimiser step is not finite; its gradient was not used.
        """
        for source, bookmark in zip(inputs["source"], inputs.pop("bookmark"), strict=True):
            if bookmark is not None:
                self._bookmarks[self.mixture.sources[source].name] = bookmark
        gates = self.koff.gates
        if gates is not None and not gates.fixed and self.settings.fix_mask_at is not None:
            if self.state.global_step >= self._gate_steps():
                self._fix_mask(model, inputs)
        if gates is not None and gates.fixed and not len(self.koff.memories):
            # Gates alone: nothing is left to tune. The run ends after this step, with a checkpoint
            # and an evaluation if it makes any.
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy == "steps"
            self.control.should_evaluate |= self.args.eval_strategy == "steps"
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:  # the optimiser steps after this micro-batch
            if self.is_fsdp_enabled:  # it shards the base alone, and knows nothing of the rest
                average_gradients(self.koff.parameters())
            # The one value that a step of koff's reads back. The host waits here until the device
            # has finished the backward pass, and then the device waits until the host has queued
            # the optimiser's first kernel: a moment, once per optimiser step. Not later, since one
            # step on such a loss makes all memories NaN, in the model and then in the checkpoints.
            # Not for each micro-batch, since a sum is finite only if all of its parts are; and of
            # all ranks, since all of them step by one gradient.
            # With it goes what signals each rank has heard, so that all of them stop at one step.
            heard = torch.tensor(self._signals.heard(), dtype=loss.dtype)
            heard = heard.to(loss.device, non_blocking=True)
            told = torch.cat([self._step_loss.detach().view(1), heard])
            total, *heard = self._mean_over_ranks(told).tolist()
            self._step_loss = 0.0
            self._check_finite(total)
            if any(heard):
                self._stop(next(s for s, share in zip(SIGNALS, heard, strict=True) if share))
        return loss

    def _stop(self, by: signal.Signals) -> None:
        """End the run behind the step it is in, with a checkpoint, and a log of what came since the
        last one."""
        self.stopped_by = by
        self.control.should_training_stop = True
        self.control.should_save = self.control.should_log = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy of the tokens that count, mixed with the divergence from
        the frozen model where a run distils, plus the sparsity constraint while the mask is open;
        of a model in evaluation mode, the cross-entropy alone.

        Args:
            model, inputs, return_outputs: as transformers'.
            num_items_in_batch: tokens that count in all micro-batches of the optimiser step, on all
                ranks; None: the mean is over ``inputs`` alone.

        Nothing is read back from the device.
        """
        ids, labels, sources = inputs["input_ids"], inputs["labels"], inputs["source"]
        weight = self.distillation_weight if model.training else 0.0
        teacher = self._teacher(model, ids) if weight else None

        def measure(states: Tensor, head: Head | None) -> tuple[Tensor, ...]:
            found = token_losses(states, head, labels, teacher, weight)
            if not return_outputs:
                return found
            return *found, states if head is None else head.logits(states)

        # Within the forward: there DDP and FSDP see what is used, and autocast holds.
        total, losses, *logits = model(
            input_ids=ids, memory=inputs["memory"], use_cache=False, instead_of_logits=measure
        )
        counted = (labels[:, 1:] != IGNORED).sum(1)  # [B]
        per_row = losses.sum(1)  # [B]
        parts = 1  # of which the step's loss is made
        if num_items_in_batch is None:
            tokens = counted.sum()
        else:
            # Micro-batches need not have equally many such tokens, so that each adds its sum over
            # the number of all, and not its mean. Ranks are averaged, which is undone here.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            tokens = num_items_in_batch / ranks
            parts = self.args.gradient_accumulation_steps
        loss = total / tokens
        if model.training:
            # A blocking copy to the device would wait for all that is queued there.
            index = torch.tensor(sources).to(per_row.device, non_blocking=True)
            values = torch.stack([per_row, counted.to(per_row.dtype)], 1)  # [B, 2]
            self._source_sums.index_add_(0, index, values)
            loss = loss + self.constraint() / parts
        return (loss, {"logits": logits[0]}) if return_outputs else loss

    @torch.no_grad()
    def _teacher(self, model, ids: Tensor) -> Tensor:
        """Return the last hidden states [B, T, d] of the same frozen model with gates open and no
        memory (its logits, where only the model can make them)."""
        # NEFTune adds noise behind embeddings that train: to what learns, and not to what it learns
        # from.
        embeddings = self.accelerator.unwrap_model(model).get_input_embeddings()
        training, embeddings.training = embeddings.training, False
        try:
            return model(
                input_ids=ids,
                memory=BASE,
                use_cache=False,
                instead_of_logits=lambda states, _: states,
            )
        finally:
            embeddings.training = training

    def constraint(self) -> Tensor | float:
        """Return lambda1 (s - t) + c (s - t)^2; 0 once the mask is fixed."""
        gates = self.koff.gates
        if gates is None or gates.fixed:
            return 0.0
        gap = gates.expected_sparsity() - self.target_now()
        return gates.multiplier * gap + self.settings.sparsity_penalty * gap**2

    def target_now(self) -> float:
        """Return the target t of this step: it rises linearly, from above 0, while it warms up;
        gates that start by saliency start at the target."""
        if self.settings.saliency_batches:
            return self.koff.gates.target
        warm = self.settings.sparsity_warmup_ratio * self.args.max_steps
        return self.koff.gates.target * min(1.0, (self.state.global_step + 1) / max(warm, 1.0))

    def _mean_over_ranks(self, loss: Tensor) -> Tensor:
        return self.accelerator.reduce(loss.detach(), reduction="mean")

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"KoffTrainer: the loss at step {self.state.global_step} must be finite, got "
                f"{loss}; lower the learning rates or check the data"
            )

    def _loss_over_ranks(self, model, inputs) -> float:
        """Return the mean loss of the tokens that count in all ranks' batches."""
        count = self._get_num_items_in_batch([inputs], self.args.device)
        return float(self._mean_over_ranks(self.compute_loss(model, inputs, False, count)))

    # ---- the mask is fixed amid the steps ----

    def _gate_steps(self) -> int:
        """Return for how many steps the gates are trained, at least one."""
        return max(1, round((self.settings.fix_mask_at or 1.0) * self.args.max_steps))

    @torch.no_grad()
    def _fix_mask(self, model, inputs) -> None:
        """Binarise, and log what it did to the loss of the current batch."""
        inputs = self._prepare_inputs(dict(inputs))
        model.eval()
        soft = self._loss_over_ranks(model, inputs)
        self._check_finite(soft)
        report = binarize(
            self.accelerator.unwrap_model(model),
            multiple_of=self.settings.width_multiple_of,
            # A sharded model has no whole matrices to look at.
            token_ids=None if self.is_fsdp_enabled else inputs["input_ids"],
        )
        hard = self._loss_over_ranks(model, inputs)
        self._check_finite(hard)
        model.train()
        self.log(
            {"loss_soft_gates": soft, "loss_hard_gates": hard, "undecided_before": report.undecided}
        )
        if hard - soft > ROUNDING_WARNING and self.is_world_process_zero():
            logger.warning(
                "koff: rounding the gates to a mask raised the loss from %.3f to %.3f (%.0f %% of "
                "them were undecided); train them longer, or start them by saliency_batches",
                soft,
                hard,
                100 * report.undecided,
            )

    # ---- the optimiser ----

    def _parameter_groups(self, model: nn.Module | None = None) -> dict[str, dict[str, Any]]:
        """Return the optimiser's groups by name, of ``model`` if it is wrapped anew."""
        koff = self.accelerator.unwrap_model(model or self.model).koff
        return parameter_groups(koff, self.settings, self.args.weight_decay)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make an optimiser with one group each for LoRA, KV, gates and the multiplier (which
        ascends)."""
        if self.optimizer is not None:
            return self.optimizer
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = self._parameter_groups(model)
        optimizer = cls(list(groups.values()), **kwargs)
        if "maximize" not in optimizer.defaults:
            raise ValueError(
                "KoffTrainer: optim must be able to maximise (the multiplier), got "
                f"{self.args.optim}; use adamw_torch or adamw_torch_fused"
            )
        self._group_names = list(groups)
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make transformers' scheduler for the memories; gates and multiplier keep their rates."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        hold_constant_groups(scheduler, (optimizer or self.optimizer).param_groups)
        return scheduler

    def _clip_grad_norm(self, model: nn.Module):
        """Clip each group by itself; the multiplier is left alone. Return the norm over all."""
        self._norms = clip_groups(
            self._group_names, self.optimizer.param_groups, self.args.max_grad_norm
        )
        return torch.linalg.vector_norm(torch.stack([n.float() for n in self._norms.values()]))

    # ---- logs ----

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As transformers', with the loss per source, the last gradient norm of each part, and the
        sparsities, undecided share, multiplier and target while gates are open.

        What is added is read back from the device here, once per log and not per step.
        """
        if "loss" in logs:
            norms = {f"grad_norm_{name}": float(norm) for name, norm in self._norms.items()}
            logs = {**logs, **norms, **self._source_losses(), **self._sparsity_logs()}
        super().log(logs, *args, **kwargs)

    def _source_losses(self) -> dict[str, float]:
        """Return the mean loss of each source's tokens since the last log, over all ranks; of those
        that had a row."""
        sums = self.accelerator.reduce(self._source_sums.clone(), reduction="sum").tolist()
        self._source_sums.zero_()
        names = [source.name for source in self.mixture.sources]
        return {
            f"loss_{name}": total / tokens
            for name, (total, tokens) in zip(names, sums, strict=True)
            if tokens
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

    # ---- what is measured and saved ----

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the perplexity of every evaluation domain with its own memory (see
        ``koff.evaluate``); a domain without a memory is measured with none.

        Returns:
            ``<prefix>_<domain>_perplexity`` of each domain, and ``<prefix>_loss``, the mean of
            their logarithms.

        Raises:
            TypeError, ValueError: no domains, or not as domain -> documents.
        """
        domains = self.eval_datasets if eval_dataset is None else eval_dataset
        if domains is None:
            raise ValueError(
                "KoffTrainer.evaluate: eval_datasets must be given, got none; pass domain -> "
                "documents"
            )
        if not isinstance(domains, Mapping):
            raise TypeError(
                f"KoffTrainer.evaluate: eval_datasets must be a mapping, got "
                f"{type(domains).__name__}; pass domain -> documents"
            )
        if not domains:
            raise ValueError(
                "KoffTrainer.evaluate: eval_datasets must name a domain, got none; pass domain -> "
                "documents"
            )
        model = self.accelerator.unwrap_model(self.model)
        metrics = {}
        nats = []
        for domain, documents in domains.items():
            rows = evaluate_domains(
                model,
                self.processing_class,
                {domain: documents},
                memories=[domain if domain in self.koff.memories.names else None],
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

    def predict(self, *args, **kwargs):
        """Refuse: there are no labels to predict.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "KoffTrainer: predict must not be called, got a call; use evaluate, or the model itself"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a model that has no gates (any more) as ``koff.save`` does, with the tokenizer.

        Args:
            output_dir: where; ``args.output_dir`` if None.

        Raises:
            ValueError: gates that are not compacted, or a taken folder; nothing is written.
        """
        if _internal_call:  # by transformers, for a checkpoint
            return self._save(output_dir)
        if self.koff.gates is not None:
            raise ValueError(
                "save_model: the model must be without gates, got gates that are not compacted; "
                "save what koff.compact(trainer.model) returns with koff.save"
            )
        # Every process comes here: ``save`` lets the first one write.
        model = self.accelerator.unwrap_model(self.model)
        save(model, output_dir or self.args.output_dir, tokenizer=self.processing_class)


class _GateSteps(TrainerCallback):
    """What open gates need around an optimiser step."""

    def __init__(self, state: KoffState):
        self.koff = state

    @property
    def open(self) -> bool:
        return self.koff.gates is not None and not self.koff.gates.fixed

    def on_step_begin(self, args, state, control, **kwargs):
        """Let every rank draw the same gates, as the one process does that several ranks equal.

        They start alike, but nothing else would bring them together again after a rank has drawn
        alone, or when more ranks resume than had written the checkpoint.
        """
        if self.open and args.world_size > 1:
            kind = args.device.type
            synchronize_rng_states(["torch" if kind == "cpu" else kind])

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Keep log_alpha in range."""
        if self.open:
            self.koff.gates.clamp_()


def _steps_of_epochs(args: TrainingArguments, mixture: Mixture) -> int:
    """Return the steps in which domain rows are seen ``num_train_epochs`` times, all domains
    together."""
    streamed = [source.name for source in mixture.domains if source.rows is None]
    if streamed:
        raise ValueError(
            f"KoffTrainer: max_steps must be given where a domain is streamed, got none and "
            f"{streamed}; nobody knows how many rows an epoch has"
        )
    rows = sum(source.rows for source in mixture.domains)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = math.ceil(args.num_train_epochs * rows / per_step)
    every = mixture.general_every
    if every > 1:
        # One general step after every - 1 of the domains; none after the last of these.
        steps += (steps - 1) // (every - 1)
    return max(1, steps)


def _take_bound(model: nn.Module) -> dict[str, Any]:
    """Take off a model what accelerate bound to it for training, and return it by name.

    That is a forward under autocast, which would stay on after the run, also in copies; and the
    mark that keeps another trainer from preparing the model. ``train`` binds it again, since
    accelerate prepares a model only once.
    """
    own = vars(model)
    names = ["_is_accelerate_prepared"]
    # A ``forward`` of the instance is accelerate's only if it put the one before aside.
    names += ["forward", "_original_forward"] if "_original_forward" in own else []
    taken = {name: own.pop(name) for name in names if name in own}
    original = taken.get("_original_forward")
    # What was there before need not be the class's: then it was the user's, and goes back.
    if original is not None and getattr(original, "__func__", None) is not type(model).forward:
        model.forward = original
    return taken


@contextlib.contextmanager
def _like_one_with_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Let a model pass for one with an adapter of PEFT's inside the ``with`` block: without one
    transformers' Trainer takes no quantised model, and memories are unknown to it."""
    before, model._hf_peft_config_loaded = model._hf_peft_config_loaded, True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before
