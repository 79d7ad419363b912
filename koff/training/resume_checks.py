"""Checks of transformers' own files in a checkpoint, before anything of it is used.

They are the only files koff does not write itself: optimizer, scheduler and RNG states are pickles,
read with ``weights_only=True``, which builds tensors and plain values and runs nothing. What they
hold is then compared with what the run needs, since transformers takes it over unseen: a moment of
another shape would fail in the middle of a step, and a name in the scheduler's state can hide one
of its methods.
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..errors import asked_by
from ..model.state import KoffState
from ..storage.files import File
from .checkpoint import EARLIER, STATE, check_complete, check_state

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
RNG = "rng_state"  # rng_state.pth, or rng_state_<rank>.pth of several processes


@asked_by("resume")
def check_resume(path: Path, state: KoffState, groups: list[dict[str, Any]]) -> None:
    """Check everything of a checkpoint that a run would use; changes nothing.

    Args:
        path: the checkpoint.
        state: ``model.koff`` of the model that resumes.
        groups: parameter groups of its optimiser.

    Raises:
        FileNotFoundError, ValueError: incomplete, changed since it was written, of another model,
            or a file that is more than tensors and plain values.
    """
    files = check_complete(path)
    check_state(state, path)
    for name in (OPTIMIZER, SCHEDULER):
        if name not in files:
            raise ValueError(
                f"resume: checkpoint {path.name} must hold {name}, got none; it was written "
                "with save_only_model=True; resume from another"
            )
    _check_pickles(path, files)
    _check_optimizer(read_pickle(path / OPTIMIZER), groups)
    _check_scheduler(read_pickle(path / SCHEDULER), len(groups))
    for name in files:
        if name.startswith(RNG):
            _check_rng(name, read_pickle(path / name))
    _check_trainer_state(File(path / STATE).json())


# ---- pickles ----

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def _check_pickles(path: Path, files: list[str]) -> None:
    """Refuse pickles that no run of koff writes, such as training_args.bin: nothing here would load
    them, but something else might."""
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        own = name in files and (name in (OPTIMIZER, SCHEDULER) or name.startswith(RNG))
        if not own and file.suffix in _PICKLE_SUFFIXES:
            raise ValueError(
                f"resume: checkpoint {path.name} must hold no file that can execute, got {name}; "
                "remove it"
            )


def read_pickle(path: Path) -> Any:
    """Return the tensors and plain values of a pickle, without running anything."""
    try:
        with safe_globals():  # of transformers: the parts of a numpy array, for its RNG state
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not the error's own text: torch advises there to load it with weights_only=False.
        raise ValueError(
            f"resume: {path.name} must hold tensors and plain values only, got something else "
            f"({type(error).__name__}); {EARLIER}"
        ) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_setting(value: Any) -> bool:
    """Whether a value is a number, a switch, None, or a few of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    if isinstance(value, Tensor):
        return value.dim() == 0 and bool(value.isfinite())
    return value is None or isinstance(value, bool) or _is_number(value)


# ---- the optimizer ----

# State of torch's optimisers that has the shape of its parameter. Everything else (the step) may be
# a scalar too.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def _check_optimizer(saved: Any, groups: list[dict[str, Any]]) -> None:
    """Compare a saved optimizer with the run's parameter groups.

    torch's format: ``param_groups`` are the run's, with numbers in the place of parameters, counted
    through all groups; ``state`` has the moments of each number.
    """
    if not isinstance(saved, dict) or set(saved) != {"state", "param_groups"}:
        raise ValueError(
            f"resume: {OPTIMIZER} must hold state and param_groups, got {type(saved).__name__}; "
            f"{EARLIER}"
        )
    state, saved_groups = saved["state"], saved["param_groups"]
    is_list = isinstance(saved_groups, list)
    if not isinstance(state, dict) or not is_list or len(saved_groups) != len(groups):
        got = f"{len(saved_groups)} groups" if is_list else repr(saved_groups)[:80]
        raise ValueError(
            f"resume: {OPTIMIZER} must fit the run's parameter groups, got {got}; {EARLIER}"
        )
    parameters = [p for group in groups for p in group["params"]]
    first = 0
    for group, saved_group in zip(groups, saved_groups, strict=True):
        numbers = list(range(first, first + len(group["params"])))
        first += len(numbers)
        if not isinstance(saved_group, dict) or saved_group.get("params") != numbers:
            raise ValueError(
                f"resume: {OPTIMIZER} must fit the run's parameter groups, got other parameters; "
                f"{EARLIER}"
            )
        for name, value in saved_group.items():
            if not isinstance(name, str) or not (name == "params" or _is_setting(value)):
                raise ValueError(
                    f"resume: {name} in {OPTIMIZER} must be a number, got {repr(value)[:80]}; "
                    f"{EARLIER}"
                )
    for number, moments in state.items():
        if (
            type(number) is not int
            or not 0 <= number < len(parameters)
            or not isinstance(moments, dict)
        ):
            raise ValueError(
                f"resume: {OPTIMIZER}'s state must fit the run's parameter groups, got "
                f"{number!r}; {EARLIER}"
            )
        shape = tuple(parameters[number].shape)
        for name, value in moments.items():
            shapes = (shape,) if name in _MOMENTS else ((), shape)
            if not (
                isinstance(value, Tensor)
                and tuple(value.shape) in shapes
                and value.is_floating_point()
                and bool(value.isfinite().all())
            ):
                is_tensor = isinstance(value, Tensor)
                got = (tuple(value.shape), value.dtype) if is_tensor else repr(value)[:80]
                raise ValueError(
                    f"resume: {name} of parameter {number} in {OPTIMIZER} must be finite numbers "
                    f"of shape {shape}, got {got}; {EARLIER}"
                )


