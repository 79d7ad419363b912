"""bf16 in Triton's interpreter as the hardware has it.

The interpreter cuts fp32 off where GPUs round to nearest even, which doubles every rounding error
and biases all of them the same way (seen in triton 3.6 and 3.7: -0.29 % on random numbers).
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> bits of the nearest bf16 (ties to even) as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 that bits of bf16 stand for."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _convert_float(x, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        return to_bf16(x)
    if source == tl.bfloat16 and target == tl.float32:
        return from_bf16(x)
    return _convert(x, source, target, rounding)


def install() -> None:
    """Let the interpreter round; the whole process is concerned."""
    interpreter._convert_float = _convert_float
