"""bench.gpu without a GPU: every part dry, the peers' results, and what the files hold."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import koffkernels
from bench import e2e, launching, timing
from bench.gate import host
from bench.gpu import __main__ as command
from bench.gpu import (
    checks,
    context,
    device,
    kernels,
    results,
    smoke,
    tables,
    training,
)
from bench.peers import peft_mlp
from koffkernels import dispatch, replay, tune
from koffkernels._triton.shared import direct

ROOT = Path(__file__).parents[2]


def dry(part: str, folder: Path, *options: str) -> dict:
    """Run one part dry in this process; its file."""
    arguments = ["--dry-run", "--child", "--part", part, "--output", str(folder), *options]
    assert command.main(arguments) == 0
    record = json.loads((folder / f"dry-{part}.json").read_text())
    assert record["dry"] and record["part"] == part and record["seconds"] >= 0
    assert record["environment"]["gpu"]["name"] == "dry"
    assert record["environment"]["torch"] == timing.version_of("torch")
    return record


@pytest.fixture(scope="module")
def bench():
    with context.bench(True) as made:
        yield made


def test_bench_gpu_targets_dry(tmp_path):
    record = dry("targets", tmp_path)
    assert record["complete"] and not record["not_run"]
    assert all(rate > 0 for rate in record["limits"].values()) and len(record["limits"]) == 2
    rows = {row["name"]: row for row in record["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    wanted = {
        "mlp-pruned-prefill": 0.95,
        "mlp-pruned-decode-16": 0.85,
        "lora-overhead-decode-1": 0.08,
        "mixed-decode-64": 0.92,
        "mlp-training-over-peft-liger": 1.3,
        "mlp-training-over-peft-liger-memory": 0.7,
        "mlp-training-over-hand-written": 1.1,
        "attention-prefill": 0.9,
        "attention-training": 0.8,
    }
    assert {name: rows[name]["target"] for name in wanted} == wanted
    assert rows["lora-overhead-prefill"]["target"] > 0.02  # the shrink's reads come on top
    overlap = {name for name in rows if name.endswith("-pdl")}
    attention = [name for name in rows if name.startswith("attention-decode")]
    decode = [rows[name]["target"] for name in attention if name not in overlap]
    assert decode == [0.75, 0.6]
    assert len(overlap) == 4 and all(rows[name]["target"] is None for name in overlap)
    for row in rows.values():
        assert row["passed"] is None  # dry times are not judged
        assert row["dtype"] == "bf16" and "condition" in row and row["case"]
        if "times" in row:
            assert row["us"] > 0 and row["limit_us"] > 0 and row["shape"] and row["limit"]
            assert all(t["min"] <= t["median"] <= t["max"] for t in row["times"].values())


def test_bench_gpu_a_missing_peer_is_said_and_not_faked(bench, monkeypatch):
    monkeypatch.setattr(peft_mlp, "liger_mlp", lambda: None)
    rows = [row for row in training.mlp_training(bench) if "liger" in row["name"]]
    assert [row["name"] for row in rows] == [
        "mlp-training-over-peft-liger",
        "mlp-training-over-peft-liger-memory",
    ]
    for row in rows:
        assert row["status"] == "peer missing: liger-kernel"
        assert row["share"] is None and row["passed"] is None and "us" not in row


def test_bench_gpu_a_peer_that_fails_costs_no_other_row(bench, monkeypatch):
    class Broken(peft_mlp.LlamaMLP):
        def forward(self, x):
            raise RuntimeError("no kernel")

    monkeypatch.setattr(peft_mlp, "liger_mlp", lambda: Broken)
    rows = {row["name"]: row for row in training.mlp_training(bench)}
    assert rows["mlp-training-over-peft-liger"]["status"] == "peer failed: no kernel"
    assert rows["mlp-training-over-hand-written"]["us"] > 0 and len(rows) == 6


def test_bench_gpu_decode_dry(tmp_path):
    rows = dry("decode", tmp_path)["rows"]
    assert len(rows) == 2 * 3 * (4 + 5 + 5)  # width x batch x (paths with 0, 1, 8 memories)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1e6 / row["us"])
        assert row["bytes"] > 0 and row["times"]["count"] > 0 and row["share_of_copy_bandwidth"] > 0
    size = {row["name"]: row["bytes"] for row in rows}
    dense, none = (
        size["decode-dense-8-memories-batch-16-koff"],
        size["decode-dense-0-memories-batch-16-koff"],
    )
    assert size["decode-pruned-8-memories-batch-16-koff"] < dense and dense > none


def test_bench_gpu_tables_dry(tmp_path):
    record = dry("tables", tmp_path)
    table = json.loads((tmp_path / "configs" / "dry.json").read_text())
    assert set(table) == {"gpu", "rows"}
    assert len(table["rows"]) == len({row["case"] for row in record["rows"]}) == 2
    for row in table["rows"]:
        assert tuple(row) == tune.FIELDS
        assert row["op"] in ("gated_mlp", "lora_linear") and row["dtype"] == "bf16"
        assert row["pass"] in ("forward", "backward") and 0 < row["us"] <= row["usual_us"]


@pytest.mark.slow
def test_bench_gpu_tests_part_dry(tmp_path):
    options = [f"--only={name}" for name in ("tests-bf16", "memcheck-vendor")]
    rows = {row["name"]: row for row in dry("tests", tmp_path, *options)["rows"]}
    tests, memcheck = rows["tests-bf16"], rows["memcheck-vendor"]
    assert (tests["passed"], tests["failed"], tests["exit_code"]) == (0, 0, 5)  # all deselected
    assert "deselected" in tests["output"] or "no tests ran" in tests["output"]  # xdist's words
    assert memcheck["status"].startswith("no compute-sanitizer") and memcheck["exit_code"] == 0
    assert "15 cases ran" in memcheck["output"]


def test_bench_gpu_smoke_dry(tmp_path):
    record = dry("smoke", tmp_path)
    rows = {row["name"]: row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) > 50 and record["complete"]
    assert not [row["name"] for row in rows.values() if "error" in row]
    trained = rows["mlp-train-mixed"]
    wanted = {f"d{name}.lora.{part}" for name in ("gate", "up", "down") for part in "ab"}
    assert set(trained["errors"]) == {"y", "dx", "dz"} | wanted
    assert trained["route"] == "auto" and trained["shapes"]["gate.lora.a"][0] == 8
    assert all(0 < e <= trained["tolerance"][k] for k, e in trained["errors"].items())


@pytest.mark.parametrize("early", [False, True])
def test_bench_gpu_smoke_sees_a_kernel_that_does_not_wait(bench, early, monkeypatch):
    """What is read too soon is the result of the call before."""
    real = smoke.koffkernels
    results, right = [], real.lora_linear

    def stale(*args, **named):
        results.append(right(*args, **named))
        return (
            results[-2]
            if early and dispatch.is_programmatic() and len(results) > 1
            else results[-1]
        )

    monkeypatch.setattr(real, "lora_linear", stale)
    (row,) = dict(smoke.cases(bench))["linear-decode-64-pdl"]()
    assert ("replays differ from launches in order" in row.get("error", "")) == early


@pytest.mark.parametrize("op", ["lora_linear", "gated_mlp", "prefix_attention"])
def test_bench_gpu_smoke_sees_a_wrong_result(bench, op, monkeypatch):
    real = getattr(smoke.koffkernels, op)
    monkeypatch.setattr(smoke.koffkernels, op, lambda *a, **k: real(*a, **k) * 1.05)
    prefix = {"lora_linear": "linear-", "gated_mlp": "mlp-", "prefix_attention": "attention-"}[op]
    found = [case for name, case in smoke.cases(bench) if name.startswith(prefix)]
    rows = [row for case in found[:4] for row in case()]
    assert all("off from fp32 by y=" in row["error"] for row in rows)


def test_bench_gpu_kernels_dry(tmp_path):
    record = dry("kernels", tmp_path)
    names = [row["name"] for row in record["rows"]]
    assert len(names) == len(set(names)) > 30 and "ncu" in names
    assert all(row["us"] > 0 for row in record["rows"] if row["name"] != "ncu")
    assert not [row for row in record["rows"] if "error" in row]


def test_bench_gpu_kernels_are_sorted_by_what_they_are():
    kinds = {
        "_mlp_hidden_fwd_kernel": "_mlp_hidden_fwd_kernel",
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT": "gemm",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": "gemm",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>": "flash",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma": "flash",
        "void at::native::vectorized_elementwise_kernel<4>": "other",
        "_ZN2at6native": "other",
    }
    assert {name: kernels.kind(name) for name in kinds} == kinds
    assert kernels.short("_prefix_attention_dkv_kernel") == "attn_dkv"


def test_bench_gpu_kernels_of_a_profile(bench, monkeypatch):
    """A row's kernels, their bytes and shares, from what the profiler and the launches say."""
    found = {"_expand_fwd_kernel": (6, 60.0), "gemm": (6, 600.0), "other": (12, 12.0)}
    monkeypatch.setattr(kernels, "profiled", lambda calls, turns: found)
    monkeypatch.setattr(kernels, "launched", lambda call: {"_expand_fwd_kernel": 1000})
    monkeypatch.setattr(kernels, "products", lambda call: 2500.0)
    monkeypatch.setattr(kernels.torch.cuda, "synchronize", lambda: None)
    made = context.Bench("cpu", True, context.TINY, None, 0)
    made.__dict__.update(copy_rate=200.0, gemm_rate=50.0)
    operation = next(kernels.operations(made))
    row = kernels._profile_row(made, operation, [None, None])  # two sets, three turns
    assert row["us"] == pytest.approx(112.0) and row["launches"] == 4
    assert row["kernels"]["gemm"]["share"] == pytest.approx(0.5)
    expand = row["kernels"]["_expand_fwd_kernel"]
    assert expand["us"] == 10.0 and expand["share"] == pytest.approx(0.5)
    text = kernels._text(row | {"eager_us": 120.0, "graph_us": 113.0, "host_us": 90.0})
    assert text == "112us/113g/120e/90h, 4L, gemm 100 50%, expand 10 50%, other 2"


