"""The command that times launches on the host: every case runs each way."""

from bench.gate import host


def test_host_times_every_case_each_way():
    cases = host.cases()
    assert {name.split()[0] for name, *_ in cases} == set(host.OPERATIONS)
    for case in cases:
        row = host.measure(case, rounds=1, calls=1)
        assert row["launches"] > 1 and min(row[way] for way in host.WAYS) > 0
