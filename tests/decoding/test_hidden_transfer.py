"""Hidden Transfer: pseudo states ride along, change nothing, and become the next draft."""

from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import SlotSession
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Shape, Step, Taps, Verdict
from isthmus.systems.speculative.hidden_transfer import HiddenTransfer, Settings, SharedPass

CHAIN, TREE = Shape(3, 3, 1), Shape(9, 3, 3)
LAYERS = [(1, 1, 1), (2, 1, 1), (2, 2)]


def ragged(name: str) -> SlotSession:
    """Three rows of different length."""
    session = cast(SlotSession, tiny.target(name).session(3))
    session.prefill(tiny.prompts())
    return session


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("layers", LAYERS)
def test_a_shared_forward_is_training_at_every_node(name: str, layers: tuple[int, ...]) -> None:
    """Each node of a tree owns the pseudo states that a text ending there gives in training."""
    drafter = checks.make(HiddenTransfer, Settings(layers=layers), name)
    batch = checks.batch_of(drafter)
    with torch.no_grad():
        want = drafter.rollout(batch)
    session = cast(SlotSession, drafter.target.session(3))
    session.prefill(list(batch.ids[:, :6]))
    # node 5 hangs from node 1 beside node 2: it must not be seen by the chain 0-1-2-3-4
    tokens = torch.cat([batch.ids[:, 6:11], torch.full((3, 1), 9)], 1)
    tree = TokenTree(tokens, Topology.of([-1, 0, 1, 2, 3, 1]))
    shared = SharedPass(drafter, session)
    assert shared.finish(tree, None) is not None and shared.states is not None
    torch.testing.assert_close(shared.states[:, :, :5], want[:, :, 6:11], rtol=0, atol=1e-9)
    assert shared.rows == 6 * (1 + len(layers))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mistral"])
def test_pseudo_rows_change_nothing(name: str) -> None:
    """Same logits, same taps, and the same cache afterwards as without them."""
    drafter = checks.make(HiddenTransfer, name=name)
    tokens = torch.stack(tiny.prompts((5, 5, 5), seed=9))
    tree = TokenTree(tokens, Topology.of([-1, 0, 0, 1, 2]))
    plain, ours = ragged(name), ragged(name)
    taps = Taps(final=True, layers=(0, 1, 2))
    ours.ahead = SharedPass(drafter, ours)
    want, got = plain.score(tree, taps=taps), ours.score(tree, taps=taps)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-10)
    assert got.features is not None and want.features is not None
    torch.testing.assert_close(got.features.final, want.features.final)
    for layer in range(3):
        torch.testing.assert_close(got.features.layers[layer], want.features.layers[layer])
    path = torch.tensor([[0, 1, 3], [0, 2, -1], [0, -1, -1]])
    for session in (plain, ours):
        session.keep(path)
    assert plain.lengths == ours.lengths and plain.cache.used == ours.cache.used
    root = TokenTree(tokens[:, :1], chain_topology(1))
    torch.testing.assert_close(ours.score(root).logits, plain.score(root).logits)


def test_identity_at_the_top_is_the_target_itself() -> None:
    drafter = HiddenTransfer(tiny.target("Llama"), Settings(layers=(2,))).double()
    batch = checks.batch_of(drafter)
    with torch.no_grad():
        logits = drafter.guess(drafter.rollout(batch)[:, 0])
    torch.testing.assert_close(logits, batch.target_logits.double(), rtol=0, atol=1e-5)


def test_later_steps_see_earlier_ones_of_their_own_place_only() -> None:
    drafter = checks.make(HiddenTransfer)
    batch = checks.batch_of(drafter)
    with torch.no_grad():
        before = drafter.rollout(batch)
        drafter.transfer[1].weight.mul_(-1.0)
        after = drafter.rollout(batch)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 2], before[:, 2])
    ids = batch.ids.clone()
    ids[:, 9:] = 5  # what comes later is not seen
    later = checks.read(drafter, ids, torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(drafter.rollout(later)[:, :, :9], after[:, :, :9])


def test_without_refinement_the_layers_above_do_nothing() -> None:
    off = checks.make(HiddenTransfer, Settings(refine=False))
    batch = checks.batch_of(off)
    with torch.no_grad():
        states = off.rollout(batch)
        for k, matrix in enumerate(off.transfer):
            torch.testing.assert_close(states[:, k], matrix(batch.features.layers[1]))
    checks.same_as_plain(off, "Llama", (TREE,))


def test_one_draft_is_free_and_the_first_round_has_none() -> None:
    """No forward but the shared one: one call of the last layer a round, and one prefill."""
    drafter: Any = checks.make(HiddenTransfer)
    rows: list[int] = []
    handle = drafter.target.layers[-1].register_forward_hook(
        lambda m, a, out: rows.append(a[0].shape[1])
    )
    result = tiny.generate("Llama", "float64", Fixed(drafter, CHAIN), 12, [0])[0]
    handle.remove()
    drafted = [r.nodes for r in result.rounds]
    assert drafted[0] == 0 and all(d > 0 for d in drafted[1:-1])
    assert rows[:-1] == [8, *(4 * (1 + d) for d in drafted[:-1])]
    assert rows[-1] == 1  # no room is left to draft into


def test_rows_that_nobody_prepared_draft_nothing() -> None:
    drafter = checks.make(HiddenTransfer)
    session, tokens = ragged("Llama"), torch.stack(tiny.prompts((1, 1, 1)))
    drafter.reset(3)
    tree = TokenTree(tokens, chain_topology(1))
    scores = session.score(tree, taps=drafter.taps)
    verdict = Verdict(torch.zeros(3, 1, dtype=torch.int64), tokens[:, 0])
    drafter.observe(Step(tree, scores.logits, verdict, [0] * 3, cast(Any, None), CHAIN))
    assert not bool(drafter._ready.any())


def test_only_the_matrices_learn() -> None:
    drafter = checks.make(HiddenTransfer)
    assert [tuple(p.shape) for p in drafter.parameters()] == [(32, 32)] * 3
    checks.learns(drafter, fall=0.995)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mistral"])
def test_output_is_the_plain_one(name: str) -> None:
    checks.same_as_plain(checks.make(HiddenTransfer, name=name), name, (CHAIN, TREE))


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="BartForConditionalGeneration"):
        HiddenTransfer(tiny.target("Bart"))
    with pytest.raises(InvalidInputError, match="never rise"):
        Settings(layers=(1, 2))
    with pytest.raises(InvalidInputError, match="layers must be 1 to 2"):
        HiddenTransfer(tiny.target("Llama"), Settings(layers=(3,)))


def test_round_trip(tmp_path: Path) -> None:
    checks.round_trip(checks.make(HiddenTransfer), tmp_path / "h")
