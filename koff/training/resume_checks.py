"""Checks of transformers' own files in a checkpoint, before anything of it is used.

They are the only files koff does not write itself: optimizer, scheduler and RNG states are pickles,
read with ``weights_only=True``, which builds tensors and plain values and runs nothing. What they
hold is then compared with what the run needs.
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

from ..errors import asked_by, refuse, require
from ..model.state import KoffState
from ..storage.files import File
from .checkpoint import STATE, check_complete, check_state

OPTIMIZER, SCHEDULER, RNG = "optimizer.pt", "scheduler.pt", "rng_state"
_WHERE = "resume"
_STEP = "resume from an earlier checkpoint"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
# Optimiser state that has the shape of its parameter; the rest may be scalars too.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


@asked_by(_WHERE)
def check_resume(
    path: Path, state: KoffState, groups: list[dict[str, Any]], *, sharded: bool = False
) -> None:
    """Check everything of a checkpoint that a run would use; changes nothing.

    Args:
        path: the checkpoint.
        state: ``model.koff`` of the model that resumes.
        groups: parameter groups of its optimiser.
        sharded: the optimiser's state is in FSDP's own files, which accelerate reads with
            ``weights_only=True``.

    Raises:
        FileNotFoundError, ValueError: incomplete, changed since it was written, of another model,
            or a file that is more than tensors and plain values.
    """
    files = check_complete(path)
    check_state(state, path)
    if not sharded:
        for name in (OPTIMIZER, SCHEDULER):
            step = "it was written with save_only_model=True; resume from another"
            there = name in files
            require(there, _WHERE, f"checkpoint {path.name}", f"hold {name}", "none", step)
        _check_pickles(path, files)
        _check_optimizer(_plain(path / OPTIMIZER), groups)
    _check_scheduler(_plain(path / SCHEDULER), len(groups))
    for name in files:
        if name.startswith(RNG):
            _check_rng(name, _plain(path / name))
    _check_trainer_state(File(path / STATE).json())


def _check_pickles(path: Path, files: list[str]) -> None:
    """Refuse pickles that no run of koff writes, such as training_args.bin: nothing here would load
    them, but something else might."""
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        own = name in files and (name in (OPTIMIZER, SCHEDULER) or name.startswith(RNG))
        good = own or file.suffix not in _PICKLES
        rule, got = "hold no file that can execute", name
        require(good, _WHERE, f"checkpoint {path.name}", rule, got, "remove it")


def _plain(path: Path) -> Any:
    """Tensors and plain values of a pickle, without running anything."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own advice here is to load it with weights_only=False
        got = f"something else ({type(error).__name__})"
        refuse(_WHERE, path.name, "hold tensors and plain values only", got, _STEP)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_setting(value: Any) -> bool:
    """A number, a switch, None, or a few of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    if isinstance(value, Tensor):
        return value.dim() == 0 and bool(value.isfinite())
    return value is None or isinstance(value, bool) or _is_number(value)


def _check_optimizer(saved: Any, groups: list[dict[str, Any]]) -> None:
    what, rule = OPTIMIZER, "fit the run's parameter groups"
    good = isinstance(saved, dict) and set(saved) == {"state", "param_groups"}
    require(good, _WHERE, what, "hold state and param_groups", type(saved).__name__, _STEP)
    state, stored = saved["state"], saved["param_groups"]
    good = isinstance(state, dict) and isinstance(stored, list) and len(stored) == len(groups)
    require(good, _WHERE, what, rule, f"{len(stored)} groups", _STEP)
    index = 0
    for own, group in zip(groups, stored, strict=True):
        ids = list(range(index, index + len(own["params"])))
        good = isinstance(group, dict) and group.get("params") == ids
        require(good, _WHERE, what, rule, "other parameters", _STEP)
        index += len(ids)
        for name, value in group.items():
            good = isinstance(name, str) and (name == "params" or _is_setting(value))
            require(good, _WHERE, f"{name} in {what}", "be a number", repr(value)[:80], _STEP)
    parameters = [p for group in groups for p in group["params"]]
    for number, entry in state.items():
        good = type(number) is int and 0 <= number < index and isinstance(entry, dict)
        require(good, _WHERE, f"{what}'s state", rule, repr(number), _STEP)
        _check_moments(entry, parameters[number], number)


def _check_moments(entry: dict, parameter: Tensor, number: int) -> None:
    for name, value in entry.items():
        shape = tuple(parameter.shape)
        shapes = (shape,) if name in _MOMENTS else ((), shape)
        good = isinstance(value, Tensor) and tuple(value.shape) in shapes
        good = good and value.is_floating_point() and bool(value.isfinite().all())
        got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value)[:80]
        what = f"{name} of parameter {number} in {OPTIMIZER}"
        require(good, _WHERE, what, f"be finite numbers of shape {shape}", got, _STEP)


def _check_scheduler(saved: Any, groups: int) -> None:
    require(isinstance(saved, dict), _WHERE, SCHEDULER, "hold a dict", type(saved).__name__, _STEP)
    for name, value in saved.items():
        # The scheduler takes these over as its attributes: none may hide a method.
        good = isinstance(name, str) and not name.startswith("__") and name != "optimizer"
        good = good and not callable(getattr(LambdaLR, name, None))
        require(good, _WHERE, f"{name!r} in {SCHEDULER}", "be a setting", "a method's name", _STEP)
        if name == "lr_lambdas":
            good = isinstance(value, list) and all(not fn for fn in value)
        elif name in ("base_lrs", "_last_lr"):
            good = isinstance(value, list) and all(map(_is_number, value)) and len(value) == groups
        elif name in ("last_epoch", "_step_count"):
            good = type(value) is int and value >= 0
        else:
            good = isinstance(value, str) or _is_setting(value)
        rule = f"fit {groups} parameter groups"
        require(good, _WHERE, f"{name} in {SCHEDULER}", rule, repr(value)[:80], _STEP)


def _check_rng(name: str, saved: Any) -> None:
    """Set throw-away generators to the stored states."""
    try:
        random.Random().setstate(saved["python"])
        np.random.RandomState().set_state(saved["numpy"])
        torch.Generator().set_state(saved["cpu"])
        for device in ("cuda", "xla", "npu", "hpu", "mlu", "musa"):
            states = saved.get(device, [])
            for state in states if isinstance(states, list) else [states]:
                if not isinstance(state, Tensor) or state.dtype != torch.uint8:
                    raise TypeError(f"a {device} state that is no tensor of bytes")
    except Exception as error:
        refuse(_WHERE, name, "hold states of random generators", error, _STEP)


_COUNTS = ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen")
_SETTINGS = ("epoch", "logging_steps", "eval_steps", "save_steps", "total_flos")


def _check_trainer_state(values: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TrainerState)}
    for name, value in values.items():
        require(name in known, _WHERE, STATE, "hold known fields", repr(name), _STEP)
        if name in _COUNTS:
            good, rule = type(value) is int and 0 <= value < 2**53, "be a count"
        elif name in _SETTINGS:
            good, rule = _is_number(value) and value >= 0, "be a number of at least 0"
        elif name == "log_history":
            good = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
            rule = "be a list of objects"
        elif name in ("stateful_callbacks", "trial_params"):
            good, rule = value is None or isinstance(value, dict), "be an object"
        elif name in ("best_model_checkpoint", "trial_name"):
            good, rule = value is None or isinstance(value, str), "be a text or null"
        else:
            good, rule = _is_setting(value), "be a number, true, false or null"
        require(good, _WHERE, f"{name} in {STATE}", rule, repr(value)[:80], _STEP)
    got = values.get("global_step", "nothing")
    require(isinstance(got, int), _WHERE, STATE, "hold global_step", got, _STEP)
