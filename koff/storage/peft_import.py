"""A LoRA that was trained elsewhere with PEFT: which one a memory can hold, and how one of the
dense base is cut to the neurons that were kept.

PEFT says what a LoRA is in two places, its settings and its tensors. The tensors rule: which layers
there are and of what rank is read off them, and the settings must not contradict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import asker
from ..model import arch
from ..model.arch import Site
from ..model.config import LoRAConfig
from ..model.memories import Memory
from .adapters import check_finite, check_plain_lora
from .files import DamagedFolder, File
from .layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

Matrices = dict[Site, tuple[Tensor, Tensor]]  # (A [r, K], B [N, r])
Pattern = list[tuple[re.Pattern[str], Any]]  # what a module's path is compared with, and its value

# Settings that say which layers there are, which the tensors say too, or that are converted below.
_HONOURED = frozenset(
    "alpha_pattern auto_mapping corda_config eva_config exclude_modules layers_pattern "
    "layers_to_transform rank_pattern use_rslora".split()
)
# The other initialisations of PEFT move a part of the base weights into the adapter.
_INITS_BESIDE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# Six digits are more layers than any model has, and few enough for int().
_KEY = re.compile(r"base_model\.model\.(.+)\.([0-9]{1,6})\.([a-z_]+\.[a-z_]+)\.lora_([AB])\.weight")
# Which matrix of a LoRA counts neurons: B in its rows where they come out, A in its columns where
# they go in. Attention has none.
_WITH_NEURONS = {linear: "BA"[dim] for linear, dim in arch.NEURON_DIM.items()}
# PEFT takes the keys of its patterns as regular expressions, and one of an unknown file may be made
# to run for ever. Without repetition, and with two groups at most, none can.
_LITERAL = r"(?:[\w.|-]|\\\.)*"
_MODULES = re.compile(rf"\^?{_LITERAL}(?:\({_LITERAL}\){_LITERAL}){{0,2}}\$?")
_LONGEST_KEY = 128  # several times the longest path of a module
_FP32 = torch.finfo(torch.float32)


@dataclass
class ImportedLoRA:
    """A LoRA of this model's widths, which ``copy_to`` puts into a memory.

    Attributes:
        config: of a memory that can hold it: the largest rank, and the largest scaling.
        matrices: of each site that has any.
        scaling: of each of these sites: alpha / r, or alpha / sqrt(r) for an rsLoRA.
    """

    config: LoRAConfig
    matrices: Matrices
    scaling: dict[Site, float]

    @torch.no_grad()
    def copy_to(self, memory: Memory) -> None:
        """Overwrite a memory's LoRA, in place.

        Missing sites and ranks become exact zeros. A memory has one scaling, so that of a site goes
        into its B.

        Args:
            memory: of ``config``.
        """
        for site, weights in memory.sites():
            weights.a.zero_()
            weights.b.zero_()
            if site in self.matrices:
                a, b = self.matrices[site]
                rank = a.shape[0]
                weights.a[:rank].copy_(a)
                weights.b[:, :rank].copy_(b.float() * (self.scaling[site] / memory.scaling))


def import_lora(model: PreTrainedModel, directory: Path) -> ImportedLoRA:
    """Read a PEFT LORA folder, check it, and cut the LoRA to the model's widths.

    Gate and up lose rows of B, down loses columns of A: the neurons that ``model.koff.kept`` lacks.
    A LoRA that has the pruned widths already is taken as it is.

    Args:
        model: an attached model.
        directory: what PEFT's ``save_pretrained`` wrote.

    Raises:
        FileNotFoundError, ValueError: damaged, not a plain LoRA, or not of this model's shapes.
    """
    values = File(directory / ADAPTER_CONFIG).json()
    check_plain_lora(values, _HONOURED)
    init = values.get("init_lora_weights")
    if init not in _INITS_BESIDE_THE_BASE:
        raise ValueError(
            f"{asker()}: init_lora_weights must leave the base weights alone, got {init!r}; "
            "convert it to a plain LoRA with PEFT"
        )
    tensors = File(directory / ADAPTER_WEIGHTS).tensors()
    check_finite(tensors)
    matrices = _cut(model, _pairs(model, tensors))
    ranks = {site: a.shape[0] for site, (a, _) in matrices.items()}
    scaling = _scalings(values, model, ranks)
    rank, largest = max(ranks.values()), max(scaling.values())
    names = {site.linear for site in matrices}
    targets = tuple(name for name in arch.LINEARS if name in names)
    return ImportedLoRA(LoRAConfig(rank, largest * rank, targets), matrices, scaling)


def _pairs(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Matrices:
    """site -> (A, B), every name checked."""
    parts: dict[Site, dict[str, Tensor]] = {}
    names = arch.architecture(model.config.model_type).linears
    known = {arch.linear_path(name, model): name for name in names}
    layers, path = len(arch.layers(model)), arch.layers_path(model)
    sites = dict(arch.sites(model))
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        ours = found and found[1] == path and found[3] in known
        ours = ours and Site(int(found[2]), known[found[3]]) in sites
        if not ours or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{asker()}: a tensor must be a LoRA matrix of the {layers} layers' linear modules "
                f"{', '.join(known)}, got {key} {tuple(tensor.shape)}; a memory holds nothing "
                "else; train with these target_modules only"
            )
        parts.setdefault(Site(int(found[2]), known[found[3]]), {})[found[4]] = tensor
    if not parts:
        raise ValueError(f"{asker()}: the LoRA must hold matrices, got none; check the folder")
    for site, pair in parts.items():
        whole = pair.keys() == {"A", "B"} and pair["A"].shape[0] == pair["B"].shape[1] > 0
        if not whole:
            got = {part: tuple(t.shape) for part, t in pair.items()}
            raise DamagedFolder(f"the LoRA of {site} must have A [r, K] and B [N, r], got {got}")
    return {site: (pair["A"], pair["B"]) for site, pair in parts.items()}


def _cut(model: PreTrainedModel, matrices: Matrices) -> Matrices:
    """The matrices at the model's widths; all of them must have been dense, or all pruned."""
    state = model.koff
    linears, narrow = dict(arch.sites(model)), arch.widths(model)
    got, pruned, dense = {}, {}, {}  # site -> (in, out)
    for site, (a, b) in matrices.items():
        out, into = linears[site].out_features, linears[site].in_features
        wide, now = state.dense_widths[site.layer], narrow[site.layer]
        matrix = _WITH_NEURONS.get(site.linear)
        got[site] = (a.shape[1], b.shape[0])
        pruned[site] = (into, out)
        # Twice the neurons come out where gate and up are one.
        dense[site] = (
            wide if matrix == "A" else into,
            out // now * wide if matrix == "B" else out,
        )
    if got == pruned:
        return matrices
    for site, shape in got.items():
        if shape != dense[site]:
            raise ValueError(
                f"{asker()}: the LoRA of {site} must have (in, out) {dense[site]} of the dense "
                f"base, or {pruned[site]} as pruned, got {shape}; check that it was trained on "
                "this model's base, or on this backbone"
            )
    if state.kept is None:
        raise ValueError(
            f"{asker()}: the model must know its kept neurons, got none; check that it was trained "
            "on this model's base, or on this backbone"
        )
    cut = {}
    for site, (a, b) in matrices.items():
        kept, wide = state.kept[site.layer], state.dense_widths[site.layer]
        rows, matrix = arch.along_neurons(site.linear, kept, wide), _WITH_NEURONS.get(site.linear)
        cut[site] = (a[:, rows] if matrix == "A" else a, b[rows] if matrix == "B" else b)
    return cut


