"""What is read of a saved folder goes through one door, which looks at each file once."""

import functools
import json
from collections import Counter

import pytest

import koff
from koff.storage import files
from koff.storage.files import DamagedFolder, File
from koff.storage.manifest import FORMAT, SEALED, Manifest
from koff.storage.saved_folder import SavedFolder, open_saved

pytestmark = pytest.mark.usefixtures("no_real_fsync")


@pytest.fixture
def seen(monkeypatch):
    """Counts (what was done, with which file)."""
    counts = Counter()

    def counted(owner, name, path_of):
        method = getattr(owner, name)

        @functools.wraps(method)
        def call(first, *rest):
            counts[name, path_of(first, *rest)] += 1
            return method(first, *rest)

        monkeypatch.setattr(owner, name, call)

    counted(File, "__init__", lambda self, path: path)
    for name in ("json", "header", "tensors"):
        counted(File, name, lambda self: self.path)
    counted(files, "sha256", lambda path: path)
    return counts


def test_no_file_is_looked_at_twice_in_one_load(saved, seen):
    koff.load(saved)
    assert set(seen.values()) == {1}
    done = {
        what: {path.relative_to(saved).as_posix() for w, path in seen if w == what}
        for what in ("__init__", "json", "header", "tensors", "sha256")
    }
    weights = {path.relative_to(saved).as_posix() for path in saved.rglob("*.safetensors")}
    assert len(weights) == 1 + 2 * 3 and done["header"] == done["tensors"] == weights
    described = {path.relative_to(saved).as_posix() for path in saved.rglob("*.json")}
    assert done["json"] == described
    assert done["sha256"] == weights | described - {"koff.json"}
    assert done["__init__"] == weights | described


def test_a_file_that_was_refused_is_refused_again(saved):
    folder = SavedFolder(saved)
    target = saved.parent / "elsewhere"
    (saved / "config.json").rename(target)
    (saved / "config.json").symlink_to(target)
    for _ in range(2):
        with pytest.raises(ValueError, match="config.json must lie in its folder, got a link to"):
            folder.file("config.json")


def test_the_manifest_writes_what_it_read(saved):
    text = (saved / "koff.json").read_text()
    assert open_saved(saved).manifest.to_text() == text
    values = json.loads(text)
    assert set(SEALED) < set(values) and values["format"] == FORMAT
    values |= {"mine": [1], "metadata": {"note": "x"}}
    written = Manifest.from_json(values).to_json()
    assert written == values  # neither is sealed
    values["memories"] = []
    assert Manifest.from_json(values).to_json()["checksum"] != values["checksum"]


def test_a_damaged_folder_says_what_to_do(saved):
    (saved / "koff.json").write_text("{")
    with pytest.raises(
        DamagedFolder, match="koff.load: koff.json must be JSON, got .*; copy the f"
    ):
        koff.load(saved)
