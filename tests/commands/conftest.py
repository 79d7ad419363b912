"""Fixtures of the command line's tests."""

from pathlib import Path

import pytest
from support.command_line import succeed


@pytest.fixture(scope="module")
def trained(root) -> Path:
    """The output of `koff train` in ``root``."""
    output = root / "out"
    succeed("train", root / "recipe.yaml", "--output", output, "--device", "cpu")
    return output
