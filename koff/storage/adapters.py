"""Memories on disk, in PEFT's formats: LORA and CARTRIDGE, in one folder with a memory.json. For
the learned cache of a model with recurrent layers PEFT has none (``hybrid_cache``).

What is read comes through a ``SavedFolder`` or from a folder of the user's own; the functions here
look at what was read: settings first, then the header, and the data once they fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import asked_by, asker
from ..model import arch
from ..model.arch import Site
from ..model.attach import new_memory
from ..model.config import KVConfig, LoRAConfig
from ..model.memories import Memory
from .files import FLOATING, DamagedFolder
from .hybrid_cache import cache_settings, cache_shapes, fill_cache, write_cache
from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CACHE_CONFIG,
    CACHE_WEIGHTS,
    KV,
    LORA,
    MEMORIES,
    MEMORY,
    memory_names,
    memory_parts,
)
from .manifest import FORMAT, Manifest
from .saved_folder import SavedFolder

Header = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)

_CACHE = "prompt_embeddings"  # PEFT's name of the one tensor of a CARTRIDGE
# Fields of PEFT's LoraConfig that may have any value: the first three make koff's config, the rest
# have no effect on what the adapter computes.
_FREE = frozenset(
    "r lora_alpha target_modules "
    "peft_type task_type peft_version revision base_model_name_or_path inference_mode lora_dropout "
    "init_lora_weights".split()
)


# ---- one memory's folder ----


def check_memory(memory: Memory) -> None:
    """Refuse a memory that no folder may hold: one that waits for text, or is not finite.

    Raises:
        ValueError: one of these.
    """
    memory.check_filled(asker())
    memory.check_finite(asker())


def write_memory(
    model: PreTrainedModel, memory: Memory, directory: Path, manifest: Manifest
) -> None:
    """Write a memory into a new folder, for a backbone that its manifest describes."""
    directory.mkdir(parents=True)
    # PEFT's Auto classes load the base that an adapter names. On the dense one a memory of a pruned
    # backbone computes something else, and where its shapes fit (a cache's and attention's do),
    # nobody would notice.
    base = manifest.base if manifest.widths == manifest.dense_widths else None
    if memory.lora_config is not None:
        write_lora(model, memory, directory / LORA, base)
    if memory.kv_config is not None:
        write_kv(model, memory, directory / KV, base)
    facts = {
        "format": FORMAT,
        "name": memory.name,
        # A memory is worth nothing on another backbone, and folders of memories get copied around.
        "backbone_sha256": manifest.backbone_sha256,
    }
    (directory / MEMORY).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read_memory(
    folder: SavedFolder, model: PreTrainedModel, name: str, generator: torch.Generator
) -> Memory:
    """Read one memory of a saved folder.

    Args:
        folder: whose manifest lists the memory.
        model: the folder's backbone.
        name: of the memory.
        generator: of initial values, all of which are overwritten.

    Returns:
        A memory that fits the model and is not yet part of it.

    Raises:
        FileNotFoundError, ValueError: damaged, or of another backbone.
    """
    with asked_by(f"memory {name!r}"):
        place = f"{MEMORIES}/{name}"
        facts = folder.file(f"{place}/{MEMORY}").json()
        for field, wanted in (("format", FORMAT), ("name", name)):
            got = facts.get(field)
            if got != wanted or isinstance(got, bool):  # True == 1
                raise ValueError(
                    f"{asker()}: its {field} in {MEMORY} must be {wanted!r}, got {got!r}; copy the "
                    "memory again"
                )
        if facts.get("backbone_sha256") != folder.manifest.backbone_sha256:
            raise ValueError(
                f"{asker()}: the memory must belong to this backbone, "
                f"got {facts.get('backbone_sha256')}; a memory works only on the backbone it was "
                "trained with"
            )
        parts = memory_parts(folder.manifest.files, name)
        if not parts:
            raise ValueError(
                f"{asker()}: it must have a LoRA or a KV part, got none; copy it again"
            )
        names = {LORA: (ADAPTER_CONFIG, ADAPTER_WEIGHTS), KV: kv_files(model)}
        files = {part: [f"{place}/{part}/{name}" for name in names[part]] for part in parts}
        lora = kv = None
        if LORA in parts:
            lora_settings, lora_weights = files[LORA]
            lora = lora_config(folder.file(lora_settings).json())
        if KV in parts:
            kv_settings, kv_weights = files[KV]
            kv = kv_config(model, folder.file(kv_settings).json())
        # The header says what the file holds; a config that claims more is refused before anything
        # of its size is made.
        if lora is not None:
            check_lora(model, lora, folder.file(lora_weights).header())
        if kv is not None:
            check_kv(model, kv, folder.file(kv_weights).header())
        # All that koff.save listed, and what is used even if the manifest does not list it: then it
        # is refused. Memories are small, so there is no verify=False for them.
        used = {f"{place}/{MEMORY}"}.union(*files.values())
        folder.verify(used.union(memory_names(folder.manifest.files, name)))
        memory = new_memory(model, name, lora, kv, generator)
        if lora is not None:
            fill_lora(model, memory, folder.file(lora_weights).tensors())
        if kv is not None:
            fill_kv(model, memory, folder.file(kv_weights).tensors())
        return memory


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a memory's tensors with NaN or infinity, as ``Memory.check_finite`` does.

    Raises:
        ValueError: the name of such a tensor.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{asker()}: {name} must be finite, got NaN or infinity; train it again"
            )


def _check_dtype(name: str, dtype: str) -> None:
    if dtype not in FLOATING:
        raise DamagedFolder(
            f"{name} must have one of the dtypes {', '.join(FLOATING)}, got {dtype}"
        )


def _config(kind: type, **values: Any) -> Any:
    """A config dataclass from a file's values: a wrong type there is a damaged file."""
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{asker()}: {error}") from None


