"""Parts of codecs of mel spectra: sampling, the global vector, and references from elsewhere."""

import itertools

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.models.mel_codec import (
    Down,
    Form,
    MelDecoder,
    MelEncoder,
    ReferenceEncoder,
    Up,
    rounded,
)
from isthmus.training.mel_codec import MelCodec, elsewhere

FORM = Form(mels=6, width=8, dim=4, g_dim=3, blocks=1, heads=2, dropout=0.0)


@pytest.mark.parametrize("factor", [2, 4])
def test_hybrid_sampling_is_a_mean_and_a_repetition_beside_convolutions(factor: int) -> None:
    x = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(0))
    plain = [part(2, factor, hybrid=False) for part in (Down, Up)]
    mixed = [part(2, factor) for part in (Down, Up)]
    for a, b in zip(mixed, plain, strict=True):
        a.load_state_dict(b.state_dict())
    means = torch.stack([c.mean(-1) for c in x.split(factor, -1)], -1)
    assert torch.allclose(mixed[0](x) - plain[0](x), means, atol=1e-6)
    y = mixed[1](means) - plain[1](means)
    assert torch.allclose(y, means.repeat_interleave(factor, -1), atol=1e-6)


@pytest.mark.parametrize("change", [{}, {"g_dim": 0}, {"blstm": False}, {"resampling": False}])
def test_four_frames_are_a_vector(change: dict[str, int]) -> None:
    form = FORM._replace(**change)
    encoder, decoder = MelEncoder(form), MelDecoder(form)
    g = torch.zeros(2, form.g_dim) if form.g_dim else None
    z = encoder(torch.randn(2, 6, 20), g)
    assert z.shape == (2, 4, 5) and decoder(z, g).shape == (2, 6, 20)


@torch.no_grad()
def test_the_reference_is_blind_to_padding_and_to_when() -> None:
    torch.manual_seed(0)
    net, mel = ReferenceEncoder(6, 8, 3).eval(), torch.randn(1, 6, 30)
    alone = net(mel[..., :17])
    padded = net(torch.cat([mel[..., :17], torch.full((1, 6, 9), 7.0)], 2), torch.tensor([17]))
    assert torch.allclose(alone, padded, atol=1e-6)
    # a stretch that repeats is told as the same wherever it is cut
    loop = mel.repeat(1, 1, 12)
    a, b = net(loop[..., :300]), net(loop[..., 13:313])
    assert float((a - b).abs().max()) < 0.02 < float((a - net(torch.randn(1, 6, 300))).abs().max())


def test_references_never_touch_the_window() -> None:
    steps = (0.0, 0.3, 0.7, 0.99)
    for at, most in itertools.product(range(0, 71, 7), (5, 50, 500)):
        for draws in itertools.product(steps, steps):
            cut = elsewhere(100, at, 30, most, draws)
            assert cut.stop <= at or cut.start >= at + 30
            assert 0 <= cut.start < cut.stop <= 100 and cut.stop - cut.start <= most
    assert elsewhere(30, 0, 30, 50, (0.5, 0.5)) == slice(0, 30)  # nothing is left elsewhere


def test_numbers_of_g_are_what_the_decoder_had_in_training() -> None:
    torch.manual_seed(0)
    codec, mel = MelCodec(FORM, 8).eval(), torch.randn(1, 6, 16)
    g = codec.vector(mel)
    assert g is not None and torch.equal(g, rounded(g))
    numbers = codec.numbers(mel)
    assert numbers.shape == (1, 3) and torch.equal(numbers.float() / 127, g)
    codes = codec.codes(mel, numbers)
    assert torch.equal(codes, codec.quantizer.encode(codec.encoder(mel, g)))
    assert not torch.equal(codec.spectra(numbers, codes), codec.spectra(-numbers, codes))
    without = MelCodec(FORM._replace(g_dim=0), 8).eval()
    assert without.numbers(mel).shape == (1, 0)
    assert without.spectra(without.numbers(mel), codes).shape == mel.shape


def test_the_adversary_learns_from_its_own_loss_only() -> None:
    mel, other = torch.randn(2, 6, 16), torch.randn(2, 6, 9)
    grads = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        codec = MelCodec(FORM, 8, disc_width=2, adversarial=weight)
        total, told = codec(mel, other, torch.tensor([9, 4]), True, True)
        total.backward()
        assert {"fooled", "discriminator", "commit"} <= set(told)
        grads.append({name: p.grad for name, p in codec.named_parameters()})
    for name, a in grads[0].items():
        b = grads[1][name]
        assert a is not None and b is not None, name
        if name.startswith("discriminator"):
            assert torch.allclose(a, b), name
    assert not torch.allclose(*(g["decoder.leave.weight"] for g in grads))  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_refused() -> None:
    for change in ({"width": 6}, {"kernel": 4}, {"g_dim": -1}):
        with pytest.raises(InvalidInputError, match="twice the heads"):
            MelEncoder(FORM._replace(**change))