def test_bench_gpu_kernels_count_what_runs(bench):
    """Operations of torch's products alone, and what a kernel reads and writes at one address
    twice."""
    operation = next(o for o in kernels.operations(bench) if o.name.startswith("mlp-train"))
    call = kernels._call(bench, operation, operation.make())
    hidden, width, (rows, tokens) = 64, 128, bench.prefill()
    tokens *= rows
    base = 6 * 2 * tokens * hidden * width  # three products of the base weights, both ways
    assert 1.0 < kernels.products(call) / base < 4.0  # on the CPU LoRA's are torch's, too
    with host.triton_on_cpu(), host.empty_driver(), koffkernels.force_route("vendor"):
        sizes = kernels.launched(call)
        assert base <= kernels.products(call) < base * 1.3  # LoRA's gradients
    arguments = 7 * tokens * width * 2  # h, dh, dg, g, u and du, each read or written
    assert arguments <= sizes["_mlp_hidden_bwd_kernel"] < 2 * arguments


def test_bench_gpu_ncu_csv():
    head = '"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected", head]
    for index, name in enumerate(("_expand_fwd_kernel", "_expand_fwd_kernel")):
        for metric, unit, value in (
            ("Duration", "ns", "1,500"),
            ("DRAM Throughput", "%", "61.5"),
            ("Achieved Occupancy", "%", "12.4"),
            ("Registers Per Thread", "register/thread", "128"),
            ("Elapsed Cycles", "cycle", "n/a"),
        ):
            lines.append(f'"{index}","{name}","(8, 4, 1)","{metric}","{unit}","{value}"')
    (row,) = kernels.parse_ncu("\n".join(lines))  # the same kernel and grid once
    assert (row["us"], row["dram"], row["occupancy"], row["registers"]) == (1.5, 61.5, 12.4, 128)
    assert row["name"] == "ncu expand (8, 4, 1)" and kernels.parse_ncu("==ERROR== no") == []


