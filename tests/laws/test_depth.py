"""The cost of a translation by depth: known constants come back, and bad runs are refused."""

import random

import pytest

from isthmus.errors import InvalidInputError
from isthmus.laws.depth import DepthCost, Run, worst_error

TRUE = DepthCost(0.004, 0.0007, 0.0021)


def runs(*splits: tuple[int, int, int], noise: float = 0.0) -> list[Run]:
    rng = random.Random(0)
    return [
        Run(e, d, t, TRUE.seconds(e, d, t) * (1 + rng.uniform(-noise, noise))) for e, d, t in splits
    ]


def test_three_runs_give_back_the_constants():
    found = DepthCost.fit(runs((1, 1, 20), (6, 1, 20), (1, 6, 20)))
    for name in ("encoder_s", "decoder_s", "output_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-9)
    assert worst_error(found, runs((12, 1, 50), (6, 6, 8))) < 1e-9


def test_a_crowded_cache_is_found_and_only_where_three_depths_tell_it():
    true = DepthCost(0.004, 0.0007, 0.0021, 0.0003)
    splits = [(1, 1), (6, 1), (1, 6), (1, 3), (12, 1), (6, 6), (4, 4)]
    measured = [Run(e, d, 20, true.seconds(e, d, 20)) for e, d in splits]
    assert measured[5].seconds == pytest.approx(
        6 * 0.004 + 20 * (6 * 0.0007 + 30 * 0.0003 + 0.0021)
    )
    found = DepthCost.fit(measured[:4])
    assert found.crowding_s == pytest.approx(0.0003, rel=1e-9)
    assert worst_error(found, measured[4:]) < 1e-9
    without = DepthCost.fit(measured[:3])  # the paper's law, which a bent curve leads astray
    assert without.crowding_s == 0
    assert worst_error(without, measured[4:]) > 0.15
    assert DepthCost.fit(runs((1, 1, 20), (6, 1, 20), (1, 6, 20), (1, 3, 20))).crowding_s < 1e-12


def test_noise_of_a_twentieth_stays_within_a_fifth():
    measured = runs((1, 1, 20), (6, 1, 20), (1, 6, 20), (4, 4, 20), noise=0.05)
    assert 0 < worst_error(DepthCost.fit(measured), runs((12, 1, 20), (6, 6, 20))) < 0.2


def test_a_cost_is_never_negative():
    # the deeper decoder was the faster one
    found = DepthCost.fit([Run(1, 1, 10, 0.2), Run(6, 1, 10, 0.7), Run(1, 6, 10, 0.19)])
    assert found.decoder_s == 0 and min(found.encoder_s, found.output_s) > 0


def test_the_share_that_no_split_saves():
    cost = DepthCost(0.1, 0.02, 0.01)
    assert cost.output_share(1, 1, 10) == pytest.approx(0.1 / 0.4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "0 runs do not tell"),
        ([Run(1, 1, 9, 0.1), Run(2, 2, 9, 0.2), Run(3, 3, 9, 0.3)], "1-1, 6-1 and 1-6"),
        ([Run(0, 1, 9, 0.1)] * 3, "at least 1"),
        ([Run(1, 1, 9, 0.0)] * 3, "more than 0 seconds"),
    ],
)
def test_runs_that_say_nothing_are_refused(given, says):
    with pytest.raises(InvalidInputError, match=says):
        DepthCost.fit(given)


def test_the_best_split_is_the_fastest_that_is_good_enough():
    accuracy = {(3, 3): 99.0, (5, 1): 98.5, (1, 5): 99.5}
    assert TRUE.best(accuracy, 100, 98.9) == (3, 3)
    assert TRUE.best(accuracy, 100, 0.0) == (5, 1)
    with pytest.raises(InvalidInputError, match=r"no split reaches 100; the best one has 99\.5"):
        TRUE.best(accuracy, 100, 100.0)
