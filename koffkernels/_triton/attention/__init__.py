"""Attention over a learned prefix."""
