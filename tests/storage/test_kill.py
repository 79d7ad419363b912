"""A process is killed before every change that a save makes on disk: at every moment the old or the
new model loads completely."""

import datetime
import shutil
from types import SimpleNamespace

import pytest
from support.kills import report, run_child, tree_digest
from support.models import same
from support.small_models import outputs, small

import koff
from koff.storage.lock import LOCK

# What differs between two saves of the same model.
DATED = ("koff.json", "README.md")
# What differs between two locks: a dead process's is nobody's, whatever it says.
LOCKS = (LOCK, f"{LOCK}-out")


pytestmark = pytest.mark.usefixtures("no_real_fsync")


@pytest.fixture(scope="module")
def models():
    return small(("en", "fr"), 0, 0.4), small(("en", "de"), 1, 0.2)


def user_files(folder):
    """Files that koff did not write, also where koff's own are."""
    for name in ("notes.txt", "recipe.json", "memories/fr/mine.txt", "checkpoints/x/y.bin"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


def check_user_files(folder):
    for name in ("notes.txt", "recipe.json", "memories/fr/mine.txt", "checkpoints/x/y.bin"):
        assert (folder / name).read_text() == f"mine: {name}"


@pytest.fixture(autouse=True)
def one_moment(monkeypatch):
    """koff.json says when it was written. Two saves in different seconds would be two states, and
    states are counted here."""
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    clock = SimpleNamespace(now=lambda zone: moment)
    fake = SimpleNamespace(datetime=clock, UTC=datetime.UTC)
    monkeypatch.setattr("koff.storage.save_load.datetime", fake)


@pytest.mark.slow
@pytest.mark.parametrize("lose", [False, True], ids=["kill", "power cut"])
def test_overwriting_save(models, in_memory, lose, record_property):
    old, new = models
    wanted = outputs(old), outputs(new)
    before = koff.save(old, in_memory / "before" / "out")
    user_files(before)

    def case(at):
        folder = in_memory / "case" / "out"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(before.parent, folder.parent)
        changes = run_child(lambda: koff.save(new, folder, overwrite=True), folder.parent, at, lose)
        return folder, changes

    folder, changes = case(None)
    after = tree_digest(folder, DATED)
    assert same(outputs(koff.load(folder)), wanted[1])
    seen, states = [], {}
    for at in range(1, len(changes) + 1):
        folder, finished = case(at)
        assert not finished
        state = tree_digest(folder.parent, LOCKS)
        if state not in states:  # an fsync changes nothing that can be seen
            got = outputs(koff.load(folder))
            states[state] = same(got, wanted[1])
            assert states[state] or same(got, wanted[0]), changes[at - 1]
            check_user_files(folder)
            koff.save(new, folder, overwrite=True)
            assert tree_digest(folder, DATED) == after, changes[at - 1]
            assert [p.name for p in folder.parent.iterdir()] == ["out"]
        seen.append(states[state])
    report(record_property, len(seen), len(states))
    assert len(seen) >= 100 and len(states) >= 60 and 20 <= sum(seen) < len(seen)
    assert seen == sorted(seen)  # the new one counts from one moment on


@pytest.mark.slow
@pytest.mark.parametrize("lose", [False, True], ids=["kill", "power cut"])
def test_first_save(models, in_memory, lose, record_property):
    model, wanted = models[0], outputs(models[0])
    root = in_memory / "case"

    def case(at):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return run_child(lambda: koff.save(model, root / "out"), root, at, lose)

    changes, complete, states = case(None), 0, set()
    after = tree_digest(root, DATED)
    for at in range(1, len(changes) + 1):
        case(at)
        state = tree_digest(root, LOCKS)
        if state in states:
            continue
        states.add(state)
        try:
            got = outputs(koff.load(root / "out"))
        except FileNotFoundError as error:
            assert "koff.json must be there" in str(error)
            assert not (root / "out").exists()
        else:
            complete += 1
            assert same(got, wanted)
        koff.save(model, root / "out", overwrite=True)
        assert tree_digest(root, DATED) == after, changes[at - 1]
    report(record_property, len(changes), len(states))
    assert len(changes) >= 40 and len(states) >= 20 and complete == 1
