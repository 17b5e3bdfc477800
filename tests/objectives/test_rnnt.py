"""The transducer loss: enumeration of all alignments, gradients, a known value, bad input."""

import itertools
import math

import pytest
import torch

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.objectives.rnnt import rnnt_loss


def enumerated(logits: torch.Tensor, targets: list[int], blank: int = 0) -> float:
    """-log p of one row [T, U + 1, V], adding up every order of reading and writing."""
    time, count = logits.shape[0], len(targets)
    log_probs, total = logits.log_softmax(-1), 0.0
    for writes in itertools.combinations(range(time - 1 + count), count):
        t, u, log_p = 0, 0, 0.0
        for step in range(time - 1 + count):
            token = targets[u] if step in writes else blank
            log_p += float(log_probs[t, u, token])
            t, u = (t, u + 1) if step in writes else (t + 1, u)
        total += math.exp(log_p + float(log_probs[t, u, blank]))  # the last frame is read, too
    return -math.log(total)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


RAGGED = (torch.tensor([4, 3, 1, 2]), torch.tensor([3, 2, 1, 0]))
TARGETS = torch.tensor([[1, 1, 4], [2, 3, 99], [4, -7, 0], [0, 0, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_enumeration(seed: int) -> None:
    logits = drawn(1, 3, 3, 4, seed=seed)
    found = rnnt_loss(logits, torch.tensor([[2, 1]]), torch.tensor([3]), torch.tensor([2]))
    assert float(found) == pytest.approx(enumerated(logits[0], [2, 1]), abs=1e-12)


@pytest.mark.parametrize("blank", [0, 5])
def test_rows_of_all_lengths_equal_enumeration(blank: int) -> None:
    logits = drawn(4, 4, 4, 6)
    found = rnnt_loss(logits, TARGETS, *RAGGED, blank=blank)
    for row, time, count in zip(range(4), *(x.tolist() for x in RAGGED), strict=True):
        alone = logits[row, :time, : count + 1]
        wanted = enumerated(alone, TARGETS[row, :count].tolist(), blank)
        assert float(found[row]) == pytest.approx(wanted, abs=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    logits = drawn(4, 4, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rnnt_loss(x, TARGETS, *RAGGED), (logits,))
    rnnt_loss(logits, TARGETS, *RAGGED, reduction="sum").backward()
    assert logits.grad is not None
    assert not logits.grad[1, 3:].any() and not logits.grad[1, :, 3:].any()
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(4, 4, 4).double())


def test_gradients_are_those_of_the_recursion() -> None:
    """Against autograd through the recursion of the paper, cell by cell."""
    logits = drawn(1, 6, 5, 7, seed=3).requires_grad_()
    targets = torch.tensor([[3, 3, 1, 6]])
    log_probs = logits.log_softmax(-1)[0]
    alpha = {(0, 0): log_probs.new_zeros(())}
    for t, u in itertools.product(range(6), range(5)):
        ways = []
        if t:
            ways.append(alpha[t - 1, u] + log_probs[t - 1, u, 0])
        if u:
            ways.append(alpha[t, u - 1] + log_probs[t, u - 1, int(targets[0, u - 1])])
        if ways:
            alpha[t, u] = torch.stack(ways).logsumexp(0)
    wanted = -(alpha[5, 4] + log_probs[5, 4, 0])
    (gradient,) = torch.autograd.grad(wanted, logits)
    found = rnnt_loss(logits, targets, torch.tensor([6]), torch.tensor([4]), reduction="mean")
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits)[0], gradient, atol=1e-14, rtol=1e-12
    )


def test_the_value_that_every_implementation_gives() -> None:
    """The example of warp-transducer's tests."""
    values = """0.1 0.6 0.1 0.1 0.1  0.1 0.1 0.6 0.1 0.1  0.1 0.1 0.2 0.8 0.1
                0.1 0.6 0.1 0.1 0.1  0.1 0.1 0.2 0.1 0.1  0.7 0.1 0.2 0.1 0.1"""
    numbers = torch.tensor([float(v) for v in values.split()], dtype=torch.float64)
    logits = numbers.view(1, 2, 3, 5)
    found = rnnt_loss(logits, torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([2]))
    assert float(found) == pytest.approx(4.495666773770733, abs=1e-12)


def test_precision_and_what_lies_beyond_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, 30, (2, 40), generator=generator)
    frames, lengths = torch.tensor([100, 60]), torch.tensor([40, 12])
    logits = drawn(2, 100, 41, 30)
    true = rnnt_loss(logits, targets, frames, lengths)
    short = rnnt_loss(logits.float(), targets, frames, lengths)
    assert short.dtype == torch.float32
    torch.testing.assert_close(short.double(), true, atol=1e-4, rtol=1e-6)
    half = rnnt_loss(logits.bfloat16(), targets, frames, lengths)
    torch.testing.assert_close(half.double(), true, rtol=1e-2, atol=0)
    dirty = logits.clone()
    dirty[1, 60:], dirty[1, :, 13:] = math.nan, math.inf
    dirty.requires_grad_()
    again = rnnt_loss(dirty, targets, frames, lengths)
    assert torch.equal(again, true)
    again.sum().backward()
    assert dirty.grad is not None and dirty.grad.isfinite().all()
    assert not dirty.grad[1, 60:].any()


