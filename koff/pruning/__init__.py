"""From gates to narrow matrices."""
