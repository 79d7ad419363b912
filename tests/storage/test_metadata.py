"""What callers want to be kept in koff.json: checked before anything is written, and again when it
is read, as it may be edited."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.damage import HOUSE, edit, reseal
from support.models import attached
from typer.testing import CliRunner

import koff
from koff import cli
from koff.commands import saved as runs
from koff.evaluation.perplexity import EvalRow
from koff.storage import push
from koff.storage.change import put_memory, write_results

pytestmark = pytest.mark.usefixtures("no_real_fsync")

ROW = EvalRow("koff", "en", "en", "test", 3.25, 1.5, 100)
RECORD = {"source": "de.jsonl", "root": "/x", "data": {"train": "de.jsonl"}}


@dataclass
class Note:
    text: str


def written(folder):
    return json.loads((folder / "koff.json").read_text())


def test_what_is_documented_is_kept(tmp_path):
    diverged = EvalRow("koff", None, "fr", "test", float("inf"), float("nan"), 100)
    given = {
        "base": Path("/somewhere/base"),
        "revision": None,
        "results": [ROW, diverged, ROW.to_dict()],
        "data": {"en": "wikipedia"},
        "general": None,
        "note": [Note("é"), Path("a/b"), 1.5, None],
    }
    out = koff.save(attached("llama", target_sparsity=0), tmp_path / "out", metadata=given)
    facts, card = written(out), (out / "README.md").read_text("utf-8")
    assert facts["base"] == str(Path("/somewhere/base")) and facts["revision"] is None
    assert facts["metadata"]["note"] == [{"text": "é"}, str(Path("a/b")), 1.5, None]
    assert facts["metadata"]["results"][0] == facts["metadata"]["results"][2] == ROW.to_dict()
    assert facts["metadata"]["results"][1]["perplexity"] is None
    assert "| koff | en | en | test | 3.250 | 1.5000 |" in card and "| en: wikipedia |" in card
    assert "| koff | none | fr | test | – | – |" in card
    assert isinstance(given["base"], Path) and given["results"][0] is ROW  # the caller's own stay
    assert koff.load(out).config._name_or_path == str(Path("/somewhere/base"))
    write_results(out, [diverged.to_dict()])
    assert "Infinity" not in (out / "koff.json").read_text()


REFUSED = [
    ([], "metadata must be a mapping of names to JSON values, got list"),
    ({"base": 5}, "'base' in metadata must be a text or None, got 5"),
    ({"revision": 5}, "'revision' in metadata must be a text or None, got 5"),
    ({"x": float("inf")}, "metadata must hold JSON values, without NaN and infinity"),
    ({"x": {1, 2}}, "metadata must hold JSON values, .* got a set"),
    ({(1, 2): 3}, "metadata must hold JSON values"),
    ({"x": "\ud800"}, "metadata must hold JSON values"),
    ({"data": "wikipedia"}, "'data' in metadata must be an object of names and texts"),
    ({"data": {"en": 5}}, "'data' in metadata must be an object of names and texts"),
    ({"general": "c4"}, "'general' in metadata must be an object of names and texts"),
    ({"added": {"en": {}}}, "'added' in metadata must be an object of names and what they were"),
    ({"added": {"en": {"source": "x", "root": "."}}}, "'added' in metadata must be an object"),
    ({"results": [1]}, "'results' in metadata must be rows of koff.evaluate, got .1."),
    ({"results": {"en": 3}}, "'results' in metadata must be rows of koff.evaluate"),
    ({"results": [{"memory": "en"}]}, "'results' in metadata must be rows of koff.evaluate"),
    (
        {"results": [ROW.to_dict() | {"perplexity": "3"}]},
        "'results' in metadata must be rows of koff.evaluate",
    ),
    (
        {"results": [ROW.to_dict() | {"perplexity": 10**400}]},
        "'results' in metadata must be rows of koff.evaluate",
    ),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(metadata, message, tmp_path):
    model = attached("llama", target_sparsity=0)
    with pytest.raises(ValueError, match=message) as caught:
        koff.save(model, tmp_path / "out", metadata=metadata)
    caught.match(HOUSE)
    assert not any(tmp_path.iterdir())


EDITED = [
    ({"added": [1]}, "'added' in the metadata of koff.json must be"),
    ({"added": {"en": {}}}, "'added' in the metadata of koff.json must be"),
    ({"added": {"en": RECORD | {"root": 5}}}, "'added' in the metadata of koff.json must be"),
    ({"results": [1]}, "'results' in the metadata of koff.json must be rows of koff.evaluate"),
    ({"data": 5}, "'data' in the metadata of koff.json must be"),
    ({"general": ["c4"]}, "'general' in the metadata of koff.json must be"),
]


@pytest.mark.parametrize(("metadata", "message"), EDITED)
def test_edited_metadata_is_refused_when_koff_json_is_read(metadata, message, saved, tmp_path):
    (saved / "recipe.json").write_text("{}")
    edit(saved / "koff.json", metadata=metadata)
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    for act in (
        koff.load,
        runs.describe,
        lambda at: koff.remove_memory(at, "en"),
        lambda at: koff.import_memory(at, "de", lora=at / "memories/en/lora"),
        lambda at: push._portable(at, tmp_path / "staging"),
        lambda at: write_results(at, []),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            act(saved)
        caught.match(HOUSE)
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before


def test_eval_refuses_edited_metadata_before_it_measures(saved, monkeypatch):
    edit(saved / "koff.json", metadata={"data": 5})
    monkeypatch.setattr(runs, "evaluate_run", lambda *_, **__: pytest.fail("measured first"))
    result = CliRunner().invoke(cli.app, ["eval", str(saved), "--card"])
    assert result.exit_code == 2 and "'data' in the metadata of koff.json" in result.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {}},
        {"versions": {"peft": 5}, "metadata": {"added": None, "data": None, "results": None}},
        {"metadata": {}, "base": None},
    ],
)
def test_what_may_be_edited_away_is_not_missed(changes, saved):
    edit(saved / "koff.json", **changes)
    koff.import_memory(saved, "de", lora=saved / "memories/en/lora")
    koff.remove_memory(saved, "en")
    write_results(saved, [ROW.to_dict()])
    assert koff.load(saved).koff.memory_names == ("keys", "es", "de")
    assert ("torch unknown" in (saved / "README.md").read_text()) == ("versions" in changes)
    put_memory(saved, _with(saved, "fr"), "fr", RECORD)
    assert written(saved)["metadata"]["added"] == {"fr": RECORD}


def _with(folder, name):
    model = koff.load(folder)
    return koff.import_memory(model, name, lora=folder / "memories/de/lora")


def _fewer(kept):
    return kept[:-1]


def _more(kept):
    return [*kept, kept[-1]]


def _huge(kept):
    return [[*rows[:-1], 10**30] for rows in kept]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_fewer, "'kept' in koff.json must have one list of kept neurons for each of 3 layers"),
        (_more, "'kept' in koff.json must have one list of kept neurons for each of 3 layers"),
        (_huge, "the kept neurons of layer 0 must be"),
    ],
)
def test_kept_neurons_that_cannot_be_are_refused(change, message, saved):
    kept = change(written(saved)["kept"])
    edit(saved / "koff.json", kept=kept)
    reseal(saved)
    with pytest.raises(ValueError, match=message) as caught:
        koff.load(saved)
    caught.match(HOUSE)
    edit(saved / "koff.json", kept=_huge(kept), dense_widths=[10**31] * 3)
    reseal(saved)
    with pytest.raises(ValueError, match="'dense_widths' in koff.json must be a list of whole"):
        koff.load(saved)
