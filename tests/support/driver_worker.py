"""Launch each kernel by Triton, directly and as a tape does, before the driver of ``libcuda.c``,
and print one line of JSON a kernel: what reached the driver each time.

A process of its own: the driver must not get between torch and a real one.
"""

import ctypes
import itertools
import json
import sys

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from bench.gate.cases import cases
from bench.gate.settings import subset
from koffkernels import dispatch
from koffkernels._triton.shared import direct
from koffkernels._triton.shared import launch as common


class Launched(ctypes.Structure):
    """The struct of ``libcuda.c``."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared", "launches", "early")),
        *((name, ctypes.c_uint64) for name in ("function", "stream")),
        ("values", ctypes.c_uint64 * 96),
    ]


class Driver(nvidia.CudaDriver):
    """Triton's own, but for what it asks torch."""

    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device: 77)


def parameters(signature) -> int:
    """How many parameters the compiled kernel has."""
    if isinstance(signature, tuple):
        return sum(map(parameters, signature))
    return int(signature != "constexpr")


def tensors(args: dict):
    """Yield the arguments, on the CPU instead of on no device: only addresses are read."""
    for name, value in args.items():
        if isinstance(value, tuple):
            value = type(value)(**dict(tensors(value._asdict())))
        yield name, torch.empty(16, dtype=value.dtype) if torch.is_tensor(value) else value


def as_on_a_tape(values):
    """Yield the arguments with addresses for tensors, and tuples for operands."""
    for value in values:
        if isinstance(value, tuple):
            value = tuple(as_on_a_tape(value))
        yield value.data_ptr() if torch.is_tensor(value) else value


def main() -> None:
    # Loaded first, so that whoever asks for libcuda.so.1 in this process finds it.
    cuda = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    launched, count = Launched.in_dll(cuda, "launched"), ctypes.c_int.in_dll(cuda, "count")
    triton.runtime.driver.set_active(Driver())
    run, binds, launches = triton.JITFunction.run, [], {}

    def noted(self, *args, **kwargs):
        binds.append(self)
        return run(self, *args, **kwargs)

    triton.JITFunction.run = noted
    for at, early in itertools.product(subset(), (False, True)):
        for _, case in cases(at):
            with dispatch.programmatic(early), common.recording() as recorded:
                case.run()
            launches |= {
                (launch.kernel.fn.__name__, launch.options.get("launch_pdl", False)): launch
                for launch in recorded
            }
    for (name, early), (kernel, grid, args, options) in launches.items():
        args = dict(tensors(args))
        chosen = options["num_warps"], options["num_stages"], options.get("maxnreg"), early

        def by_triton(kernel=kernel, grid=grid, args=args, options=options):
            return kernel[grid](**args, **options)

        ran = []

        def directly(kernel=kernel, grid=grid, args=args, chosen=chosen, ran=ran):
            ran.append(direct.launch(kernel, grid, args, chosen))

        def played(kernel=kernel, grid=grid, args=args, ran=ran):
            run, function, metadata, _ = ran[-1]
            in_order = as_on_a_tape([args[p.name] for p in kernel.params])
            run(*(*grid, 1, 1)[:3], 77, function, metadata, None, None, None, *in_order)

        count.value = 0  # of this kernel it is not known yet
        count.value = sum(map(parameters, by_triton().src.signature.values()))
        found = []
        for launch in (by_triton, directly, directly, played):
            before, bound = launched.launches, len(binds)
            launch()
            values = list(launched.values)[: count.value]
            sizes = launched.early, list(launched.grid), launched.threads, launched.shared
            handles = launched.function, launched.stream
            counts = launched.launches - before, len(binds) - bound
            found.append([*counts, *sizes, *handles, values])
        print(json.dumps({"kernel": name, "early": early, "launched": found}), flush=True)


if __name__ == "__main__":
    main()
