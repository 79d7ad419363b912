"""A saved folder, trusted by nobody."""
