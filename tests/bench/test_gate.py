"""The compile gate: what it writes, that nothing escapes it, and that it can fail."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support.gate_units import one_of_each

from bench.gate import cases, compiling, settings
from bench.gate import compile as gate
from koffkernels._triton.mlp import hidden, hidden_bwd
from koffkernels._triton.shared import launch as common
from koffkernels._triton.shared.waves import fullness

ROOT = Path(__file__).parents[2]
EXPECTS = {"_tile_kernel": "dot", "_copy_kernel": None, "_loop_kernel": "dot"}


def run_gate(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("KOFF_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-m", "bench.gate", *arguments],
        cwd=ROOT,
        env=env | environment,
        capture_output=True,
        text=True,
    )


@triton.jit
def _tile_kernel(
    x_ptr, w_ptr, y_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile of y = x w. Everything is loaded in one piece."""
    offs_m, offs_n, offs_k = (tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K))
    x = tl.load(x_ptr + offs_m[:, None] * BLOCK_K + offs_k[None, :])
    w = tl.load(w_ptr + offs_k[:, None] * BLOCK_N + offs_n[None, :])
    tl.store(y_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], tl.dot(x, w))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = cumulative sum of x, in one program: every element is held in registers."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + tl.sum(x, 0))


def tile(m: int, n: int, k: int, warps: int = 4) -> common.Launch:
    """A launch of ``_tile_kernel`` in bf16."""
    x, w = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((m, k), (k, n)))
    with common.recording() as launches:
        common.launch(
            _tile_kernel,
            (1,),
            x_ptr=x,
            w_ptr=w,
            y_ptr=torch.empty(m, n, device="meta"),
            BLOCK_M=m,
            BLOCK_N=n,
            BLOCK_K=k,
            num_warps=warps,
        )
    return launches[0]


def copy(block: int, warps: int) -> common.Launch:
    x = torch.empty(block, device="meta")
    with common.recording() as launches:
        common.launch(_copy_kernel, (1,), x_ptr=x, y_ptr=x, BLOCK=block, num_warps=warps)
    return launches[0]


def problems(launch: common.Launch, arch: str = "sm_90", **contract) -> list[str]:
    row = compiling.row_of(launch, arch)
    return compiling.problems_of(row, compiling.Contract(**contract), launch.args)


@pytest.mark.parametrize("arch", [*settings.ARCHS, "gfx942"])
def test_gate_passes_what_is_right(arch):
    launch = tile(64, 64, 64)
    row = compiling.row_of(launch, arch)
    assert row["problems"] == []
    assert row["registers"] > 0 and row["spill_bytes"] == 0
    assert 0 < row["shared_bytes"] <= row["shared_limit"]
    used = {kind for kind, count in row["mma"].items() if count}
    assert used == {compiling._FULL_TILE[arch]}


@pytest.mark.parametrize(
    "registers, shared, warps, arch, blocks",
    [
        (80, 22_528, 4, "sm_90", 6),  # 2560 registers a warp: 6 warps in each quarter of 16384
        (81, 0, 4, "sm_90", 5),  # 2816
        (128, 0, 8, "sm_80", 2),
        (255, 0, 8, "sm_90", 1),
        (32, 0, 1, "sm_90", 32),  # no more blocks
        (16, 0, 4, "sm_90", 16),  # no more warps
        (80, 51_200, 4, "sm_90", 4),  # 51 KB each of 228
        (80, 51_200, 4, "sm_80", 3),  # of 164
    ],
)
def test_gate_blocks_of_a_multiprocessor(registers, shared, warps, arch, blocks):
    row = {"arch": arch, "registers": registers, "shared_bytes": shared, "tensor_columns": 0}
    assert compiling.ctas_per_sm(row, warps) == blocks
    assert compiling.ctas_per_sm(row | {"tensor_columns": 512}, warps) == 1


def test_gate_waves():
    """Two blocks of 1024 threads fit each of the 132 multiprocessors of an H100."""
    row = compiling.row_of(copy(128, 32), "sm_90", programs={"few": 40, "many": 396})
    assert (row["ctas_per_sm"], row["warps_per_sm"]) == (2, 64)
    assert row["waves"] == {"few": 0.15, "many": 1.5}


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_gate_fails_on_spills(arch):
    row = compiling.row_of(copy(32768, 1), arch)
    assert row["spill_bytes"] > 0 and "spills" in row["problems"][0]


def test_gate_fails_on_shared_memory():
    found = problems(tile(128, 256, 512, warps=8), tensor_cores="dot")
    assert len(found) == 1 and "bytes shared memory" in found[0]


def test_gate_fails_without_the_declared_tensor_cores():
    assert "no tensor-core" in problems(copy(128, 4), tensor_cores="dot16")[0]
    # 32 rows: mma.sync also where there is wgmma, which needs 64.
    low = tile(32, 32, 64)
    assert problems(low, tensor_cores="dot16") == []
    assert problems(low, tensor_cores="dot") == ["must use wgmma, got mma.sync"]


