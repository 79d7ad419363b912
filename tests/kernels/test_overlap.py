"""Programmatic dependent launch: who begins early, and that it waits before it reads or writes.

No GPU is needed: launches are recorded, and what they would run is compiled for chips that are not
there. What a GPU makes of it only a GPU can say (``bench.gpu``)."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from support.gate_units import one_of_each

from bench.gate import cases, compiling, order, settings
from bench.gate import compile as gate
from koffkernels import dispatch
from koffkernels._triton.lora.decode import decode_linears
from koffkernels._triton.shared import launch as common
from koffkernels._triton.shared.launch import start_dependent, wait_for_primary
from koffkernels._triton.shared.operands import Linear

ROOT = Path(__file__).parents[2]
FILES = ("lora.decode", "mlp.decode", "attention.decode")
# Second kernel -> whom it may follow.
PAIRS = {
    "_decode_expand_fwd_kernel": {"_decode_linear_fwd_kernel"},
    "_decode_mlp_up_fwd_kernel": {"_decode_linear_fwd_kernel"},
    "_prefix_attention_own_kernel": {"_prefix_attention_group_kernel"},
    "_prefix_attention_merge_kernel": {"_prefix_attention_own_kernel"},
}
EXPECTS = {
    name: None for name in ("_late_kernel", "_inside_kernel", "_sometimes_kernel", "_hasty_kernel")
}


def calls(on: bool, subset: bool = True) -> list[list[common.Launch]]:
    """The launches of every call of the decode kernels that the gate knows, call by call."""
    found = []
    for at in settings.subset() if subset else settings.settings():
        for file, case in cases.cases(at):
            if file in FILES:
                with dispatch.programmatic(on), common.recording() as launches:
                    case.run()
                found.append(list(launches))
    return found


def name(launch: common.Launch) -> str:
    return launch.kernel.fn.__name__


def is_early(launch: common.Launch) -> bool:
    return launch.options.get("launch_pdl", False)


def test_nothing_begins_early_unless_asked_for():
    for launches in calls(False, subset=False):
        for launch in launches:
            assert not launch.args["PDL"] and "launch_pdl" not in launch.options


def test_who_begins_early_follows_the_one_that_lets_it():
    """In one operation, directly, and never the first of an operation: that one starts when all
    before it has ended, which is what the second kernel's wait then stands for, too."""
    seen = set()
    for launches in calls(True, subset=False):
        assert not is_early(launches[0])
        for first, second in zip(launches, launches[1:], strict=False):
            assert is_early(second) and second.args["PDL"] and first.args["PDL"]
            assert name(first) in PAIRS[name(second)]
            seen.add((name(first), name(second)))
        # The last one lets nobody begin: whoever comes next is not ours to know.
        last = launches[-1]
        assert not last.args["PDL"] or (
            name(last) in PAIRS and last.args.get("merged", "") is not None
        )
    assert seen == {(first, second) for second, firsts in PAIRS.items() for first in firsts}


def compiled(launch: common.Launch, arch: str):
    launch = compiling.for_chip(launch, arch)
    with compiling._chip(arch, compiling._COMPILED):
        return launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options)


def check(launch: common.Launch, arch: str) -> None:
    """Waits and signals are where the roles of the launch want them, in PTX and in SASS."""
    done = compiled(launch, arch)
    ptx = done.asm["ptx"]
    overlaps = launch.args["PDL"] and arch != "sm_80"
    second = overlaps and name(launch) in PAIRS
    first = overlaps and any(name(launch) in firsts for firsts in PAIRS.values())
    if name(launch) == "_prefix_attention_own_kernel":  # ... of the merge, if there is one
        first = first and launch.args["merged"] is None
    found = ptx.count(order.WAIT), ptx.count(order.SIGNAL)
    assert found == (int(second), int(first)), name(launch)
    assert done.metadata.launch_pdl == (is_early(launch) and overlaps)
    assert order.order_problems(done, compiling.for_chip(launch, arch)) == []
    if second:  # launched early or not
        assert order.ahead_of_wait(ptx.partition(".entry")[2], "ptx") == []