# ---- LORA ----


def write_lora(model: PreTrainedModel, memory: Memory, directory: Path, base: str | None) -> None:
    """Write a memory's LoRA as PEFT's LORA adapter into a new folder.

    Args:
        model: that the memory belongs to.
        memory: with a LoRA.
        directory: to make.
        base: id of the model that it belongs on, for PEFT's config; None if it has none.
    """
    from peft import LoraConfig  # peft takes a second to import, and loading a model needs none

    config = memory.lora_config
    directory.mkdir(parents=True)
    tensors = {}
    for site, weights in memory.sites():
        tensors[_lora_key(model, site, "A")] = weights.a.detach().cpu().contiguous()
        tensors[_lora_key(model, site, "B")] = weights.b.detach().cpu().contiguous()
    # The mark of torch, which PEFT and transformers write too, and older versions ask for.
    save_file(tensors, str(directory / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=sorted(config.target_modules),  # a set to PEFT, which writes it in any order
        task_type="CAUSAL_LM",
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base,
    ).save_pretrained(str(directory))


def _lora_key(model: PreTrainedModel, site: Site, part: str) -> str:
    """PEFT's name of one matrix:
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"."""
    return f"base_model.model.{arch.site_path(site, model)}.lora_{part}.weight"


def check_plain_lora(values: dict[str, Any], also: frozenset[str] = frozenset()) -> None:
    """Refuse the settings of anything but a LORA whose formula is koff's, W + alpha / r * B A.

    PEFT's variants are switched on by settings that are empty or at their default in a plain LoRA.
    One that koff does not know yet counts as a variant.

    Args:
        values: of an adapter_config.json.
        also: further settings that may have any value, because the caller honours them.

    Raises:
        ValueError: another kind of adapter, or the setting that makes it another formula.
    """
    from peft import LoraConfig

    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{asker()}: peft_type must be 'LORA', got {values.get('peft_type')!r}; check the "
            "folder"
        )
    plain = LoraConfig().to_dict()
    for name, value in values.items():
        if value and name not in _FREE and name not in also and value != plain.get(name):
            raise ValueError(
                f"{asker()}: {name if name.isidentifier() else repr(name)} must be unset (koff has "
                f"plain LoRA), got {value!r}; merge or retrain it"
            )


def lora_config(values: dict[str, Any]) -> LoRAConfig:
    """Return koff's LoRA config of a PEFT LORA folder.

    Args:
        values: of its adapter_config.json.

    Raises:
        ValueError: not a plain LoRA, or damaged.
    """
    check_plain_lora(values)
    targets = values.get("target_modules")
    if not isinstance(targets, list):
        raise ValueError(
            f"{asker()}: target_modules must be a list, got {targets!r}; check the folder"
        )
    return _config(
        LoRAConfig,
        r=values.get("r"),
        alpha=values.get("lora_alpha"),
        target_modules=tuple(targets),
    )


def check_lora(model: PreTrainedModel, config: LoRAConfig, header: Header) -> None:
    """Refuse a LORA's tensors unless names, shapes and dtypes are those of a config on this model.

    Args:
        model: that it is for.
        config: of the LoRA.
        header: of its weights; so nothing is allocated by what a damaged file claims.

    Raises:
        ValueError: the first tensor that does not fit.
    """
    wanted = {}
    for site, module in arch.sites(model):
        if site.linear in config.target_modules:
            wanted[_lora_key(model, site, "A")] = (config.r, module.in_features)
            wanted[_lora_key(model, site, "B")] = (module.out_features, config.r)
    differ = sorted(wanted.keys() ^ header.keys())
    if differ:
        raise ValueError(
            f"{asker()}: the LoRA tensors must be the model's, got a difference in {differ[:3]}; "
            "check the model"
        )
    for name, want in wanted.items():
        dtype, shape = header[name]
        if shape != want:
            raise ValueError(
                f"{asker()}: {name} must have shape {want}, got {shape}; an unpruned LoRA does not "
                "fit a pruned backbone, nor the other way round"
            )
        _check_dtype(name, dtype)


