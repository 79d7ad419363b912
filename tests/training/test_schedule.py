"""The training schedule: balanced, repeatable, aligned over ranks, resumable."""

import collections
import dataclasses

import pytest

from koff.data.blocks import pack
from koff.training.schedule import Mixture, MixtureDataset, MixtureSampler, Source, collate


def rows_of(count, token):
    """So many rows of four equal tokens."""
    return pack([{"input_ids": [token] * 4 * count}], None, 4)


def mixture(general_every=4, mixed=True, seed=0, memories=3):
    domains = [Source(f"d{i}", rows_of(10 + i, i), i if memories else -1) for i in range(3)]
    general = [Source("general/a", rows_of(7, 10)), Source("general/b", rows_of(5, 11))]
    return Mixture(domains, general, [0.8, 0.2], memories, general_every, mixed, seed)


def batches(mix, size=6, steps=16, accumulation=1, ranks=1):
    return list(MixtureSampler(mix, size, steps, accumulation, ranks))


@pytest.mark.parametrize("mixed", [True, False])
def test_the_order_depends_on_the_seed_alone(mixed):
    assert batches(mixture(mixed=mixed)) == batches(mixture(mixed=mixed))
    assert batches(mixture(mixed=mixed)) != batches(mixture(mixed=mixed, seed=1))


def test_every_nth_step_is_general():
    for step, batch in enumerate(batches(mixture())):
        assert all((source >= 3) == ((step + 1) % 4 == 0) for source, _, _ in batch)
    assert all(s < 3 for b in batches(mixture(general_every=0)) for s, _, _ in b)


def test_mixed_rows_are_balanced_and_use_their_own_memory():
    rows = [r for b in batches(mixture(general_every=0), size=5, steps=30) for r in b]
    counts = collections.Counter(source for source, _, _ in rows)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(memory == source for source, _, memory in rows)


def test_single_batches_have_one_domain_and_all_come_round():
    order = [{s for s, _, _ in b} for b in batches(mixture(general_every=0, mixed=False), steps=9)]
    assert all(len(o) == 1 for o in order)
    cycles = [set().union(*order[i : i + 3]) for i in (0, 3, 6)]
    assert all(c == {0, 1, 2} for c in cycles)


def test_each_source_is_seen_whole_before_it_repeats():
    rows = [r for b in batches(mixture(general_every=0), steps=20) for r in b]
    for source, size in ((0, 10), (1, 11), (2, 12)):
        seen = [row for s, row, _ in rows if s == source]
        assert sorted(seen[:size]) == list(range(size))
        assert (
            sorted(seen[size : 2 * size]) == list(range(size))
            and seen[:size] != seen[size : 2 * size]
        )


def test_general_rows_follow_the_weights_and_random_memories():
    rows = [r for b in batches(mixture(general_every=1), size=50, steps=20) for r in b]
    share = sum(s == 3 for s, _, _ in rows) / len(rows)
    assert abs(share - 0.8) < 0.05  # 1000 draws: standard deviation 0.013
    assert {m for _, _, m in rows} == {0, 1, 2}
    single = batches(mixture(general_every=1, mixed=False), steps=12)
    assert all(len({m for _, _, m in b}) == 1 for b in single)
    assert all(m == -1 for b in batches(mixture(memories=0)) for _, _, m in b)


@pytest.mark.parametrize("mixed", [True, False])
def test_ranks_take_batches_of_one_kind_in_turn(mixed):
    ranks, accumulation = 4, 2
    got = batches(mixture(mixed=mixed), steps=8, accumulation=accumulation, ranks=ranks)
    assert len(got) == 8 * accumulation * ranks
    for micro in range(0, len(got), ranks):
        group = got[micro : micro + ranks]
        step = micro // ranks // accumulation
        assert all((s >= 3) == ((step + 1) % 4 == 0) for b in group for s, _, _ in b)
        if not mixed and group[0][0][0] < 3:
            assert len({s for b in group for s, _, _ in b}) == 1
    rows = [r for b in got for r in b if r[0] == 0][:10]
    assert len({row for _, row, _ in rows}) == 10  # no rank sees another's rows


def test_rows_and_batches():
    data = MixtureDataset(mixture(), ["en", "fr", "es"])
    assert len(data) == 10 + 11 + 12 + 7 + 5
    batch = collate([data[(1, 0, 1)], data[(4, 2, -1)]])
    assert batch["input_ids"].tolist() == [[1] * 4, [11] * 4]
    assert batch["labels"].tolist() == [[-100, 1, 1, 1], [-100, 11, 11, 11]]
    assert batch["memory"] == ["fr", None] and batch["source"] == [1, 4]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_share_of_the_rows_goes_without_a_memory_while_gates_train(mixed):
    plain = mixture(mixed=mixed)
    bare = dataclasses.replace(plain, no_memory=0.3)

    def run(mix):
        return list(MixtureSampler(mix, 6, 400, 1, 1, gate_steps=300))

    got, without = run(bare), run(plain)
    # The same text in the same order, and every memory that is left is the one it would be.
    for batch, full in zip(got, without, strict=True):
        assert [row[:2] for row in batch] == [row[:2] for row in full]
        assert all(a[2] in (-1, b[2]) for a, b in zip(batch, full, strict=True))
    kinds = [[memory == -1 for _, _, memory in batch] for batch in got]
    share = sum(map(sum, kinds[:300])) / 1800
    # Of 1800 draws the standard deviation is 0.011; of whole batches, 300 draws, 0.027.
    assert abs(share - 0.3) < (0.05 if mixed else 0.11)
    assert mixed or all(len(set(kind)) == 1 for kind in kinds)
    assert not any(map(any, kinds[300:]))  # only memories train by then


@pytest.mark.parametrize("mixed", [True, False])
def test_a_share_of_the_rows_of_domains_has_the_memory_of_another(mixed):
    plain = mixture(mixed=mixed)
    got = batches(dataclasses.replace(plain, distractors=0.3), steps=400)
    for batch, full in zip(got, batches(plain, steps=400), strict=True):
        assert [row[:2] for row in batch] == [row[:2] for row in full]
        if full[0][0] >= 3:
            assert batch == full  # the memories of general rows are drawn at random as they are
    rows = [row for batch in got for row in batch if row[0] < 3]
    counts = collections.Counter((source, memory) for source, _, memory in rows if source != memory)
    # Of 1800 draws the standard deviation is 0.011; of whole batches, 300 draws, 0.027.
    assert abs(counts.total() / len(rows) - 0.3) < (0.05 if mixed else 0.11)
    assert set(counts) == {(s, m) for s in range(3) for m in range(3) if s != m}
    kinds = [{s == m for s, _, m in batch} for batch in got if batch[0][0] < 3]
    assert all(len(kind) == 1 for kind in kinds) != mixed


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_rows_of_all_ranks_are_those_of_one_larger_batch(ranks, mixed):
    dealt = batches(mixture(mixed=mixed), size=6 // ranks, accumulation=2, ranks=ranks)
    together = [sum(dealt[i : i + ranks], []) for i in range(0, len(dealt), ranks)]
    assert together == batches(mixture(mixed=mixed), size=6, accumulation=2)