@pytest.mark.parametrize(
    "shape, accumulators, good",
    [
        ((128, 128), 1, True),
        ((128, 64), 1, False),
        ((128, 64), 2, True),
        ((64, 128), 2, False),
        ((128, 32), 2, False),
    ],
)
def test_gate_fails_on_small_prefill_tiles(shape, accumulators, good):
    launch = tile(*shape, 64, warps=8)
    found = problems(launch, tensor_cores="dot", accumulators=accumulators)
    assert good == (found == []) and all("prefill tile" in text for text in found)


@triton.jit
def _loop_kernel(
    x_ptr, w_ptr, y_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """y = x w^T; with STEP = 2 neither is read from one element to the next."""
    offs_m, offs_n, offs_k = (tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :] * STEP)
        w = tl.load(w_ptr + offs_n[None, :] * K + (k + offs_k)[:, None] * STEP)
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc)


@pytest.mark.parametrize("arch", settings.ARCHS)
@pytest.mark.parametrize("step", [1, 2])
def test_gate_fails_on_narrow_loads(step, arch):
    x = torch.empty(128, 512, dtype=torch.bfloat16, device="meta")
    tiles = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, STEP=step)
    pointers = dict(x_ptr=x, w_ptr=x, y_ptr=torch.empty(128, 128, device="meta"))
    with common.recording() as launches:
        common.launch(_loop_kernel, (1,), **pointers, K=512, **tiles, num_warps=8, num_stages=3)
    copies = compiling.compile_launch(launches[0], arch)["wide_copies"]
    found = compiling.copy_problems(copies, 1, launches[0])
    assert found == ([] if step == 1 else ["must load by 24 copies of 16 bytes, got 0"])


def test_gate_reports_what_does_not_compile():
    launch = copy(100, 4)  # not a power of two
    row = compiling.row_of(launch, "sm_90")
    assert row["problems"][0].startswith("does not compile")
    assert row["registers"] is None and row["mma"] is None
    row["config"], row["dtype"] = {}, "fp32"
    assert gate.offenders([row]) and gate.summary([row])


def test_gate_survives_a_compiler_that_dies(monkeypatch):
    launch, real = copy(128, 4), compiling.row_of

    def dies_on_sm_80(launch, arch, **labels):
        if arch == "sm_80":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(launch, arch, **labels)

    monkeypatch.setattr(compiling, "row_of", dies_on_sm_80)
    units = [gate.Unit(launch, arch, {}) for arch in ("sm_80", "sm_90")]
    rows = {row["arch"]: row for row in gate.compile_all(units, jobs=1)}
    assert "died" in rows["sm_80"]["problems"][0] and rows["sm_90"]["problems"] == []


def test_gate_fails_on_an_undeclared_kernel(monkeypatch):
    launch = copy(128, 4)
    assert compiling.contract_of(launch) == compiling.Contract(None)
    monkeypatch.setitem(EXPECTS, "_copy_kernel", lambda args: "dot" if args["BLOCK"] else None)
    assert compiling.contract_of(launch).tensor_cores == "dot"
    monkeypatch.setitem(EXPECTS, "_copy_kernel", "dots")
    with pytest.raises(ValueError, match="must be 'dot', 'dot16' or None"):
        compiling.contract_of(launch)
    monkeypatch.delitem(EXPECTS, "_copy_kernel")
    assert "EXPECTS must name every kernel" in compiling.row_of(launch, "sm_90")["problems"][0]


