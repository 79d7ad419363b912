"""Round the gates to a binary mask, and say how sparse a model is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from koffkernels.reference import ACTIVATIONS

from ..errors import asked_by, asker
from ..model import arch
from ..model.config import MAX_SPARSITY
from ..model.forward_context import BASE
from ..model.neuron_order import move_kept_first, restore_order
from ..model.state import KoffState, count_weights, require_attached

# How far above the median neuron a massive one lies.
MASSIVE = 1000.0
# Rounding moves the sum of the widths by half a multiple: less than a thousandth of any real
# model's neurons. Where it is more than this share of them, the multiple does not suit the widths.
MISSED_WARNING = 0.02

logger = logging.getLogger("koff")


@dataclass(frozen=True)
class SparsityReport:
    """How much is removed, as shares in [0, 1].

    Args:
        mlp: of the MLP neurons.
        model: of all base weights (tied embeddings counted once).
        non_embedding: of all base weights but the embedding and output tables.
        undecided: share of gates with 0.1 < P(z > 0) < 0.9.
        hard: True for a binary mask or a compacted model; False: expected values of trained gates.
        widths: kept MLP neurons of each layer (of a soft mask: those whose
            deterministic gate is above 0).
    """

    mlp: float
    model: float
    non_embedding: float
    undecided: float
    hard: bool
    widths: list[int]


@dataclass(frozen=True)
class BinarizeReport:
    """What ``binarize`` reached.

    Args:
        target: share of MLP neurons that was asked for.
        sparsity: what came of it (hard).
        undecided: share of gates that were undecided before.
        massive: (layer, neuron) of the removed neurons of massive activation; None if no tokens
            were given to find them by.
    """

    target: float
    sparsity: SparsityReport
    undecided: float
    massive: list[tuple[int, int]] | None = None


def _report(state: KoffState, removed: float, model: PreTrainedModel, widths: list[int]):
    """Shares for ``removed`` neurons (a float for expected values)."""
    neurons = sum(state.dense_widths)
    dense = dense_weights(state, model)
    weights = removed * dense["mlp"] / neurons  # every neuron has equally many
    hard = state.gates is None or state.gates.fixed
    return SparsityReport(
        mlp=removed / neurons,
        model=weights / dense["total"],
        non_embedding=weights / (dense["total"] - dense["embedding"]),
        undecided=0.0 if hard else state.gates.undecided(),
        hard=hard,
        widths=widths,
    )


def dense_weights(state: KoffState, model: PreTrainedModel) -> dict[str, int]:
    """Return ``count_weights`` of the model before anything was removed."""
    now, widths = count_weights(model), arch.widths(model)
    per_neuron = now["mlp"] // sum(widths)
    removed = (sum(state.dense_widths) - sum(widths)) * per_neuron
    return {**now, "total": now["total"] + removed, "mlp": now["mlp"] + removed}


@torch.no_grad()
@asked_by("sparsity")
def sparsity(model: PreTrainedModel) -> SparsityReport:
    """Return how sparse an attached model is: exact once the mask is fixed, expected before.

    Args:
        model: an attached model, compacted or not.

    Returns:
        The report, for the neurons, for all weights and for all but the embeddings.

    Raises:
        ValueError: koff is not attached.
    """
    state = require_attached(model)
    if state.gates is None:
        widths = arch.widths(model)
        return _report(state, sum(state.dense_widths) - sum(widths), model, widths)
    widths = state.gates.open_widths()
    if state.gates.fixed:
        removed = state.gates.neurons - sum(widths)
    else:
        removed = float(state.gates.expected_sparsity()) * state.gates.neurons
    return _report(state, removed, model, widths)


def _raw_widths(scores: Sequence[Tensor], keep: int) -> list[int]:
    """How many of the ``keep`` best neurons of all layers each layer holds, at least one each."""
    flat = [s.double().clone() for s in scores]
    for s in flat:  # its best neuron comes first, so that no layer is emptied
        s[s.argmax()] = torch.inf
    # Stable: of equal scores the first are kept, on every device.
    order = torch.cat(flat).sort(descending=True, stable=True).indices[:keep]
    layer = torch.repeat_interleave(
        torch.arange(len(scores), device=order.device),
        torch.tensor([len(s) for s in scores], device=order.device),
    )
    return torch.bincount(layer[order], minlength=len(scores)).tolist()


def _reachable(width: int, full: int, multiple: int) -> tuple[int, int]:
    """The reachable widths below and above: multiples of ``multiple``, and ``full``."""
    low = width // multiple * multiple
    high = min(low + multiple, full) if width > low else low
    return (low or min(multiple, full)), high  # 0 is not reachable: no layer is emptied


def round_widths(raw: list[int], full: list[int], multiple: int, keep: int) -> list[int]:
    """Round each width to one of its two reachable neighbours so that their sum is nearest to
    ``keep``.

    Args:
        raw: widths to round.
        full: dense widths.
        multiple: widths must be a multiple of it, or dense.
        keep: what the widths should add up to.

    Returns:
        Rounded widths. The layers with the largest remainders are rounded up first, as long as that
        brings the sum nearer: it is within ``multiple / 2`` wherever the bounds allow it.
    """
    bounds = [_reachable(w, f, multiple) for w, f in zip(raw, full, strict=True)]
    chosen = [low for low, _ in bounds]
    gaps = [high - low for low, high in bounds]
    share = [
        (w - low) / gap if gap > 0 else -1.0 for w, low, gap in zip(raw, chosen, gaps, strict=True)
    ]
    for index in sorted(range(len(raw)), key=lambda i: -share[i]):
        missing = keep - sum(chosen)
        if gaps[index] > 0 and abs(missing - gaps[index]) < abs(missing):
            chosen[index] += gaps[index]
    return chosen


def check_multiple(full: list[int], target: float, multiple: int) -> None:
    """Refuse a multiple of the kept widths that keeps the target out of reach, before a training.

    It does where layers that are cut alike would stay whole, or where the smallest widths that it
    allows are together above what is to be kept.

    Args:
        full: dense widths.
        target: share of MLP neurons to remove.
        multiple: as ``multiple_of`` of ``binarize``.

    Raises:
        ValueError: so.
    """
    if target == 0:
        return
    keep = max(round((1.0 - target) * sum(full)), len(full))
    alike = round_widths([round((1.0 - target) * width) for width in full], full, multiple, keep)
    most = 1.0 - sum(min(multiple, width) for width in full) / sum(full)
    if alike != full and most >= target - MISSED_WARNING:
        return
    can = sorted({n for width in full for n in (*range(multiple, width, multiple), width)})
    raise ValueError(
        f"{asker()}: width_multiple_of must let {100 * target:.4g} % of the MLP neurons go, got "
        f"{multiple}, by which a layer can only keep {'..., ' if len(can) > 5 else ''}"
        f"{', '.join(map(str, can[-5:]))}; lower it, or change the target"
    )


def _best(score: Tensor, width: int) -> Tensor:
    """The mask of the ``width`` highest scores; of equal ones, the first."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.sort(descending=True, stable=True).indices[:width]] = True
    return mask


