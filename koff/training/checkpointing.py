"""transformers' Trainer with koff's checkpoints: complete or not there, and nothing in them that
can execute.

Everything here overrides a private hook of transformers' Trainer. Those of the run itself, which
users meet, are ``KoffTrainer``'s.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import asked_by
from ..model.neuron_order import move_kept_first, restore_order
from ..model.plain_trainer import PlainTrainerGuard
from ..model.state import KoffState
from ..storage.processes import one_writes
from ..storage.space import SMALL_FILES, bytes_of, check_room, writing
from . import checkpoint
from .resume_checks import RNG, read_pickle


class CheckpointingTrainer(Trainer):
    """Writes and reads the checkpoints of a run that trains ``model.koff``.

    transformers' own ``_save_checkpoint`` writes optimizer, scheduler, random states and its own
    state into the folder that ``_get_output_dir`` names, and calls ``_save`` for the model. Here
    that folder is a staging folder, and the model is what was learned.
    """

    _staging = False  # whether a checkpoint is being written

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PlainTrainerGuard)  # these checkpoints leave nothing out

    @property
    def koff(self) -> KoffState:
        """The model's koff state, also where the model is wrapped."""
        return self.accelerator.unwrap_model(self.model).koff

    def _save_checkpoint(self, model, trial) -> None:
        """As transformers', but into a staging folder, which takes the checkpoint's name once it is
        complete and on disk; older checkpoints go after that."""
        run_dir = Path(super()._get_output_dir(trial=trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / checkpoint.STAGED / name
        what, needed = f"checkpoint {run_dir / name}", self.checkpoint_bytes()
        # One process tidies up, seals and renames; all of them write (each its random state). So
        # they wait for each other before and after.
        writes = self.args.should_save
        with asked_by("KoffTrainer"):
            with one_writes(f"the beginning of {what}"):
                if writes:
                    checkpoint.clean_up(run_dir)
                    check_room(what, needed, run_dir)
            self._staging = True
            try:
                with writing(what, needed if writes else 0, run_dir):
                    super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
        # transformers noted the best checkpoint by the name that it has now.
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(run_dir / name)
            if writes:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if writes:
            checkpoint.put_in_place(run_dir, name)
            checkpoint.rotate(
                run_dir,
                newest=run_dir / name,
                limit=self.args.save_total_limit,
                best=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def checkpoint_bytes(self) -> int:
        """Return how much room a checkpoint takes, or will take: what is learned, and the two
        moments that Adam has of each of its values."""
        return 3 * bytes_of(self.koff.state_dict().values()) + SMALL_FILES

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the run as it is now; every process calls this.

        Returns:
            Its folder.

        Raises:
            OSError: there is no room for it on the disk.
        """
        self._save_checkpoint(self.model_wrapped, trial=None)
        return Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _get_output_dir(self, trial=None) -> str:
        # transformers also rotates in this folder, and finds there the new checkpoint alone.
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, checkpoint.STAGED) if self._staging else run_dir

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write gates, multiplier, masks and memories; never the base weights, and no pickle of the
        arguments."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        checkpoint.write_checkpoint(self.koff, output_dir)

    # For a model that FSDP shards, transformers writes the whole of it into the optimiser's files,
    # base included. What the optimiser holds here is never sharded: one process writes it, and any
    # number of them reads it.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            folder = Path(output_dir)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            for part, name in (
                (self.optimizer, OPTIMIZER_NAME),
                (self.lr_scheduler, SCHEDULER_NAME),
            ):
                # The optimiser moves its moments to where their parameters are.
                part.load_state_dict(read_pickle(folder / name))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As transformers'; but if another number of processes wrote the checkpoint, go on from
        what its first one had, of which the gates were drawn."""
        if checkpoint is None:
            return
        folder, several = Path(checkpoint), self.args.world_size > 1
        own = folder / (f"{RNG}_{self.args.process_index}.pth" if several else f"{RNG}.pth")
        firsts = [f for f in (folder / f"{RNG}.pth", folder / f"{RNG}_0.pth") if f.is_file()]
        if own.is_file() or not firsts:
            return super()._load_rng_state(checkpoint)
        saved = read_pickle(firsts[0])
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(saved["cpu"])
        device = saved.get("cuda")  # one state, or one for each GPU of the first process
        if device is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(device[0] if isinstance(device, list) else device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Read what ``KoffTrainer.train`` has checked."""
        base = self.accelerator.unwrap_model(self.model)
        # The base's neurons stand in the order of the mask there is now, which is not the one that
        # comes.
        restore_order(base)
        checkpoint.read_checkpoint(self.koff, resume_from_checkpoint)
        if self.koff.gates is not None and self.koff.gates.fixed:
            move_kept_first(base)
