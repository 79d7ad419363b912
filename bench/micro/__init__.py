"""Microbenchmarks of every public operation, by pytest-benchmark."""