@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "sm_100"])
def test_kernels_wait_before_they_read_or_write(arch):
    """Each kernel in each of its roles."""
    found = {}
    for launches in calls(True):
        for launch in launches:
            merged = launch.args.get("merged", 0) is None
            found.setdefault((name(launch), launch.args["PDL"], is_early(launch), merged), launch)
    assert {key[0] for key in found if key[2]} == set(PAIRS)
    for launch in found.values():
        check(launch, arch)


@pytest.mark.slow
def test_the_gate_has_nothing_against_kernels_that_begin_early():
    """Each of these waits first, and as many of its blocks fit a multiprocessor as of the usual
    one."""
    kernels = [*{name(launch) for launches in calls(True) for launch in launches}]

    def key(kernel, config, shapes):
        return kernel, str({k: v for k, v in config.items() if k != "PDL"}), str(shapes)

    def key_of(unit):
        return key(unit.kernel, unit.labels["config"], unit.shapes)

    def planned(on):
        with dispatch.programmatic(on):
            return gate.plan(["sm_90"], subset=True, kernels=kernels)

    usual = one_of_each(planned(False))
    keys = [*map(key_of, usual)]
    early = [unit for unit in planned(True) if key_of(unit) in keys]
    assert sorted(keys) == sorted(map(key_of, early))
    blocks = {}
    for row in gate.run(usual, jobs=2):
        assert row["problems"] == []
        blocks[key(row["kernel"], row["config"], row["shapes"])] = row["ctas_per_sm"]
    waiting = set()
    for row in gate.run(early, jobs=2):
        assert row["problems"] == []
        assert row["ctas_per_sm"] >= blocks[key(row["kernel"], row["config"], row["shapes"])]
        if row["waits"]:
            waiting.add(row["kernel"])
    assert waiting == set(PAIRS)


@triton.jit
def _late_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Reads before it waits."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    wait_for_primary(PDL)
    tl.store(y_ptr + offs, x)


@triton.jit
def _inside_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Waits inside of a loop, whose loads Triton's pipeline puts ahead of it."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, N, BLOCK):
        wait_for_primary(PDL)
        x = tl.load(x_ptr + offs[:, None] * N + (k + offs)[None, :])
        acc = tl.dot(x, tl.trans(x), acc)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _hasty_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Lets the next kernel begin before it has waited itself."""
    start_dependent(PDL)
    wait_for_primary(PDL)
    tl.store(y_ptr + tl.arange(0, BLOCK), 0.0)


@triton.jit
def _sometimes_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Waits in some programs."""
    offs = tl.arange(0, BLOCK)
    if tl.program_id(0) < N:
        wait_for_primary(PDL)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def problems(launch: common.Launch, arch: str = "sm_90") -> str:
    return "; ".join(compiling.row_of(launch, arch)["problems"])


