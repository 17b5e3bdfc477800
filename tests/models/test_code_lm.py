"""The model of codes: steps give what the whole gives, and nothing sees its own frame."""

import numpy as np
import pytest
import torch

from isthmus.codecs.laws import frequencies, one_thread
from isthmus.errors import InvalidInputError
from isthmus.models.code_lm import CodeLM, CodeState


def model() -> CodeLM:
    torch.manual_seed(0)
    lm = CodeLM(3, 11, 8, 2, 2, 16, reach=5).eval()
    for block in lm.blocks:
        block.bias.data.normal_()
    return lm


@pytest.mark.parametrize("used", [1, 3])
def test_steps_give_what_the_whole_gives(used: int) -> None:
    lm, codes = model(), torch.randint(11, (3, 2, 17))[:used]
    whole, state = lm(codes), CodeState()
    for t in range(17):
        logits, state = lm.step(state, used, 2)
        assert torch.allclose(logits, whole[:, :, t], atol=1e-5), t
        state.last = codes[:, :, t]
        assert state.keys[0].shape[2] <= 5


def test_a_frame_sees_only_what_is_before_it() -> None:
    lm, codes = model(), torch.randint(11, (3, 1, 12))
    other = codes.clone()
    other[:, :, 6:] = (other[:, :, 6:] + 1) % 11
    assert torch.equal(lm(codes)[:, :, :7], lm(other)[:, :, :7])
    assert not torch.equal(lm(codes)[:, :, 7], lm(other)[:, :, 7])


def test_nats_are_those_of_the_logits() -> None:
    lm, codes = model(), torch.randint(11, (3, 2, 6))
    found = -lm(codes).log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    assert torch.allclose(lm.nats(codes), found, atol=1e-6)


def test_frequencies_are_whole_and_near_the_law() -> None:
    logits = 4 * torch.randn(50, 256)
    counts = frequencies(logits)
    assert (counts.sum(-1) == 1 << 16).all() and counts.min() >= 1
    p = logits.double().softmax(-1).numpy()
    extra = (p * (np.log2(p) - np.log2(counts / (1 << 16)))).sum(-1)
    assert extra.max() < 0.02  # bits a symbol lost to rounding
    with pytest.raises(InvalidInputError, match="finite"):
        frequencies(torch.tensor([0.0, float("nan")]))


def test_one_thread_puts_back_what_was() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
