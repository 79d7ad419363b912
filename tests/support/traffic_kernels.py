"""A kernel whose loads and stores are known. Import koffkernels first: it switches the interpreter
on."""

import triton
import triton.language as tl


@triton.jit
def sum_kernel(x_ptr, y_ptr, size, SHIFT: tl.constexpr, ATOMIC: tl.constexpr):
    """Each program adds all of x, 16 elements at a time, into its element of y."""
    offs = tl.arange(0, 16)
    total = tl.zeros((16,), tl.float32)
    for i in range(0, size, 16):
        total += tl.load(x_ptr + SHIFT + i + offs, mask=i + offs < size, other=0.0)
    if ATOMIC:
        tl.atomic_add(y_ptr, tl.sum(total, 0))
    else:
        tl.store(y_ptr + tl.program_id(0) // 2, tl.sum(total, 0))
