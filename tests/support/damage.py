"""Damage to saved folders, and the errors that answer it."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from koff.storage.files import digests
from koff.storage.manifest import seal_of

# How every error of koff reads: "who: what must rule, got value; next step".
HOUSE = r"(?s)^[^:]+: .+ must .+, got .*; .+"


def edit(path, **changes):
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reshape(path, name=None, shape=None):
    """Give a tensor of a safetensors file (the first one) another shape: one more in each size."""
    tensors = load_file(path)
    name = name or sorted(tensors)[0]
    tensors[name] = torch.zeros(shape or [n + 1 for n in tensors[name].shape])
    save_file(tensors, path, metadata={"format": "pt"})


def reseal(directory):
    """What a forger would do: make every hash agree with what lies there now."""
    facts = json.loads((directory / "koff.json").read_text())
    if isinstance(facts["files"], dict):
        known = [name for name in facts["files"] if (directory / name).is_file()]
        facts["files"] |= digests(directory, known)
    facts["checksum"] = seal_of(facts)
    (directory / "koff.json").write_text(json.dumps(facts))


def flip(path, where=-1):
    """Flip one bit of a file, of its last byte."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))


def cut(path):
    """Cut the last bytes of a file off."""
    path.write_bytes(path.read_bytes()[:-5])


# What is done to a saved model of the memories en, keys and es, the error and what it says.
DAMAGES = {
    "no marker": (
        lambda d: (d / "koff.json").unlink(),
        FileNotFoundError,
        "koff.json must be there",
    ),
    "format": (
        lambda d: edit(d / "koff.json", format=9),
        ValueError,
        "must be 1, got 9; update koff",
    ),
    "not json": (lambda d: (d / "koff.json").write_text("{"), ValueError, "must be JSON, got"),
    "bad name": (
        lambda d: edit(d / "koff.json", memories=["../x"]),
        ValueError,
        "must be 1 to 64 letters",
    ),
    "other widths": (
        lambda d: edit(d / "koff.json", widths=[1, 2, 3]),
        ValueError,
        "the backbone's widths must be",
    ),
    "no memory": (
        lambda d: shutil.rmtree(d / "memories/es"),
        FileNotFoundError,
        "memory 'es': memory.json must be there",
    ),
    "foreign memory": (
        lambda d: edit(d / "memories/es/memory.json", backbone_sha256="0" * 64),
        ValueError,
        "memory 'es': the memory must belong to this backbone",
    ),
    "lora shape": (
        lambda d: reshape(d / "memories/es/lora/adapter_model.safetensors"),
        ValueError,
        "an unpruned LoRA does not fit a pruned backbone",
    ),
    "kv shape": (
        lambda d: reshape(d / "memories/es/kv/adapter_model.safetensors"),
        ValueError,
        "this model has 3 layers, 2 kv heads and head_dim 16",
    ),
    "rank": (
        lambda d: edit(d / "memories/es/lora/adapter_config.json", r=-3),
        ValueError,
        "r must be a whole number",
    ),
    "dora": (
        lambda d: edit(d / "memories/es/lora/adapter_config.json", use_dora=True),
        ValueError,
        "use_dora must be unset",
    ),
    "cut short": (
        lambda d: (d / "memories/es/kv/adapter_model.safetensors").write_bytes(b"\x00" * 7),
        ValueError,
        "must be a safetensors file",
    ),
    "wrong kind": (
        lambda d: edit(d / "memories/es/kv/adapter_config.json", peft_type="LORA"),
        ValueError,
        "peft_type must be 'CARTRIDGE', got 'LORA'",
    ),
}
