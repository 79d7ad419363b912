"""Adapters that were trained elsewhere with PEFT: which ones a memory can hold, and how a LoRA of
the dense base is cut to the neurons that were kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import require
from ..model import arch
from ..model.arch import Site
from ..model.config import LoRAConfig
from ..model.memories import Memory
from . import adapters as disk

Matrices = dict[Site, tuple[Tensor, Tensor]]  # (A [r, K], B [N, r])

# Settings that say which layers there are, which the tensors say too, or that are converted below.
_HONOURED = frozenset(
    "alpha_pattern auto_mapping corda_config eva_config exclude_modules layers_pattern "
    "layers_to_transform rank_pattern use_rslora".split()
)
# The other initialisations of PEFT move a part of the base weights into the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_KEY = re.compile(r"base_model\.model\.(.+)\.([0-9]{1,6})\.([a-z_]+\.[a-z_]+)\.lora_([AB])\.weight")
# Which matrix of a LoRA has the neurons: B in its rows where they come out, A in its columns where
# they go in.
_DENSE_AXIS = {name: "BA"[dim] for name, dim in arch.NEURON_DIM.items()}
# PEFT takes the keys of its patterns as regular expressions, and one of an unknown file may be made
# to run for ever. Without repetition, and with two groups at most, none can.
_PLAIN = r"(?:[\w.|-]|\\\.)*"
_MODULES = re.compile(rf"\^?{_PLAIN}(?:\({_PLAIN}\){_PLAIN}){{0,2}}\$?")
_LONGEST_KEY = 128
_FP32 = torch.finfo(torch.float32)
Pattern = list[tuple[re.Pattern[str], Any]]


def read_lora(
    model: PreTrainedModel, directory: Path, where: str
) -> tuple[LoRAConfig, Matrices, dict[Site, float]]:
    """Read a PEFT LORA folder and cut it to the model's widths.

    Gate and up lose rows of B, down loses columns of A: the neurons that ``model.koff.kept`` lacks.
    A LoRA that has the pruned widths already is taken as it is.

    Args:
        model: an attached model.
        directory: what PEFT's ``save_pretrained`` wrote.
        where: who asks, for errors.

    Returns:
        The config of a memory that can hold it, the matrices of each site, and the scaling of each
        site.

    Raises:
        FileNotFoundError, ValueError: damaged, not a plain LoRA, or not of this model's shapes.
    """
    values = disk.lora_values(directory, where, _HONOURED)
    init, rule = values.get("init_lora_weights"), "leave the base weights alone"
    step = "convert it to a plain LoRA with PEFT"
    require(init in _PLAIN_INITS, where, "init_lora_weights", rule, repr(init), step)
    tensors = disk.read_finite(directory / disk.WEIGHTS, where)
    matrices = _cut(model, _pairs(model, tensors, where), where)
    ranks = {site: a.shape[0] for site, (a, _) in matrices.items()}
    scaling = _scalings(values, model, ranks, where)
    rank, largest = max(ranks.values()), max(scaling.values())
    names = {site.linear for site in matrices}
    targets = tuple(name for name in arch.LINEARS if name in names)
    return LoRAConfig(rank, largest * rank, targets), matrices, scaling


@torch.no_grad()
def fill_lora(memory: Memory, matrices: Matrices, scaling: dict[Site, float]) -> None:
    """Copy matrices into a memory's LoRA, in place; missing sites and ranks become exact zeros, and
    a site's own scaling goes into its B."""
    for site, weights in memory.sites():
        weights.a.zero_()
        weights.b.zero_()
        if site in matrices:
            a, b = matrices[site]
            weights.a[: a.shape[0]].copy_(a)
            weights.b[:, : a.shape[0]].copy_(b.float() * (scaling[site] / memory.scaling))


