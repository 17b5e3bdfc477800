"""Mixture of Attentions: training sees what drafting sees, and the target's whole cache is read."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.cache import LayerShape
from isthmus.decoding.law import Law
from isthmus.decoding.layers import Memory, round_starts
from isthmus.decoding.policy import Fixed
from isthmus.errors import InvalidInputError
from isthmus.roles import Context
from isthmus.systems.speculative.mixture_of_attentions import (
    LayerAttention,
    MixtureOfAttentions,
    Settings,
)


def past(drafter: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layers = [batch.past.layers[i] for i in drafter.read_layers]
    return torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers])


def begun(drafter: Any, ids: torch.Tensor, counts: list[int]) -> Any:
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
@pytest.mark.parametrize("all_layers", [True, False])
def test_training_is_stepwise_drafting(name: str, all_layers: bool) -> None:
    drafter = checks.make(MixtureOfAttentions, Settings(all_layers=all_layers), name)
    batch, counts = checks.batch_of(drafter), [7, 3, 9]
    t = batch.ids.shape[1]
    begun(drafter, batch.ids, counts)
    zero = torch.zeros(3, 1, dtype=torch.int64)
    places = torch.tensor(counts)[:, None]
    for depth in range(t - max(counts)):
        level = Level(batch.ids.gather(1, places + depth), zero, torch.zeros(3, 1), depth)
        got = drafter.expand(level)
        for row, n in enumerate(counts):
            starts = torch.where(torch.arange(t) < n, 0, n)
            with torch.no_grad():
                want = drafter.head(drafter.teach(batch.ids, *past(drafter, batch), starts))
            torch.testing.assert_close(
                got[row, 0], want[row, n + depth], rtol=0, atol=1e-9, msg=f"{name} {row} {depth}"
            )


def test_queries_see_the_cache_up_to_their_round_only() -> None:
    drafter = checks.make(MixtureOfAttentions)
    batch = checks.batch_of(drafter)
    keys, values = past(drafter, batch)
    starts = round_starts(14, 4, torch.Generator().manual_seed(1))
    want = drafter.teach(batch.ids, keys, values, starts)
    for place in range(14):
        start = int(starts[place])
        if start == 0:
            continue
        spoiled = keys.clone()
        spoiled[:, :, :, start:] += 1.0
        got = drafter.teach(batch.ids, spoiled, values, starts)
        torch.testing.assert_close(got[:, place], want[:, place])
        spoiled[:, :, :, start - 1] += 1.0
        got = drafter.teach(batch.ids, spoiled, values, starts)
        assert not torch.allclose(got[:, place], want[:, place])
    assert bool(torch.isfinite(want).all())


def test_rounds_of_a_given_period() -> None:
    """Period 4, first start at 2: by hand."""
    for seed in range(50):
        starts = round_starts(9, 4, torch.Generator().manual_seed(seed)).tolist()
        if starts[1] == 0 and starts[2] == 2:
            assert starts == [0, 0, 2, 2, 2, 2, 6, 6, 6]
            return
    raise AssertionError("no draw starts at 2")


def test_layers_are_attended_to_in_any_order_but_are_told_apart() -> None:
    """One state a place; without rotary the mean over layers would not know their order."""
    torch.manual_seed(0)
    mix = LayerAttention(LayerShape(2, 8, 8), 32).double()
    keys, values = torch.randn(2, 3, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
    states = mix(keys, values)
    assert states.shape == (1, 5, 32)
    for place in (0, 4):  # places do not mix
        alone = mix(keys[:, :, :, place : place + 1], values[:, :, :, place : place + 1])
        torch.testing.assert_close(alone[:, 0], states[:, place])
    assert not torch.allclose(mix(keys.flip(0), values.flip(0)), states)


def test_the_off_switch_reads_the_last_layer_only() -> None:
    on, off = (checks.make(MixtureOfAttentions, Settings(all_layers=a)) for a in (True, False))
    assert list(on.read_layers) == [0, 1] and list(off.read_layers) == [1]
    assert sum(p.numel() for p in on.parameters()) == sum(p.numel() for p in off.parameters())


def test_rejected_places_are_forgotten() -> None:
    drafter = checks.make(MixtureOfAttentions)
    lengths: list[list[int]] = []
    absorb = drafter.absorb

    def spy(fresh: Any) -> None:
        absorb(fresh)
        memory: Memory = drafter._memory
        lengths.append([*memory.lengths, *drafter._cache.lengths])

    drafter.absorb = spy
    result = tiny.generate("Llama", "float64", Fixed(drafter, checks.TREE), 12, [0])[0]
    emitted = [r.emitted for r in result.rounds]
    want = [8 + sum(emitted[:i]) for i in range(len(emitted) + 1)]
    assert [n for n, _ in lengths][:-1] == want[:-1]
    assert all(a == b for a, b in lengths)


def test_learns() -> None:
    checks.learns(checks.make(MixtureOfAttentions), fall=0.97)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_output_is_the_plain_one(name: str) -> None:
    drafter = checks.make(MixtureOfAttentions, name=name)
    checks.same_as_plain(drafter, name, (checks.CHAIN, checks.TREE))


def test_bad_settings() -> None:
    with pytest.raises(InvalidInputError, match="1 <= shortest <= longest"):
        Settings(shortest=9, longest=8)


def test_round_trip(tmp_path: Path) -> None:
    checks.round_trip(checks.make(MixtureOfAttentions), tmp_path / "m")