@pytest.mark.slow
def test_bench_gpu_e2e_dry(tmp_path):
    record = dry("e2e", tmp_path)
    rows = {row["name"]: row for row in record["rows"]}
    assert not [row for row in rows.values() if "error" in row] and record["complete"]
    assert list(rows) == [case.name for case in e2e.cases(e2e.DRY, cuda=False)]
    for row in rows.values():
        assert row["tokens_per_second"] > 0 and row["us"] > 0 and "peak_gb" in row


def test_bench_gpu_host_dry(tmp_path):
    """Every way of launching, and no way is left switched on."""
    before = direct.ENABLED, list(replay.DEVICES), dispatch.is_programmatic()
    rows = {row["name"]: row for row in dry("host", tmp_path)["rows"]}
    assert (direct.ENABLED, list(replay.DEVICES), dispatch.is_programmatic()) == before
    assert {row["way"] for row in rows.values()} == {*launching.WAYS} and len(rows) == 14
    for row in rows.values():
        assert row["us"] > 0 and row["of_triton"]["count"] == 5 and "error" not in row
    assert rows["host-decode-8-triton"]["of_triton"]["median"] == 1.0


def test_bench_gpu_what_a_part_leaves_is_for_those_after_it(tmp_path, monkeypatch):
    args = command._parser().parse_args(["--dry-run", "--no-warm", "--minutes", "7"])
    limits, now = {}, [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    run = command.Run(args, tmp_path, tmp_path)
    assert sum(command.PARTS[name].seconds for name in run.names) == 60 * command.MINUTES

    class Done:
        quiet, code, done, said = False, 0, True, ""

        def start(self, left):
            limits.setdefault(name, left + command.GRACE)

    monkeypatch.setattr(run, "child", lambda *args: Done())
    monkeypatch.setattr(run, "_merge", lambda name: None)
    for name in run.names:
        run._part(name, tmp_path)
        now[0] += 10.0 if name == "smoke" else limits[name]
    smoke, second, *others = run.names
    assert limits[smoke] == 85 and limits[second] == command.PARTS[second].seconds + 75
    assert all(limits[name] == command.PARTS[name].seconds for name in others)


@pytest.mark.parametrize("part", ["kernels", "targets", "host", "e2e"])
def test_bench_gpu_warm_runs_everything_and_times_nothing(part, tmp_path):
    record = dry(part, tmp_path, "--warm")
    assert record["complete"]
    assert not [row for row in record["rows"] if "error" in row]


def test_bench_gpu_parts_run_as_processes(tmp_path, monkeypatch):
    """Which processes are started, with what, for how long."""
    calls = []

    class Process:
        def __init__(self, command, **options):
            calls.append(command)
            assert options["start_new_session"]

        def poll(self):
            return 0

    monkeypatch.setattr(command.subprocess, "Popen", Process)
    before = time.time()
    given = ["--dry-run", "--minutes", "3.5", "--only", "x", "--output", str(tmp_path)]
    assert command.main(given) == 0
    parsed = [command._parser().parse_args(call[3:]) for call in calls]
    assert all(args.child and args.dry_run and args.only == ["x"] for args in parsed)
    real = [args for args in parsed if not args.warm]
    for args in parsed:
        args.minutes = (args.until - before) / 60
    names = list(dict.fromkeys(args.part[0] for args in real))
    assert names == [name for name, part in command.PARTS.items() if not part.alone]
    assert {args.part[0] for args in parsed if args.warm} == {"kernels", "targets", "host", "e2e"}
    for args in real:
        part = command.PARTS[args.part[0]]
        assert args.output == tmp_path.resolve() and args.configs == tmp_path.resolve() / "configs"
        assert 0 < args.minutes <= 3.5
        assert (args.share is not None) == (part.processes > 1)


def program(tmp_path: Path, body: str) -> list[str]:
    """A process that runs cases as a part does."""
    script = tmp_path / "part.py"
    script.write_text(
        "import argparse, os, sys, time\nfrom pathlib import Path\n"
        "from bench.gpu import results\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('part', 'keep'): parser.add_argument('--' + name)\n"
        "parser.add_argument('--until', type=float)\n"
        "args = parser.parse_args()\n"
        f"made = results.Results(Path({str(tmp_path)!r}), 'targets', True, args.keep)\n"
        "row = lambda name: [{'name': name, 'text': 'ok'}]\n"
        f"{body}\n"
        "made.run(cases, results.Deadline((args.until - time.time()) / 60))\n"
        "sys.exit(results.LOST if made.lost else 0)\n"
    )
    return [sys.executable, str(script), "--part", "targets"]


def watched(child, seconds: float) -> None:
    """Look after a process until it is done."""
    end = time.monotonic() + seconds
    child.start(seconds)
    while not child.done:
        child.poll(end)
        time.sleep(0.05)


@pytest.mark.slow
def test_bench_gpu_a_process_is_replaced_behind_the_case_that_ended_it(tmp_path, monkeypatch):
    """A case that raises, one that ends the process, one that loses the GPU, one that hangs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(command, "STARTING", 20.0)
    body = (
        "def lose():\n    results._free = lambda: 'the GPU was lost: why'\n    return 1 / 0\n"
        "cases = [('a', lambda: row('a')), ('raises', lambda: 1 / 0), ('b', lambda: row('b')),\n"
        "    ('dies', lambda: os._exit(11)), ('c', lambda: row('c')), ('loses', lose),\n"
        "    ('d', lambda: row('d')), ('hangs', lambda: time.sleep(600)), ('e', lambda: row('e'))]"
    )
    # A case has 3 seconds: of 1, a busy machine takes too much for those that end at once.
    part = command.Part(60, 3.0)
    child = command.Child(
        program(tmp_path, body), part, tmp_path, "*-targets.json", "none", quiet=False
    )
    # A process that already ran cases must not get the starting time of its first one.
    monkeypatch.setattr(command.Child, "idle", idle_without_start(command.Child.idle))
    watched(child, 120.0)
    record = json.loads((tmp_path / "dry-targets.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["a", "raises", "b", "dies", "c", "loses", "d", "hangs", "e"]
    assert record["complete"] and child.starts == 4 and child.code == 0
    assert "ZeroDivisionError" in rows["raises"]["error"] and "Error" in rows["loses"]["error"]
    for name in ("dies", "hangs"):
        assert rows[name]["error"] == "the process ended in this case"
    lines = command.summary(record)
    assert lines[0].startswith("targets: 9 rows, 4 errors") and len(lines) == 5


def idle_without_start(real):
    """``Child.idle`` for cases that need no start of CUDA."""

    def idle(self):
        times = [p.stat().st_mtime for p in self.output.glob(self.pattern)]
        if max(times, default=0.0) <= self.began:
            return real(self)
        return time.time() - max(times) - self.part.case

    return idle


def test_bench_gpu_a_cut_process_leaves_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    body = "cases = [('a', lambda: row('a')), ('slow', lambda: time.sleep(600))]"
    part = command.Part(60, 600.0)
    child = command.Child(
        program(tmp_path, body), part, tmp_path, "*-targets.json", "none", quiet=False
    )
    child.start(60.0)
    path, start = tmp_path / "dry-targets.json", time.monotonic()
    while not (path.exists() and json.loads(path.read_text())["running"] == "slow"):
        assert time.monotonic() - start < 60
        time.sleep(0.1)
    child.poll(time.monotonic() - command.GRACE - 1)  # its time is over
    record = json.loads(path.read_text())
    assert child.done and child.code == 1 and [row["name"] for row in record["rows"]] == ["a"]
    assert record["running"] == "slow" and command.summary(record)[0].endswith("cut in slow")


def test_bench_gpu_shares_become_one_file(tmp_path, monkeypatch):
    for i in range(2):
        made = results.Results(tmp_path, "smoke", True, share=(i, 2))
        cases = [(n, lambda n=n: [{"name": n, "text": "ok"}]) for n in "abcde"]
        made.run(cases, results.Deadline(1))
        assert [row["name"] for row in made.record["rows"]] == list("abcde")[i::2]
    args = command._parser().parse_args(["--dry-run", "--minutes", "1", "--resume"])
    run = command.Run(args, tmp_path, tmp_path)
    run._merge("smoke")
    assert [p.name for p in tmp_path.iterdir()] == ["dry-smoke.json"]
    record = json.loads((tmp_path / "dry-smoke.json").read_text())
    assert sorted(row["name"] for row in record["rows"]) == list("abcde") and record["complete"]
    run._split("smoke", 2)  # and apart again, to be resumed: nothing is run twice
    for i in range(2):
        again = results.Results(tmp_path, "smoke", True, "good", (i, 2))
        again.run([(n, lambda: 1 / 0) for n in "abcde"], results.Deadline(1))
    run._merge("smoke")
    record = json.loads((tmp_path / "dry-smoke.json").read_text())
    assert sorted(row["name"] for row in record["rows"]) == list("abcde")


def test_bench_gpu_out_of_time_is_marked_and_resumed(tmp_path):
    first = dry("tables", tmp_path, "--minutes", "0")
    names = [key.name for key in tables.keys(context.Bench("cpu", True, context.TINY, None, 0))]
    assert [row["name"] for row in first["not_run"]] == names and not first["complete"]
    assert {row["reason"] for row in first["not_run"]} == {"out of time"} and not first["rows"]
    half = dry("tables", tmp_path, "--only", names[0])
    both = dry("tables", tmp_path, "--resume")
    assert both["rows"][0] == half["rows"][0] and both["complete"]
    assert list(dict.fromkeys(row["case"] for row in both["rows"])) == names


def test_bench_gpu_rows_of_other_versions_are_not_kept(tmp_path):
    path = tmp_path / "dry-tables.json"
    record = dry("tables", tmp_path)
    record["environment"]["torch"], record["rows"][0]["us"] = "1.0", -1.0
    path.write_text(json.dumps(record))
    assert all(row["us"] > 0 for row in dry("tables", tmp_path, "--resume")["rows"])


def test_bench_gpu_rows_of_another_route_table_are_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "routes.json"
    monkeypatch.setattr(results, "table_path", lambda gpu: path)

    def kept():
        return len(results.Results(tmp_path, "targets", True, keep="good").record["rows"])

    first = results.Results(tmp_path, "targets", True)
    first.add([{"case": "a", "name": "a", "us": 1.0}])
    assert kept() == 1
    path.write_text("{}")
    assert kept() == 0


def test_bench_gpu_an_error_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    made = results.Results(tmp_path, "targets", True)
    cases = [("bad", lambda: 1 / 0), ("good", lambda: [results.judged("good", 0.9, 0.8)])]
    made.run(cases, results.Deadline(1))
    rows = json.loads(made.path.read_text())["rows"]
    assert rows[0]["name"] == "bad" and "ZeroDivisionError" in rows[0]["error"]
    assert rows[1]["name"] == "good" and [p.name for p in tmp_path.iterdir()] == [made.path.name]
    monkeypatch.setattr(results, "_free", lambda: "the GPU was lost: why")
    made = results.Results(tmp_path, "targets", True)
    made.run(cases, results.Deadline(1))
    assert made.record["not_run"] == [{"name": "good", "reason": "the GPU was lost: why"}]


@pytest.mark.parametrize(
    "share,at_most,passed",
    [
        (0.9, False, True),
        (0.7, False, False),
        (0.7, True, True),
        (0.9, True, False),
        (None, True, None),
    ],
)
def test_bench_gpu_verdicts(share, at_most, passed):
    row = results.judged("name", share, 0.8, at_most=at_most)
    assert row["passed"] is passed and ("name" in results.line(row))


@pytest.mark.parametrize(
    "part,row,codes",
    [
        ("targets", {"passed": False, "target": 1.0}, (0, 1)),
        ("targets", {"passed": None, "target": 1.0}, (0, 1)),  # a peer was missing
        ("targets", {"passed": None, "target": None}, (0, 0)),
        ("targets", {"error": "why"}, (0, 1)),
        ("targets", {"passed": True, "target": 1.0}, (0, 0)),
        ("tests", {"passed": 3, "failed": 0, "exit_code": 0}, (0, 0)),
        ("tests", {"passed": 3, "failed": 1, "exit_code": 1}, (1, 1)),
        ("tests", {"passed": 0, "failed": 0, "exit_code": 5}, (1, 1)),  # nothing collected
        ("tests", {"passed": 0, "failed": 0, "exit_code": None}, (1, 1)),  # stopped
        ("tests", {"error": "why"}, (1, 1)),
        ("tests", {"status": "3 errors", "exit_code": 99}, (1, 1)),
        ("tests", {"status": "failed", "exit_code": 1}, (1, 1)),
        ("tests", {"status": "refused", "exit_code": 1}, (0, 0)),
    ],
)
def test_bench_gpu_exit_codes(part, row, codes):
    record = {"part": part, "dry": False, "rows": [row]}
    assert tuple(command._verdict(record, check) for check in (False, True)) == codes


def test_bench_gpu_says_in_one_line_what_is_missing(monkeypatch, capsys):
    real = device.importlib.util.find_spec
    monkeypatch.setattr(
        device.importlib.util, "find_spec", lambda n: None if n == "pytest" else real(n)
    )
    assert command.main(["--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "package pytest must be installed" in error


def test_bench_gpu_refuses_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "a CUDA GPU must be visible" in capsys.readouterr().err


def test_bench_gpu_results_go_into_the_repository_only_when_measured(tmp_path):
    def folders(*arguments):
        return command._folders(command._parser().parse_args(arguments))

    assert folders() == (ROOT / "bench" / "results", ROOT / "koffkernels" / "configs")
    assert folders("--output", str(tmp_path)) == (tmp_path, ROOT / "koffkernels" / "configs")
    dry_run = folders("--output", str(tmp_path), "--dry-run")
    assert dry_run == (tmp_path, tmp_path / "configs")
    assert ROOT not in folders("--dry-run")[0].parents
    assert device.slug("NVIDIA H200") == "h200"
    assert device.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    text = device.without_paths("File /opt/x.y/lib/a.py line 1/2 at ../b/c", 100)
    assert text == "File a.py line 1/2 at ../b/c"


def test_bench_gpu_sets_do_not_fit_the_cache():
    made = context.Bench("cpu", False, context.LLAMA_8B, None, l2=60 << 20)
    for size in (1 << 20, 8 << 20, 352 << 20):
        assert made.sets(size) * size >= min(4 * made.l2, 256 * size) and made.sets(size) >= 2
    assert context.pruned(14336) == 11904


def test_bench_gpu_junit_counts(tmp_path):
    report = tmp_path / "report.xml"
    assert checks._counts(report)["passed"] == 0
    report.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='c'><skipped/></testcase>"
        "<testcase name='b'><failure message='/x/y/z.py: no'/></testcase>"
        "</testsuite></testsuites>"
    )
    counts = checks._counts(report)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert counts["failures"] == [{"test": "b", "why": "z.py: no"}]


def test_bench_gpu_pytest_that_was_killed_is_counted_by_its_lines():
    quiet = "a.py::test_x[bf16] PASSED [ 1%]\na.py::test_y FAILED [ 2%]\nFAILED a.py::test_y - no\n"
    several = "[gw0] [ 10%] PASSED a.py::test_x[bf16] \n[gw1] [ 20%] FAILED a.py::test_y \n"
    for output in (quiet, several):
        found = checks._counted(output)
        assert (found["passed"], found["failed"]) == (1, 1)
        assert found["failures"] == [{"test": "test_y", "why": ""}]


@pytest.mark.parametrize(
    "code,output,status",
    [
        (0, "9 cases ran\n== ERROR SUMMARY: 0 errors", "clean"),
        (0, "0 cases ran\n== ERROR SUMMARY: 0 errors", "failed"),
        (99, "Invalid __global__ read\n== ERROR SUMMARY: 2 errors", "2 errors"),
        (1, "Error: Device not supported", "refused"),
        (1, "Traceback", "failed"),
        (None, "", "out of time"),
    ],
)
def test_bench_gpu_memcheck_status(code, output, status):
    assert checks._status(code, output) == status


def test_bench_gpu_files_with_gpu_tests_are_found():
    assert "tests/kernels/test_gated_mlp.py" in checks.other_tests()
    assert "tests/bench/test_bench_gpu.py" not in checks.other_tests()
    assert checks.KERNEL_TESTS not in checks.other_tests()
    source = (ROOT / checks.KERNEL_TESTS).read_text("utf-8")
    assert f"\npytestmark = pytest.{checks.MARK}\n" in source  # all of them


def test_bench_gpu_make_target_passes_its_options():
    def dry(*options: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # of an outer make
        command = ["make", "-n", "gpu", *options]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.stdout.strip()

    options = dry("PART=targets", "OUTPUT=out", "GPU_PYTHON=some-python")
    assert options == "some-python -m bench.gpu --part targets --output out"
    assert dry() == "python3 -m bench.gpu"


def test_bench_gpu_results_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    timing.write(path, {"a": 1})
    monkeypatch.setattr(timing.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        timing.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_bench_gpu_a_stopped_process_leaves_nothing_behind():
    child = "import time; print('child', flush=True); time.sleep(60)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    code, output = checks._process([sys.executable, "-c", script], 2.0)
    assert code is None and "child" in output
    assert time.monotonic() - start < 30  # the pipe is closed: the child is gone too
