"""Activation checkpointing under the name that the installed transformers has for it."""

from transformers import TrainingArguments

from koff.training.settings import checkpointing_name, enable_checkpointing

NAME = checkpointing_name(TrainingArguments)
enable = enable_checkpointing  # in place


def arguments(on: bool = True, **kwargs) -> dict:
    """What ``TrainingArguments`` are given for it; ``kwargs`` are torch's."""
    return {NAME: on, **({f"{NAME}_kwargs": kwargs} if kwargs else {})}
