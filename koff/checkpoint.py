"""Training checkpoints: everything learned, and never the base weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .disk import read_json, read_tensors
from .errors import require
from .state import KoffState

WEIGHTS, FACTS = "koff_state.safetensors", "koff_state.json"
FORMAT = 1
_WHERE = "resume"


def write_checkpoint(
    state: KoffState, directory: str | Path, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write gates, multiplier, masks and memories of a model into a folder.

    Args:
        state: ``model.koff``.
        directory: an existing folder.
        tensors: the state's tensors, gathered, where they are sharded; None: the state's own.
    """
    tensors = state.state_dict() if tensors is None else tensors
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, str(Path(directory, WEIGHTS)), metadata={"format": "pt"})
    facts = {
        "format": FORMAT,
        "config": state.config.to_dict(),
        "dense_widths": state.dense_widths,
        "mask_fixed": state.gates is not None and state.gates.fixed,
        "kv_filled": {memory.name: memory.kv_filled for memory in state.memories},
    }
    Path(directory, FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _read_facts(state: KoffState, path: Path) -> dict[str, Any]:
    """The checkpoint's facts, checked against the model that resumes from it."""
    for name in (WEIGHTS, FACTS):
        there, what = (path / name).is_file(), f"checkpoint {path.name}"
        step = "resume from an earlier checkpoint"
        require(there, _WHERE, what, f"hold {name}", "none", step, FileNotFoundError)
    facts = read_json(path / FACTS, _WHERE)
    got = facts.get("format")
    require(got == FORMAT, _WHERE, "the checkpoint format", f"be {FORMAT}", got, "update koff")
    for name, own in (("config", state.config.to_dict()), ("dense_widths", state.dense_widths)):
        got, step = facts.get(name), "attach with the settings of the run that wrote it"
        require(got == own, _WHERE, f"the checkpoint's {name}", f"be {own}", got, step)
    return facts


@torch.no_grad()
def read_checkpoint(state: KoffState, directory: str | Path) -> None:
    """Load what ``write_checkpoint`` wrote, in place, after checking that it belongs to this model.

    Args:
        state: ``model.koff`` of a model attached with the same config.
        directory: the checkpoint.

    Raises:
        FileNotFoundError, ValueError: not a koff checkpoint, or one of another model or config.
    """
    facts = _read_facts(state, Path(directory))
    tensors, own = read_tensors(Path(directory, WEIGHTS), _WHERE), state.state_dict()
    shapes = [{n: tuple(t.shape) for n, t in some.items()} for some in (tensors, own)]
    rule = "have the model's names and shapes"
    step = "check the model"
    require(shapes[0] == shapes[1], _WHERE, "the checkpoint's tensors", rule, "others", step)
    for name, t in own.items():
        t.copy_(tensors[name])
    if facts["mask_fixed"]:
        state.gates.fix_([mask.clone() for mask in state.gates.masks])
    for name, filled in facts["kv_filled"].items():
        state.memories[name].kv_filled = filled
