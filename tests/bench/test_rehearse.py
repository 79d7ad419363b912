"""The rehearsal, of a tiny model: every stage, a stop on the way, and going on."""

import json

import pytest

from bench import rehearse


@pytest.mark.slow
def test_every_stage_goes_through_and_is_done_once(tmp_path, monkeypatch):
    settings = dict(steps=2, rows=2, tokens=16)
    first = rehearse.rehearse("tiny", tmp_path, until="train", **settings)
    assert [row["stage"] for row in first] == ["write", "load", "attach", "train"]
    rows = rehearse.rehearse("tiny", tmp_path, **settings)
    assert [row["stage"] for row in rows] == list(rehearse.STAGES)
    assert rows[0] == first[0]  # the base was not written again
    assert all(row["seconds"] > 0 and row["peak"] > 0 and row["disk"] > 0 for row in rows)
    assert json.loads((tmp_path / rehearse.RESULT).read_text())["rows"] == rows
    monkeypatch.setattr(rehearse.subprocess, "Popen", None)  # nothing is left to do
    assert rehearse.rehearse("tiny", tmp_path, **settings) == rows


def test_what_must_not_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--model must be one of"):
        rehearse.rehearse("huge", tmp_path)
    with pytest.raises(ValueError, match="--until must be one of"):
        rehearse.rehearse("tiny", tmp_path, until="never")
    record = {"settings": {"model": "tiny", "steps": 1, "rows": 1, "tokens": 8}, "rows": []}
    (tmp_path / rehearse.RESULT).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must hold a rehearsal of"):
        rehearse.rehearse("tiny", tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == [rehearse.RESULT]