def _scalings(
    values: dict[str, Any], model: PreTrainedModel, ranks: dict[Site, int]
) -> dict[Site, float]:
    """alpha / r of each site, or alpha / sqrt(r) of an rsLoRA, with PEFT's patterns by module."""
    most = len(list(arch.sites(model)))
    rank_pattern = _pattern(values, "rank_pattern", most)
    alpha_pattern = _pattern(values, "alpha_pattern", most)
    found = {}
    for site, rank in ranks.items():
        path = arch.site_path(site, model)
        wanted = next(_matching(rank_pattern, path), values.get("r"))
        if wanted != rank:
            raise DamagedFolder(f"the LoRA of {site} must have rank {wanted}, got {rank}")
        alpha = next(_matching(alpha_pattern, path), values.get("lora_alpha"))
        if not (_is_real(alpha) and 0 < alpha <= _FP32.max):
            raise DamagedFolder(
                f"lora_alpha of {site} must be a positive number of at most {_FP32.max:.2g}, "
                f"got {repr(alpha)[:80]}"
            )
        found[site] = alpha / (rank**0.5 if values.get("use_rslora") else rank)
        # Below fp32's smallest normal number the quotient of two scalings is 0 or loses its digits.
        if found[site] < _FP32.tiny:
            raise DamagedFolder(
                f"alpha / r of {site} must be at least {_FP32.tiny:.2g}, as fp32 holds it, "
                f"got {found[site]}"
            )
    return found


def _pattern(values: dict[str, Any], name: str, most: int) -> Pattern:
    """What PEFT compares a module's path with, in order, and the value for it."""
    given = values.get(name) or {}
    if (
        not isinstance(given, dict)
        or len(given) > most
        or not all(_is_real(value) for value in given.values())
    ):
        raise DamagedFolder(
            f"{name} must be an object of at most {most} modules, as the model has, and numbers, "
            f"got {repr(given)[:80]}"
        )
    for key in given:
        if len(key) > _LONGEST_KEY or _MODULES.fullmatch(key) is None:
            raise ValueError(
                f"{asker()}: a module's name in {name} must have at most {_LONGEST_KEY} letters, "
                f"digits, '.', '-', '|', two groups, and '^' and '$', got {repr(key)[:80]}; write "
                "the modules' names out"
            )
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in given.items()]


def _matching(pattern: Pattern, path: str) -> Iterator[Any]:
    return (value for expression, value in pattern if expression.match(path))


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
