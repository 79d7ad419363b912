"""Activation checkpointing under the name that the installed transformers has for it."""

from transformers import PreTrainedModel, TrainingArguments

from koff.training.settings import checkpointing_name

NAME = checkpointing_name(TrainingArguments)


def enable(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Switch it on, in place."""
    getattr(model, f"{NAME}_enable")({"use_reentrant": reentrant})


def arguments(on: bool = True, **kwargs) -> dict:
    """What ``TrainingArguments`` are given for it; ``kwargs`` are torch's."""
    return {NAME: on, **({f"{NAME}_kwargs": kwargs} if kwargs else {})}
