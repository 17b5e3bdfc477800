"""Span corruption against its definition, and AdamW with scaled steps against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isthmus.errors import InvalidInputError
from isthmus.objectives.span_corruption import SpanCorruption, lengths
from isthmus.training.optimizers import AdamWScale

TOP, END = 1000, 1


def merge(inputs: list[int], targets: list[int]) -> list[int]:
    """The text that inputs and targets were cut from."""
    noise = {}
    for token in targets[:-1]:
        if token > TOP - 100:
            noise[token] = current = []
        else:
            current.append(token)
    out = []
    for token in inputs[:-1]:
        out += noise.get(token, [token])
    return out


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 80), st.sampled_from([0.15, 0.3, 0.5]), st.sampled_from([1.0, 3.0]))
def test_inputs_and_targets_merge_to_the_text(raw, density, mean_span):
    assume(round(round(raw * density) / mean_span) <= raw - round(raw * density))
    rule = SpanCorruption(raw, 100, TOP, END, density, mean_span)
    ids = torch.arange(10, 10 + raw).expand(6, -1).contiguous()
    noise = rule.noise_mask(6, torch.Generator().manual_seed(raw))
    assert noise[:, -1].all() and not noise[:, 0].any()
    assert (noise.sum(1) == max(1, min(round(raw * density), raw - 1))).all()
    for inputs, targets, text in zip(
        *(t.tolist() for t in rule.corrupt(ids, noise)), ids.tolist(), strict=True
    ):
        assert merge(inputs, targets) == text
        assert inputs[-1] == targets[-1] == END
        marks = [t for t in inputs if t > TOP - 100]
        assert marks == [TOP - 1 - i for i in range(len(marks))]


def test_every_cut_is_equally_likely():
    rule = SpanCorruption(7, 9, TOP, END, 0.3, 1.0)  # two noise tokens in two spans
    noise = rule.noise_mask(6_000, torch.Generator().manual_seed(0))
    codes = (noise.long() * 2 ** torch.arange(7)).sum(1)
    found, counts = codes.unique(return_counts=True)
    assert len(found) == 4  # five clean tokens in two runs: 1+4, 2+3, 3+2, 4+1
    assert counts.min() > 1_350 and counts.max() < 1_650


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(1, 9, TOP, END), "at least 2 tokens"),
        (lambda: SpanCorruption(100, 3, TOP, END), "5 spans and there are 3 sentinels"),
        (lambda: SpanCorruption(10, 99, TOP, END, 0.9, 1.0), "do not fit"),
        (lambda: lengths(2), "too short"),
    ],
)
def test_impossible_rows_are_refused(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_a_scaled_step_is_adam_where_the_weights_have_size_one():
    weights = [torch.nn.Parameter(torch.tensor([1.0, -1.0, 1.0])) for _ in range(2)]
    pair = (
        AdamWScale([weights[0]], lr=0.01, eps=1e-12),
        torch.optim.Adam([weights[1]], lr=0.01, eps=1e-12),
    )
    for weight, optimizer in zip(weights, pair, strict=True):
        weight.grad = torch.tensor([0.5, 2.0, -1.0])
        optimizer.step()
    torch.testing.assert_close(*weights)
    zero = torch.nn.Parameter(torch.zeros(2))
    zero.grad = torch.ones(2)
    AdamWScale([zero], lr=0.5).step()
    torch.testing.assert_close(zero.detach(), torch.full((2,), -0.5e-3), rtol=1e-3, atol=0)
