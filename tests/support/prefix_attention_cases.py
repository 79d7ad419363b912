"""Arguments of the attention kernels, and the comparison with the fp64 oracle."""

from collections.abc import Callable, Iterable

import torch
from support import bf16
from support.attention_shapes import lengths_of, shape_of
from support.kernel_inputs import attention_tensors, ids_of, prefix_from
from support.oracle import Tensors, compare, run
from support.tolerances import BACKWARD, FORWARD

from koffkernels import RowBounds, reference
from koffkernels._triton.attention.call import Call

bf16.install()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case:
    """One problem: named tensors (see oracle.py), ids, lengths and bounds."""

    def __init__(self, sizes, dtype, kind="mixed", bounds=None, lengths=None):
        self.shape = shape_of(*sizes)
        if kind == "none":
            self.shape |= {"n": 1}
        self.dtype = dtype
        self.tensors = attention_tensors(self.shape, dtype)
        self.ids = ids_of(kind, self.shape["B"], self.shape.get("n", 1))
        self.lengths = lengths_of(self.shape) if lengths is None else torch.tensor(lengths)
        self.bounds: RowBounds | None = bounds(self.shape) if callable(bounds) else bounds

    def call(self, t: Tensors | None = None, scale: float | None = None) -> Call:
        """As the launchers take it."""
        t = self.tensors if t is None else t
        prefix = prefix_from(t, self.lengths)
        scale = scale or t["q"].shape[-1] ** -0.5
        return Call(t["q"], t["k"], t["v"], prefix, self.ids, self.bounds, scale)

    def oracle(self, frozen: Iterable[str] = ()):
        """(output, gradients) in fp64."""

        def call(t):
            return reference.prefix_attention(*self.call(t)[:-1], None)

        return run(call, self.tensors, frozen, torch.float64)

    def check(self, function: Callable[..., torch.Tensor], frozen: Iterable[str] = ()) -> None:
        """Compare output and gradients of ``function(*call[:-1], scale)`` with the oracle's."""
        output, grads = run(lambda t: function(*self.call(t)), self.tensors, frozen)
        want, want_grads = self.oracle(frozen)
        assert output.dtype == self.dtype
        compare("output", output, want, self.dtype, FORWARD)
        assert set(grads) == set(want_grads)
        for name, grad in grads.items():
            assert grad.dtype == self.tensors[name].dtype, name
            compare(name, grad, want_grads[name], self.dtype, BACKWARD)


def spoiled(tensors: Tensors, names: Iterable[str], index, bad: float = float("nan")) -> Tensors:
    """The same with ``bad`` at an index of some tensors."""
    changed = dict(tensors)
    for name in names:
        changed[name] = tensors[name].clone()
        changed[name][index] = bad
    return changed
