"""Training checkpoints: everything learned, and never the base weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import require
from .state import KoffState

WEIGHTS, FACTS = "koff_state.safetensors", "koff_state.json"
FORMAT = 1


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


def read_checkpoint(state: KoffState, directory: str | Path) -> None:
    """Load what ``write_checkpoint`` wrote, in place, after checking that it belongs to this model.

    Raises:
        FileNotFoundError, ValueError: not a koff checkpoint, or one of another model or config.
    """
    where, path = "resume", Path(directory)
    for name in (WEIGHTS, FACTS):
        require(
            (path / name).is_file(),
            where,
            f"checkpoint {path.name}",
            f"hold {name}",
            "none",
            "resume from an earlier checkpoint",
            FileNotFoundError,
        )
    facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    require(
        facts.get("format") == FORMAT,
        where,
        "the checkpoint format",
        f"be {FORMAT}",
        facts.get("format"),
        "update koff",
    )
    for name, own in (("config", state.config.to_dict()), ("dense_widths", state.dense_widths)):
        step = "attach with the settings of the run that wrote it"
        require(
            facts[name] == own, where, f"the checkpoint's {name}", f"be {own}", facts[name], step
        )
    tensors = load_file(str(path / WEIGHTS))
    own = state.state_dict()
    same = {n: tuple(t.shape) for n, t in tensors.items()} == {
        n: tuple(t.shape) for n, t in own.items()
    }
    require(
        same,
        where,
        "the checkpoint's tensors",
        "have the model's names and shapes",
        "others",
        "check the model",
    )
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])
    if facts["mask_fixed"]:
        state.gates.fix_([mask.clone() for mask in state.gates.masks])
    for name, filled in facts["kv_filled"].items():
        state.memories[name].kv_filled = filled
