"""Damaged and hostile checkpoints: resume refuses them with a clear error, before anything of them
is used, and nothing in them executes."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import HOUSE, cut, edit, flip
from support.models import same
from support.trainings import learned, tiny_run

from koff.training import checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_run(folder, max_steps=2, save_steps=2).train()
    return folder / "checkpoint-2"


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint-2")


def reseal(folder):
    """What a forger would do: make the hashes agree with what lies there now."""
    (folder / checkpoint.SEAL).unlink()
    checkpoint.seal(folder)


def refused(folder, message, error=ValueError):
    """Resume raises, and neither the model nor the folder beside it has changed."""
    run = tiny_run(folder.parent / "again", max_steps=3)
    before = learned(run.model)
    with pytest.raises(error, match=message) as caught:
        run.train(resume_from_checkpoint=str(folder))
    caught.match(HOUSE)
    assert same(learned(run.model), before) and run.optimizer is None


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').write('ran')",)


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin")
PICKLES += ("optimizer.bin", "pytorch_model.bin", "rng_state_0.pth")


@pytest.mark.parametrize("plain", [False, True], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("forged", [False, True], ids=["planted", "forged"])
@pytest.mark.parametrize("name", PICKLES)
def test_planted_pickles_do_not_run(name, forged, plain, saved, tmp_path):
    bomb = {"state": Bomb(tmp_path / "ran"), "param_groups": []}
    if plain:
        (saved / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, saved / name)
    if forged:
        reseal(saved)
    refused(saved, "must hold no file that can execute|must hold tensors and plain|must have")
    assert not (tmp_path / "ran").exists()
    if plain:  # it is a bomb
        pickle.loads((saved / name).read_bytes())
    else:
        torch.load(saved / name, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_pickles_in_place_of_json_and_safetensors_do_not_run(saved, tmp_path):
    for name in ("trainer_state.json", "koff_state.json", "koff_state.safetensors"):
        copy = shutil.copytree(saved, tmp_path / name / "checkpoint-2")
        (copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        reseal(copy)
        refused(copy, "must be JSON|must be a safetensors file")
    assert not (tmp_path / "ran").exists()


def test_every_file_is_checked(saved, tmp_path):
    """A flipped bit, a cut or a missing file: each file, each time."""
    files = sorted(path.name for path in saved.iterdir())
    assert len(files) == 7
    for name in files:
        for number, harm in enumerate((flip, cut, Path.unlink, link_away)):
            copy = shutil.copytree(saved, tmp_path / f"{name}{number}" / "checkpoint-2")
            harm(copy / name)
            with pytest.raises((ValueError, FileNotFoundError), match=HOUSE):
                checkpoint.check_complete(copy)


def link_away(path):
    target = path.parent.parent / "elsewhere"
    path.replace(target)
    path.symlink_to(target)


def change(name, edit_value):
    def harm(folder):
        with torch.serialization.safe_globals(ALLOWED):
            value = torch.load(folder / name, weights_only=True)
        torch.save(edit_value(value), folder / name)

    return harm


ALLOWED = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype(np.uint32))]


def put(*path_and_value):
    *path, last, new = path_and_value

    def edited(value):
        place = value
        for key in path:
            place = place[key]
        place[last] = new
        return value

    return edited


def tensors(edited):
    def harm(folder):
        values = load_file(folder / "koff_state.safetensors")
        save_file(edited(values), folder / "koff_state.safetensors")

    return harm


def state(**changes):
    return lambda folder: edit(folder / "trainer_state.json", **changes)


def facts(**changes):
    return lambda folder: edit(folder / "koff_state.json", **changes)


def first(values):
    return sorted(n for n, t in values.items() if t.is_floating_point() and t.dim() == 2)[0]


FORGERIES = {
    "moment of another shape": (
        change("optimizer.pt", put("state", 0, "exp_avg", torch.zeros(3))),
        r"exp_avg of parameter 0 in optimizer.pt must be finite numbers of shape",
    ),
    "moment NaN": (
        change("optimizer.pt", lambda v: (v["state"][0]["exp_avg"].fill_(float("nan")), v)[1]),
        "exp_avg of parameter 0 in optimizer.pt must be finite",
    ),
    "step": (change("optimizer.pt", put("state", 0, "step", "x")), "step of parameter 0 in opt"),
    "unknown parameter": (
        change("optimizer.pt", put("state", 10**9, {})),
        "optimizer.pt's state must fit the run's parameter groups, got 1000000000",
    ),
    "fewer groups": (
        change("optimizer.pt", lambda v: {**v, "param_groups": v["param_groups"][:1]}),
        "optimizer.pt must fit the run's parameter groups, got 1 groups",
    ),
    "other parameters": (
        change("optimizer.pt", put("param_groups", 0, "params", [5])),
        "optimizer.pt must fit the run's parameter groups, got other parameters",
    ),
    "rate": (change("optimizer.pt", put("param_groups", 0, "lr", "fast")), "lr in optimizer.pt"),
    "no optimizer": (change("optimizer.pt", lambda v: [1]), "must hold state and param_groups"),
    "a method": (change("scheduler.pt", put("step", 5)), "'step' in scheduler.pt must be a sett"),
    "its optimizer": (change("scheduler.pt", put("optimizer", 5)), "'optimizer' in scheduler.pt"),
    "a dunder": (change("scheduler.pt", put("__class__", 5)), "'__class__' in scheduler.pt must"),
    "rates": (change("scheduler.pt", put("base_lrs", [1.0])), "base_lrs in scheduler.pt must fit"),
    "last epoch": (change("scheduler.pt", put("last_epoch", "1")), "last_epoch in scheduler.pt"),
    "python's generator": (
        change("rng_state.pth", put("python", (3, (1, 2), None))),
        "rng_state.pth must hold states of random generators",
    ),
    "numpy's generator": (change("rng_state.pth", put("numpy", 3)), "rng_state.pth must hold"),
    "torch's generator": (
        change("rng_state.pth", put("cpu", torch.zeros(3, dtype=torch.uint8))),
        "rng_state.pth must hold states of random generators",
    ),
    "a GPU's generator": (change("rng_state.pth", put("cuda", "x")), "rng_state.pth must hold"),
    "steps as a text": (state(global_step="2"), "global_step in trainer_state.json must be a cou"),
    "steps below 0": (state(global_step=-2), "global_step in trainer_state.json must be a count"),
    "steps": (state(global_step=10**30), "global_step in trainer_state.json must be a count"),
    "an unknown field": (state(mine=1), "trainer_state.json must hold known fields, got 'mine'"),
    "history": (state(log_history="x"), "log_history in trainer_state.json must be a list"),
    "epoch": (state(epoch="x"), "epoch in trainer_state.json must be a number"),
    "callbacks": (state(stateful_callbacks=[1]), "stateful_callbacks in trainer_state.json must"),
    "mask_fixed": (facts(mask_fixed="yes"), "mask_fixed must be true or false"),
    "kv_filled": (facts(kv_filled={"en": 1}), "kv_filled must be true or false for each memory"),
    "checkpoint format": (facts(format=7), "the checkpoint format must be 1, got 7"),
    "a tensor less": (
        tensors(lambda v: {n: t for n, t in v.items() if n != first(v)}),
        "the checkpoint's tensors must have the model's names, shapes and dtypes",
    ),
    "a tensor's shape": (
        tensors(lambda v: v | {first(v): torch.zeros(1, 2)}),
        "the checkpoint's tensors must have the model's names, shapes and dtypes",
    ),
    "a tensor's dtype": (
        tensors(lambda v: v | {first(v): v[first(v)].half()}),
        "the checkpoint's tensors must have the model's names, shapes and dtypes",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_checkpoints_are_refused(forgery, saved):
    harm, message = FORGERIES[forgery]
    harm(saved)
    reseal(saved)
    refused(saved, message)


def test_a_checkpoint_that_is_not_finite_is_refused(saved):
    tensors(lambda v: v | {first(v): v[first(v)] * float("nan")})(saved)
    reseal(saved)
    run = tiny_run(saved.parent / "again", max_steps=3)
    before = learned(run.model)
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity; resume from an ear"):
        run.train(resume_from_checkpoint=str(saved))
    assert same(learned(run.model), before)


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tmp_path):
    tiny_run(tmp_path, max_steps=2, save_steps=2, save_only_model=True).train()
    refused(tmp_path / "checkpoint-2", "must hold optimizer.pt, got none; it was written with save")


def test_what_others_put_into_a_checkpoint_may_stay(saved):
    (saved / "notes.txt").write_text("mine")
    run = tiny_run(saved.parent / "again", max_steps=2)
    run.train(resume_from_checkpoint=str(saved))
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 2
