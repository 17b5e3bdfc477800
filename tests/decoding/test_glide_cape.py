"""GliDe with a CaPE: the target's keys as they are, blocks in training, candidates."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.law import Law
from isthmus.errors import InvalidInputError
from isthmus.nn.decoder import rotate
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.glide_cape import (
    GlideCape,
    Settings,
    at_equal_cost,
    with_widths,
)
from isthmus.training.drafting import Drafting
from isthmus.workbench.drafters import _documents


def begun(drafter: Any, ids: torch.Tensor, counts: list[int]) -> Context:
    """The drafter after a ragged prefill of the first tokens of each row."""
    target = drafter.target
    inputs = {k: v.expand(len(ids), -1) for k, v in target.probe_inputs().items()}
    session = target.session(len(ids), **inputs)
    rows = [row[:n] for row, n in zip(ids, counts, strict=True)]
    features = session.prefill(rows, taps=drafter.taps)
    lengths = [n + 1 for n in counts]
    made = torch.Generator().manual_seed(0)
    context = Context(ids[:, : max(lengths)], lengths, lengths, Law(), made, [0, 1, 2])
    context.features, context.session = features, session
    drafter.begin(context, target)
    return context


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
@pytest.mark.parametrize("cross", [True, False])
def test_training_is_stepwise_drafting(name: str, cross: bool) -> None:
    """A block of training sees what a draft sees that starts at the block's first place."""
    drafter = checks.make(GlideCape, Settings(cross=cross), name)
    batch, counts = checks.batch_of(drafter, length=15), [10, 5, 10]
    last = batch.past.layers[-1]
    with torch.no_grad():
        want = drafter.teach(batch.ids, last.keys, last.values)
    begun(drafter, batch.ids, counts)
    zero = torch.zeros(3, 1, dtype=torch.int64)
    places = torch.tensor(counts)[:, None]
    for depth in range(5):
        level = Level(batch.ids.gather(1, places + depth), zero, torch.zeros(3, 1), depth)
        got = drafter.expand(level)
        for row, n in enumerate(counts):
            torch.testing.assert_close(got[row, 0], want[row, n + depth], rtol=0, atol=1e-9)


def test_the_first_block_sees_nothing_and_stays_finite() -> None:
    drafter = checks.make(GlideCape)
    batch = checks.batch_of(drafter)
    last = batch.past.layers[-1]
    out = drafter.teach(batch.ids, last.keys, last.values)
    assert bool(torch.isfinite(out).all())
    other = drafter.teach(batch.ids, last.keys + 1.0, last.values - 1.0)
    torch.testing.assert_close(out[:, :5], other[:, :5])
    assert not torch.allclose(out[:, 5:], other[:, 5:])
    drafter.loss(batch).backward()
    documents = _documents("sums-l", "held-out")
    assert all(text[:2].isdigit() and "answer: " in text for text in documents)


def test_a_block_reads_blocks_before_it_only() -> None:
    drafter = checks.make(GlideCape)
    batch = checks.batch_of(drafter)
    last = batch.past.layers[-1]
    want = drafter.teach(batch.ids, last.keys, last.values)
    keys = last.keys.clone()
    keys[:, :, 5:] += 1.0
    got = drafter.teach(batch.ids, keys, last.values)
    torch.testing.assert_close(got[:, :10], want[:, :10])
    assert not torch.allclose(got[:, 10:], want[:, 10:])