@torch.no_grad()
@asked_by("binarize")
def binarize(
    model: PreTrainedModel,
    *,
    target: float | None = None,
    per_layer: str = "global",
    multiple_of: int = 64,
    token_ids: Tensor | None = None,
    scores: Sequence[Tensor] | None = None,
) -> BinarizeReport:
    """Fix the mask, in place: keep the neurons of highest log_alpha, k = round((1 - target) L I) of
    all layers. The kept neurons move to the front of each MLP: the pruned ones then cost nothing.

    Args:
        model: an attached model with gates.
        target: share of MLP neurons to remove; None: the target it was trained to.
        per_layer: "global" ranks all layers together; "uniform" keeps equally many in each layer.
        multiple_of: every kept width becomes a multiple of it (or stays dense), the sum as near the
            target as that allows; 1 is exact. 64 fills the tiles of every device's matmuls. A
            warning says so if that is far from the target.
        token_ids: int64 [B, T] of ordinary text; by these, neurons of massive activation that the
            mask removes are found (``massive_neurons``), named in the report and in a warning.
        scores: [I] of each layer, to rank the neurons by instead of by log_alpha: memories can then
            be trained on a mask that was found in another way.

    Returns:
        What was reached.

    Raises:
        ValueError: no gates, gates that are not finite, or illegal arguments.
        RuntimeError: a call of the model runs, in this thread or another.

    Source: KOFF (arXiv 2605.29075), top-k over the learned gates; rounding is koff's own.
    """
    gates = require_attached(model).gates
    if gates is None:
        raise ValueError(
            "binarize: the model must have gates, got none; attach with target_sparsity > 0"
        )
    target = gates.target if target is None else target
    if per_layer not in ("global", "uniform"):
        raise ValueError(
            f"binarize: per_layer must be 'global' or 'uniform', got {per_layer!r}; choose one"
        )
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(
            f"binarize: multiple_of must be a whole number of at least 1, got {multiple_of!r}; 64 "
            "fills tiles"
        )
    if not 0 <= target <= MAX_SPARSITY:
        raise ValueError(f"binarize: target must lie in 0..{MAX_SPARSITY}, got {target}; change it")
    if not all(bool(torch.isfinite(p).all()) for p in gates.log_alpha):
        raise ValueError(
            "binarize: the gates must be finite, got NaN or inf; lower gate_learning_rate and "
            "train again"
        )
    undecided = gates.undecided()  # of the gates as they are; a fixed mask has none
    full = [len(p) for p in gates.log_alpha]
    if scores is None:
        scores = [p.detach() for p in gates.log_alpha]
    elif [tuple(s.shape) for s in scores] != [(width,) for width in full]:
        raise ValueError(
            f"binarize: scores must be one number for each of {full} neurons, got shapes "
            f"{[tuple(s.shape) for s in scores]}; give one tensor a layer"
        )
    elif not all(bool(torch.isfinite(s).all()) for s in scores):
        raise ValueError("binarize: scores must be finite, got NaN or inf; look at their source")
    keep = max(round((1.0 - target) * sum(full)), len(full))  # one neuron a layer at least
    if per_layer == "uniform":
        if len(set(full)) != 1:
            raise ValueError(
                "binarize: the layers must be equally wide for per_layer='uniform', "
                f"got {full}; use 'global'"
            )
        raw = max(round(keep / len(full)), 1)
        low, high = _reachable(raw, full[0], multiple_of)
        chosen = [high if high - raw < raw - low else low] * len(full)
    else:
        chosen = round_widths(_raw_widths(scores, keep), full, multiple_of, keep)
    masks = [_best(score, width) for score, width in zip(scores, chosen, strict=True)]
    removed = None
    with model.koff.running.changing("binarize"):
        restore_order(model)  # an earlier mask's
    if token_ids is not None:
        removed = [(i, n) for i, n in massive_neurons(model, token_ids) if not masks[i][n]]
        if removed:
            logger.warning(
                "koff: the mask removes neurons of massive activation, %s (layer/neuron); without "
                "a memory the model may be poor. Raise no_memory_rows, or train the gates longer",
                ", ".join(f"{layer}/{neuron}" for layer, neuron in removed),
            )
    with model.koff.running.changing("binarize"):
        gates.fix_(masks)
        move_kept_first(model)
    report = BinarizeReport(target, sparsity(model), undecided, removed)
    if abs(report.sparsity.mlp - target) > MISSED_WARNING:
        logger.warning(
            "koff: %.1f %% of the MLP neurons are removed where %.1f %% were asked for: of %s in a "
            "layer a multiple of %d stays, or all; take a smaller multiple",
            100 * report.sparsity.mlp,
            100 * target,
            " or ".join(str(width) for width in sorted(set(full))),
            multiple_of,
        )
    return report


