"""What every test runs under: a fixed seed, one thread, and NaN in memory that nobody wrote."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# Before anything of it is imported: its assertions say what was compared, as those of tests do.
# Fixtures import it, and koff, when they run, so that collecting tests stays cheap.
pytest.register_assert_rewrite("support")

torch.set_num_threads(1)

# A name that is no folder may be one of the hub, which is asked several times, and waited for. No
# test needs it: test_hub.py has its own. huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What tests tokenise goes when they do, and nothing is found that an earlier run left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Triton's interpreter needs a process of its own: test_interpreter.py starts it.
# What is in vllm runs in vLLM's environment: make test-vllm.
collect_ignore = ["vllm"]
if os.environ.get("KOFF_BACKEND") != "interpret":
    collect_ignore.append("kernels/interpreter")


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seed torch, and let torch.empty give NaN (integers: the largest number) instead of whatever
    lay there: it does so only in deterministic mode, which therefore only warns here."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def compiled_anew():
    """Forget what a test compiled: torch.compile gives up on a function that was compiled too
    often, by whichever tests ran before in this process."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """A Python with transformers and peft, but no koff."""
    from support import bare

    return bare.make_python(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a saved model that no test changes."""
    from support.widths import compacted

    import koff

    return koff.save(compacted("llama"), tmp_path_factory.mktemp("original") / "out")


@pytest.fixture
def saved(original, tmp_path):
    """A copy of ``original`` of a test's own."""
    return shutil.copytree(original, tmp_path / "out")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a tiny model, its tokenizer, data of three domains and a recipe."""
    from support.command_line import fill_root

    return fill_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def no_data_root(monkeypatch):
    """For tests of recipes' data: they lie where the recipe says, whatever KOFF_DATA is here."""
    monkeypatch.delenv("KOFF_DATA", raising=False)


@pytest.fixture
def no_real_fsync(monkeypatch):
    """For tests that simulate what fsync does: the real one takes minutes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def in_memory(tmp_path):
    """A folder that no disk slows down, where there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def pytest_collection_modifyitems(config, items):
    """Deselect, and so count in the last line, what needs what is not there; begin with
    the interpreter, which takes minutes in one process while the others do the rest."""
    items.sort(key=lambda item: not item.name.startswith("test_kernels_in_the_interpreter"))
    there = {"gpu": torch.cuda.is_available(), "browser": shutil.which("chromium") is not None}
    for what in (name for name, is_there in there.items() if not is_there):
        without = [item for item in items if what in item.keywords]
        if without:
            config.hook.pytest_deselected(items=without)
            items[:] = [item for item in items if what not in item.keywords]
