"""Memories on disk, in PEFT's formats: LORA and CARTRIDGE. Only safetensors and JSON are read or
written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import refuse, require
from ..model import arch
from ..model.config import KVConfig, LoRAConfig
from ..model.memories import Memory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FLOATING = ("F16", "BF16", "F32", "F64")
FILES = (WEIGHTS, CONFIG)
_KV = "prompt_embeddings"
_PREFIX = "base_model.model."
_MOST_JSON = 1 << 26
_AGAIN = "copy the folder again"
# Fields of PEFT's LoraConfig that may have any value: the first three make koff's config, the rest
# have no effect on what the adapter computes.
_FREE = ("r", "lora_alpha", "target_modules", "peft_type", "task_type", "peft_version", "revision")
_FREE += ("base_model_name_or_path", "inference_mode", "lora_dropout", "init_lora_weights")


def _lora_key(model: PreTrainedModel, site: arch.Site, part: str) -> str:
    """PEFT's name of one matrix:
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"."""
    return f"{_PREFIX}{arch.site_path(site, model)}.lora_{part}.weight"


def write_lora(model: PreTrainedModel, memory: Memory, directory: Path, base: str | None) -> None:
    """Write a memory's LoRA as PEFT's LORA adapter into a new folder."""
    from peft import LoraConfig

    config = memory.lora_config
    directory.mkdir(parents=True)
    tensors = {}
    for site, weights in memory.sites():
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
    save_file({_KV: packed}, str(directory / WEIGHTS), metadata={"format": "pt"})
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


def require_file(path: Path, where: str) -> None:
    """Refuse a path that is not a regular file (or a link to one)."""
    got, step = "no such file", "check the folder"
    require(path.is_file(), where, path.name, "be there", got, step, FileNotFoundError)


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    Raises:
        FileNotFoundError, ValueError: missing or malformed.
    """
    require_file(path, where)
    size, rule = path.stat().st_size, f"have at most {_MOST_JSON} bytes"
    require(size <= _MOST_JSON, where, path.name, rule, size, "check the folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        refuse(where, path.name, "be JSON", error, _AGAIN)
    got = type(values).__name__
    require(isinstance(values, dict), where, path.name, "hold a JSON object", got, "check it")
    return values


def read_header(path: Path, where: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape) of every tensor of a safetensors file; reads no data.

    The library has checked that the tensors fill the file exactly, so sizes that pass here are the
    file's real ones.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or a tensor without values.
    """
    require_file(path, where)
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except Exception as error:
        refuse(where, path.name, "be a safetensors file", error, _AGAIN)
    for name, (_, shape) in header.items():
        require(0 not in shape, where, f"{name} in {path.name}", "hold values", shape, _AGAIN)
    return header


def read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: missing or damaged.
    """
    require_file(path, where)
    try:
        return load_file(str(path))
    except Exception as error:
        refuse(where, path.name, "be a safetensors file", error, _AGAIN)


def lora_values(directory: Path, where: str, also: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The settings of a PEFT LORA folder; variants that change the formula are refused.

    Args:
        directory: the folder.
        where: for errors.
        also: further settings that may have any value, because the caller honours them.
    """
    from peft import LoraConfig

    values = read_json(directory / CONFIG, where)
    kind = values.get("peft_type")
    require(kind == "LORA", where, "peft_type", "be 'LORA'", repr(kind), "check the folder")
    plain = LoraConfig().to_dict()
    for name, value in values.items():
        good = name in _FREE or name in also or not value or value == plain.get(name)
        what, step = name if name.isidentifier() else repr(name), "merge or retrain it"
        require(good, where, what, "be unset (koff has plain LoRA)", repr(value), step)
    return values


def lora_config(directory: Path, where: str) -> LoRAConfig:
    """koff's LoRA config of a PEFT LORA folder."""
    values = lora_values(directory, where)
    targets, rule = values.get("target_modules"), "be a list"
    good = isinstance(targets, list)
    require(good, where, "target_modules", rule, repr(targets), "check the folder")
    r, alpha = values.get("r"), values.get("lora_alpha")
    return _config(LoRAConfig, where, r=r, alpha=alpha, target_modules=tuple(targets))