def test_keys_are_not_rotated_twice() -> None:
    """One query by hand: rotate it to its place, take the cached keys as they are."""
    drafter = checks.make(GlideCape)
    attention = drafter.cross_attn
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64).unbind(0)
    got = attention(x, torch.tensor([[9]]), keys, values, None)
    q = rotate(
        (x @ attention.q_proj.weight.T).view(1, 1, 4, 8).transpose(1, 2), torch.tensor([[9]]), 1e4
    )
    heads = []
    for head in range(4):  # two query heads share a key head
        law = torch.softmax(q[0, head] @ keys[0, head // 2].T / 8**0.5, -1)
        heads.append(law @ values[0, head // 2])
    want = torch.cat(heads, -1) @ attention.o_proj.weight.T
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-5)


def test_candidates_at_the_edges() -> None:
    drafter = checks.make(GlideCape)
    p = torch.tensor([0.0, 0.3, 0.3001, 0.6, 0.6001, 0.8, 0.8001, 1.0], dtype=torch.float64)
    assert drafter.candidates(p).tolist() == [7, 7, 5, 5, 3, 3, 1, 1]
    assert drafter.candidates(p.float()).tolist() == [7, 7, 5, 5, 3, 3, 1, 1]


def test_the_tree_is_a_chain_with_siblings() -> None:
    drafter = checks.make(GlideCape, Settings(edges=(0.033, 0.036), widths=(4, 2, 1)))
    ids = torch.stack(tiny.prompts((9, 9, 9)))
    context = begun(drafter, ids, [8, 8, 8])
    tree = drafter.propose(context, drafter.default_shape)
    chain = drafter.propose(context, Shape(5, 5, 1))
    plain = drafter.propose(begun(drafter, ids, [8, 8, 8]), Shape(5, 5, 1))
    assert torch.equal(plain.tokens, chain.tokens)
    parents = tree.topology.parent.expand(3, -1)
    widths = set()
    for row in range(3):
        spine, law = 0, []
        for depth in range(5):
            kids = [n for n in range(tree.nodes) if parents[row, n] == spine and tree.alive[row, n]]
            assert tree.tokens[row, kids[0]] == chain.tokens[row, depth + 1]
            law.append(len(kids))
            spine = kids[0]
        widths |= set(law)
        assert sum(law) == tree.drafted()[row]
    assert widths <= {4, 2, 1} and len(widths) > 1
    assert with_widths(drafter, (2, 2, 2)).default_shape == Shape(10, 5, 2)


def test_equal_widths_are_uniform() -> None:
    drafter = with_widths(checks.make(GlideCape), (3, 3, 3, 3))
    ids = torch.stack(tiny.prompts((9, 9, 9)))
    tree = drafter.propose(begun(drafter, ids, [8, 8, 8]), drafter.default_shape)
    assert tree.drafted() == [15, 15, 15]
    small = drafter.propose(begun(drafter, ids, [8, 8, 8]), Shape(6, 5, 3))
    assert small.drafted() == [6, 6, 6] and small.topology.max_depth == 5  # the chain comes first


def test_line_between_two_runs() -> None:
    runs = [Drafting(2.0, 4.0), Drafting(2.4, 8.0), Drafting(2.5, 12.0)]
    assert at_equal_cost(runs, 8.0) == pytest.approx(2.4)
    assert at_equal_cost(runs, 10.0) == pytest.approx(2.45)
    assert at_equal_cost(runs, 2.0) == pytest.approx(1.8)
    assert at_equal_cost(runs, 13.0) == pytest.approx(2.525)


def test_the_cache_is_read_where_it_is() -> None:
    """A draft changes with the target's keys, and not at all when the layer has no cross part."""
    for cross in (True, False):
        drafter = checks.make(GlideCape, Settings(cross=cross))
        ids = torch.stack(tiny.prompts((9, 9, 9)))
        context = begun(drafter, ids, [8, 8, 8])
        root = Level(ids[:, 8:], torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), 0)
        before = drafter.expand(root)
        for arena in context.session.cache.arenas:  # type: ignore[union-attr]
            arena.values.mul_(-1.0)
        assert torch.allclose(before, drafter.expand(root)) != cross


def test_sums_are_read_by_the_models_of_sums() -> None:
    assert all(
        text[:2].isdigit() and "answer: " in text for text in _documents("sums-l", "held-out")
    )


def test_learns() -> None:
    checks.learns(checks.make(GlideCape), fall=0.99)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_output_is_the_plain_one(name: str) -> None:
    drafter = checks.make(GlideCape, name=name)
    checks.same_as_plain(drafter, name, (checks.CHAIN, Shape(20, 3, 5)))


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="one more than edges"):
        Settings(widths=(1, 2))
    with pytest.raises(InvalidInputError, match="1 or more"):
        Settings(widths=(3, 2, 1, 0))


def test_round_trip(tmp_path: Path) -> None:
    checks.round_trip(checks.make(GlideCape), tmp_path / "g")
