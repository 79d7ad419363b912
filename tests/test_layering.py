"""Who may import what, and what a bare installation can import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import ROOT, imports_of, top, tree_of

PACKAGES = ("koffkernels", "koff", "koff_vllm", "bench")
FILES = [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Who may import whom: a room imports only from rows above its own, so rooms of one row know nothing
# of each other. A package's own name is its face, __init__.py.
DIRECTION = {
    "koff": (
        ("koff.errors", "koff.version"),
        ("koff.data",),
        ("koff.model",),
        ("koff.pruning", "koff.evaluation"),
        ("koff.storage",),
        ("koff.training",),
        ("koff.manage",),
        ("koff",),
        ("koff.serving",),
        ("koff.commands",),
        ("koff.demo",),
        ("koff.cli",),
        ("koff.__main__",),
    ),
    "koffkernels": (
        ("koffkernels.types", "koffkernels.clock"),
        ("koffkernels.reference", "koffkernels.checks"),
        ("koffkernels.group_rows",),
        ("koffkernels.routes",),
        ("koffkernels.dispatch",),  # loads the two below by name, when they are used
        ("koffkernels.replay",),  # as it does
        ("koffkernels._torch",),
        ("koffkernels._triton.shared",),
        ("koffkernels._triton.lora", "koffkernels._triton.attention"),
        ("koffkernels._triton.mlp",),
        (
            "koffkernels.gated_mlp",
            "koffkernels.lora_linear",
            "koffkernels.prefix_attention",
            "koffkernels.hard_concrete",
        ),
        ("koffkernels.layers", "koffkernels.modules", "koffkernels.warmup", "koffkernels.tune"),
        ("koffkernels",),
    ),
    "koff_vllm": (
        ("koff_vllm.saved", "koff_vllm.samples", "koff_vllm.configs"),
        ("koff_vllm.requests",),
        ("koff_vllm.server",),
        ("koff_vllm.plugin",),
        ("koff_vllm.connector", "koff_vllm.models", "koff_vllm.transformers_models"),
        ("koff_vllm.qwen3_5",),
        ("koff_vllm",),
    ),
}
LEVELS = {room: i for rows in DIRECTION.values() for i, row in enumerate(rows) for room in row}
# The only folders that import triton and koffkernels' kernels.
TRITON = ("koffkernels/_triton/", "bench/gate/")


def inside(path: Path) -> str:
    """The path of a file in the repository."""
    return path.relative_to(ROOT).as_posix()


IN_ROOMS = [p for p in FILES if inside(p).startswith(("koff/", "koffkernels/", "koff_vllm/"))]
every_file = pytest.mark.parametrize("path", FILES, ids=inside)
every_file_in_a_room = pytest.mark.parametrize("path", IN_ROOMS, ids=inside)
every_test = pytest.mark.parametrize("path", TESTS, ids=inside)


def room_of(module: str) -> str | None:
    """The room that a module, or a name in it, belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVELS), None)


def test_layering_rooms_follow_from_names():
    assert room_of("koff.storage.save_load.load") == "koff.storage"
    assert room_of("koff.manage") == "koff.manage" and room_of("koff.load") == "koff"
    assert room_of("koffkernels._triton.lora.op.run") == "koffkernels._triton.lora"
    assert room_of("torch.nn") is None


@every_file_in_a_room
def test_layering_direction(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = room_of(".".join(parts).removesuffix(".__init__"))
    assert own not in DIRECTION or path.name == "__init__.py", "a new file or folder needs a row"
    for name in imports_of(path):
        room = room_of(name)
        if room is None or room == own or top({room}) != top({own}):
            continue
        assert LEVELS[room] < LEVELS[own], f"{own} must not import {name}"


@every_file_in_a_room
def test_layering_no_function_reaches_the_face(path):
    """Who needs attach, save or load imports them from their rooms, where readers see it."""
    faces = {name for name in imports_of(path, inside_functions=True) if room_of(name) == "koff"}
    assert not faces, faces


@every_file
def test_layering_imports(path):
    names, package = imports_of(path), inside(path).split("/")[0]
    kernels = {name for name in names if f"{name}.".startswith("koffkernels._triton.")}
    if not inside(path).startswith(TRITON):
        assert "triton" not in top(names), f"triton only inside {TRITON}"
        assert not kernels, f"kernels only inside {TRITON}"
    if package == "koffkernels":
        outside = top(names) - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "koffkernels"}
    if package == "koff_vllm":
        # vLLM's processes load it, which have a transformers of their own.
        outside = top(names) - set(sys.stdlib_module_names)
        classes = (
            {"transformers"} if path.name in ("configs.py", "transformers_models.py") else set()
        )
        assert outside <= {"safetensors", "torch", "vllm", "koff_vllm"} | classes
    if package == "koff":
        assert "bench" not in top(names)
        if "koff_vllm" in top(names):
            assert inside(path) == "koff/commands/serve.py", "koff's other rooms know no server"
        private = {name for name in names if name.startswith("koffkernels._")}
        assert not private, f"private to koffkernels: {private}"
    assert "tests" not in top(names)


@every_test
def test_layering_tests_share_only_support(path):
    """No test imports from another: what two need stands in tests/support, or in a conftest."""
    for name in imports_of(path):
        assert not any(p.startswith("test_") or p == "conftest" for p in name.split(".")), name


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


BLOCKED = ("triton", "datasets", "matplotlib", "lm_eval", "bitsandbytes", "torchao")
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


def test_layering_koff_vllm_is_light():
    """Every process of vLLM imports it, also those that serve something else."""
    blocked = (*BLOCKED, "koff", "koffkernels", "transformers", "peft", "vllm", "tokenizers")
    brought = import_bare("koff_vllm", blocked)
    assert brought - set(sys.stdlib_module_names) <= {"koff_vllm", "safetensors", "numpy"}


def test_layering_koffkernels_imports_nothing_heavy():
    """With everything installed: a user of the kernels alone does not pay for what they lack."""
    brought = import_bare("koffkernels", ())
    assert not brought & {"koff", "transformers", "peft", "triton", "datasets", "matplotlib"}
