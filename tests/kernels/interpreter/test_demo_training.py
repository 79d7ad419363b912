"""The demo's training, a few steps, once through the Triton kernels and once in plain torch."""

import copy
import dataclasses

import pytest
from support.demo_settings import SMALL

import koffkernels
from koff.commands.train import LOG_FILE, run
from koff.demo import base_model as demo_base
from koff.demo import corpus as demo_data
from koff.demo.run import demo_recipe
from koff.storage.files import File

STEPS = 5
# The kernels differ from torch by roundings of 2^-24 in sums of a few hundred terms, about 1e-6 of
# the loss; five optimiser steps (Adam divides by small second moments) multiply that by about 30.
RELATIVE = 1e-4


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "SIZES", {"train": 30_000, "validation": 4_000, "test": 4_000})
    folder = demo_base.prepare_base(tmp_path / "cache", settings=copy.deepcopy(SMALL))
    made = demo_recipe(folder / "base", folder / "data")
    few = {"steps": STEPS, "batch_size": 3, "block_size": 32, "general_every": 2}
    few["width_multiple_of"] = 16  # of 64 neurons
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, logging_every=1, **few))
    made.root = folder
    return made


def losses(folder):
    return [e["loss"] for e in File(folder / LOG_FILE).json()["history"] if "loss" in e]


@pytest.mark.slow
def test_demo_training_interpreted(recipe, tmp_path):
    interpreted = run(recipe, tmp_path / "triton", device="cpu", label="triton")
    with koffkernels.force_backend("torch"):
        plain = run(recipe, tmp_path / "torch", device="cpu", label="torch")
    got, want = losses(interpreted), losses(plain)
    assert len(got) == STEPS and got == pytest.approx(want, rel=RELATIVE)
    assert len(set(want)) == STEPS
