"""Triton kernels and their launchers, one file per step, chosen by ``koffkernels.dispatch``.

Only this folder imports triton. Every launcher takes x as [M, K] and, for memories, ``Rows``: the
memory of token i is ``ids[i // tokens]``.
"""
