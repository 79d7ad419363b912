"""What a command imports before it has anything to compute: modules are counted, not seconds."""

import os
import subprocess
import sys

import pytest
from support.imports import ROOT
from support.run_folders import RunFolder

from koff.version import __version__

HEAVY = {"torch", "transformers", "peft", "accelerate", "triton", "datasets", "tokenizers"}
HEAVY |= {"bitsandbytes", "torchao"}
COMMANDS = (
    "train", "eval", "analyse", "generate", "info", "export", "add-memory", "import-memory",
    "remove-memory", "push", "demo", "report", "reproduce",
)  # fmt: skip

# Runs `koff` with the arguments it gets, then prints its exit code and every module there is.
KOFF = """
import sys
from koff.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print("\\nENDS", end.code, *sys.modules)
"""


def fresh(code: str, *arguments: object, **environment: str) -> str:
    """Run code in a process of its own, and return what it printed."""
    env = {name: v for name, v in os.environ.items() if name not in ("KOFF_BACKEND", "KOFF_DATA")}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=env | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run(*arguments: object) -> tuple[int, set[str]]:
    """Run `koff`, and return its exit code and the modules it imported."""
    code, *modules = fresh(KOFF, *arguments).rpartition("\nENDS ")[2].split()
    assert "koff.cli" in modules
    return int(code), set(modules)


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_imports_neither_torch_nor_transformers(arguments):
    code, modules = run(*arguments, "--help")
    assert code == 0 and not modules & HEAVY


def test_version_imports_neither_torch_nor_transformers():
    code, modules = run("--version")
    assert code == 0 and not modules & HEAVY


def test_koff_is_a_module_that_runs():
    command = [sys.executable, "-m", "koff", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"koff {__version__}\n"), result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("train",),
        ("train", "--stpes", "3"),
        ("train", "none.yaml", "--output", "out"),
        ("train", "koff/recipes/docs-llama.yaml", "--output", "out", "--set", "train.stpes=3"),
        ("train", "koff/recipes/docs-llama.yaml", "--output", "out", "--set", "koff.lora.r=0"),
        ("train", "koff/recipes/docs-llama.yaml", "--output", "out", "--without", "mlp"),
        ("eval", "none"),
        ("eval", "none", "--batch-size", "many"),
        ("eval", "none", "--json", "none/rows.json"),
        ("analyse", "none", "--domain", "en"),
        ("generate", "none", "Once"),
        ("generate", "none", "Once", "--temperature", "-1"),
        ("info", "none"),
        ("report",),
        ("report", "none"),
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_wrong_arguments_are_refused_before_torch_or_transformers(arguments):
    code, modules = run(*arguments)
    assert code == 2 and not modules & HEAVY


def test_info_reads_a_saved_model_without_torch_or_transformers(saved):
    code, modules = run("info", saved)
    assert code == 0 and not modules & HEAVY


def test_report_reads_finished_runs_without_torch_or_transformers(tmp_path):
    run_folder = RunFolder().write(tmp_path / "run")
    for name in ("page.html", "page.md"):
        code, modules = run("report", run_folder, "--output", tmp_path / name)
        assert code == 0 and not modules & HEAVY
        assert ("matplotlib" in modules) == name.endswith(".md")


def test_importing_koff_imports_neither_torch_nor_transformers():
    modules = set(fresh("import koff, sys; print(*sys.modules)").split())
    assert "koff" in modules and not modules & (HEAVY | {"koffkernels"})


def test_kernels_can_be_interpreted_by_who_imports_koff_before_triton():
    """Triton reads TRITON_INTERPRET when it is imported, which may be before koff's first use."""
    code = "import koff, triton; print(triton.knobs.runtime.interpret)"
    assert fresh(code, KOFF_BACKEND="interpret", TRITON_INTERPRET="").strip() == "True"
