from collections import Counter

import numpy as np
import pytest
import torch

from causal_wan.data.sample_order import Interleaving, SampleOrder
from causal_wan.seeds import RandomPurpose, seeded_generator


def first(order, number):
    return next(order.candidates(number))


def make(buckets, sources=None, **settings):
    sources = [0] * len(buckets) if sources is None else sources
    return SampleOrder(buckets, sources, **{"seed": 0, "samples_per_step": 4, **settings})


@pytest.mark.parametrize("shares", [[1.0], [1, 1], [5, 3, 2], [0.97, 0.02, 0.01]])
def test_every_stretch_of_an_interleaving_has_its_share_of_each_class(shares):
    sequence = Interleaving(shares, seed=0, key=(RandomPurpose.ORDER,))
    classes = np.array([sequence[position][0] for position in range(5000)])
    expected = np.cumsum(np.eye(len(shares))[classes], axis=0)
    line = np.arange(1, 5001)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(expected - line).max() < len(shares)
    counts = Counter()
    for position, kind in enumerate(classes):
        assert sequence[position] == (kind, counts[kind])
        counts[kind] += 1


@pytest.mark.parametrize("unit", [1, 0.01])
def test_an_interleaving_goes_by_times_with_an_offset_of_each_class(unit):
    sequence = Interleaving([3 * unit, unit, 2 * unit], seed=5, key=(RandomPurpose.SOURCE, 7))
    offsets = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(int(RandomPurpose.SOURCE), 7))).random(3)
    shares = (3 / 6, 1 / 6, 2 / 6)
    times = sorted(
        ((item + offset) / share, kind, item)
        for kind, (offset, share) in enumerate(zip(offsets, shares, strict=True))
        for item in range(2000)
    )
    assert [sequence[position] for position in range(2000)] == [(kind, item) for _, kind, item in times[:2000]]


def test_an_interleaving_of_one_class_counts():
    sequence = Interleaving([7.0], seed=0, key=(RandomPurpose.ORDER,))
    assert [sequence[position] for position in (0, 1, 10**12)] == [(0, 0), (0, 1), (0, 10**12)]


def test_an_interleaving_grows_as_it_is_read():
    sequence = Interleaving([1, 1], seed=0, key=(RandomPurpose.ORDER,))
    for position in (0, 1023, 1024, 2047, 2048, 5000):
        kind, rank = sequence[position]
        assert kind in (0, 1)
        assert abs(2 * rank - position) <= 2


def test_an_interleaving_does_not_depend_on_how_far_it_was_read():
    one, other = (Interleaving([3, 2, 1], seed=1, key=(RandomPurpose.WINDOW,)) for _ in range(2))
    one[100_000]
    assert [one[position] for position in range(3000)] == [other[position] for position in range(3000)]


