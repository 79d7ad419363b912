"""How a Triton operation joins torch: a direct call, an autograd.Function, or a custom operator.

Eager inference calls the launchers directly, since the operator's boundary alone costs tens of
microseconds; eager training goes through an autograd.Function; torch.compile sees one opaque
operator with a fake and a backward operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...replay import apply, replayed, replayed_backward

# Of the operators: the name of the whole package, "koffkernels" as installed by pip. A copy loaded
# from a hub has a name of its own, so that two of them can live in one process.
NAMESPACE = __name__.partition(".")[0]


# Shapes a tensor that nobody else has, as torch's own products do with their results. A view that a
# Function's forward has made could not be changed in place afterwards.
shaped = torch.ops.aten._unsafe_view.default


class Operation(NamedTuple):
    """The differentiable forms of one operation: same arguments, same results."""

    eager: Callable[..., tuple[Tensor, ...]]
    traced: Callable[..., tuple[Tensor, ...]]

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Call whichever form fits: inside torch.compile, or outside."""
        return (self.traced if torch.compiler.is_compiling() else self.eager)(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd would have to record a call with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def wanted(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Return those that are not None: an operator's list cannot hold None."""
    return [g for g in gradients if g is not None]


def spread(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients with None where there is no need: the inverse of ``wanted``."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needs]


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Return a Function's backward that cannot itself be differentiated, and says so where somebody
    does.

    torch's ``once_differentiable`` switches gradients off in every call, which takes the host 5 us.
    They are off already unless somebody asked for a graph of the backward.
    """
    careful = torch.autograd.function.once_differentiable(backward)

    def call(ctx: Any, *dys: Tensor | None) -> tuple:
        return (careful if torch.is_grad_enabled() else backward)(ctx, *dys)

    return call


def operation(
    name: str,
    arguments: str,
    results: str,
    backward_arguments: str,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    setup: Callable[[Any, tuple, tuple], None],
    backward: Callable[..., list[Tensor]],
    backward_fake: Callable[..., list[Tensor]],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    outputs: int = 1,
) -> Operation:
    """Register ``NAMESPACE::name`` and its ``_backward`` and tie them to autograd.

    Args:
        name: of the operator.
        arguments: of ``forward``, in the words of torch's schemas: "Tensor x, Tensor? bias".
            Numbers of tokens are a "SymInt", so that torch.compile need not fix them.
        results: "Tensor, Tensor": the first ``outputs`` are what the operation returns, the others
            are saved for backward.
        backward_arguments: of ``backward``, which returns a "Tensor[]".
        forward: what the operator computes; None where there is nothing to return.
        fake: the same on tensors without data.
        setup: (ctx, inputs, outputs) -> None, saves the tensors that backward needs, and whatever
            else as ``ctx.constants``. Some calls have one flag more in ``ctx.needs_input_grad``
            than inputs.
        backward: returns only the gradients that are wanted.
        backward_fake: the same on tensors without data.
        gradients: (run, ctx, dy of each output or None) -> one entry per input, where ``run`` is
            ``backward`` or its operator.
        outputs: how many of the results have a gradient; as in a slice, -1 is all but the last.

    Returns:
        Both forms.
    """

    def without_none(run: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple]:
        """An operator cannot return None; ``setup`` knows which of its tensors stand for it."""

        def filled(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            return tuple(x.new_empty(0) if part is None else part for part in run(x, *rest))

        return filled

    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        without_none(forward),
        mutates_args=(),
        schema=f"({arguments}) -> ({results})",
    )
    op.register_fake(without_none(fake))
    op_backward = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"({backward_arguments}) -> Tensor[]",
    )
    op_backward.register_fake(backward_fake)

    def prepare(ctx: Any, inputs: tuple, output: tuple) -> None:
        # What is saved gets no gradient, nor does an output that nobody used: no zeros for them.
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    inputs = arguments.count(",") + 1

    def propagate(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dys = dys[:outputs]
        if all(dy is None for dy in dys):
            return (None,) * inputs
        return gradients(op_backward, ctx, *dys)

    op.register_autograd(propagate, setup_context=prepare)

    forward_again = replayed(forward, f"{name}, forward")

    class Eager(torch.autograd.Function):
        # ctx in forward, and no setup_context, with which torch reads the signature in every call.
        @staticmethod
        def forward(ctx, *args):
            *args, kind = args
            output = forward_again.of_kind(kind, *args)
            ctx.mark_non_differentiable(*(t for t in output[outputs:] if t is not None))
            prepare(ctx, args, output)
            return output

        @staticmethod
        @differentiable_once
        @replayed_backward(f"{name}, backward")
        def backward(ctx, *dys):
            return *gradients(backward, ctx, *dys[:outputs]), None

    return Operation(functools.partial(apply, Eager), op)


def inference(
    name: str,
    arguments: str,
    results: str = "Tensor",
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Register ``NAMESPACE::name_inference``, for calls that record no gradient.

    Args:
        name: of the operation.
        arguments: those of the operation.
        results: "Tensor", or "Tensor[]" of an operation with several outputs.
        forward: what it computes.
        fake: ``forward`` on tensors without data.

    Returns:
        A function that calls ``forward``, and inside torch.compile the operator.
    """
    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}_inference",
        forward,
        mutates_args=(),
        schema=f"({arguments}) -> {results}",
    )
    op.register_fake(fake)

    def call(*args: Any) -> Any:
        return (op if torch.compiler.is_compiling() else forward)(*args)

    return call
