"""Read a backbone from a folder that need not be trusted: sizes are compared with what the weight
files really hold before anything is allocated, and no code, adapter or kernel that the config may
name is looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..errors import asked_by, refuse, require
from ..model import arch
from ..model.narrow import narrow_classes
from . import adapters as disk
from .layout import WEIGHTS, check_inside

CONFIG, GENERATION = "config.json", "generation_config.json"
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# Names under which transformers would fetch code, kernels or adapters from elsewhere.
_FOREIGN = ("auto_map", "attn_implementation", "experts_implementation", "custom_generate")


def names(files: dict[str, str]) -> list[str]:
    """Which of the saved files make the backbone.

    Args:
        files: "files" of koff.json.
    """
    own = [name for name in files if name == GENERATION or WEIGHTS.fullmatch(name)]
    return [CONFIG, *own]


def _read_config(directory: Path, name: str, where: str) -> dict[str, Any]:
    """A config's values without those that lead elsewhere."""
    check_inside(directory, name, where)
    values = disk.read_json(directory / name, where)
    return {k: v for k, v in values.items() if k not in _FOREIGN and not k.startswith("_")}


def _headers(directory: Path, files: dict[str, str], where: str) -> dict[str, tuple[str, tuple]]:
    """name -> (dtype, shape) over all weight files."""
    found: dict[str, tuple[str, tuple]] = {}
    for name in sorted(name for name in files if WEIGHTS.fullmatch(name)):
        check_inside(directory, name, where)
        header = disk.read_header(directory / name, where)
        both = sorted(set(found) & set(header))
        rule, step = "hold each tensor once", "copy the folder again"
        require(not both, where, "the weight files", rule, f"{both[:3]} twice", step)
        found |= header
    step = "copy the folder again"
    require(bool(found), where, "the folder", "hold weight files", "none in koff.json", step)
    return found


def _classes(values: dict[str, Any], where: str) -> tuple[type, type]:
    """(config class, model class) that a config.json asks for, from transformers or koff alone."""
    model_type = values.get("model_type")
    known = isinstance(model_type, str)
    require(known, where, "the model type", "be a text", repr(model_type), "check config.json")
    with asked_by(where):
        entry = arch.architecture(model_type)
    if model_type.startswith(arch.NARROW_PREFIX):
        return narrow_classes(entry.model_type)
    return getattr(transformers, entry.config), getattr(transformers, entry.causal_lm)


def _build_config(values: dict[str, Any], where: str) -> tuple[Any, type]:
    config_class, model_class = _classes(values, where)
    for name in values:
        own = callable(getattr(config_class, name, None))
        step = "copy the folder again"
        require(not own, where, f"{name!r} in {CONFIG}", "be a setting", "a method's name", step)
    quantised, step = values.get("quantization_config"), "save it in bfloat16, float16 or float32"
    require(not quantised, where, "the backbone", "not be quantised", quantised, step)
    try:
        return config_class.from_dict(values), model_class
    except Exception as error:  # transformers' own checks, of many types
        refuse(where, CONFIG, "be a config of its model type", error, "copy the folder again")


def check_backbone(directory: Path, facts: dict[str, Any], where: str) -> tuple[Any, type]:
    """Compare config.json, koff.json and the weight files with each other; reads no data.

    Args:
        directory: the saved folder.
        facts: koff.json.
        where: for errors.

    Returns:
        (config, model class).

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file, or sizes that are not those of the
            weights.
    """
    values = _read_config(directory, CONFIG, where)
    _classes(values, where)
    header = _headers(directory, facts["files"], where)
    layers = arch.count_layers(header, values["model_type"])
    got = values.get("num_hidden_layers")
    same = type(got) is int and got == layers
    rule, step = f"be {layers}, as in the weights", "copy the folder again"
    require(same, where, f"num_hidden_layers in {CONFIG}", rule, repr(got), step)
    config, model_class = _build_config(values, where)
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
        wanted = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        tied = set(skeleton.all_tied_weights_keys)
    except Exception as error:
        refuse(where, CONFIG, "describe a model", error, step)
    _check_widths(facts, arch.widths(skeleton), where)
    differ = sorted(set(header) ^ set(wanted) - (tied - set(header)))
    what, got = "the backbone's tensors", f"a difference in {differ[:3]}"
    require(not differ, where, what, f"be those of {CONFIG}", got, step)
    for name, (dtype, shape) in header.items():
        want = wanted[name]
        require(shape == want, where, name, f"have shape {want}, as in {CONFIG}", shape, step)
        rule = f"have one of the dtypes {', '.join(disk.FLOATING)}"
        require(dtype in disk.FLOATING, where, name, rule, dtype, step)
    return config, model_class


def _check_widths(facts: dict[str, Any], got: list[int], where: str) -> None:
    widths = facts["widths"]
    step = "copy the folder again"
    require(got == widths, where, "the backbone's widths", f"be {widths}", got, step)


def _tensors(directory: Path, files: dict[str, str], where: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in files:
        if WEIGHTS.fullmatch(name):
            tensors |= disk.read_tensors(directory / name, where)
    return tensors


def build_backbone(
    directory: Path, facts: dict[str, Any], built: tuple[Any, type], dtype: Any, where: str
) -> PreTrainedModel:
    """Build the model that ``check_backbone`` has checked.

    Args:
        directory: the saved folder.
        facts: koff.json.
        built: what ``check_backbone`` returned.
        dtype: of the weights; "auto": as saved.
        where: for errors.

    Returns:
        The model, on the CPU.
    """
    config, model_class = built
    tensors = _tensors(directory, facts["files"], where)
    if dtype == "auto":
        saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
        rule, step = f"be one of {', '.join(_DTYPES)}", "copy the folder again"
        require(saved in _DTYPES, where, f"dtype in {CONFIG}", rule, saved, step)
        dtype = getattr(torch, saved)
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    wrong = {kind: found for kind, found in report.items() if found}
    rule, step = "all be used and complete", "copy the folder again"
    require(not wrong, where, "the backbone's tensors", rule, wrong, step)
    if GENERATION in facts["files"]:
        model.generation_config = _generation(directory, where)
    model.config._name_or_path = facts["base"] or ""
    return model


def _generation(directory: Path, where: str) -> GenerationConfig:
    values = _read_config(directory, GENERATION, where)
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:
        refuse(where, GENERATION, "be a generation config", error, "copy the folder again")
