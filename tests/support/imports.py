"""What a source file imports, read without running it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path, inside_functions: bool = False) -> set[str]:
    """Every module that a file imports, at any depth or only inside functions: relative ones made
    absolute, and ``a.b`` for ``from a import b``."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    roots: list[ast.AST] = [tree_of(path)]
    if inside_functions:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        roots = [node for node in ast.walk(roots[0]) if isinstance(node, functions)]
    found = set()
    for node in (node for root in roots for node in ast.walk(root)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def top(names: set[str]) -> set[str]:
    """The packages that modules belong to."""
    return {name.split(".")[0] for name in names}
