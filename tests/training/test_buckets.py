import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import InvalidInputError
from isthmus.training.buckets import (
    Ahead,
    Buckets2D,
    BucketSampler,
    KeptBytes,
    Profile,
    batch_sizes,
    outliers,
    padding,
    saved_bytes,
    survives,
)


@pytest.fixture(scope="module")
def speech():
    """20,000 pairs of seconds and tokens, spread like speech."""
    rng = np.random.default_rng(0)
    seconds = np.exp(rng.normal(1.9, 0.75, 40_000))
    seconds = seconds[(seconds >= 0.5) & (seconds <= 40)][:20_000]
    rate = rng.normal(3.5, 1, len(seconds))
    tokens = np.maximum(1, np.round(seconds * rate) + rng.geometric(0.2, len(seconds)))
    return seconds, tokens


def cost(seconds, tokens, rows):
    frames = 12.5 * seconds
    own = 40 * frames + frames**2 / 16 + 50 * tokens + 0.05 * tokens**2 + 0.1 * frames * tokens
    return rows * own


def waste(seconds, tokens, subparts):
    buckets = Buckets2D.estimate(seconds, tokens, 10, subparts)
    cap = 4 * cost(seconds.max(), tokens.max(), 1)
    sizes = batch_sizes(buckets.bounds, lambda i, o, n: cost(i, o, n) <= cap, tolerance=0)
    sampler = BucketSampler(buckets.assign(seconds, tokens), sizes)
    batches = [sampler.rows(part) for part in range(sampler.parts)]
    return padding(seconds, batches), padding(tokens, batches), len(seconds) / len(batches)


def test_two_dimensions_waste_less_than_one_and_much_less_than_none(speech):
    seconds, tokens = speech
    rows = np.random.default_rng(1).permutation(len(seconds))
    random = np.split(rows, range(16, len(rows), 16))
    one, two = waste(seconds, tokens, 1), waste(seconds, tokens, 2)
    assert padding(seconds, random) > 0.6
    assert one[0] < 0.15 and two[0] < 0.15  # frames
    assert two[1] < one[1] - 0.08  # tokens
    assert two[2] > 1.1 * one[2]  # rows of a batch


