"""transformers' Trainer with koff's checkpoints: complete or not there, and nothing in them that
can execute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import refuse, require
from ..model.neuron_order import move_kept_first, restore_order
from ..model.state import KoffState
from ..storage.save_load import save
from . import checkpoint
from .resume_checks import check_resume


def _take_bound(model: nn.Module) -> dict[str, Any]:
    """Take off a model what accelerate bound to it for training: a forward under autocast, which
    would stay on, also in copies, and the mark that keeps another trainer from preparing it."""
    own = vars(model)
    names = ["_is_accelerate_prepared"]
    names += ["forward", "_original_forward"] if "_original_forward" in own else []
    taken = {name: own.pop(name) for name in names if name in own}
    original = taken.get("_original_forward")
    if original is not None and getattr(original, "__func__", None) is not type(model).forward:
        model.forward = original
    return taken


class SafeTrainer(Trainer):
    """Writes and reads the checkpoints of a run that trains ``model.koff``."""

    _staging = False  # while a checkpoint is being written
    _bound: dict[str, Any] = {}  # what accelerate puts on the model, between two calls of train

    @property
    def koff(self) -> KoffState:
        """The model's koff state, also where the model is wrapped."""
        return self.accelerator.unwrap_model(self.model).koff

    def start(self) -> None:
        """What a run from the beginning does first."""

    def groups(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """The parameter groups of the optimiser, of ``model`` if it is wrapped anew."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As transformers', after ``start`` or the checks of a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one of
                ``args.output_dir``. It is checked wholly before anything of it is used.
            kwargs: as transformers'.

        Raises:
            FileNotFoundError, ValueError: no complete checkpoint, or one that is damaged, hostile
                or of another model.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checked_checkpoint(resume_from_checkpoint)
        else:
            self.start()
        model = self.accelerator.unwrap_model(self.model)
        vars(model).update(self._bound)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._bound = _take_bound(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``koff.save`` of a model that has no gates (any more), with the tokenizer.

        Args:
            output_dir: where; ``args.output_dir`` if None.

        Raises:
            ValueError: gates that are not compacted, or a taken folder; nothing is written.
        """
        if _internal_call:  # of a checkpoint
            return super().save_model(output_dir, _internal_call)
        step = "save what koff.compact(trainer.model) returns with koff.save"
        what, got = "the model", "gates that are not compacted"
        require(self.koff.gates is None, "save_model", what, "be without gates", got, step)
        if self.args.should_save:
            model, folder = self.accelerator.unwrap_model(self.model), output_dir
            save(model, folder or self.args.output_dir, tokenizer=self.processing_class)

    def predict(self, *args, **kwargs):
        """Refused: there are no labels to predict.

        Raises:
            NotImplementedError: always.
        """
        step = "use evaluate, or the model itself"
        refuse("KoffTrainer", "predict", "not be called", "a call", step, NotImplementedError)

    def _checked_checkpoint(self, wanted: str | bool) -> str:
        path = checkpoint.last_complete(self.args.output_dir) if wanted is True else Path(wanted)
        step = "train without resume_from_checkpoint"
        rule, folder = "hold a complete checkpoint", self.args.output_dir
        require(path is not None, "resume", folder, rule, "none", step)
        check_resume(path, self.koff, self.groups(), sharded=self.is_fsdp_enabled)
        return str(path)

    def _save_checkpoint(self, model, trial) -> None:
        """As transformers', but into a staging folder, which takes the checkpoint's name once it is
        complete and on disk; older checkpoints go after that."""
        run_dir = Path(super()._get_output_dir(trial=trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / checkpoint.STAGED / name
        writes = self.args.should_save
        if writes:
            checkpoint.settle(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(run_dir / name)
            if writes:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if writes:
            checkpoint.publish(run_dir, name)
            best = self.state.best_model_checkpoint
            checkpoint.rotate(run_dir, run_dir / name, self.args.save_total_limit, best)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial=None) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, checkpoint.STAGED) if self._staging else run_dir

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Gates, multiplier, masks and memories; never the base weights, and no pickle of the
        arguments."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        tensors = None
        if state_dict is not None:
            tensors = {
                k.removeprefix("koff."): v for k, v in state_dict.items() if k.startswith("koff.")
            }
        checkpoint.write_checkpoint(self.koff, output_dir, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        base = self.accelerator.unwrap_model(self.model)
        restore_order(base)
        checkpoint.read_checkpoint(self.koff, resume_from_checkpoint)
        if self.koff.gates is not None and self.koff.gates.fixed:
            move_kept_first(base)
