"""Chimera: two streams in training are what drafting does step by step."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.layers import round_starts
from isthmus.errors import InvalidInputError
from isthmus.systems.speculative.chimera import Chimera, Settings


def one_round(drafter: Chimera, batch: Any, start: int) -> list[torch.Tensor]:
    """Logits [B, V] of every place from ``start`` on, drafted with caches on the true tokens."""
    drafter.reset(3)
    with torch.no_grad():
        for a, b in ((0, start // 2), (start // 2, start)):  # verified in two rounds
            part = checks.prefix(batch, b)
            cut = type(part)(
                part.tokens[:, a:],
                part.following[:, a:],
                type(part.features)(part.final[:, a:]),
                part.valid[:, a:],
            )
            if b > a:
                drafter.absorb(cut)
        zero, out = torch.zeros(3, 1, dtype=torch.int64), []
        for depth, place in enumerate(range(start, batch.ids.shape[1])):
            level = Level(batch.ids[:, place : place + 1], zero, torch.zeros(3, 1), depth)
            out.append(drafter.expand(level)[:, 0])
    return out


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
@pytest.mark.parametrize("start", [1, 2, 7])
def test_two_streams_are_stepwise_drafting(name: str, start: int) -> None:
    drafter = checks.make(Chimera, name=name)
    batch = checks.batch_of(drafter)
    t = batch.ids.shape[1]
    starts = torch.where(torch.arange(t) < start, 0, start)
    with torch.no_grad():
        want = drafter.logits(*drafter.two_streams(batch.ids, batch.final, starts))
    for place, got in enumerate(one_round(drafter, batch, start), start):
        torch.testing.assert_close(got, want[:, place], rtol=0, atol=1e-9)


def test_the_label_does_not_leak() -> None:
    """o_i must not change with the features of its own round, nor anything with the future."""
    drafter = checks.make(Chimera)
    batch = checks.batch_of(drafter)
    starts = round_starts(14, 5, torch.Generator().manual_seed(3))
    o, _ = drafter.two_streams(batch.ids, batch.final, starts)
    for place in range(14):
        spoiled = batch.final.clone()
        spoiled[:, int(starts[place]) :] += 1.0
        ids = batch.ids.clone()
        ids[:, place + 1 :] = 5
        again, _ = drafter.two_streams(ids, spoiled, starts)
        torch.testing.assert_close(again[:, place], o[:, place])
    spoiled = batch.final.clone()
    spoiled[:, 0] += 1.0
    assert not torch.allclose(drafter.two_streams(batch.ids, spoiled, starts)[0], o)


def test_the_head_starts_as_the_target_s_on_the_sum() -> None:
    drafter = Chimera(tiny.target("Llama")).double()
    o, g = torch.randn(2, 3, 32).double(), torch.randn(2, 3, 32).double()
    torch.testing.assert_close(drafter.logits(o, g), drafter.head(o + g), rtol=0, atol=1e-5)


def test_three_tokens_count_and_the_first_repeats() -> None:
    drafter, one = checks.make(Chimera), checks.make(Chimera, Settings(trigram=False))
    a, b = torch.tensor([7, 8, 9]), torch.tensor([5, 8, 9])
    assert not torch.allclose(drafter.encode(a), drafter.encode(b))
    torch.testing.assert_close(one.encode(a), one.encode(b))
    torch.testing.assert_close(one.encode(a), one.embed(torch.tensor(9)))
    batch = checks.batch_of(drafter)
    start = torch.zeros(14, dtype=torch.int64)
    _, g = drafter.two_streams(batch.ids, batch.final, start)
    x = batch.ids[0].tolist()
    for place, trail in enumerate(([x[0]] * 3, [x[0], x[0], x[1]], x[:3], x[1:4])):
        torch.testing.assert_close(g[0, place], drafter.encode(torch.tensor(trail)))


def test_without_context_only_three_tokens_count() -> None:
    off = checks.make(Chimera, Settings(context=False))
    batch = checks.batch_of(off)
    starts = round_starts(14, 5, torch.Generator().manual_seed(3))
    other = batch.ids.clone()
    other[:, :5] = 3
    a, b = (off.logits(*off.two_streams(ids, batch.final, starts)) for ids in (batch.ids, other))
    torch.testing.assert_close(a[:, 7:], b[:, 7:])
    on = checks.make(Chimera)
    a, b = (
        on.logits(*on.two_streams(ids, batch.final + k, starts))
        for k, ids in ((0.0, batch.ids), (0.5, other))
    )
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("settings", [Settings(), Settings(context=False)])
def test_learns(settings: Settings) -> None:
    checks.learns(checks.make(Chimera, settings), fall=0.99)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_output_is_the_plain_one(name: str) -> None:
    checks.same_as_plain(checks.make(Chimera, name=name), name, (checks.CHAIN, checks.TREE))


@pytest.mark.parametrize("settings", [Settings(context=False), Settings(trigram=False)])
def test_output_is_the_plain_one_with_a_half(settings: Settings) -> None:
    checks.same_as_plain(checks.make(Chimera, settings), "Llama", (checks.TREE,))


def test_bad_settings() -> None:
    with pytest.raises(InvalidInputError, match="round_length must be 1 or more"):
        Settings(round_length=0)


def test_round_trip(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Chimera), tmp_path / "c")