def test_padding_is_below_five_percent_on_lengths_spread_twentyfold():
    rng = np.random.default_rng(0)
    source = rng.integers(10, 201, 20_000)
    target = np.clip(np.round(source * rng.normal(1, 0.05, len(source))), 10, 210)
    buckets = Buckets2D.estimate(source, target, 30, 2)
    sizes = [max(1, int(8192 // (i + o))) for i, o in buckets.bounds]
    sampler = BucketSampler(buckets.assign(source, target), sizes)
    batches = [sampler.rows(part) for part in range(sampler.parts)]
    assert padding(source + target, batches) < 0.05


def test_parts_hold_equal_sums(speech):
    seconds, tokens = speech
    buckets = Buckets2D.estimate(seconds, tokens, 10, 2)
    found = buckets.assign(seconds, tokens)
    assert (found >= 0).all()
    tops = np.array([top for top, _ in buckets.edges])
    sums = np.bincount(np.searchsorted(tops, seconds), seconds)
    assert sums == pytest.approx(np.full(10, seconds.sum() / 10), rel=0.02)
    for part in range(10):
        edge = buckets.edges[part][1][0]
        inside = tokens[found // 2 == part]
        # the first half reaches half of the sum with its last value and not before
        assert inside[inside < edge].sum() < inside.sum() / 2 <= inside[inside <= edge].sum()


def test_equal_edges_become_one():
    buckets = Buckets2D.estimate([5.0] * 40 + [9.0], [1.0] * 40 + [7.0], 8, 2)
    assert buckets.edges == ((5.0, (1.0,)), (9.0, (7.0,)))


def test_strict_looks_at_the_first_part_only():
    buckets = Buckets2D(((4.0, (2.0,)), (9.0, (8.0,))))
    assert buckets.assign([3, 3], [2, 6]).tolist() == [0, -1]
    assert buckets.assign([3, 3], [2, 6], strict=False).tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_the_largest_size_that_fits_is_found(limits, start):
    limits = sorted(limits, reverse=True)  # longer examples, smaller batches
    bounds = [(i + 1.0, 1.0) for i in range(len(limits))]
    exact = batch_sizes(bounds, lambda i, o, n: n <= limits[int(i) - 1], start, tolerance=0)
    assert exact == limits
    near = batch_sizes(bounds, lambda i, o, n: n <= limits[int(i) - 1], start)
    assert all(0.9 * limit - 1 <= size <= limit for size, limit in zip(near, limits, strict=True))


def test_an_example_that_never_fits_is_refused():
    with pytest.raises(InvalidInputError, match="lengths 9 and 2 does not fit"):
        batch_sizes([(1, 1), (9, 2)], lambda i, o, n: n * i < 8)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_row_once_an_epoch_and_one_bucket_at_a_time(ranks):
    bucket = np.random.default_rng(0).integers(-1, 4, 203)
    sampler = BucketSampler(bucket, [3, 5, 2, 7], seed=4, ranks=ranks)
    epochs = []
    for epoch in range(2):
        parts = [sampler.rows(epoch * sampler.parts + p) for p in range(sampler.parts)]
        assert sorted(np.concatenate(parts)) == sorted(np.flatnonzero(bucket >= 0))
        for i in range(0, len(parts), ranks):
            together = np.concatenate(parts[i : i + ranks])
            assert len({*bucket[together]}) == 1
        epochs.append([p.tolist() for p in parts])
    assert epochs[0] != epochs[1]
    fresh = BucketSampler(bucket, [3, 5, 2, 7], seed=4, ranks=ranks)
    middle = sampler.parts + 5
    assert fresh.rows(middle).tolist() == epochs[1][5]  # a run may begin anywhere


def test_too_much_output_for_an_input_is_found():
    rng = np.random.default_rng(0)
    ins = rng.uniform(1, 10, 500)
    outs = ins * rng.normal(3, 0.2, 500)
    outs[17] = 90
    buckets = Buckets2D.estimate(ins, outs, 4, 2)
    assert np.flatnonzero(outliers(ins, outs, buckets)).tolist() == [17]


@pytest.mark.parametrize(
    ("ins", "outs"), [([], []), ([1, 2], [1]), ([0.0], [1]), ([np.nan], [1]), ([1], [-1])]
)
def test_bad_lengths_are_refused(ins, outs):
    with pytest.raises(InvalidInputError, match="lengths"):
        Buckets2D.estimate(ins, outs)


def test_kept_bytes_are_those_of_a_real_step_and_of_one_without_data():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))

    def step(longest, output, rows, device="cpu"):
        x = torch.ones(rows, int(longest), 8, device=device)
        return layer.to(device)(x).logsumexp(-1).sum() * output

    kept = KeptBytes(step)
    for rows in (1, 2, 7):
        assert kept(5, 1, rows) == saved_bytes(lambda rows=rows: step(5, 1, rows))
    per_row = kept(5, 1, 2) - kept(5, 1, 1)
    assert per_row >= 5 * (8 + 32 + 32) * 4  # inputs of both linear maps and of GELU
    meta = KeptBytes(lambda *of: step(*of, device="meta"))
    assert meta(5, 1, 7) == kept(5, 1, 7)


def test_a_step_that_runs_out_of_memory_halves_the_batch():
    weight, asked = torch.ones(1, requires_grad=True), []

    def step(longest, output, rows):
        asked.append(rows)
        if rows * longest > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return weight.sum()

    assert batch_sizes([(2, 1), (9, 1)], survives(step), tolerance=0) == [50, 11]
    assert weight.grad is not None and max(asked) < 130
    with pytest.raises(InvalidInputError, match="does not fit"):
        batch_sizes([(200, 1)], survives(step))


def test_batches_made_ahead_are_the_same_and_errors_come_through():
    made = {}

    def make(part):
        if part == 9:
            raise InvalidInputError("nine")
        made[part] = threading.current_thread()
        return part * part

    ahead = Ahead(make)
    assert [ahead(p) for p in (0, 2, 4, 6, 6, 1)] == [0, 4, 16, 36, 36, 1]
    assert ahead(7) == 49
    assert made[4] is not threading.main_thread() is made[1]
    with pytest.raises(InvalidInputError, match="nine"):
        ahead(9)


def test_the_profile_counts_what_is_left_out():
    profile = Profile.of([1, 3, 4, 9], [1, 1, 2, 5], [np.array([0, 1]), np.array([2])])
    assert (profile.batches, profile.rows, profile.left_out) == (2, 1.5, 1)
    assert profile.inputs == pytest.approx(1 - 8 / 10) and profile.outputs == 0
    assert profile.cost == pytest.approx(1 - 12 / 14)
    assert "1 records left out" in str(profile) and Profile(**profile.to_dict()).rows == 1.5
