"""Tables and JSON files of measured rows."""

import json
import math
import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from koff.commands import tables as report
from koff.evaluation.perplexity import EvalRow


def row(variant, memory, domain, perplexity):
    return EvalRow(variant, memory, domain, "test", perplexity, perplexity / 10, 100)


ROWS = [
    row("base", None, "en", 10.0),
    row("base", None, "math", 20.0),
    *(row("koff", memory, "en", value) for memory, value in (("en", 11), ("fr", 13), (None, 14))),
    *(row("koff", memory, "math", value) for memory, value in (("en", 21), ("fr", 23), (None, 24))),
]
GATES = [row("koff", None, "en", 12.0)]


def test_pivot_puts_every_row_in_its_column():
    header, lines = report.pivot(ROWS, gates_only=GATES)
    names = ["dense", "gates only", "own memory", "memory en", "memory fr", "no memory"]
    assert header == ["domain", *names]
    assert lines == [
        ["en", "10.00", "12.00", "11.00", "·", "13.00", "14.00"],
        ["math", "20.00", "–", "–", "21.00", "23.00", "24.00"],
    ]


def test_pivot_leaves_out_what_was_not_measured():
    header, lines = report.pivot([row("koff", None, "en", 3.14159)], metric="bits_per_byte")
    assert header == ["domain", "no memory"] and lines == [["en", "0.314"]]
    assert report.pivot([row("koff", None, "en", math.inf)])[1] == [["en", "inf"]]
    with pytest.raises(ValueError, match="metric must be 'perplexity' or 'bits_per_byte', got 'x'"):
        report.pivot(ROWS, metric="x")


def test_markdown_table():
    text = report.markdown(*report.pivot(ROWS[:2]))
    assert text == "| domain | dense |\n| --- | ---: |\n| en | 10.00 |\n| math | 20.00 |\n"
    text = report.markdown(["", "value"], [("size", "3")])
    assert text == "|  | value |\n| --- | ---: |\n| size | 3 |\n"


def test_rich_tables_show_the_same_cells():
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(report.eval_table(ROWS, gates_only=GATES))
    console.print(report.facts_table({"speed-up": "1.2x"}, title="facts"))
    console.print(report.facts_table({"[red]base[/b]": "[/x] b"}, title="out[v2] [/]"))
    text = console.export_text()
    assert "[red]base[/b]" in text and "[/x] b" in text and "out[v2] [/]" in text
    for cell in ("gates only", "own memory", "13.00", "speed-up", "1.2x", "lower is better"):
        assert cell in text


def test_sparsity_facts_say_soft_or_hard():
    values = {"mlp": 0.2, "model": 0.1, "non_embedding": 0.15, "undecided": 0.5}
    soft = report.sparsity_facts(SimpleNamespace(**values, hard=False, widths=[64, 64]))
    assert soft["gates"] == "soft, 50% undecided" and soft["kept MLP widths"] == "64 in 2 layers"
    hard = report.sparsity_facts(SimpleNamespace(**values, hard=True, widths=[64, 128]))
    assert hard["gates"] == "hard" and hard["kept MLP widths"] == "64 to 128 in 2 layers"
    assert hard["sparsity, of the MLP neurons"] == "20.0%"


def test_millions():
    assert (report.millions(5_771_000), report.millions(1500)) == ("5.77 M", "1.5 k")


def test_write_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "rows.json"
    report.write_json(path, [ROWS[0].to_dict(), {"x": (math.nan, math.inf)}])
    assert json.loads(path.read_text("utf-8")) == [ROWS[0].to_dict(), {"x": [None, None]}]
    with pytest.raises(TypeError):
        report.write_json(path, {"x": object()})
    assert json.loads(path.read_text("utf-8"))[0]["domain"] == "en"
    assert [item.name for item in tmp_path.iterdir()] == ["rows.json"]


def test_write_json_refuses_bad_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="must lie in an existing folder"):
        report.write_json(tmp_path / "none" / "rows.json", [])
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        report.write_json(tmp_path, [])
    assert not list(tmp_path.iterdir())
