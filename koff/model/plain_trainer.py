"""transformers' own Trainer on an attached model, and TRL's, which are subclasses of it.

It trains what is learned as it trains any parameter, but its checkpoints are written by
``model.save_pretrained``, which holds the backbone alone and therefore refuses. That would be at
the first checkpoint, after hours; so a callback says it before the first step.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers import TrainerCallback

from .state import is_attached


class PlainTrainerGuard(TrainerCallback):
    """Refuses checkpoints that would leave out what is learned. ``KoffTrainer``, whose checkpoints
    hold it, takes this callback off."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any):
        """Look at the model and at whether checkpoints are to be written.

        Raises:
            ValueError: checkpoints of a model with memories or gates.
        """
        if not is_attached(model) or args.save_strategy == "no":
            return
        if len(model.koff.memories) or model.koff.gates is not None:
            raise ValueError(
                "Trainer: save_strategy must be 'no' for a model with koff attached (checkpoints "
                f"would hold its backbone alone), got {args.save_strategy.value!r}; use "
                "koff.KoffTrainer, or save_strategy='no' and koff.save(model, folder) after the "
                "training"
            )


def guard(trainer: ModuleType) -> None:
    """Give every Trainer the callback.

    Args:
        trainer: the module ``transformers.trainer``.
    """
    # Not documented by transformers: where the list is gone, ``save_pretrained`` still refuses.
    getattr(trainer, "DEFAULT_CALLBACKS", []).append(PlainTrainerGuard)
