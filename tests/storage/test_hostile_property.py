"""A saved folder is damaged at random 500 times: koff.load refuses it with a clear error or returns
a complete model that computes bit for bit what was saved. Nothing else."""

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import HOUSE, reseal
from support.models import same
from support.small_models import outputs, small

import koff
from koff.storage.files import DamagedFolder

pytestmark = pytest.mark.slow

ERRORS = (ValueError, DamagedFolder, FileNotFoundError, KeyError)
VALUES = st.sampled_from(
    (None, True, False, 0, -1, 1, 2, 3, 10**12, -(10**12), 10**400, 0.5, 1e308, float("nan"))
    + ("", "x", "3", "../x", "/etc/passwd", "a" * 300, [], [1], [[]], ["x"], {}, {"x": 1})
)


@pytest.fixture(scope="module")
def case():
    """(folder, the names of its files, what its model computes)."""
    with tempfile.TemporaryDirectory() as root:
        folder = koff.save(small(("en", "fr"), 0, 0.4), Path(root, "out"))
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        yield folder, names, outputs(koff.load(folder))


def flip(data, folder, name):
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3), "flips")):
        place = data.draw(st.integers(0, len(content) - 1), "place")
        content[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
    (folder / name).write_bytes(bytes(content))


def truncate(data, folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1), "length")])


def extend(data, folder, name):
    with (folder / name).open("ab") as file:
        file.write(data.draw(st.binary(min_size=1, max_size=20), "tail"))


def delete(data, folder, name):
    (folder / name).unlink()


def rename(data, folder, name):
    (folder / name).rename(folder / f"{name}.old")


def exchange(data, folder, name, names):
    other = data.draw(st.sampled_from(names), "other")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes((folder / other).read_bytes())
    (folder / other).write_bytes(content)


def link(data, folder, name):
    elsewhere = folder.parent / "elsewhere"
    targets = [elsewhere, folder / "config.json", folder / name, folder / "nowhere", folder]
    (folder / name).replace(elsewhere)
    (folder / name).symlink_to(data.draw(st.sampled_from(targets), "target"))


def keys_of(value, path=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3])
    for key, item in items:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from keys_of(item, (*path, key))


def substitute(data, folder, name):
    """Another value at one place of a JSON file, a place less, or one more."""
    values = json.loads((folder / name).read_text())
    *path, last = data.draw(st.sampled_from(list(keys_of(values))), "key")
    place = values
    for key in path:
        place = place[key]
    kind = data.draw(st.sampled_from(("replace", "remove", "add")), "kind")
    if kind == "remove":
        del place[last]
    elif kind == "add" and isinstance(place, dict):
        place[data.draw(st.sampled_from(("x", "../x", "_x", "to_dict", "")), "new")] = 1
    else:
        place[last] = data.draw(VALUES, "value")
    (folder / name).write_text(json.dumps(values))


MUTATIONS = {f.__name__: f for f in (flip, truncate, extend, delete, rename, exchange, link)}


@contextlib.contextmanager
def mutated(data, case):
    """A damaged copy of the folder; a name says how it was damaged."""
    original, names, _ = case
    name = data.draw(st.sampled_from(names), "file")
    kinds = [*MUTATIONS, *["substitute"] * (4 if name.endswith(".json") else 0)]
    kind = data.draw(st.sampled_from(kinds), "mutation")
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(original, Path(root, "out"))
        if kind == "substitute":
            substitute(data, folder, name)
        elif kind == "exchange":
            exchange(data, folder, name, names)
        else:
            MUTATIONS[kind](data, folder, name)
        yield folder, kind


def load(folder):
    """The model, or the error; anything but one of the clear errors is raised."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return koff.load(folder)
    except ERRORS as error:
        assert type(error) in ERRORS, type(error)
        assert re.match(HOUSE, str(error.args[0])), error
        return error


def sampled(examples):
    checks = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


def test_accidents(case, record_property):
    seen = Counter()

    @sampled(500)
    @given(st.data())
    def check(data):
        with mutated(data, case) as (folder, kind):
            result = load(folder)
            if isinstance(result, Exception):
                seen[f"{kind}: refused"] += 1
            else:
                assert same(outputs(result), case[2])
                seen[f"{kind}: harmless"] += 1

    check()
    report(seen, record_property, least=500)


def test_forgeries(case, record_property):
    """As above, with every hash made to agree with the damage: there may be another model then, but
    a complete one, and no other errors."""
    seen = Counter()

    @sampled(300)
    @given(st.data())
    def check(data):
        with mutated(data, case) as (folder, kind):
            with contextlib.suppress(Exception):  # what cannot be sealed again stays as it is
                reseal(folder)
            result = load(folder)
            if isinstance(result, Exception):
                seen[f"{kind}: refused"] += 1
            else:
                logits = outputs(result)
                assert all(logits[m].shape == case[2][None].shape for m in logits)
                assert all(torch.isfinite(v).all() for v in logits.values()) or kind != "substitute"
                seen[f"{kind}: loaded"] += 1

    check()
    report(seen, record_property, least=300)


def report(seen, record_property, least):
    for kind, count in sorted(seen.items()):
        record_property(kind, count)
    total, refused = sum(seen.values()), sum(n for k, n in seen.items() if k.endswith("refused"))
    print(f"\n{total} mutations, {refused} refused:", dict(sorted(seen.items())))
    assert total >= least and least // 4 < refused < total
    assert len({kind.split(":")[0] for kind in seen}) == len(MUTATIONS) + 1
