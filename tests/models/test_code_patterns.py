import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.models import code_patterns as P
from isthmus.models.pattern_lm import PatternLM, RowStore

MAKERS = {
    "flat": (P.flat, lambda k, t: k * t),
    "parallel": (P.parallel, lambda k, t: t),
    "delay": (P.delay, lambda k, t: t + k - 1),
    "stack": (P.stack, lambda k, t: k * t),
    "streams": (P.streams, lambda k, t: t + 3 * (k - 1)),
}


@pytest.mark.parametrize("levels", range(2, 9))
@pytest.mark.parametrize("name", MAKERS)
def test_every_code_is_written_once_and_in_so_many_steps(name, levels):
    make, steps = MAKERS[name]
    made = make(levels, 7)
    assert made.steps == steps(levels, 7) == int(made.step.max()) + 1
    row, level = (made.emits >= 0).nonzero().T
    written = sorted(zip(level.tolist(), made.emits[row, level].tolist(), strict=True))
    assert written == [(k, t) for k in range(levels) for t in range(7)]
    step = made.step[made.row_of].flatten()
    earlier = step[None] < step[:, None]
    told = made.visible()
    assert earlier[told].all()
    if name != "stack":  # which forgets; all others are told of everything that was written
        assert torch.equal(told, earlier)


def test_the_steps_of_streams_by_hand():
    made = P.streams(2, 5, delay=2, stride=2)  # times 0 2 4 1 3
    at = made.step[made.row_of]
    assert at.tolist() == [[0, 3, 1, 4, 2], [2, 5, 3, 6, 4]]
    row = int(made.row_of[1, 2])  # step 3, where level 0 is at time 1
    assert made.before[row].tolist() == [4, 0]
    assert made.same[row].tolist() == [2, P.NONE]
    seen = made.sees[row].nonzero().flatten().tolist()
    first = [int(made.row_of[0, t]) for t in (0, 2, 4)]
    assert seen == sorted([*first, row])  # no row of the second stream, and not its own step's


def test_streams_in_order_one_behind_another_write_as_delay_does():
    a, b = P.streams(3, 6, delay=1, stride=1), P.delay(3, 6)
    assert torch.equal(a.step[a.row_of], b.step[b.row_of])
    assert torch.equal(a.visible(), b.visible())
    c = P.streams(3, 6)
    assert not torch.equal(c.step[c.row_of], b.step[b.row_of])


def test_what_stack_forgets():
    told = P.stack(3, 4).visible().view(3, 4, 3, 4)
    assert told[2, 1, 0].tolist() == [True, True, True, False]  # level 0 is kept as it was read
    assert told[2, 1, 1].tolist() == [True, True, False, False]  # level 1: what level 2 read of it
    assert told[2, 3, 0].all() and not told[1, 1, 2].any()


def test_rows_that_a_cache_holds():
    assert [make(4, 9).cached for make, _ in MAKERS.values()] == [35, 8, 11, 17, 17]


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PatternLM(3, 5, 16, 3, 2).double()
        torch.nn.init.normal_(made.head)
    return made.eval()


@pytest.mark.parametrize("name", MAKERS)
def test_a_code_moves_those_that_are_told_of_it_and_no_other(model, name):
    pattern = MAKERS[name][0](3, 5)
    codes = torch.randint(5, (1, 3, 5), generator=torch.Generator().manual_seed(1))
    others = codes.repeat(15, 1, 1).flatten(1)
    at = torch.arange(15)
    others[at, at] = (others[at, at] + 1) % 5  # row y has another code at y
    with torch.no_grad():
        moved = model(others.view(15, 3, 5), pattern) - model(codes, pattern)
    changed = moved.abs().amax(-1).flatten(1).T > 1e-12  # [code that is asked for, y]
    assert torch.equal(changed, pattern.visible())


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_written_with_a_cache_is_what_the_whole_gives(model, name):
    pattern = MAKERS[name][0](3, 6)
    noise = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(2)).double()
    made = model.generate(pattern, noise)
    with torch.no_grad():
        again = (model(made, pattern) + noise).argmax(-1)
        other = (model(made.roll(1, 1), pattern) + noise).argmax(-1)
    assert torch.equal(made, again)
    assert not torch.equal(made, other)


def test_the_chain_rule_sums_to_one():
    """Over all matrices, probabilities by the chain rule add up to 1, whatever the order."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = PatternLM(2, 2, 8, 1, 2).double()
        torch.nn.init.normal_(small.head)
    every = (torch.arange(64)[:, None] >> torch.arange(6) & 1).view(64, 2, 3)
    for make, _ in MAKERS.values():
        with torch.no_grad():
            total = (-small.nats(every, make(2, 3)).sum((1, 2))).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-9)


def test_a_store_keeps_the_rows_it_is_told():
    store = RowStore(5)
    rows = torch.arange(4.0).view(1, 1, 4, 1)
    store.update(rows, -rows)
    store.select(torch.tensor([0, 2, 3]), -1)
    keys, values = store.update(rows[:, :, 1:2], rows[:, :, 1:2])
    assert keys.flatten().tolist() == [0, 2, 3, 1] and values.flatten().tolist() == [0, -2, -3, 1]
    store.select(torch.tensor([0]), 1)
    assert store.update(rows[:, :, 3:], rows[:, :, 3:])[0].flatten().tolist() == [0, 3]


def test_bad_input(model):
    for wrong in ({"levels": 0, "times": 3}, {"levels": 2, "times": 0}):
        for make, _ in MAKERS.values():
            with pytest.raises(InvalidInputError, match="1 or more"):
                make(**wrong)
    with pytest.raises(InvalidInputError, match="stride"):
        P.streams(2, 3, stride=0)
    with pytest.raises(InvalidInputError, match="multiple"):
        PatternLM(2, 4, 10, 1, 2)
    with pytest.raises(InvalidInputError, match="must agree"):
        model(torch.zeros(1, 2, 4, dtype=torch.int64), P.flat(2, 4))
    with pytest.raises(InvalidInputError, match="0 to 4"):
        model(torch.full((1, 3, 4), 5), P.flat(3, 4))
    with pytest.raises(InvalidInputError, match="kinds"):
        model(torch.zeros(1, 3, 99, dtype=torch.int64), P.streams(3, 99, stride=40))
    with pytest.raises(InvalidInputError, match="noise"):
        model.generate(P.flat(3, 4), torch.zeros(1, 3, 5, 5))
