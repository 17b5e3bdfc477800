"""Kangaroo: the first layers draft, unsure tokens end a draft, verification goes on from there."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.kangaroo import Kangaroo, Settings, with_policy, work

SURE = Settings(exit_layer=1, threshold=0.0)


def after(drafter: Any, ids: torch.Tensor, count: int) -> Any:
    """The drafter with the first tokens of a batch verified, and a context at the next one."""
    session = drafter.target.session(len(ids))
    features = session.prefill(list(ids[:, :count]), taps=drafter.taps)
    lengths = [count + 1] * len(ids)
    generator = torch.Generator().manual_seed(0)
    rows = list(range(len(ids)))
    context = Context(ids[:, : count + 1], lengths, lengths, Law(), generator, rows)
    context.features, context.session = features, session
    drafter.begin(context, drafter.target)
    return context


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_drafting_equals_training(name: str) -> None:
    """Step by step with caches, on the same tokens, the logits of one pass without any."""
    drafter = checks.make(Kangaroo, SURE, name)
    batch = checks.batch_of(drafter)
    hidden, n = batch.features.layers[1], batch.ids.shape[1]
    want = drafter.adapt(hidden, torch.arange(n)[None])
    after(drafter, batch.ids, 8)
    zero = torch.zeros(3, 1, dtype=torch.int64)
    with torch.no_grad():
        for depth, place in enumerate(range(8, n)):
            level = Level(batch.ids[:, place : place + 1], zero, torch.zeros(3, 1), depth)
            got = drafter.expand(level)
            torch.testing.assert_close(got[:, 0], want[:, place], rtol=0, atol=1e-9)


def test_learns_and_the_target_does_not() -> None:
    checks.learns(checks.make(Kangaroo, SURE), fall=0.985)


@pytest.mark.parametrize(("name", "threshold"), [("Llama", 0.1), ("GPT2", 0.1), ("Mistral", 0.0)])
def test_output_is_the_plain_one(name: str, threshold: float) -> None:
    """At every accepted count from 0 up: the drafter here is right about every other time."""
    drafter = checks.make(Kangaroo, Settings(threshold=threshold), name)
    checks.same_as_plain(drafter, name, (checks.CHAIN, checks.TREE))


def test_verification_never_runs_the_first_layer_again() -> None:
    drafter = checks.make(Kangaroo, SURE)
    rows: dict[int, int] = {0: 0, 1: 0}
    handles = [
        layer.register_forward_hook(
            lambda m, a, out, i=i: rows.__setitem__(i, rows[i] + a[0].shape[1])
        )
        for i, layer in enumerate(drafter.target.layers)
    ]
    result = tiny.generate("Llama", "float64", Fixed(drafter, Shape(3, 3, 1)), 12, [0])[0]
    for handle in handles:
        handle.remove()
    assert rows[0] == rows[1] == 8 + result.stats.drafted + result.stats.target_forwards


def test_a_draft_ends_after_its_first_unsure_token() -> None:
    drafter = checks.make(Kangaroo, SURE)
    ids = torch.stack(tiny.prompts((9, 9, 9)))
    context = after(drafter, ids, 8)
    long = drafter.propose(context, Shape(6, 6, 1))
    tops = torch.stack(drafter._tops, 1)  # [3, 6]
    assert long.drafted() == [6, 6, 6] and tops.shape == (3, 6)
    for eta in (float(tops[:, 1].median()) + 1e-5, float(tops.max()) + 1e-5):
        stopping = with_policy(drafter, eta, 6)
        tree = stopping.propose(after(stopping, ids, 8), Shape(6, 6, 1))
        want = [next((i for i, p in enumerate(row) if p < eta), 5) + 1 for row in tops.tolist()]
        assert tree.drafted() == want
        alive = tree.alive
        assert torch.equal(tree.tokens[alive], long.tokens[:, : tree.nodes][alive])


def test_without_the_adapter_there_is_a_norm_only() -> None:
    off = checks.make(Kangaroo, Settings(adapter=False))
    assert [n for n, _ in off.named_parameters()] == ["norm.weight"]
    h = torch.randn(1, 3, 32, dtype=torch.float64)
    where = torch.arange(3)[None]
    torch.testing.assert_close(off.adapt(h, where)[:, 2], off.adapt(h[:, 2:], where[:, :1])[:, 0])
    on = checks.make(Kangaroo)
    assert not torch.allclose(on.adapt(h, where)[:, 2], on.adapt(h[:, 2:], where[:, :1])[:, 0])
    fresh = Kangaroo(tiny.target("Llama"), Settings(adapter=False)).double()
    torch.testing.assert_close(fresh.norm.weight, fresh.slices.norm.weight)
    checks.same_as_plain(off, "Llama", (checks.CHAIN,))


def test_adapter_has_four_square_matrices_and_two_norms() -> None:
    drafter = Kangaroo(tiny.target("GPT2"))  # as many key heads as query heads
    assert sum(p.numel() for p in drafter.parameters()) == 4 * 32 * 32 + 2 * 32


def test_work_by_hand() -> None:
    """Two layers, one of them shallow, no adapter: 1 + 4 half-forwards and one half."""
    off = checks.make(Kangaroo, Settings(adapter=False))
    norm = 32 / sum(p.numel() for p in off.target.layers[0].parameters())
    assert work(off, 4) == pytest.approx((5 * (1 + norm) + 1) / 2)


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="BartForConditionalGeneration"):
        Kangaroo(tiny.target("Bart"))
    with pytest.raises(InvalidInputError, match="exit_layer"):
        Kangaroo(tiny.target("Llama"), Settings(exit_layer=0))


def test_round_trip(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Kangaroo), tmp_path / "k")
