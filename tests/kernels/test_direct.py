"""Launches that skip Triton's binding run what Triton would have run, on the same arguments.

No GPU is needed: triton's driver is one that launches nothing and notes what it is given. Triton's
own launch code says which variant it would compile."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch.nn import Parameter
from triton import knobs

from bench.gate.cases import all_kernels, cases
from bench.gate.host import empty_driver
from bench.gate.settings import settings
from koffkernels import dispatch
from koffkernels._triton.shared import direct
from koffkernels._triton.shared import launch as common
from koffkernels._triton.shared.launch import Launch

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
# Where Triton draws lines: 1, multiples of 16, 32 bits; and what equals one of these in Python.
NUMBERS = [0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 15, -(2**31), -(2**31) - 1]
NUMBERS += [True, 1.0, None]
CONSTANTS = [0, 1, 2, 16, True, False, None, "1", "ieee"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]


def tensor(dtype: torch.dtype, misaligned: bool = False) -> torch.Tensor:
    """One of whose address and dtype alone anything is read."""
    return torch.empty(17, dtype=dtype)[int(misaligned) :]


# The kernels that may begin before the one before them has ended (tests/kernels/test_overlap.py).
EARLY = {"_decode_expand_fwd_kernel", "_decode_mlp_up_fwd_kernel"}
EARLY |= {"_prefix_attention_own_kernel", "_prefix_attention_merge_kernel"}

TENSORS = [tensor(dtype, misaligned) for dtype in DTYPES for misaligned in (False, True)]
TENSORS += [None, Parameter(tensor(torch.float32))]


def options_of(launch: Launch) -> tuple:
    options = launch.options
    first = options["num_warps"], options["num_stages"], options.get("maxnreg")
    return *first, options.get("launch_pdl", False)


def ours(launch: Launch) -> tuple | None:
    """What we take a launch for; None where we leave it to Triton."""
    kernel = direct.Kernel(launch.kernel)
    key = direct.key_of(kernel, launch.args, options_of(launch))
    return key if direct._says_all(kernel, launch.args) else None


def of_triton(launch: Launch) -> str:
    """What Triton takes it for, inside of ``empty_driver``."""
    return launch.kernel[launch.grid](**launch.args, **launch.options).key


def variants(launches: list[Launch]) -> list[tuple[str, tuple, str]]:
    """(kernel, our kind, Triton's variant) of each launch, but of those that we leave to Triton."""
    with empty_driver():
        known = [(launch, ours(launch)) for launch in launches]
        return [
            (launch.kernel.fn.__name__, key, of_triton(launch))
            for launch, key in known
            if key is not None
        ]


def most(found: list[tuple[str, tuple, str]]) -> int:
    """How many variants of Triton's a kind stands for, at most."""
    kinds = {}
    for kernel, key, variant in found:
        kinds.setdefault((kernel, key), set()).add(variant)
    return max(map(len, kinds.values()))


@pytest.fixture(scope="module")
def recorded() -> list[Launch]:
    """Every launch of the compile gate's cases, each with the same arguments once; of decode also
    those that begin early."""
    found = {}
    for at, early in itertools.product(settings(), (False, True)):
        for file, case in cases(at):
            if early and "decode" not in file:
                continue
            with dispatch.programmatic(early), common.recording() as launches:
                case.run()
            for launch in launches:
                leaves = tuple(common.leaves_of(launch.args))
                what = [v.dtype if isinstance(v, torch.Tensor) else v for _, v in leaves]
                found[launch.kernel.fn.__name__, str(what), options_of(launch)] = launch
    return list(found.values())


@pytest.fixture(scope="module")
def changed(recorded) -> list[tuple[str, tuple, str]]:
    """The ``variants`` of launches of each kernel, with one or two arguments changed."""
    pick = random.Random(0)
    structures = {}
    for launch in recorded:
        leaves = common.leaves_of(launch.args)
        kinds = str([(name, type(value)) for name, value in leaves])
        structures.setdefault(launch.kernel.fn.__name__, {}).setdefault(kinds, launch)
    found = []
    for launches in structures.values():
        for launch in pick.sample(list(launches.values()), min(3, len(launches))):
            base = launch._replace(args=dict(on_cpu(launch.args)))
            near = [base, *variations(base)]
            found += near
            for launch in pick.sample(near, 20):
                found += pick.sample(variations(launch), 5)
    return variants(found)


def on_cpu(args: dict):
    for name, value in args.items():
        if isinstance(value, tuple):
            value = type(value)(**dict(on_cpu(value._asdict())))
        yield name, tensor(value.dtype) if isinstance(value, torch.Tensor) else value


def variations(launch: Launch) -> list[Launch]:
    """The launch with each argument, field and option in turn something else."""
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    found = []
    for name, value in launch.args.items():
        if isinstance(value, tuple):
            for field, part in value._asdict().items():
                for other in others(part):
                    part = {name: value._replace(**{field: other})}
                    found.append(launch._replace(args=launch.args | part))
        else:
            for other in CONSTANTS if name in constants else others(value):
                found.append(launch._replace(args=launch.args | {name: other}))
    for option, values in {"num_warps": (1, 2), "num_stages": (1, 7), "maxnreg": (64, 80)}.items():
        for value in values:
            found.append(launch._replace(options=launch.options | {option: value}))
    found.append(launch._replace(options=launch.options | {"launch_pdl": True}))
    return found


def others(value):
    if value is None:
        return [*TENSORS, *NUMBERS]
    return TENSORS if isinstance(value, torch.Tensor) else NUMBERS


def test_every_launch_of_ours_is_known(recorded):
    """None is left to Triton, and so slow, without anybody's wish."""
    assert {launch.kernel.fn.__name__ for launch in recorded if ours(launch) is None} == set()
    assert triton.__version__.startswith(direct.KNOWN) and len(recorded) > 1000


def test_one_kind_is_one_variant_of_tritons(recorded):
    assert most(variants(recorded)) == 1


def test_one_kind_is_one_variant_whatever_the_arguments_are(changed):
    assert most(changed) == 1
    assert len({(kernel, variant) for kernel, _, variant in changed}) > 2000


@pytest.mark.parametrize(
    "left_out",
    [torch.dtype, int, str, type(None), type, type(direct._MISALIGNED)],
    ids=lambda kind: kind.__name__,
)
def test_nothing_in_a_kind_is_idle(changed, left_out):
    """Without it some kind would stand for several variants, so the tests above can fail."""
    without = [(k, tuple(x for x in key if type(x) is not left_out), v) for k, key, v in changed]
    assert most(without) > 1


def test_numbers_of_64_bits_are_kinds_of_their_own(one, monkeypatch):
    wide = [one, *(one._replace(args=one.args | {"tokens": n}) for n in (2**31, -(2**31) - 1))]
    assert len(variants(wide)) == 1  # the others are left to Triton
    monkeypatch.setattr(direct, "_MOST", 2**31)
    assert most(variants(wide)) == 2


@pytest.fixture
def launched():
    """What the launchers were given, one entry for each launch."""
    found = []
    with empty_driver(lambda *args: found.append(args)):
        yield found


def bound_by_triton(monkeypatch) -> list:
    """The kernels that go Triton's way from here on, one entry for each launch."""
    found, run = [], triton.JITFunction.run

    def note(self, *args, **kwargs):
        found.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", note)
    return found


def test_the_launcher_is_given_the_same(recorded, launched, monkeypatch):
    """Grid, stream, function, metadata and arguments are those of Triton's way, one by one; in
    place of the hooks, all of them empty, stands None."""
    by_triton = bound_by_triton(monkeypatch)
    for launch in recorded[::3]:
        launched.clear()
        for _ in range(3):
            direct.launch(launch.kernel, launch.grid, launch.args, options_of(launch))
        by_triton.clear()
        direct.launch(launch.kernel, launch.grid, launch.args, options_of(launch))
        assert by_triton == []
        launch.kernel[launch.grid](**launch.args, **launch.options)
        *_, mine, theirs = launched
        assert len(mine) == len(theirs) == 9 + len(launch.kernel.params)
        same = zip(mine[3:6] + mine[9:], theirs[3:6] + theirs[9:], strict=True)
        assert all(a is b for a, b in same)
        assert mine[:3] == theirs[:3] and mine[6:9] == (None, None, None)


@pytest.fixture
def one(recorded) -> Launch:
    return next(x for x in recorded if x.kernel.fn.__name__ == "_expand_fwd_kernel")


def run(launch: Launch, **args) -> None:
    direct.launch(launch.kernel, launch.grid, launch.args | args, options_of(launch))


def test_the_first_of_a_kind_goes_tritons_way(one, launched, monkeypatch):
    by_triton = bound_by_triton(monkeypatch)
    sizes = [
        *({"tokens": t, "length": n} for t, n in ((1, 1), (16, 16), (17, 2**31 - 1))),
        *({"N": n} for n in (1, 16, one.args["N"])),
    ]
    for changes in sizes * 2:
        run(one, **changes)
    # Of tokens and length Triton is told not to look at the value, so the first three are one kind.
    assert len(by_triton) == 3 and len(launched) == 12


@pytest.mark.parametrize("where", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("as_function", [False, True])
def test_hooks_see_every_launch(one, launched, where, as_function):
    """Profilers hang on them."""
    run(one)
    seen, before = [], getattr(knobs.runtime, where)
    if as_function:
        setattr(knobs.runtime, where, seen.append)
    else:
        before.add(seen.append)
    try:
        run(one)
    finally:
        if as_function:
            setattr(knobs.runtime, where, before)
        else:
            before.remove(seen.append)
    run(one)
    hooks = [args[7:9] for args in launched]
    assert hooks[2] == (None, None) and hooks[1] != (None, None)
    assert launched[1][6].get()["name"] == "_expand_fwd_kernel"  # what a hook is told


@pytest.mark.parametrize(
    "holder, name, value",
    [
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", lambda *args: ("", "")),
        (knobs.compilation, "instrumentation_mode", "consan"),
        ("kernel", "debug", True),
        ("kernel", "pre_run_hooks", [lambda *args, **kwargs: None]),
        (direct, "ENABLED", False),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_whoever_debugs_gets_tritons_way(one, launched, monkeypatch, holder, name, value):
    run(one)
    run(one)
    by_triton = bound_by_triton(monkeypatch)
    monkeypatch.setattr(one.kernel if holder == "kernel" else holder, name, value)
    run(one)
    assert by_triton == [one.kernel]


class Other(torch.Tensor):
    """A kind of tensor of which nothing is known."""


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 2**31},
        {"tokens": True},
        {"BLOCK_N": 128.0},
        {"y_ptr": tensor(torch.bfloat16).as_subclass(Other)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_known_is_not_remembered(one, launched, monkeypatch, changes):
    by_triton = bound_by_triton(monkeypatch)
    for _ in range(3):
        run(one, **changes)
    assert len(by_triton) == 3


def test_each_device_has_its_own(one, launched, monkeypatch):
    by_triton = bound_by_triton(monkeypatch)
    chip, streams = triton.runtime.driver.active, {}
    monkeypatch.setattr(
        chip, "get_current_stream", lambda device: streams.setdefault(device, object())
    )
    for device in (chip.device, chip.device + 1) * 2:
        monkeypatch.setattr(chip, "device", device)
        run(one)
    assert len(by_triton) == 2
    assert [args[3] for args in launched] == [*streams.values()] * 2
    assert launched[0][4] is launched[2][4] is not launched[1][4]


def test_another_driver_is_not_handed_the_kernels_of_the_last(one):
    functions = []
    for _ in range(2):
        with empty_driver(lambda *args: functions.append(args[4])):
            run(one)
            run(one)
    assert functions[0] is functions[1] is not functions[2]


def test_shapes_that_are_ever_new_do_not_fill_the_memory(one, launched, monkeypatch):
    monkeypatch.setattr(direct, "_MOST_VARIANTS", 4)
    for n in range(1, 20):
        run(one, N=n)
    assert 0 < len(direct._kernels[id(one.kernel)].variants) <= 4


def test_an_empty_grid_launches_nothing(one, launched):
    common.launch(one.kernel, (0,), **one.args)
    assert launched == []


@pytest.mark.slow
def test_the_driver_is_told_the_same(tmp_path):
    """By Triton's real launcher, of compiled kernels: grid, threads, shared memory, function,
    stream and every parameter, before a CUDA driver that launches nothing."""
    library = tmp_path / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = ["-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, SUPPORT / "libcuda.c", "-o", library], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = os.environ | {"TRITON_LIBCUDA_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SUPPORT / "driver_worker.py", library]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {name for _, name in all_kernels()}
    early = {row["kernel"] for row in rows if row["early"]}
    assert early == EARLY
    for row in rows:
        by_triton, first, later, played = row["launched"]
        assert by_triton[2] == row["early"]
        assert by_triton[2:] == first[2:] == later[2:] == played[2:] and any(later[-1])
        # launches, and how often Triton bound arguments for them
        assert [launch[:2] for launch in row["launched"]] == [[1, 1], [1, 1], [1, 0], [1, 0]]
