"""The one wording of koff's errors, shared with the kernels."""

from koffkernels.checks import refuse, require

__all__ = ["refuse", "require"]