def test_fastemit_weighs_writing_and_keeps_the_value() -> None:
    logits = drawn(4, 4, 4, 6).requires_grad_()
    plain, fast = (rnnt_loss(logits, TARGETS, *RAGGED, fastemit=x) for x in (0.0, 0.5))
    assert torch.equal(plain, fast)
    (a,), (b,) = (torch.autograd.grad(x.sum(), logits) for x in (plain, fast))
    assert torch.equal(a[3], b[3])  # an empty text writes nothing
    # at the first cell the gradient of a token no text asks for is its probability times visits
    probability = logits.detach().softmax(-1)[0, 0, 0]
    writes = float(a[0, 0, 0, 5] / probability[5]) - float(probability[0] - a[0, 0, 0, 0])
    assert float((b - a)[0, 0, 0, 5] / probability[5]) == pytest.approx(0.5 * writes)


def test_a_text_without_probability_has_no_gradient() -> None:
    logits = drawn(2, 3, 3, 4)
    logits[0, :, 1, 2] = -math.inf
    logits.requires_grad_()
    targets = torch.tensor([[1, 2], [1, 3]])
    found = rnnt_loss(logits, targets, torch.tensor([3, 3]), torch.tensor([2, 2]))
    assert found[0] == math.inf and found[1].isfinite()
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert not logits.grad[0].any() and logits.grad[1].any()


def test_bad_input() -> None:
    logits, targets = torch.zeros(1, 2, 3, 4), torch.tensor([[1, 2]])
    two = torch.tensor([2])
    with pytest.raises(InvalidInputError, match=r"takes logits \[B, T, U \+ 1, V\]"):
        rnnt_loss(logits[0], targets, two, two)
    with pytest.raises(InvalidInputError, match=r"frames are from 1 to 2, got \[3\]"):
        rnnt_loss(logits, targets, torch.tensor([3]), two)
    with pytest.raises(InvalidInputError, match=r"frames are from 1 to 2, got \[0\]"):
        rnnt_loss(logits, targets, torch.tensor([0]), two)
    with pytest.raises(InvalidInputError, match=r"lengths are from 0 to 2, got \[3\]"):
        rnnt_loss(logits, targets, two, torch.tensor([3]))
    with pytest.raises(InvalidInputError, match="without the blank, 0"):
        rnnt_loss(logits, torch.tensor([[1, 0]]), two, two)
    with pytest.raises(InvalidInputError, match="from 0 to 3"):
        rnnt_loss(logits, torch.tensor([[1, 4]]), two, two)
    with pytest.raises(InvalidInputError, match="fastemit"):
        rnnt_loss(logits, targets, two, two, fastemit=-1.0)
    with pytest.raises(UnknownNameError, match="reduction"):
        rnnt_loss(logits, targets, two, two, reduction="max")  # type: ignore[arg-type]
