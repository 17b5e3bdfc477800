"""Bottleneck decoders: who sees what, by gradient, and the bag of words at its minimum."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.models.bottleneck import ABSENT, EnhancedDecoder, bag_loss, enhanced_mask, word_scores

PRESENT = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def _drawn(rate: float, **options: int) -> torch.Tensor:
    return enhanced_mask(PRESENT, rate, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_no_place_sees_itself_and_all_see_the_first(rate: float) -> None:
    seen = _drawn(rate)
    assert not seen.diagonal(dim1=1, dim2=2).any()
    assert seen[:, 1:, 0].all() and not seen[:, 0, 0].any()
    assert not seen[1, :, 4:].any()


def test_rows_have_masks_of_their_own_at_the_rate() -> None:
    wide = torch.ones(4, 200, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    seen = enhanced_mask(wide, 0.3, generator=generator)
    assert float(seen[:, 1:, 1:].float().mean()) == pytest.approx(0.7 * 198 / 199, abs=0.01)
    assert len(torch.unique(seen[0], dim=0)) == 200
    shared = enhanced_mask(wide, 0.3, patterns=5, generator=generator)
    others = torch.arange(1, 200)
    others = others[(others != 7) & (others != 12)]
    assert torch.equal(shared[0, 7, others], shared[0, 12, others])  # 7 and 12: one pattern of 5
    assert not torch.equal(shared[0, 7, others], shared[0, 8, others])


def test_the_gradient_knows_only_what_a_row_sees() -> None:
    torch.manual_seed(0)
    decoder, seen = EnhancedDecoder(8, 2).double(), _drawn(0.5)
    vector = torch.randn(2, 8, dtype=torch.double, requires_grad=True)
    tokens = torch.randn(2, 6, 8, dtype=torch.double, requires_grad=True)
    places = torch.randn(6, 8, dtype=torch.double)
    states = decoder(vector, tokens, places, seen)
    assert states.shape == (2, 5, 8)
    weights = torch.randn(8, dtype=torch.double)
    for row in range(1, 6):
        toward = (states[:, row - 1] @ weights).sum()
        to_vector, to_tokens = torch.autograd.grad(toward, [vector, tokens], retain_graph=True)
        touched = to_tokens.abs().sum(-1) > 0
        expected = seen[:, row].clone()
        expected[:, 0] = False  # the vector stands there
        assert torch.equal(touched, expected) and not touched[:, row].any()
        assert (to_vector.abs().sum(-1) > 0).all()


def test_the_decoder_is_torchs_attention() -> None:
    torch.manual_seed(0)
    decoder, seen = EnhancedDecoder(8, 2), _drawn(0.5)
    vector, tokens, places = torch.randn(2, 8), torch.randn(2, 6, 8), torch.randn(6, 8)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    parts = (decoder.query, decoder.key, decoder.value)
    theirs.in_proj_weight.data = torch.cat([p.weight for p in parts]).detach()
    theirs.in_proj_bias.data = torch.cat([p.bias for p in parts]).detach()
    theirs.out_proj.load_state_dict(decoder.out.state_dict())
    asked = (vector[:, None] + places)[:, 1:]
    known = torch.cat([vector[:, None], tokens[:, 1:]], 1)
    hidden = (~seen[:, 1:]).repeat_interleave(2, 0)
    mixed, _ = theirs(asked, known, known, attn_mask=hidden)
    x = decoder.norm(asked + mixed)
    expected = decoder.last_norm(x + decoder.feed_forward(x))
    torch.testing.assert_close(decoder(vector, tokens, places, seen), expected)


def test_a_text_of_one_token_has_the_scores_of_that_token() -> None:
    torch.manual_seed(0)
    head, states = torch.nn.Linear(4, 7), torch.randn(1, 3, 4)
    found = word_scores(states, torch.tensor([[False, True, False]]), head)
    torch.testing.assert_close(found, head(states[:, 1]))


@pytest.mark.parametrize("block", [1, 2, 5, 9])
def test_blocks_change_neither_values_nor_gradients(block: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 7).double()
    states = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    counted = torch.tensor([[False, True, True, True, True], [False, True, True, False, False]])
    whole = head(states).masked_fill(~counted[..., None], ABSENT).amax(1)
    ours = word_scores(states, counted, head, block=block)
    torch.testing.assert_close(ours, whole)
    inputs = [states, *head.parameters()]
    expected = torch.autograd.grad(whole.square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_bag_is_least_where_the_scores_are_its_law() -> None:
    ids = torch.tensor([[3, 1, 1, 2, 0], [4, 4, 2, 0, 0]])
    counted = torch.tensor([[False, True, True, True, False], [True, True, True, False, False]])
    p = torch.tensor([[0, 2, 1, 0, 0], [0, 0, 1, 0, 2]]).double() / 3
    scores = (p + 1e-12).log().requires_grad_()
    loss = bag_loss(scores, ids, counted)
    entropy = -(p * (p + 1e-12).log()).sum()
    assert float(loss.detach()) == pytest.approx(float(entropy), abs=1e-9)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(gradient.abs().max()) < 1e-9
    for seed in range(5):
        moved = scores.detach() + torch.randn(
            2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.double
        )
        assert float(bag_loss(moved, ids, counted)) > float(loss.detach())


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="rate"):
        enhanced_mask(PRESENT, 1.5)
    with pytest.raises(InvalidInputError, match="heads"):
        EnhancedDecoder(8, 3)
    with pytest.raises(InvalidInputError, match="do not fit"):
        EnhancedDecoder(8, 2)(torch.zeros(1, 8), torch.zeros(1, 1, 8), torch.zeros(1, 8), PRESENT)
    with pytest.raises(InvalidInputError, match="block"):
        word_scores(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), lambda x: x, block=0)
