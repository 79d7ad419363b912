"""What the tests of serving share: the folders and outputs of ``reference.py``, and engines.

They run in an environment with vLLM (``make test-vllm``). koff's own suite passes them by.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
from pathlib import Path

import pytest

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAVE_VLLM else ["test_*.py"]

# One process for front end, scheduler and worker, so that a test can look into each; one thread,
# bound to no core, since tests run side by side. Before vLLM is imported, which reads them then.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def pytest_addoption(parser):
    parser.addoption("--reference", type=Path, help="folder that reference.py made")
    parser.addoption("--koff", help="interpreter that has koff, for `koff serve`")


@pytest.fixture(scope="session")
def root(request) -> Path:
    """The folder with saved models."""
    return request.config.getoption("--reference").absolute()


@pytest.fixture(scope="session")
def expected(root) -> dict:
    """Folder -> memory -> rows of what koff computes."""
    return json.loads((root / "expected.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, and its folder."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["KOFF_CACHE"] = str(folder)
    return folder


@pytest.fixture
def engine(root):
    """A function that starts an engine with a folder; they end with the test."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    import koff_vllm

    started = []

    def start(name, **changes):
        own = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 16}
        own |= {"max_num_batched_tokens": 256, "disable_log_stats": False}
        llm = LLM(**koff_vllm.options(root / name) | own | changes)
        started.append(llm)
        return llm

    yield start
    for llm in started:
        llm.llm_engine.engine_core.shutdown()
    started.clear()
    gc.collect()
    cleanup_dist_env_and_memory()
