"""Read a backbone from a folder that need not be trusted: sizes are compared with what the weight
files really hold before anything is allocated, and no code, adapter or kernel that the config may
name is looked for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..errors import asker
from ..model import arch
from ..model.narrow import narrow_classes
from .files import FLOATING, DamagedFolder
from .layout import CONFIG, GENERATION, weight_names
from .saved_folder import SavedFolder

# What config.json may say of a dtype. It names an attribute of torch, and must not name any other.
_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Names under which transformers would fetch code, kernels or adapters from elsewhere.
_FOREIGN = ("auto_map", "attn_implementation", "experts_implementation", "custom_generate")


def check_writable(model: PreTrainedModel) -> None:
    """Refuse an attached model in few bits, or with tensors that its config does not tell of, such
    as an adapter's: nobody could load what would be written.

    Args:
        model: an attached model.

    Raises:
        ValueError: few bits, or the first names that there should not, or should, be.
    """
    if arch.is_few_bits(model):
        raise ValueError(
            f"{asker()}: the base must be plain, got one in few bits; call koff.compact first, "
            "which takes the weights from the checkpoint that it was quantised from"
        )
    base_class = type(model).__mro__[2]  # behind koff's subclass and its mixin
    with torch.device("meta"):
        wanted = base_class(copy.deepcopy(model.config)).state_dict().keys()
    names = {name for name in model.state_dict() if not name.startswith("koff.")}
    differ = sorted(names ^ wanted)
    if differ:
        raise ValueError(
            f"{asker()}: the backbone's tensors must be those of a {base_class.__name__}, got a "
            f"difference in {differ[:3]}; take adapters off first (PEFT: merge_and_unload() or "
            "unload())"
        )


def check_backbone(folder: SavedFolder) -> tuple[Any, type[PreTrainedModel]]:
    """Compare config.json, koff.json and the headers of the weight files with each other.

    No data is read, and nothing allocated: the model that the config describes is built on the meta
    device, where tensors have a shape and no memory.

    Args:
        folder: the saved folder.

    Returns:
        (config, model class), for ``build_backbone``.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file, or sizes that are not those of the
            weights.
    """
    values = _read_config(folder, CONFIG)
    config_class, model_class = _classes(values.get("model_type"))
    header = _read_headers(folder)
    # Before the skeleton: it takes time and memory for each layer, also on the meta device.
    layers = arch.count_layers(header, values["model_type"])
    got = values.get("num_hidden_layers")
    if type(got) is not int or got != layers:
        raise DamagedFolder(
            f"num_hidden_layers in {CONFIG} must be {layers}, as in the weights, got {got!r}"
        )
    for name in values:  # the config takes its values over as attributes
        if callable(getattr(config_class, name, None)):
            raise DamagedFolder(f"{name!r} in {CONFIG} must be a setting, got a method's name")
    if values.get("quantization_config"):
        raise ValueError(
            f"{asker()}: the backbone must not be quantised, got {values['quantization_config']}; "
            "save it in bfloat16, float16 or float32"
        )
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # transformers' own checks, of many types
        raise DamagedFolder(f"{CONFIG} must be a config of its model type, got {error}") from error
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
        wanted = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        tied = set(skeleton.all_tied_weights_keys)
    except Exception as error:
        raise DamagedFolder(f"{CONFIG} must describe a model, got {error}") from error
    if arch.widths(skeleton) != folder.manifest.widths:
        raise DamagedFolder(
            f"the backbone's widths must be {folder.manifest.widths}, got {arch.widths(skeleton)}"
        )
    # The head of a tied model is its embedding, and not saved twice.
    differ = sorted(header.keys() ^ wanted.keys() - (tied - header.keys()))
    if differ:
        raise DamagedFolder(
            f"the backbone's tensors must be those of {CONFIG}, got a difference in {differ[:3]}"
        )
    # Equal shapes here, and files that their tensors fill (``File.header``): the model is as large
    # as its files, whatever the config claims.
    for name, (dtype, shape) in header.items():
        if shape != wanted[name]:
            raise DamagedFolder(
                f"{name} must have shape {wanted[name]}, as in {CONFIG}, got {shape}"
            )
        if dtype not in FLOATING:
            raise DamagedFolder(
                f"{name} must have one of the dtypes {', '.join(FLOATING)}, got {dtype}"
            )
    return config, model_class


def build_backbone(
    folder: SavedFolder,
    config: Any,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype | str,
) -> PreTrainedModel:
    """Build the model that ``check_backbone`` has checked.

    Args:
        folder: the saved folder.
        config, model_class: what ``check_backbone`` returned.
        dtype: of the weights; "auto": as saved.

    Returns:
        The model, on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    for name in weight_names(folder.manifest.files):
        tensors |= folder.file(name).tensors()
    if dtype == "auto":
        saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
        if saved not in _DTYPES:
            raise DamagedFolder(
                f"dtype in {CONFIG} must be one of {', '.join(_DTYPES)}, got {saved}"
            )
        dtype = getattr(torch, saved)
    # Without a path transformers looks for nothing on disk or on the hub.
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    wrong = {kind: found for kind, found in report.items() if found}
    if wrong:
        raise DamagedFolder(f"the backbone's tensors must all be used and complete, got {wrong}")
    if GENERATION in folder.manifest.files:
        values = _read_config(folder, GENERATION)
        try:
            model.generation_config = GenerationConfig.from_dict(values)
        except Exception as error:
            raise DamagedFolder(f"{GENERATION} must be a generation config, got {error}") from error
    # As after transformers' from_pretrained; a later koff.save takes the id of the base from here.
    model.config._name_or_path = folder.manifest.base or ""
    return model


def _read_config(folder: SavedFolder, name: str) -> dict[str, Any]:
    """A config's values without those that lead elsewhere. Names with "_" are transformers' own
    attributes, such as the implementation of attention."""
    values = folder.file(name).json()
    return {k: v for k, v in values.items() if k not in _FOREIGN and not k.startswith("_")}


def _classes(model_type: Any) -> tuple[type, type[PreTrainedModel]]:
    """(config class, model class) of a model type, from transformers or koff alone."""
    if not isinstance(model_type, str):
        raise ValueError(
            f"{asker()}: the model type must be a text, got {model_type!r}; check config.json"
        )
    entry = arch.architecture(model_type)
    if model_type.startswith(arch.NARROW_PREFIX):
        return narrow_classes(entry.model_type)
    return getattr(transformers, entry.config), getattr(transformers, entry.causal_lm)


def _read_headers(folder: SavedFolder) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape) over all weight files."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in sorted(weight_names(folder.manifest.files)):
        header = folder.file(name).header()
        both = sorted(found.keys() & header.keys())
        if both:
            raise DamagedFolder(
                f"the weight files must hold each tensor once, got {both[:3]} twice"
            )
        found |= header
    if not found:
        raise DamagedFolder("the folder must hold weight files, got none in koff.json")
    return found
