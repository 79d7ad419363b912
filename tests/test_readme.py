"""The README's first example runs as it stands, on a tiny model in place of the named one."""

import re
from pathlib import Path

import torch
from support.readme import README, prepare

ROOT = Path(__file__).parents[1]


def test_readme_names_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"make {command}" in README and re.search(rf"^{command}:", makefile, re.M)


def test_readme_first_screen_is_for_strangers():
    """At most 12 numbers in the first 60 lines, those of the example included."""
    first = "\n".join(README.splitlines()[:60])
    assert len(re.findall(r"\d+(?:[.,]\d+)?", first)) <= 12


def test_readme_example_runs(tmp_path, monkeypatch):
    names, code = {}, prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    assert names["small"].dtype == torch.bfloat16
    assert names["small"].koff.memory_names == ("en", "fr", "es")
    assert (tmp_path / "out" / "koff.json").is_file()