def test_gate_covers_every_kernel_and_configuration():
    """Every ``_kernel`` of the folder is launched, and every entry of CONFIGS by its name."""
    units = gate.plan(["sm_90", "sm_80", "sm_100"])
    launched = {(compiling.module_of(unit.launch), unit.kernel) for unit in units}
    written = {
        (f"{path.parent.name}.{path.stem}", line[len("def ") : line.index("(")])
        for path in (ROOT / "koffkernels" / "_triton").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert launched == written == cases.all_kernels()
    named = {(compiling.module_of(u.launch), u.labels["config"]["name"]) for u in units}
    for file in {file for file, _ in written}:
        for config in {name for table in gate.tables_of(file) for name in table}:
            assert (file, config) in named


def test_gate_knows_every_prefill_gemm():
    for file, kernel in cases.all_kernels():
        declared = kernel in getattr(cases.module_named(file), "PREFILL", {})
        assert declared == file.endswith(".gemm"), f"{file}: PREFILL must name {kernel}"


def test_gate_finds_a_kernel_without_a_case(monkeypatch):
    without = {name: case for name, case in cases.FILES.items() if name != "mlp.decode"}
    monkeypatch.setattr(cases, "FILES", without)
    with pytest.raises(ValueError, match="mlp.decode._decode_mlp_up_fwd_kernel"):
        gate.plan(["sm_90"])


def test_an_operand_with_a_field_that_is_none_is_refused():
    """Triton 3.6 cannot compile a kernel that asks whether such an operand is there."""
    from koffkernels._triton.lora.expand import expand_
    from koffkernels._triton.shared.launch import Rows
    from koffkernels._triton.shared.operands import Delta

    y, s, b = (torch.empty(*shape, device="meta") for shape in ((4, 64), (4, 16), (1, 64, 16)))
    with common.recording(), pytest.raises(AssertionError, match="first: a field of an operand"):
        expand_(y, (Delta(s, b, None),), Rows(None, 1))


@pytest.mark.slow
def test_gate_command(tmp_path):
    """A subset in a process of its own, without a home that can be written to."""
    path = tmp_path / "rows.json"
    arguments = ("--arch", "sm_90", "--subset", "--json", str(path))
    done = run_gate(*arguments, "--kernel", "_sum_partials_kernel", HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows and os.listdir(tmp_path) == ["rows.json"]
    for row in rows:
        assert set(gate.FIELDS) <= set(row) and row["arch"] == "sm_90"
        assert row["dtype"] in settings.DTYPES and isinstance(row["config"], dict)
        assert row["kernel"] == "_sum_partials_kernel" and row["problems"] == []
        assert all(isinstance(row[name], int) for name in gate.FIELDS[4:-1])
        assert set(row["mma"]) == {"wgmma", "mma.sync", "tcgen05", "mfma"}
    assert f"{len(rows)} variants compiled" in done.stdout


@pytest.mark.slow
def test_gate_passes_a_subset():
    """At least one variant of every kernel, the chip's default configurations: no findings."""
    done = run_gate("--arch", "sm_90", "--subset")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{kernel} " in done.stdout for _, kernel in cases.all_kernels())


@pytest.mark.slow
def test_gate_passes_one_of_each_on_other_chips():
    """A subset of these takes four minutes on two cores."""
    archs = [arch for arch in settings.ARCHS if arch != "sm_90"]
    rows = gate.run(one_of_each(gate.plan(archs, subset=True)), jobs=2)
    assert gate.offenders(rows) == []
    wanted = {(kernel, arch) for _, kernel in cases.all_kernels() for arch in archs}
    assert {(row["kernel"], row["arch"]) for row in rows} == wanted


@pytest.mark.slow
def test_gate_hidden_kernels_fill_an_h100():
    """At the widths of four models, dense and pruned, with 8192 tokens in one piece or eight; and
    as many blocks fit a multiprocessor as the launchers cut stretches for."""
    blocks = {"_mlp_hidden_fwd_kernel": hidden.BLOCKS, "_mlp_hidden_bwd_kernel": hidden_bwd.BLOCKS}
    found = {"one memory": [], "mixed": []}
    for unit in gate.plan(["sm_90"], kernels=list(blocks)):
        way = unit.shapes[0]
        if unit.labels["dtype"] != "bf16" or "r=16" not in way or "gate up down" not in way:
            continue
        row = compiling.row_of(unit.launch, unit.arch, **unit.labels)
        assert row["ctas_per_sm"] == blocks[unit.kernel]["no gates" in way], row
        if unit.kernel == "_mlp_hidden_fwd_kernel":
            assert row["warps_per_sm"] >= 24
        at_once = row["ctas_per_sm"] * common.multiprocessors(torch.device("meta"))
        filled = [fullness(programs, at_once) for programs in row["programs"].values()]
        found["mixed" if "mixed" in way else "one memory"] += filled
    assert len(found["one memory"]) == 32 and min(found["one memory"]) >= 0.9, found
    # A row of 1024 tokens is cut into one or two stretches, which leaves little choice.
    assert len(found["mixed"]) == 16 and min(found["mixed"]) >= 0.84, found


def test_gate_exit_status_and_message(monkeypatch, capsys):
    """Findings give 1 and are named on stderr."""
    unit = gate.Unit(tile(32, 32, 64), "sm_90", {"dtype": "bf16", "config": {"name": "small"}})
    monkeypatch.setattr(gate, "plan", lambda *_: [unit])
    assert gate.main(["--jobs", "1"]) == 1
    message = capsys.readouterr().err
    assert message == "_tile_kernel sm_90 bf16 [name=small]: must use wgmma, got mma.sync\n"


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (("--arch", "sm_70"), {}, "invalid choice: 'sm_70'"),
        (("--kernel", "nothing"), {}, "--kernel must be one of"),
        (("--jobs", "0"), {}, "--jobs must be at least 1"),
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
        ((), {"KOFF_BACKEND": "interpret"}, "TRITON_INTERPRET"),
    ],
)
def test_gate_refuses(arguments, environment, message):
    done = run_gate(*arguments, **environment)
    assert done.returncode == 2 and message in done.stderr, done.stderr
