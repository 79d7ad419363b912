"""These tests run in a process of their own, under KOFF_BACKEND=interpret."""

import koffkernels  # noqa: F401  first: it switches the interpreter on before triton is imported