@torch.no_grad()
def fill_lora(model: PreTrainedModel, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
    """Copy a LORA's tensors into a memory, in place.

    Args:
        model: that the memory belongs to.
        memory: with a LoRA that ``check_lora`` found to fit.
        tensors: the file's.

    Raises:
        ValueError: they are not finite.
    """
    check_finite(tensors)
    for site, weights in memory.sites():
        weights.a.copy_(tensors[_lora_key(model, site, "A")])
        weights.b.copy_(tensors[_lora_key(model, site, "B")])


# ---- CARTRIDGE, or koff's own format where the model has recurrent layers ----


def kv_files(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the files of a learned cache: its settings and its tensors."""
    if arch.is_hybrid(model):
        return CACHE_CONFIG, CACHE_WEIGHTS
    return ADAPTER_CONFIG, ADAPTER_WEIGHTS


def write_kv(model: PreTrainedModel, memory: Memory, directory: Path, base: str | None) -> None:
    """Write a memory's learned cache as PEFT's CARTRIDGE adapter into a new folder.

    One tensor ``prompt_embeddings`` [P, 2 L Hkv D]: for each token, layer by layer, its key then
    its value.

    Args:
        model: that the memory belongs to.
        memory: with a learned cache.
        directory: to make.
        base: id of the model that it belongs on, for PEFT's config; None if it has none.
    """
    directory.mkdir(parents=True)
    if arch.is_hybrid(model):
        write_cache(memory, directory)
        return
    from peft import CartridgeConfig

    config, (heads, width) = memory.kv_config, arch.kv_shape(model)
    # [Hkv, P, D] of key, value, key, value, ... -> [P, 2 L, Hkv, D] -> [P, 2 L Hkv D]
    parts = [t.detach().cpu().transpose(0, 1) for weights in memory.kv for t in weights.full()]
    cache = torch.stack(parts, dim=1).reshape(config.num_tokens, -1).contiguous()
    save_file({_CACHE: cache}, str(directory / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    CartridgeConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.num_tokens,
        num_frozen_tokens=config.num_frozen_tokens,
        num_layers=len(memory.kv),
        # PEFT divides token_dim by the heads: kv heads are what a cache has, where they are fewer.
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=1,  # 2 would be an encoder and a decoder
        inference_mode=True,
        base_model_name_or_path=base,
    ).save_pretrained(str(directory))


def kv_config(model: PreTrainedModel, values: dict[str, Any]) -> KVConfig:
    """Return koff's KV config of the folder of a learned cache.

    Args:
        model: that it is for.
        values: of its adapter_config.json or cache.json.

    Raises:
        ValueError: of another kind, or damaged.
    """
    if arch.is_hybrid(model):
        return _config(KVConfig, **cache_settings(values))
    if values.get("peft_type") != "CARTRIDGE":
        raise ValueError(
            f"{asker()}: peft_type must be 'CARTRIDGE', got {values.get('peft_type')!r}; check the "
            "folder"
        )
    return _config(
        KVConfig,
        num_tokens=values.get("num_virtual_tokens"),
        num_frozen_tokens=values.get("num_frozen_tokens"),
    )


def check_kv(model: PreTrainedModel, config: KVConfig, header: Header) -> None:
    """Refuse a learned cache's tensors unless names, shapes and dtypes are what a config means on
    this model.

    Args:
        model: that it is for.
        config: of the learned cache.
        header: of its weights; so nothing is allocated by what a damaged file claims.

    Raises:
        ValueError: it does not fit.
    """
    got = {name: shape for name, (_, shape) in header.items()}
    for name, (dtype, _) in header.items():
        _check_dtype(name, dtype)
    if arch.is_hybrid(model):
        want = cache_shapes(model, config)
        differ = sorted(n for n in {*want, *got} if want.get(n) != got.get(n))
        if differ:
            name = differ[0]
            raise ValueError(
                f"{asker()}: {name} of the learned cache must have shape {want.get(name)}, got "
                f"{got.get(name)}; check that the memory is of this model"
            )
        return
    heads, width = arch.kv_shape(model)
    layers = len(arch.layers(model))
    want = {_CACHE: (config.num_tokens, 2 * layers * heads * width)}
    if got != want:
        raise ValueError(
            f"{asker()}: the learned cache must be {want}, got {got}; this model has {layers} "
            f"layers, {heads} kv heads and head_dim {width}"
        )


@torch.no_grad()
def fill_kv(model: PreTrainedModel, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
    """Copy a learned cache's tensors into a memory, in place.

    Args:
        model: that the memory belongs to.
        memory: with a learned cache that ``check_kv`` found to fit.
        tensors: the file's.

    Raises:
        ValueError: they are not finite.
    """
    check_finite(tensors)
    memory.kv_filled = True
    if arch.is_hybrid(model):
        fill_cache(memory, tensors)
        return
    heads, width = arch.kv_shape(model)
    # [P, 2 L Hkv D] -> [P, L, 2, Hkv, D]; key and value of a layer are [Hkv, P, D] in the memory
    # Keys stay as they are on disk, at positions 0..P-1: a rotation here, and one back at save,
    # would not be bit-equal.
    cache = tensors[_CACHE].view(memory.length, len(memory.kv), 2, heads, width).float()
    for index, weights in enumerate(memory.kv):
        key, value = cache[:, index, 0].transpose(0, 1), cache[:, index, 1].transpose(0, 1)
        weights.fill_(key.to(weights.k.device), value.to(weights.v.device))
