"""CTC: the loss and the beam against enumeration of every path."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from isthmus.decoding.ctc import greedy, prefix_beam
from isthmus.errors import InvalidInputError
from isthmus.objectives.ctc import ctc_loss, frames_needed


def scores(frames: int, vocab: int, seed: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, frames, vocab, generator=generator, dtype=torch.float64)
    return (2 * drawn).log_softmax(-1)


def enumerated(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Probability of every text, by adding up all paths [T, V]."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(k for k, _ in itertools.groupby(path) if k)
        total[text] += math.exp(sum(log_probs[t, k].item() for t, k in enumerate(path)))
    return total


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_unbounded_beam_equal_enumeration(seed: int) -> None:
    log_probs = scores(5, 4, seed)
    true = enumerated(log_probs[0])
    found = prefix_beam(log_probs[0], width=0)
    assert {t.tokens for t in found} == set(true)
    assert [t.logprob for t in found] == sorted((t.logprob for t in found), reverse=True)
    for transcript in found:
        assert transcript.logprob == pytest.approx(math.log(true[transcript.tokens]), abs=1e-9)
    texts = sorted(true)
    width = max(map(len, texts))
    targets = torch.tensor([[*t, *[9] * (width - len(t))] for t in texts])
    lengths = torch.tensor([len(t) for t in texts])
    batch = log_probs.expand(len(texts), -1, -1)
    loss = ctc_loss(batch, torch.full((len(texts),), 5), targets, lengths)
    assert loss.fits.all()
    wanted = torch.tensor([-math.log(true[t]) for t in texts])
    torch.testing.assert_close(loss.nats, wanted, atol=1e-4, rtol=1e-5)


def test_the_beam_finds_better_texts_than_the_best_path() -> None:
    other = 0
    for seed in range(60):
        log_probs = scores(5, 4, seed)
        true = enumerated(log_probs[0])
        best = max(true, key=lambda text: true[text])
        assert prefix_beam(log_probs[0], width=0)[0].tokens == best
        other += greedy(log_probs, torch.tensor([5]))[0].tokens != best
    assert 6 <= other <= 30


def test_a_text_that_does_not_fit_is_told_and_has_no_gradient() -> None:
    log_probs = scores(3, 4, 0, rows=3).requires_grad_()
    targets = torch.tensor([[1, 1, 2], [1, 2, 3], [1, 0, 0]])
    target_lengths = torch.tensor([3, 3, 1])
    assert frames_needed(targets, target_lengths).tolist() == [4, 3, 1]
    loss = ctc_loss(log_probs, torch.tensor([3, 3, 3]), targets, target_lengths)
    assert loss.fits.tolist() == [False, True, True] and loss.nats[0] == 0
    loss.nats.sum().backward()
    assert log_probs.grad is not None
    assert not log_probs.grad[0].any() and log_probs.grad[1].any()


def test_padding_changes_nothing() -> None:
    log_probs = scores(6, 4, 1, rows=2)
    lengths, targets = torch.tensor([6, 4]), torch.tensor([[1, 2], [3, 0]])
    whole = ctc_loss(log_probs, lengths, targets, torch.tensor([2, 1])).nats
    alone = ctc_loss(log_probs[1:, :4], lengths[1:], targets[1:, :1], torch.tensor([1])).nats
    torch.testing.assert_close(whole[1:], alone)
    assert greedy(log_probs, lengths)[1] == greedy(log_probs[1:, :4], torch.tensor([4]))[0]


def test_frames_are_those_of_the_first_emission() -> None:
    path = torch.tensor([0, 3, 3, 0, 3, 1])
    sure = (torch.nn.functional.one_hot(path, 4) * 20.0).log_softmax(-1)
    assert prefix_beam(sure, width=4)[0].frames == greedy(sure[None], torch.tensor([6]))[0].frames
    assert prefix_beam(sure, width=4)[0].frames == (1, 4, 5)


def test_a_language_model_and_a_bonus_change_the_order_but_not_the_sums() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.4]]).log()
    plain = {t.tokens: t for t in prefix_beam(log_probs)}
    told = prefix_beam(
        log_probs, language_model=lambda p: 0.0 if p[-1] == 2 else -2.0, weight=0.5, bonus=0.1
    )
    assert told[0].tokens == (2,) and told[0].logprob == pytest.approx(math.log(0.4))
    for t in told:
        says = 0.0 if not t.tokens else 0.1 - (t.tokens[0] != 2)
        assert t.score == pytest.approx(plain[t.tokens].logprob + says)
    assert prefix_beam(log_probs, candidates=1)[0].tokens == (1,)


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="0 is the blank"):
        ctc_loss(scores(3, 4, 0), torch.tensor([3]), torch.tensor([[0]]), torch.tensor([1]))
    with pytest.raises(InvalidInputError, match="0 is the blank"):
        ctc_loss(scores(3, 4, 0), torch.tensor([3]), torch.tensor([[4]]), torch.tensor([1]))
    with pytest.raises(InvalidInputError, match=r"scores \[T, V\]"):
        prefix_beam(torch.zeros(0, 3))
