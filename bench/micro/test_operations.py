"""Every public operation of koffkernels against what a user would run instead.

    pytest bench/micro --benchmark-only [--dtype bf16] [--divide 1] [-k "gated_mlp and decode"]

One group per operation, phase, memories and model; in it one row per peer. A peer whose output or
gradient is off by more than roundings fails and is not timed. Beside each time: bytes that must
move, floating-point operations, the share of this run's own limit, and the peak of memory.
"""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, MEMORIES, MODELS, check, extra, least_seconds, now, timed
from .peers import peers, problem


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("operation", "phase", "memories", "peer"), CASES, ids=map("-".join, CASES)
)
def test_operation(benchmark, context, limits, model, operation, phase, memories, peer):
    """Time one peer at one case, once its result is right."""
    bench, count = context(model), MEMORIES[memories]
    rows, tokens = (8, 1) if phase == "decode" else bench.prefill()
    torch.manual_seed(0)
    found = problem(bench, operation, rows, tokens, count)
    run = peers(operation, found, count)[peer]()
    training = phase == "backward"
    check(found, run, training, bench.dtype)
    call = timed(found, run, training)
    call()  # compiles, and allocates what is allocated once
    benchmark.group = f"{operation} {phase} {memories} {model}"
    benchmark._timer = now
    benchmark.extra_info.update(extra(found, call, training))
    benchmark(call)
    if benchmark.stats:  # not under --benchmark-disable
        least = least_seconds(benchmark.extra_info, limits)
        benchmark.extra_info["share_of_limit"] = least / benchmark.stats.stats.median
        taken = benchmark.stats.stats.sorted_data
        for share in (20, 80):  # as Liger-Kernel's tables have them
            place = round(share / 100 * (len(taken) - 1))
            benchmark.extra_info[f"seconds_{share}"] = taken[place]