def kv_config(directory: Path, where: str) -> KVConfig:
    """koff's KV config of a PEFT CARTRIDGE folder."""
    values = read_json(directory / CONFIG, where)
    kind = values.get("peft_type")
    require(
        kind == "CARTRIDGE", where, "peft_type", "be 'CARTRIDGE'", repr(kind), "check the folder"
    )
    frozen = values.get("num_frozen_tokens")
    tokens = values.get("num_virtual_tokens")
    return _config(KVConfig, where, num_tokens=tokens, num_frozen_tokens=frozen)


def _config(cls: type, where: str, **values: Any) -> Any:
    """A config dataclass from a file's values: a wrong type there is a damaged file."""
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_lora(model: PreTrainedModel, config: LoRAConfig, directory: Path, where: str) -> None:
    """Refuse a PEFT LORA file whose names, shapes or dtypes are not those of a config on this
    model; reads no data, so that nothing is allocated by what a damaged file claims."""
    wanted = {}
    for site, module in arch.sites(model):
        if site.linear in config.target_modules:
            width_out, width_in = module.weight.shape
            wanted[_lora_key(model, site, "A")] = (config.r, width_in)
            wanted[_lora_key(model, site, "B")] = (width_out, config.r)
    header = read_header(directory / WEIGHTS, where)
    names = sorted(set(wanted) ^ set(header))
    got = f"a difference in {names[:3]}"
    require(not names, where, "the LoRA tensors", "be the model's", got, "check the model")
    step = "an unpruned LoRA does not fit a pruned backbone, nor the other way round"
    for name, want in wanted.items():
        dtype, shape = header[name]
        require(shape == want, where, name, f"have shape {want}", shape, step)
        _check_dtype(name, dtype, where)


def check_kv(model: PreTrainedModel, config: KVConfig, directory: Path, where: str) -> None:
    """Refuse a PEFT CARTRIDGE file whose shape or dtype is not that of a config on this model;
    reads no data."""
    heads, width = arch.kv_shape(model)
    layers = len(arch.layers(model))
    header = read_header(directory / WEIGHTS, where)
    got = {name: shape for name, (_, shape) in header.items()}
    want = {_KV: (config.num_tokens, 2 * layers * heads * width)}
    step = f"this model has {layers} layers, {heads} kv heads and head_dim {width}"
    require(got == want, where, "the learned cache", f"be {want}", got, step)
    _check_dtype(_KV, header[_KV][0], where)


def _check_dtype(name: str, dtype: str, where: str) -> None:
    rule = f"have one of the dtypes {', '.join(FLOATING)}"
    require(dtype in FLOATING, where, name, rule, dtype, _AGAIN)


def read_finite(path: Path, where: str) -> dict[str, Tensor]:
    """A file's tensors; one NaN or infinity would poison every row that uses the memory.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or not finite.
    """
    tensors = read_tensors(path, where)
    for name, tensor in tensors.items():
        good = bool(tensor.isfinite().all())
        require(good, where, name, "be finite", "NaN or infinity", "train it again")
    return tensors


@torch.no_grad()
def read_lora(model: PreTrainedModel, memory: Memory, directory: Path, where: str) -> None:
    """Fill a memory's LoRA from a PEFT LORA folder, in place, after checking every name, shape and
    value."""
    check_lora(model, memory.lora_config, directory, where)
    tensors = read_finite(directory / WEIGHTS, where)
    for site, weights in memory.sites():
        weights.a.copy_(tensors[_lora_key(model, site, "A")])
        weights.b.copy_(tensors[_lora_key(model, site, "B")])


@torch.no_grad()
def read_kv(model: PreTrainedModel, memory: Memory, directory: Path, where: str) -> None:
    """Fill a memory's learned cache from a PEFT CARTRIDGE folder, in place, after checking its
    shape and values."""
    check_kv(model, memory.kv_config, directory, where)
    heads, width = arch.kv_shape(model)
    layers, tokens = len(memory.kv), memory.length
    packed = read_finite(directory / WEIGHTS, where)[_KV]
    packed = packed.view(tokens, layers, 2, heads, width).float()
    for index, weights in enumerate(memory.kv):
        key, value = packed[:, index, 0].transpose(0, 1), packed[:, index, 1].transpose(0, 1)
        weights.fill_(key.to(weights.k.device), value.to(weights.v.device))
    memory.kv_filled = True
