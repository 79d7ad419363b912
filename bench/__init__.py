"""Measurements: run as ``python -m bench.<name>``; results are kept in ``bench/results``."""
