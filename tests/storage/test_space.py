"""A full disk: seen before a write where it can be, said in words where not; nothing is lost."""

import errno
import json
import os
import shutil
import types

import pytest
import torch
from safetensors import SafetensorError
from support.command_line import RECIPE, invoke, succeed
from support.models import same
from support.small_models import outputs, small
from support.trainings import learned, tiny_run

import koff
from koff.storage import space
from koff.storage.space import DiskFull, check_room, room_kept, writing

pytestmark = pytest.mark.usefixtures("no_real_fsync", "no_data_root")

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def models():
    return small(("en",), 0, 0.4), small(("en", "de"), 1, 0.2)


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes are free."""

    def say(count):
        monkeypatch.setattr(
            space.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count)
        )

    return say


def test_a_save_that_does_not_fit_is_refused_before_it_begins(models, free, tmp_path):
    old, new = models
    out = koff.save(old, tmp_path / "out")
    free(10_000_000)
    rule = r"koff\.save: the model must have 16\.8 MB of room in .*out, got 10\.0 MB free; make r"
    with pytest.raises(OSError, match=rule):
        koff.save(new, out, overwrite=True)
    with pytest.raises(OSError, match=rule.replace("out,", "new/deep,")):
        koff.save(new, tmp_path / "new" / "deep")
    with pytest.raises(OSError, match="memory 'de' must have 16.8 MB of room"):
        koff.import_memory(out, "de", kv=out / "memories/en/kv")
    for export in (out, koff.load(out)):
        with pytest.raises(OSError, match="koff.export_merged: the export must have 16.8 MB of ro"):
            koff.export_merged(export, "en", tmp_path / "exported")
    with pytest.raises(OSError, match="koff.save: the model must have 16.8 MB of room"):
        koff.push_to_hub(old, "some/one")
    with pytest.raises(OSError, match="koff.push_to_hub: the copy to upload must have 16.8 MB of"):
        koff.push_to_hub(out, "some/one")
    assert not (tmp_path / "exported").exists()
    free(10**12)
    assert same(outputs(koff.load(out)), outputs(old))


def fails_at(number, error, call):
    """``call``, but for the call of this number, which raises."""
    calls = []

    def limited(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise error
        return call(*args, **kwargs)

    return limited, calls


WORDS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("kind", ["safetensors", "system"])
def test_a_disk_that_fills_up_amid_a_save_leaves_the_old_model(kind, models, tmp_path, monkeypatch):
    import safetensors.torch

    old, new = models
    out = koff.save(old, tmp_path / "out")
    names = {p.name for p in out.iterdir()}
    owner, name, error = {
        "safetensors": (safetensors.torch, "serialize_file", WORDS),
        "system": (type(tmp_path), "write_text", NO_SPACE),
    }[kind]
    counted, calls = fails_at(None, error, getattr(owner, name))
    monkeypatch.setattr(owner, name, counted)
    koff.save(new, tmp_path / "whole")
    monkeypatch.undo()
    assert len(calls) >= 3
    for number in range(1, len(calls) + 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            patch.setattr(owner, name, fails_at(number, error, getattr(owner, name))[0])
            with pytest.raises(DiskFull, match="the model must have .*, got a disk that is full"):
                koff.save(new, out, overwrite=True)
        assert {p.name for p in out.iterdir()} == names
        assert same(outputs(koff.load(out)), outputs(old)), number


def test_only_a_full_disk_is_called_one(tmp_path, free):
    torchs = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    for error, full in (
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError(errno.EACCES, "denied"), False),
        (ValueError("other"), False),
    ):
        with pytest.raises(DiskFull if full else type(error)), writing("x", 0, tmp_path):
            raise error
    for left, kind in ((10, DiskFull), (10**12, RuntimeError)):
        free(10**12)
        with pytest.raises(kind), writing("x", 1000, tmp_path):
            free(left)
            raise torchs


def test_room_is_kept_until_it_is_wanted(tmp_path):
    with pytest.raises(KeyError), room_kept(3_000_000, tmp_path):
        (file,) = tmp_path.iterdir()
        assert file.stat().st_blocks * 512 >= 3_000_000  # and not a hole in a file
        raise KeyError
    assert not list(tmp_path.iterdir())
    check_room("x", 1, tmp_path / "not" / "yet")


def test_a_run_without_room_for_a_checkpoint_does_not_begin(free, tmp_path):
    run = tiny_run(tmp_path)
    free(1000)
    with pytest.raises(OSError, match="KoffTrainer: a checkpoint must have 16.8 MB of room"):
        run.train()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    limited, _ = fails_at(6, NO_SPACE, torch.save)  # three files in each: in the second one
    monkeypatch.setattr(torch, "save", limited)
    with pytest.raises(DiskFull, match="checkpoint .*-2 must have .* a disk that is full"):
        run.train()
    monkeypatch.undo()
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-1"]
    whole = tiny_run(tmp_path / "whole", save_strategy="no")
    whole.train()
    again = tiny_run(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(learned(again.model), learned(whole.model))


def command(root, output, *options):
    return ("train", root / "recipe.yaml", "--output", output, "--device", "cpu", *options)


def fails(*arguments):
    """The line in which a command ends that had begun its work, behind what it says of that."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: koff")
    return line


