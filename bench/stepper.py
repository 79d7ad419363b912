"""What the training steps that are compared have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stepper:
    """A model that takes training steps.

    Attributes:
        model: what is trained; its parameters are not activations.
        optimizer: of what it learns.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def loss(self, ids: Tensor) -> Tensor:
        """Return the loss of [B, T] tokens."""
        raise NotImplementedError

    def step(self, ids: Tensor) -> float:
        """Take one optimiser step; return the loss before it."""
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