def test_an_epoch_of_one_bucket_has_every_row_once():
    order = make([0] * 10)
    epochs = [[first(order, number) for number in range(start, start + 10)] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_all_samples_of_a_step_are_of_one_bucket_and_buckets_keep_their_share():
    buckets = [0] * 60 + [2] * 30 + [5] * 7  # bucket 1, 3 and 4 have no rows
    order = make(buckets)
    seen = Counter()
    for step in range(500):
        numbers = range(4 * step, 4 * step + 4)
        assert {order.step(number) for number in numbers} == {step}
        (bucket,) = {order.bucket(number) for number in numbers}
        for number in numbers:
            row = first(order, number)
            assert buckets[row] == bucket
            seen[row] += 1
    # 2000 samples are 20.6 passes over 97 rows; no row is more than two steps of its bucket away from that.
    assert min(seen.values()) >= 18
    assert max(seen.values()) <= 23
    assert len(seen) == 97


def test_within_a_bucket_epochs_are_whole():
    order = make([0] * 8 + [1] * 8)
    rows = [first(order, number) for number in range(64 * 4) if order.bucket(number) == 1]
    for start in range(0, 64, 8):
        assert sorted(rows[start : start + 8]) == list(range(8, 16))


def test_weights_say_how_often_a_source_is_seen_not_how_many_rows_it_has():
    order = make([0] * 110, [0] * 100 + [1] * 10, weights=[1, 3])
    rows = [first(order, number) for number in range(4000)]
    assert sum(row < 100 for row in rows) == pytest.approx(1000, abs=2)
    assert set(Counter(rows).values()) <= {9, 10, 11, 299, 300, 301}


def test_without_weights_sources_are_one_set():
    assert [first(make([0] * 9, [0, 1, 2] * 3), n) for n in range(30)] == [first(make([0] * 9), n) for n in range(30)]


def test_order_is_that_of_the_number_alone_however_it_was_reached():
    settings = {"buckets": [0, 1, 1, 2] * 5, "sources": [0, 1] * 10, "weights": [2, 1]}
    whole, resumed = make(**settings), make(**settings)
    rows = [first(whole, number) for number in range(400)]
    assert [first(resumed, number) for number in range(396, 400)] == rows[396:]
    assert [first(make(**settings, seed=1), number) for number in range(400)] != rows


def test_steps_go_on_from_where_a_run_with_other_steps_stopped():
    order = make([0] * 5, samples_per_step=8, start_sample=100, start_step=25)
    assert [order.step(number) for number in (100, 107, 108)] == [25, 25, 26]


def test_candidates_are_the_rows_of_the_cell_that_come_next():
    order = make([0, 0, 0, 1, 1, 1])
    for number in range(40):
        candidates = list(order.candidates(number))
        bucket = order.bucket(number)
        assert sorted(candidates) == ([0, 1, 2] if bucket == 0 else [3, 4, 5])


def test_candidates_go_on_from_the_row_of_the_sample_and_begin_again():
    order = make([0] * 5)
    epoch = [first(order, number) for number in range(5)]
    for number in range(5):
        assert list(order.candidates(number)) == epoch[number:] + epoch[:number]


def test_the_order_of_one_cell_depends_on_seed_and_epoch_alone():
    expected = [
        torch.randperm(6, generator=seeded_generator(3, RandomPurpose.ORDER, epoch)).tolist() for epoch in range(2)
    ]
    order = make([4] * 6, seed=3)
    assert [first(order, number) for number in range(12)] == expected[0] + expected[1]


def test_cells_are_shuffled_by_bucket_and_cell_and_epoch():
    order = make([2] * 6 + [7] * 6, [0, 0, 0, 1, 1, 1] * 2, weights=[1, 1], seed=3)
    rows = {}
    for number in range(200):
        row = first(order, number)
        rows.setdefault((2 if row < 6 else 7, row % 6 // 3), []).append(row)
    for (bucket, cell), found in rows.items():
        for epoch in range(4):
            generator = seeded_generator(3, RandomPurpose.ORDER, epoch, bucket, cell)
            base = (0 if bucket == 2 else 6) + 3 * cell
            expected = [base + place for place in torch.randperm(3, generator=generator).tolist()]
            assert found[3 * epoch : 3 * epoch + 3] == expected
    assert len(rows) == 4


def test_a_source_without_rows_takes_no_turns():
    order = make([0] * 6, [0, 0, 0, 2, 2, 2], weights=[1, 5, 1, 4])
    rows = [first(order, number) for number in range(600)]
    assert sum(row < 3 for row in rows) == pytest.approx(300, abs=2)


def test_a_source_of_one_row_has_its_weight():
    order = make([0] * 4, [0, 0, 0, 1], weights=[1, 1])
    assert sum(first(order, number) == 3 for number in range(600)) == pytest.approx(300, abs=2)


def test_weights_hold_across_buckets():
    # source 1 is in bucket 1 alone, where it shares turns with a third of source 0
    order = make([0] * 20 + [1] * 10 + [1] * 3, [0] * 30 + [1] * 3, weights=[1, 2])
    rows = [first(order, number) for number in range(6000)]
    assert sum(row >= 30 for row in rows) == pytest.approx(4000, abs=20)
    counts = Counter(rows)
    assert max(counts[row] for row in range(30)) - min(counts[row] for row in range(30)) <= 4


def test_buckets_take_turns_by_step_from_the_step_that_a_run_goes_on_at():
    whole = make([0] * 6 + [1] * 6)
    later = make([0] * 6 + [1] * 6, samples_per_step=2, start_sample=40, start_step=10)
    for step in range(10, 30):
        numbers = (40 + 2 * (step - 10), 41 + 2 * (step - 10))
        assert {later.step(number) for number in numbers} == {step}
        assert {later.bucket(number) for number in numbers} == {whole.bucket(4 * step)}
        assert {first(later, number) // 6 for number in numbers} == {whole.bucket(4 * step)}


def test_each_sample_of_a_step_has_its_place_in_the_epochs_of_the_bucket():
    order = make([0] * 6 + [1] * 6, samples_per_step=4, start_sample=41, start_step=10)
    whole = make([0] * 6 + [1] * 6, samples_per_step=4)
    for bucket in range(2):
        before = sum(whole.bucket(number) == bucket for number in range(40))
        rows = [first(order, number) for number in range(41, 141) if order.bucket(number) == bucket]
        expected = []
        for epoch in range(20):
            generator = seeded_generator(0, RandomPurpose.ORDER, epoch, bucket, 0)
            expected += [6 * bucket + place for place in torch.randperm(6, generator=generator).tolist()]
        assert rows == expected[before : before + len(rows)]
