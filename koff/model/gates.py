"""One learnable gate per MLP neuron, and the mask they are rounded to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from koffkernels import hard_concrete, open_probability

# Here the deterministic gate clamp(1.2 sigmoid(log_alpha) - 0.1, 0, 1) is exactly 1, so that an
# attached model computes what it did before, bit for bit.
INIT_LOG_ALPHA = 2.5
# Noise that breaks ties, and no more: top-k over equal gates would go by their numbers.
INIT_STD = 0.01
# How steeply log_alpha rises with the logit of a neuron's rank where gates start by saliency.
START_SLOPE = 1.0
# P(z > 0) then stays within 4.7 % and 99.8 %. Further out the sigmoid is flat, and a gate that went
# there would hardly come back.
LOG_ALPHA_LIMIT = math.log(100.0)


class Gates(nn.Module):
    """Gates of all layers.

    Args:
        widths: number of MLP neurons of each layer.
        target: share of all neurons to remove, in [0, 1).
        device: where the parameters live.
        generator: of the initial noise.

    Attributes:
        log_alpha: fp32 parameter [I] of each layer.
        mask: bool buffer [I] of each layer, meaningful once ``fixed``.
        multiplier: fp32 scalar, the Lagrange multiplier lambda1 of the sparsity constraint.
        fixed: whether the mask is binary (``koff.binarize``).

    Once fixed, ``neuron_order`` may reorder the base's neurons, layer by layer; ``width`` says of
    which layers it did, and ``order`` how. Gates and masks themselves stay in the original order.
    """

    def __init__(
        self, widths: list[int], target: float, device: torch.device, generator: torch.Generator
    ):
        super().__init__()
        noise = [torch.randn(width, generator=generator) * INIT_STD for width in widths]
        self.log_alpha = nn.ParameterList(
            [nn.Parameter((INIT_LOG_ALPHA + n).to(device)) for n in noise]
        )
        self.multiplier = nn.Parameter(torch.zeros((), device=device))
        for index, width in enumerate(widths):
            self.register_buffer(
                f"mask_{index}", torch.ones(width, dtype=torch.bool, device=device)
            )
            # Not saved: it follows from the mask, and saved weights are in the original order.
            self.register_buffer(f"order_{index}", None, persistent=False)
        self.register_load_state_dict_pre_hook(_before_load)
        self.target = target
        self.fixed = False
        self._held: list[Tensor] | None = None  # see held_open
        # On the host, since slices need numbers: reading a tensor would wait for the GPU.
        self._widths: list[int | None] = [None] * len(widths)

    @property
    def masks(self) -> list[Tensor]:
        """The boolean mask of each layer; True keeps the neuron."""
        return [getattr(self, f"mask_{index}") for index in range(len(self.log_alpha))]

    @property
    def kept_first(self) -> bool:
        """Whether some layer's neurons were reordered, kept ones first."""
        return any(width is not None for width in self._widths)

    def order(self, index: int) -> Tensor:
        """Return the original number of each neuron of a reordered layer, int64 [I]."""
        return getattr(self, f"order_{index}")

    def width(self, index: int) -> int | None:
        """Return how many leading neurons of a layer are kept; None if it was not reordered."""
        return self._widths[index]

    @property
    def widths(self) -> tuple[int | None, ...]:
        """``width`` of each layer; None where it was not reordered."""
        return tuple(self._widths)

    def set_order_(self, index: int, order: Tensor, width: int) -> None:
        """Record, in place, how a layer was reordered."""
        setattr(self, f"order_{index}", order)
        self._widths[index] = width

    def drop_order_(self, index: int) -> None:
        """Record, in place, that a layer is in its original order."""
        setattr(self, f"order_{index}", None)
        self._widths[index] = None

    @property
    def neurons(self) -> int:
        """Number of gates."""
        return sum(p.numel() for p in self.log_alpha)

    def values(self) -> list[Tensor]:
        """Return z [I] of each layer: the mask if fixed, a sample in training mode, else the
        deterministic ("soft") gate.

        Each layer's z has a graph of its own, so that recomputed layers can run backward one after
        another.
        """
        if self._held is not None:
            return self._held
        if self.fixed:
            return [self.factor(index) for index in range(len(self.log_alpha))]
        return self._drawn(self.training)

    @contextlib.contextmanager
    def held_open(self) -> Iterator[list[Tensor]]:
        """Let every gate be 1 inside the ``with`` block, and yield these ones, z [I] of each layer,
        to take gradients by."""
        self._held = [torch.ones_like(p, requires_grad=True) for p in self.log_alpha]
        try:
            yield self._held
        finally:
            self._held = None

    @torch.no_grad()
    def start_(self, saliency: list[Tensor]) -> None:
        """Start log_alpha, in place, by the rank of each neuron's saliency among those of all
        layers, so that the expected sparsity is the target from the first step on.

        With q in (0, 1) the share of all neurons that matter less,

            log_alpha = START_SLOPE logit(q) - c,

        c such that 1 - mean P(z > 0) is the target. Neurons near the edge of the mask start
        undecided; the further from it, the more decided.

        Args:
            saliency: [I] of each layer; the larger, the more a neuron matters.
        """
        # On the host, where the search below waits for nothing.
        flat = torch.cat([s.flatten() for s in saliency]).double().cpu()
        rank = torch.empty_like(flat)
        places = torch.arange(len(flat), dtype=flat.dtype)
        rank[flat.argsort(stable=True)] = (places + 0.5) / len(flat)
        slope = START_SLOPE * torch.logit(rank)

        def shifted(c: float) -> Tensor:
            return (slope - c).clamp(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

        low, high = -50.0, 50.0  # beyond, all gates are at a limit
        for _ in range(50):  # the expected sparsity rises with c
            middle = (low + high) / 2
            sparse = 1 - float(open_probability(shifted(middle)).mean())
            low, high = (middle, high) if sparse < self.target else (low, middle)
        parts = shifted(low).split([len(p) for p in self.log_alpha])
        for p, part in zip(self.log_alpha, parts, strict=True):
            p.copy_(part)

    def factor(self, index: int) -> Tensor:
        """Return the fixed mask of a layer as zeros and ones, z [I]."""
        return getattr(self, f"mask_{index}").to(self.log_alpha[index].dtype)

    def _drawn(self, sample: bool) -> list[Tensor]:
        return [hard_concrete(p, sample=sample) for p in self.log_alpha]

    @torch.no_grad()
    def open_widths(self) -> list[int]:
        """Return how many neurons of each layer are open: in the mask, or with a deterministic gate
        above 0."""
        values = self.masks if self.fixed else self._drawn(False)
        return [int((z > 0).sum()) for z in values]

    def expected_sparsity(self) -> Tensor:
        """Return 1 - mean P(z > 0) over all neurons: differentiable scalar, in units of the
        target."""
        if self.fixed:
            kept = torch.stack([mask.sum() for mask in self.masks]).sum()
            return 1.0 - kept.to(torch.float32) / self.neurons
        return 1.0 - torch.cat([open_probability(p) for p in self.log_alpha]).mean()

    @torch.no_grad()
    def undecided(self) -> float:
        """Return the share of gates with 0.1 < P(z > 0) < 0.9; 0 once fixed."""
        if self.fixed:
            return 0.0
        p = torch.cat([open_probability(a) for a in self.log_alpha])
        return float(((p > 0.1) & (p < 0.9)).float().mean())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep log_alpha within +-log 100, in place, after an optimiser step."""
        for p in self.log_alpha:
            p.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    @torch.no_grad()
    def fix_(self, masks: list[Tensor]) -> None:
        """Set the binary mask, in place, and stop training the gates."""
        for own, new in zip(self.masks, masks, strict=True):
            own.copy_(new)
        self.fixed = True
        for p in (*self.log_alpha, self.multiplier):
            p.requires_grad_(False)
            p.grad = None  # or the optimiser would still step by what is left in it

    def unfix_(self) -> None:
        """Let the gates train again, in place: back to a moment before the mask was fixed."""
        self.fixed = False
        for p in (*self.log_alpha, self.multiplier):
            p.requires_grad_(True)

    # What ``state_dict`` says of the masks beside their values, and ``load_state_dict`` takes over.
    # A tensor, since formats like safetensors hold nothing else.

    def get_extra_state(self) -> Tensor:
        """Return ``fixed``, bool []."""
        return torch.tensor(self.fixed)

    def set_extra_state(self, state: Tensor) -> None:
        """Take ``fixed`` over, after the masks themselves."""
        if bool(state):
            self.fix_(self.masks)
        elif self.fixed:
            self.unfix_()

    def check_loadable(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Refuse masks of which nobody knows whether they are fixed.

        Args:
            tensors: that are about to be loaded.
            prefix: of the names of these gates among them.

        Raises:
            ValueError: they do not say.
        """
        given = any(name.startswith(prefix) for name in tensors)
        if given and f"{prefix}_extra_state" not in tensors:
            raise ValueError(
                f"load_state_dict: gates must come with {prefix}_extra_state, which says whether "
                "their mask is fixed, got none; add it: torch.tensor(True) if the model was "
                "binarised, else torch.tensor(False)"
            )


def _before_load(gates: Gates, tensors: Mapping[str, Tensor], prefix: str, *_) -> None:
    """Hook of ``load_state_dict``."""
    gates.check_loadable(tensors, prefix)
    if gates.kept_first:  # a hook of the whole model would have put the neurons back before
        raise ValueError(
            "load_state_dict: gates must be loaded by the model whose neurons their mask has "
            "ordered, got a call on a part of it; put 'koff.' in front of the names and call "
            "model.load_state_dict(..., strict=False)"
        )