@pytest.mark.parametrize(
    "kernel, ptx, sass",
    [
        (_late_kernel, r"ld\.global", "LDG"),
        (_inside_kernel, r"cp\.async", "LDGSTS"),
        (_sometimes_kernel, r"bra", "BRA|EXIT"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_check_finds_what_comes_before_a_wait(kernel, ptx, sass):
    x = torch.empty(64, 512, dtype=torch.bfloat16, device="meta")
    y = torch.empty(64, 64, device="meta")
    args = {"x_ptr": x, "y_ptr": y, "N": 512, "BLOCK": 64, "PDL": True}
    with common.recording() as launches:
        common.launch(kernel, (8,), **args, dependent=True, num_stages=3)
    assert "must wait for the kernel before it first" in problems(launches[0])
    done = compiled(launches[0], "sm_90")
    ahead = {
        ptx: order.ahead_of_wait(done.asm["ptx"].partition(".entry")[2], "ptx"),
        sass: order.ahead_of_wait(order.sass_of(done), "sass"),
    }
    for access, lines in ahead.items():
        assert any(re.search(rf"\b({access})\b", line) for line in lines), lines
    # A launch that may begin early, of a kernel that does not wait.
    careless = launches[0]._replace(args=args | {"PDL": False})
    assert "no wait" in problems(careless)
    # Who begins behind the end of the one before has nothing to wait for.
    options = {k: v for k, v in careless.options.items() if k != "launch_pdl"}
    assert problems(careless._replace(options=options)) == ""
    assert problems(launches[0], "sm_80") == ""


def test_the_check_finds_a_signal_that_comes_too_early():
    x = torch.empty(64, device="meta")
    args = {"x_ptr": x, "y_ptr": x, "N": 64, "BLOCK": 64}
    with common.recording() as launches:
        common.launch(_hasty_kernel, (8,), **args, PDL=True, dependent=True)
        common.launch(_hasty_kernel, (8,), **args, PDL=False)
    assert problems(launches[0]) == "must wait before it lets the next kernel begin"
    assert problems(launches[1]) == ""
    # Of a launch that asked for neither.
    done = compiled(launches[0], "sm_90")
    assert "must neither wait" in order.order_problems(done, launches[1])[0]


@pytest.mark.parametrize("moved", [False, True])
def test_tensor_memory_is_taken_before_the_next_kernel_may_begin(moved):
    """Else the second on sm_100 could take it, and wait for a first one that waits for it."""
    pairs = [launches[:2] for launches in calls(True) if len(launches) > 1]
    launch = next(first for first, second in pairs if name(second) == "_decode_mlp_up_fwd_kernel")
    done = compiled(launch, "sm_100")
    ptx = done.asm["ptx"]
    assert "tcgen05.alloc" in ptx
    if moved:
        signal = re.search(rf"\t{re.escape(order.SIGNAL)}.*\n", ptx).group()
        rest = ptx.replace(signal, "")
        at = rest.index("bar.sync")
        ptx = rest[:at] + signal + rest[at:]
    found = order.order_problems(SimpleNamespace(asm={"ptx": ptx}), launch)
    assert [text.partition(" before")[0] for text in found] == [
        "must take its tensor memory"
    ] * moved


@pytest.mark.parametrize(
    "what, value",
    [("gdc_wait", None), ("INTERPRETED", True), ("ROCM", True)],
)
def test_where_there_is_no_such_launch_nothing_begins_early(monkeypatch, what, value):
    common.has_pdl.cache_clear()
    meta = torch.device("meta")
    with dispatch.programmatic(True):
        assert common.pdl(meta)
        with dispatch.programmatic(False):
            assert not common.pdl(meta)
        monkeypatch.setattr(common, what, value)
        common.has_pdl.cache_clear()
        assert not common.pdl(meta)
        monkeypatch.undo()
    common.has_pdl.cache_clear()


@pytest.mark.parametrize("capability, has", [((8, 0), False), ((8, 9), False), ((9, 0), True)])
def test_the_gpu_decides(monkeypatch, capability, has):
    common.has_pdl.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with dispatch.programmatic(True):
        assert common.pdl(torch.device("cuda", 0)) == has
    common.has_pdl.cache_clear()


def test_without_a_second_launch_nobody_is_let_begin():
    """One layer without memories and one split is one launch."""
    x, w = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 64), (64, 64))
    )
    with dispatch.programmatic(True), common.recording() as launches:
        decode_linears(x, [Linear(w, None, None)], common.Rows(None, 1))
    assert [(name(launch), launch.args["PDL"]) for launch in launches] == [
        ("_decode_linear_fwd_kernel", False)
    ]


@pytest.mark.parametrize("value, on", [(None, False), ("0", False), ("1", True)])
def test_one_variable_turns_it_on(value, on):
    environment = {k: v for k, v in os.environ.items() if k != "KOFF_PDL"}
    environment |= {} if value is None else {"KOFF_PDL": value}
    program = (
        "import torch; from koffkernels._triton.shared import launch; "
        "print(launch.pdl(torch.device('meta')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(on)