@torch.no_grad()
def massive_neurons(model: PreTrainedModel, token_ids: Tensor) -> list[tuple[int, int]]:
    """Return (layer, neuron) of the neurons that write massive activations into the residual
    stream: whose largest |h| over the tokens, times the norm of its column of down_proj, is above
    ``MASSIVE`` times the median of all neurons.

    A few such neurons make the first token an attention sink. A learned cache is one too, so that
    training with memories alone may remove them without a loss; without a memory the model is then
    ruined.

    Args:
        model: an attached model whose neurons are in their original order.
        token_ids: int64 [B, T], computed without gates and memories.

    Source: Sun et al. 2024 (arXiv 2402.17762), massive activations.
    """
    activation = ACTIVATIONS[arch.activation(model)]
    peaks: list[Tensor] = []

    def measure(module, args) -> None:
        gate, up, down = arch.dense_mlp_weights(module, args[0].dtype)
        hidden = activation(F.linear(args[0], gate)) * F.linear(args[0], up)
        peak = hidden.abs().flatten(0, -2).amax(0).float()
        peaks.append(peak * down.float().norm(dim=0))

    hooks = [module.register_forward_pre_hook(measure) for module in arch.mlps(model)]
    try:
        model(input_ids=token_ids.to(model.device), memory=BASE, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    limit = MASSIVE * torch.cat(peaks).median()
    return [(i, int(n)) for i, peak in enumerate(peaks) for n in (peak > limit).nonzero()]
