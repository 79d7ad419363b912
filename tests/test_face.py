"""The names of `koff`, which load when they are used."""

import ast
import importlib
from pathlib import Path

import pytest

import koff


def names_for_editors() -> dict[str, str]:
    """name -> module it is imported from, of the block that only type checkers read."""
    tree = ast.parse(Path(koff.__file__).read_text("utf-8"))
    conditions = (node for node in tree.body if isinstance(node, ast.If))
    (block,) = (node for node in conditions if ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.name: f"koff.{node.module}" for node in block.body for alias in node.names}


def test_editors_are_told_the_names_that_there_are():
    assert sorted([*names_for_editors(), "__version__"]) == sorted(koff.__all__) == dir(koff)


@pytest.mark.parametrize(("name", "module"), names_for_editors().items())
def test_a_name_is_its_homes_own(name, module):
    assert getattr(koff, name) is getattr(importlib.import_module(module), name)
    assert name in vars(koff), "found without __getattr__ from now on"


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'koff' has no attribute 'atach'"):
        koff.atach  # noqa: B018
    assert not hasattr(koff, "torch")
