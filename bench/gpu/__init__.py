"""Measurements on a GPU: tests, target rows, decode of a whole stack, and route tables.

One command, ``python -m bench.gpu``; docs/gpu.md says what every row means.
"""
