"""The whole path on a small model of its own."""