# ---- the scheduler ----


def _check_scheduler(saved: Any, groups: int) -> None:
    """Check what the scheduler takes over as its attributes, whatever their names."""
    if not isinstance(saved, dict):
        raise ValueError(
            f"resume: {SCHEDULER} must hold a dict, got {type(saved).__name__}; {EARLIER}"
        )
    for name, value in saved.items():
        if (
            not isinstance(name, str)
            or name.startswith("__")
            or name == "optimizer"
            or callable(getattr(LambdaLR, name, None))
        ):
            raise ValueError(
                f"resume: {name!r} in {SCHEDULER} must be a setting, got a method's name; {EARLIER}"
            )
        if name == "lr_lambdas":
            # Functions are saved as None, and a partial as its empty ``__dict__``. Anything else
            # would be written into the ``__dict__`` of the run's own.
            good = isinstance(value, list) and all(not fn for fn in value)
        elif name in ("base_lrs", "_last_lr"):
            good = isinstance(value, list) and all(map(_is_number, value)) and len(value) == groups
        elif name in ("last_epoch", "_step_count"):
            good = type(value) is int and value >= 0
        else:
            good = isinstance(value, str) or _is_setting(value)
        if not good:
            raise ValueError(
                f"resume: {name} in {SCHEDULER} must fit {groups} parameter groups, got "
                f"{repr(value)[:80]}; {EARLIER}"
            )


# ---- random generators ----


def _check_rng(name: str, saved: Any) -> None:
    """Set throw-away generators to the stored states: what these take, the run's own will take."""
    try:
        random.Random().setstate(saved["python"])
        np.random.RandomState().set_state(saved["numpy"])
        torch.Generator().set_state(saved["cpu"])
        # There may be no such device here to try it on, and one state or one per device.
        for device in ("cuda", "xla", "npu", "hpu", "mlu", "musa"):
            states = saved.get(device, [])
            for state in states if isinstance(states, list) else [states]:
                if not isinstance(state, Tensor) or state.dtype != torch.uint8:
                    raise TypeError(f"a {device} state that is no tensor of bytes")
    except Exception as error:
        raise ValueError(
            f"resume: {name} must hold states of random generators, got {error}; {EARLIER}"
        ) from None


# ---- trainer_state.json ----


def _is_count(value: Any) -> bool:
    # Below 2^53 a count is exact as a float too, which transformers makes of some.
    return type(value) is int and 0 <= value < 2**53


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_log(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _is_object_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


_COUNT = ("be a count", _is_count)
_AMOUNT = ("be a number of at least 0", _is_amount)
_OBJECT = ("be an object", _is_object_or_none)
_TEXT = ("be a text or null", _is_text_or_none)
_SETTING = ("be a number, true, false or null", _is_setting)
_FIELDS = {  # what TrainerState's fields must be; _SETTING where nothing stands here
    "global_step": _COUNT,
    "max_steps": _COUNT,
    "num_train_epochs": _COUNT,
    "num_input_tokens_seen": _COUNT,
    "epoch": _AMOUNT,
    "logging_steps": _AMOUNT,
    "eval_steps": _AMOUNT,
    "save_steps": _AMOUNT,
    "total_flos": _AMOUNT,
    "log_history": ("be a list of objects", _is_log),
    "stateful_callbacks": _OBJECT,
    "trial_params": _OBJECT,
    "best_model_checkpoint": _TEXT,
    "trial_name": _TEXT,
}


def _check_trainer_state(values: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TrainerState)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"resume: {STATE} must hold known fields, got {name!r}; {EARLIER}")
        rule, is_right = _FIELDS.get(name, _SETTING)
        if not is_right(value):
            raise ValueError(
                f"resume: {name} in {STATE} must {rule}, got {repr(value)[:80]}; {EARLIER}"
            )
    if "global_step" not in values:
        raise ValueError(f"resume: {STATE} must hold global_step, got nothing; {EARLIER}")
