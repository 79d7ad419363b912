"""bench.report: docs and README say what the result files say."""

import csv
import io
import json
from pathlib import Path

from support.readme import README

from bench import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def row(way: str, backbone: str, memories: int, readings: list[float], **other) -> dict:
    removed = 0.0 if backbone == "dense" else 0.25
    facts = {"phase": "decode", "rows": 8, "keys": False, "widths": [64, 64], "removed": removed}
    facts |= {"weight_bytes": 2**20, "memory_bytes": 0, "kv_bytes": 2**20, "share_of_ideal": 0.5}
    facts |= {"way": way, "backbone": backbone, "memories": memories, "readings": readings}
    us = 1e6 * sorted(readings)[len(readings) // 2]
    return facts | {"us": us, "tokens_per_second": 8e6 / us, "least_seconds": 1 - removed} | other


ROWS = [
    row("transformers", "dense", 0, [2.0, 4.0, 8.0]),
    row("koff", "dense", 0, [4.0, 8.0, 16.0]),
    row("transformers", "25-equal", 0, [2.1, 3.9, 8.0]),
    row("koff", "25-equal", 0, [2.0, 4.0, 8.0]),
    row("peft", "dense", 8, [9.0, 9.0, 9.0]),
    row("koff", "dense", 8, [3.0, 3.0, 3.0]),
    {"name": "decode-8-koff-25-different-0", "error": "off"},
]


def cells(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_report_says_where_koff_loses():
    slower, unsure, faster = cells(report.verdicts(ROWS))
    assert slower[:3] == ["decode, 8 rows", "dense", "none"] and slower[5:7] == [
        "0.50",
        "koff is **slower**",
    ]
    assert unsure[5:7] == ["1.00", "no difference that is sure"]
    assert faster[2] == "eight mixed" and faster[4].endswith("(PEFT)")
    assert faster[5:7] == ["3.00", "koff is faster"]


def test_report_holds_pruning_against_what_is_possible():
    line, _ = cells(report.pruning(ROWS))
    assert line[3:] == ["25 % removed, equal widths", "2.00", "1.33", "1.50"]


def test_report_csv_has_liger_kernels_columns(tmp_path):
    record = {"environment": {"processor": "P", "threads": 1, "torch": "2", "transformers": "5"}}
    (tmp_path / "cpu-e2e.json").write_text(json.dumps(record | {"rows": ROWS}))
    rows = list(csv.DictReader(io.StringIO(report.table_of_times(tmp_path))))
    assert tuple(rows[0]) == report.COLUMNS and len(rows) == 2 * 6
    first = rows[0]
    assert first["kernel_name"] == "e2e_decode" and first["kernel_provider"] == "transformers"
    assert (first["y_value_50"], first["y_value_20"]) == ("4000", "2800")
    assert json.loads(first["extra_benchmark_config_str"])["backbone"] == "dense"


def test_report_draws_three_figures(tmp_path):
    report.draw({"rows": ROWS}, "x", tmp_path)
    for kind in ("speedup", "latency", "memory"):
        assert (tmp_path / f"bench-x-{kind}.png").stat().st_size > 5000


def test_docs_and_readme_are_what_the_report_writes():
    written = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    assert written == report.document(RESULTS)
    assert report.table_of_times(RESULTS) == (ROOT / "docs" / "bench.csv").read_text()
    assert report.with_table(README, RESULTS) == README
    for name, record in report.end_to_end(RESULTS).items():
        for kind in ("speedup", "latency", "memory") * report._is_drawn(record):
            assert (ROOT / "docs" / f"bench-{name}-{kind}.png").is_file()
