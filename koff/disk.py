"""Memories on disk, in PEFT's formats: LORA and CARTRIDGE. Only safetensors and JSON are read or
written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from . import arch
from .config import KVConfig, LoRAConfig
from .errors import require
from .memories import Memory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def _lora_key(model: PreTrainedModel, site: str, part: str) -> str:
    """PEFT's name of one matrix:
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"."""
    index, name = site.split("_", 1)
    path = arch.linear_path(name, model)
    return f"{_PREFIX}{arch.layers_path(model)}.{index}.{path}.lora_{part}.weight"


def write_lora(model: PreTrainedModel, memory: Memory, directory: Path, base: str | None) -> None:
    """Write a memory's LoRA as PEFT's LORA adapter into a new folder."""
    from peft import LoraConfig

    config = memory.lora_config
    directory.mkdir(parents=True)
    tensors = {}
    for site, weights in memory.lora.items():
        tensors[_lora_key(model, site, "A")] = weights.a.detach().cpu().contiguous()
        tensors[_lora_key(model, site, "B")] = weights.b.detach().cpu().contiguous()
    save_file(tensors, str(directory / WEIGHTS), metadata={"format": "pt"})
    LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=sorted(config.target_modules),
        task_type="CAUSAL_LM",
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base,
    ).save_pretrained(str(directory))


def write_kv(model: PreTrainedModel, memory: Memory, directory: Path, base: str | None) -> None:
    """Write a memory's learned cache as PEFT's CARTRIDGE adapter into a new folder.

    One tensor ``prompt_embeddings`` [P, 2 L Hkv D]: for each token, layer by layer, its key then
    its value.
    """
    from peft import CartridgeConfig

    config, (heads, width) = memory.kv_config, arch.kv_shape(model)
    directory.mkdir(parents=True)
    parts = [t.detach().cpu().transpose(0, 1) for weights in memory.kv for t in weights.full()]
    packed = torch.stack(parts, dim=1).reshape(config.num_tokens, -1).contiguous()
    save_file({"prompt_embeddings": packed}, str(directory / WEIGHTS), metadata={"format": "pt"})
    CartridgeConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_tokens,
        num_frozen_tokens=config.num_frozen_tokens,
        num_layers=len(memory.kv),
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=1,
        inference_mode=True,
        base_model_name_or_path=base,
    ).save_pretrained(str(directory))


def _require_file(path: Path, where: str) -> None:
    got, step = "no such file", "check the folder"
    require(path.is_file(), where, path.name, "be there", got, step, FileNotFoundError)


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError, ValueError: missing or malformed.
    """
    _require_file(path, where)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{where}: {path.name} must be JSON, got {error}; copy the folder again"
        ) from None
    require(
        isinstance(values, dict),
        where,
        path.name,
        "hold a JSON object",
        type(values).__name__,
        "check it",
    )
    return values


def read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: missing or damaged.
    """
    _require_file(path, where)
    try:
        return load_file(str(path))
    except Exception as error:
        raise ValueError(
            f"{where}: {path.name} must be a safetensors file, got {error}; copy the folder again"
        ) from None


def lora_config(directory: Path, where: str) -> LoRAConfig:
    """koff's LoRA config of a PEFT LORA folder; variants that change the formula are refused."""
    values = read_json(directory / CONFIG, where)
    kind = values.get("peft_type")
    require(kind == "LORA", where, "peft_type", "be 'LORA'", repr(kind), "check the folder")
    for name in (
        "use_dora",
        "use_rslora",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
    ):
        value = values.get(name)
        require(
            not value,
            where,
            name,
            "be unset (koff has plain LoRA)",
            repr(value),
            "merge or retrain it",
        )
    targets = values.get("target_modules")
    require(
        isinstance(targets, list),
        where,
        "target_modules",
        "be a list",
        repr(targets),
        "check the folder",
    )
    return LoRAConfig(
        r=values.get("r"), alpha=values.get("lora_alpha"), target_modules=tuple(targets)
    )


def kv_config(directory: Path, where: str) -> KVConfig:
    """koff's KV config of a PEFT CARTRIDGE folder."""
    values = read_json(directory / CONFIG, where)
    kind = values.get("peft_type")
    require(
        kind == "CARTRIDGE", where, "peft_type", "be 'CARTRIDGE'", repr(kind), "check the folder"
    )
    frozen = values.get("num_frozen_tokens")
    return KVConfig(num_tokens=values.get("num_virtual_tokens"), num_frozen_tokens=frozen)


@torch.no_grad()
def read_lora(model: PreTrainedModel, memory: Memory, directory: Path, where: str) -> None:
    """Fill a memory's LoRA from a PEFT LORA folder, in place, after checking every name and
    shape."""
    tensors = read_tensors(directory / WEIGHTS, where)
    wanted = {}
    for site, weights in memory.lora.items():
        wanted[_lora_key(model, site, "A")] = weights.a
        wanted[_lora_key(model, site, "B")] = weights.b
    names = sorted(set(wanted) ^ set(tensors))
    require(
        not names,
        where,
        "the LoRA tensors",
        "be the model's",
        f"a difference in {names[:3]}",
        "check the model",
    )
    for name, parameter in wanted.items():
        got, want = tuple(tensors[name].shape), tuple(parameter.shape)
        step = "an unpruned LoRA does not fit a pruned backbone, nor the other way round"
        require(got == want, where, name, f"have shape {want}", got, step)
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])


@torch.no_grad()
def read_kv(model: PreTrainedModel, memory: Memory, directory: Path, where: str) -> None:
    """Fill a memory's learned cache from a PEFT CARTRIDGE folder, in place, after checking its
    shape."""
    tensors = read_tensors(directory / WEIGHTS, where)
    heads, width = arch.kv_shape(model)
    layers, tokens = len(memory.kv), memory.length
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    want = {"prompt_embeddings": (tokens, 2 * layers * heads * width)}
    step = f"this model has {layers} layers, {heads} kv heads and head_dim {width}"
    require(got == want, where, "the learned cache", f"be {want}", got, step)
    packed = tensors["prompt_embeddings"].view(tokens, layers, 2, heads, width).float()
    for index, weights in enumerate(memory.kv):
        key, value = packed[:, index, 0].transpose(0, 1), packed[:, index, 1].transpose(0, 1)
        weights.fill_(key.to(weights.k.device), value.to(weights.v.device))
    memory.kv_filled = True
