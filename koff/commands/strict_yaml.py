"""YAML as people mean it.

PyYAML reads YAML 1.1, where ``no`` is false, ``010`` is eight, ``1:30`` is ninety, and the last of
two equal keys wins. Each of these would change a recipe without a word, so here they are errors.
Dates stay the texts that they are.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# Octal by a leading 0, and base 60 by colons.
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")

_TAG = "tag:yaml.org,2002:"


def read_yaml(text: str, what: str) -> Any:
    """Return what a YAML text says.

    Args:
        text: one document.
        what: the beginning of errors: who asks, and what the text is.

    Raises:
        ValueError: malformed YAML, a key that is not a text or comes twice, or a number that is not
            in base ten.
    """
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None and "\n" in text else ""
        fault = getattr(error, "problem", None) or error
        if not isinstance(error, _Refused):
            got = fault if "\n" in text else f"{text[:60]!r} ({fault})"
            fault = f"must be valid YAML, got {got}; correct it"
        raise ValueError(f"{what}{line} {fault}") from None


class _Refused(yaml.MarkedYAMLError):
    """YAML that would not say what it seems to."""

    def __init__(self, fault: str, node: yaml.Node):
        super().__init__(problem=fault, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    # A date is the text that it was written as: no tag but its own would be lost with it.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != f"{_TAG}timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":  # "<<"; what it brings is there to be overridden
                continue
            if key.tag != f"{_TAG}str":
                kind = key.tag.removeprefix(_TAG)
                raise _Refused(
                    f"must have texts for keys, got {_written(key)}, which YAML takes for a value "
                    f"of type {kind}; quote it",
                    key,
                )
            if key.value in seen:
                raise _Refused(
                    f"must have each key once, got {key.value!r} again; remove or rename one", key
                )
            seen.add(key.value)
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        is_int = node.tag == f"{_TAG}int"
        value = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        if _ODD_NUMBER.fullmatch(node.value):
            raise _Refused(
                f"must have numbers in base ten, got {node.value}, which YAML takes for {value}; "
                "quote it if it is a text, or write the number that it is",
                node,
            )
        return value


def _written(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"


_Loader.add_constructor(f"{_TAG}int", _Loader.construct_number)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)
