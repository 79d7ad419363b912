"""The command that times launches on the host: every case runs each way."""

import torch

from bench.gate import host


def test_host_times_every_case_each_way():
    cases = host.cases()
    assert {name.split()[0] for name, *_ in cases} == {*host.OPERATIONS, "lora_linears", "layer"}
    for case in cases:
        row = host.measure(case, rounds=1, seconds=0.0001)
        assert row["launches"] > 0 and min(row[way] for way in host.WAYS) > 0


def test_what_is_replayed_takes_less_time():
    (case,) = [case for case in host.cases() if case.name == "gated_mlp decode"]
    row = host.measure(case, rounds=10)
    assert row["replayed"] < row["triton"]


def test_products_are_torchs_own_again():
    x = torch.eye(2)
    with host.without_products():
        pass
    assert torch.equal(x @ x, x) and torch.equal(torch.nn.functional.linear(x, x), x)
