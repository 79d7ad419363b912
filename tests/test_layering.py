"""Who may import what, and what a bare installation can import."""

import ast
import os
import subprocess
import sys

import pytest
from support.imports import ROOT, imports_of, top, tree_of

PACKAGES = ("koffkernels", "koff", "bench")
FILES = [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
every_test = pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)


@every_file
def test_layering_imports(path):
    names, inside = imports_of(path), path.relative_to(ROOT).parts
    allowed_triton = inside[:2] in (("koffkernels", "_triton"), ("bench", "gate"))
    assert allowed_triton or "triton" not in top(names), "triton only inside koffkernels/_triton"
    if inside[0] == "koffkernels":
        outside = top(names) - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "koffkernels"}
    if inside[0] == "koff":
        assert "bench" not in top(names)
        private = {name for name in names if name.startswith("koffkernels._")}
        assert not private, f"private to koffkernels: {private}"
    assert "tests" not in top(names)


FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


@every_file
def test_layering_nothing_runs_code_from_data(path):
    assert not top(imports_of(path)) & FORBIDDEN_MODULES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            plain = any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
            if name == "torch.load" and plain and path.name == "resume_checks.py":
                continue  # transformers' optimizer and RNG states: tensors and plain values
            assert name not in FORBIDDEN_CALLS, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] != "bench"], ids=lambda p: p.name)
def test_layering_public_docstrings(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree) or path.read_text(encoding="utf-8").strip() == ""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: {node.name} has no docstring"


BLOCKED = ("triton", "datasets", "matplotlib", "lm_eval")
# Hidden as if not installed: every finder says so, also to those who only ask (find_spec).
BARE_IMPORT = """
import importlib, sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {blocked!r}
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
import torch
before = set(sys.modules)
importlib.import_module({package!r})
print(" ".join(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""


def import_bare(package: str, blocked: tuple[str, ...]) -> set[str]:
    """Import a package in a fresh interpreter without some modules; what it brought along."""
    code = BARE_IMPORT.format(package=package, blocked=blocked)
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("package", ["koffkernels", "koff"])
def test_layering_imports_without_the_extras(package):
    brought = import_bare(package, BLOCKED)
    assert package in brought and not brought & set(BLOCKED)


def test_layering_koffkernels_needs_only_torch():
    blocked = (*BLOCKED, "koff", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
    assert "koffkernels" in import_bare("koffkernels", blocked)


def test_layering_koffkernels_imports_nothing_heavy():
    """With everything installed: a user of the kernels alone does not pay for what they lack."""
    brought = import_bare("koffkernels", ())
    assert not brought & {"koff", "transformers", "peft", "triton", "datasets", "matplotlib"}
