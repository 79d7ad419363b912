"""The one wording of koff's errors, shared with the kernels."""

from koffkernels.checks import require

__all__ = ["require"]