@pytest.fixture(scope="module")
def whole(root):
    output = root / "whole"
    succeed(*command(root, output, "--set", "train.save_every=0"))
    assert not (output / "checkpoints").exists()
    return {p.name: p.read_bytes() for p in output.rglob("*.safetensors")}


def test_koff_train_asks_for_room_before_it_begins(root, free, tmp_path):
    free(20_000_000)
    line = fails(*command(root, tmp_path / "out"))
    assert "koff train: the run must have" in line and "got 20.0 MB free" in line
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@pytest.mark.parametrize("at", ["the last save", "a checkpoint"])
def test_a_full_disk_loses_nothing_of_koff_train(at, root, whole, tmp_path, monkeypatch):
    from koff.storage import save_load
    from koff.training import checkpointing

    output = tmp_path / "out"
    every = 0 if at == "the last save" else 1
    options = command(root, output, "--set", f"train.save_every={every}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        if at == "the last save":
            patch.setattr(save_load, "write_backbone", fails_at(1, NO_SPACE, None)[0])
        else:  # of the last step but one; the one that is written instead finds room
            check = checkpointing.check_room
            patch.setattr(
                checkpointing, "check_room", fails_at(3, DiskFull("koff: full"), check)[0]
            )
        assert "full" in fails(*options)
    assert not (output / "koff.json").exists() and not (output / ".koff-room").exists()
    (kept,) = sorted((output / "checkpoints").glob("checkpoint-*"))[-1:]
    assert kept.name == ("checkpoint-4" if at == "the last save" else "checkpoint-3")
    succeed(*options)
    log = json.loads((output / "train_log.json").read_text("utf-8"))
    assert log["resumed_from"] == str(kept) and RECIPE["train"]["steps"] == 4
    assert {p.name: p.read_bytes() for p in output.rglob("model*.safetensors")} == {
        name: data for name, data in whole.items() if name.startswith("model")
    }
    assert (output / "checkpoints").exists() == bool(every)
    shutil.rmtree(output)


def test_add_memory_keeps_room_while_it_trains(root, whole, free, monkeypatch):
    from support.trainings import documents

    out = root / "whole"
    seen = []
    data = [{"input_ids": [i % 5 + 3 for i in d["input_ids"]]} for d in documents(1)]

    class Look(koff.KoffTrainer):
        def train(self, *args, **kwargs):
            seen.append((out / ".koff-room").stat().st_blocks > 0)

    monkeypatch.setattr("koff.manage.KoffTrainer", Look)
    args = koff.KoffTrainingArguments(str(root / "add"), use_cpu=True, max_steps=1, block_size=16)
    settings = dict(lora=koff.LoRAConfig(r=2), kv=None, args=args, tokenizer=None)
    koff.add_memory(out, "de", data, **settings)
    assert seen == [True] and not (out / ".koff-room").exists()
    free(1000)
    with pytest.raises(OSError, match="koff.add_memory: memory 'it' must have .* of room"):
        koff.add_memory(out, "it", data, **settings)
    free(10**12)
    koff.remove_memory(out, "de")