def _pairs(model: PreTrainedModel, tensors: dict[str, Tensor], where: str) -> Matrices:
    """site -> (A, B), every name checked."""
    parts: dict[Site, dict[str, Tensor]] = {}
    known = {arch.linear_path(n, model): n for n in arch.LINEARS}
    layers, path = len(arch.layers(model)), arch.layers_path(model)
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        good = found is not None and found[1] == path and int(found[2]) < layers
        good = good and found[3] in known and tensor.dim() == 2 and tensor.is_floating_point()
        rule = f"be a LoRA matrix of the {layers} layers' linear modules {', '.join(known)}"
        step = "a memory holds nothing else; train with these target_modules only"
        require(good, where, "a tensor", rule, f"{key} {tuple(tensor.shape)}", step)
        parts.setdefault(Site(int(found[2]), known[found[3]]), {})[found[4]] = tensor
    require(bool(parts), where, "the LoRA", "hold matrices", "none", "check the folder")
    for site, pair in parts.items():
        whole = set(pair) == {"A", "B"} and pair["A"].shape[0] == pair["B"].shape[1] > 0
        got = {part: tuple(t.shape) for part, t in pair.items()}
        rule, step = "have A [r, K] and B [N, r]", "copy the folder again"
        require(whole, where, f"the LoRA of {site}", rule, got, step)
    return {site: (pair["A"], pair["B"]) for site, pair in parts.items()}


def _cut(model: PreTrainedModel, matrices: Matrices, where: str) -> Matrices:
    """The matrices at the model's widths; all of them must have been dense, or all pruned."""
    state, linears = model.koff, dict(arch.sites(model))
    want, got, dense = {}, {}, {}
    for site, (a, b) in matrices.items():
        out, into = linears[site].weight.shape
        want[site], got[site] = (into, out), (a.shape[1], b.shape[0])
        wide, axis = state.dense_widths[site.layer], _DENSE_AXIS.get(site.linear)
        dense[site] = (wide if axis == "A" else into, wide if axis == "B" else out)
    if got == want:
        return matrices
    wrong = {site: shape for site, shape in got.items() if shape != dense[site]}
    site, shape = next(iter(wrong.items()), (None, None))
    rule = f"have (in, out) {dense.get(site)} of the dense base, or {want.get(site)} as pruned"
    step = "check that it was trained on this model's base, or on this backbone"
    require(not wrong, where, f"the LoRA of {site}", rule, shape, step)
    require(state.kept is not None, where, "the model", "know its kept neurons", "none", step)
    return {site: _slice(site, pair, state.kept) for site, pair in matrices.items()}


def _slice(site: Site, pair: tuple[Tensor, Tensor], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    (a, b), axis = pair, _DENSE_AXIS.get(site.linear)
    rows = kept[site.layer]
    return (a[:, rows] if axis == "A" else a), (b[rows] if axis == "B" else b)


def _scalings(
    values: dict[str, Any], model: PreTrainedModel, ranks: dict[Site, int], where: str
) -> dict[Site, float]:
    """alpha / r of each site, or alpha / sqrt(r) of an rsLoRA, with PEFT's patterns by module."""
    most, step = len(arch.LINEARS) * len(arch.layers(model)), "copy the folder again"
    own = [_pattern(values, name, most, where) for name in ("rank_pattern", "alpha_pattern")]
    found = {}
    for site, rank in ranks.items():
        path = arch.site_path(site, model)
        wanted = next(_matching(own[0], path), values.get("r"))
        require(wanted == rank, where, f"the LoRA of {site}", f"have rank {wanted}", rank, step)
        alpha = next(_matching(own[1], path), values.get("lora_alpha"))
        good = _is_number(alpha) and 0 < alpha <= _FP32.max
        rule = f"be a positive number of at most {_FP32.max:.2g}"
        require(good, where, f"lora_alpha of {site}", rule, repr(alpha)[:80], step)
        found[site] = alpha / (rank**0.5 if values.get("use_rslora") else rank)
        rule = f"be at least {_FP32.tiny:.2g}, as fp32 holds it"
        require(found[site] >= _FP32.tiny, where, f"alpha / r of {site}", rule, found[site], step)
    return found


def _pattern(values: dict[str, Any], name: str, most: int, where: str) -> Pattern:
    """What PEFT compares a module's path with, in order, and the value for it."""
    given = values.get(name) or {}
    good = isinstance(given, dict) and len(given) <= most and all(map(_is_number, given.values()))
    rule = f"be an object of at most {most} modules, as the model has, and numbers"
    require(good, where, name, rule, repr(given)[:80], "copy the folder again")
    rule = (
        f"have at most {_LONGEST_KEY} letters, digits, '.', '-', '|', two groups, and '^' and '$'"
    )
    for key in given:
        good = len(key) <= _LONGEST_KEY and _MODULES.fullmatch(key) is not None
        step = "write the modules' names out"
        require(good, where, f"a module's name in {name}", rule, repr(key)[:80], step)
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in given.items()]


def _matching(pattern: Pattern, path: str) -> Iterator[Any]:
    return (value for expression, value in pattern if expression.match(path))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
