"""Options and what all microbenchmarks of a run share."""

from __future__ import annotations

import pytest
import torch

from koffkernels.clock import WallClock

from .. import timing
from ..gpu.context import Bench
from .cases import CUDA, DTYPES, MODELS, now, scaled


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add this folder's options."""
    group = parser.getgroup("koff microbenchmarks")
    group.addoption("--dtype", choices=DTYPES, default="bf16" if CUDA else "fp32")
    group.addoption(
        "--divide",
        type=int,
        default=1 if CUDA else 4,
        help="divide widths, heads and tokens of the models by this, to fit the machine",
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Versions and processor beside every result."""
    machine_info.pop("node", None)  # a machine's name identifies it
    machine_info["koff"] = timing.environment(torch.get_num_threads())
    machine_info["koff"]["gpu"] = torch.cuda.get_device_name() if CUDA else None


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest):
    """A function: the context of a model by its name."""
    by = request.config.getoption("--divide")
    dtype = DTYPES[request.config.getoption("--dtype")]
    device = torch.device("cuda" if CUDA else "cpu")
    made: dict[str, Bench] = {}

    def of(model: str) -> Bench:
        if model not in made:
            shape = scaled(MODELS[model], by)
            made[model] = Bench(device, False, shape, WallClock(), 0, dtype=dtype)
        return made[model]

    return of


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> dict[str, float]:
    """Bytes per second of a copy and operations per second of a product, of this run."""
    device = torch.device("cuda" if CUDA else "cpu")
    dtype = DTYPES[request.config.getoption("--dtype")]
    return timing.limits(device, dtype, now)
