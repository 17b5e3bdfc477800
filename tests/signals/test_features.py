"""Log-mel features against transformers' and against a plain computation."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.signals.features import LogMel, mel_filters


def sounds() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(20000) / 16000
    rows = 0.1 * torch.randn(3, 20000, generator=generator) + torch.sin(2000 * t + t**2 * 5000)
    return rows.float(), torch.tensor([20000, 8000, 400])


@pytest.mark.parametrize(("n_mels", "n_fft"), [(80, 400), (128, 400), (80, 512)])
def test_filters_equal_those_of_transformers(n_mels: int, n_fft: int) -> None:
    theirs = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, 8000.0, 16000, "slaney", "slaney")
    np.testing.assert_allclose(mel_filters(n_mels, n_fft).numpy(), theirs.T, atol=1e-15)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_whisper_equals_the_extractor_of_transformers(n_mels: int) -> None:
    samples, lengths = sounds()
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    rows = [row[:n].numpy() for row, n in zip(samples, lengths.tolist(), strict=True)]
    theirs = extractor(rows, sampling_rate=16000, return_tensors="pt").input_features
    ours, frames = LogMel("whisper", n_mels)(samples, lengths, pad_to=480_000)
    assert ours.shape == (3, n_mels, 3000) and frames.tolist() == [125, 50, 3]
    assert (ours - theirs).abs().max() == 0.0


def test_nemo_equals_a_plain_computation() -> None:
    samples, lengths = sounds()
    ours, frames = LogMel("nemo")(samples, lengths)
    assert frames.tolist() == [126, 51, 3]
    for row, length, count, found in zip(samples, lengths, frames, ours, strict=True):
        x = row[:length].numpy().astype(np.float64)
        x = np.concatenate([x[:1], x[1:] - 0.97 * x[:-1]])
        x = np.pad(x, (256, 256 + 512))
        window = np.pad(np.hanning(400), 56)
        pieces = np.stack([x[160 * i : 160 * i + 512] * window for i in range(count)])
        power = np.abs(np.fft.rfft(pieces)) ** 2
        log = np.log(power @ mel_filters(80, 512).numpy().T + 2**-24).T
        log = (log - log.mean(1, keepdims=True)) / (log.std(1, ddof=1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(found[:, :count].numpy(), log, atol=2e-3)
        assert not found[:, count:].any()


@pytest.mark.parametrize("normalise", [True, False])
def test_padding_and_neighbours_change_nothing(normalise: bool) -> None:
    samples, lengths = sounds()
    mel = LogMel("nemo", 40, normalise=normalise)
    batch, frames = mel(samples, lengths)
    longer = torch.cat([samples, torch.ones(3, 5000)], 1)
    again, _ = mel(longer, lengths)
    for b, count in enumerate(frames.tolist()):
        alone, _ = mel(samples[b : b + 1, : lengths[b]], lengths[b : b + 1])
        torch.testing.assert_close(batch[b, :, :count], alone[0, :, :count], atol=1e-5, rtol=0)
        torch.testing.assert_close(again[b, :, :count], alone[0, :, :count], atol=1e-5, rtol=0)


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="whisper"):
        LogMel("wisper")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="from 1 to 10"):
        LogMel()(torch.zeros(2, 10), torch.tensor([0, 10]))


def test_features_at_a_fixed_level_need_no_later_sound() -> None:
    sound = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    fixed = LogMel("nemo", 40, normalise="fixed")
    whole, frames = fixed(sound, torch.tensor([8000]))
    plain, _ = LogMel("nemo", 40, normalise=False)(sound, torch.tensor([8000]))
    torch.testing.assert_close(4 * whole - 9, plain)
    early, _ = fixed(sound[:, :4200], torch.tensor([4200]))
    # frame f reaches 200 samples beyond 160 f
    torch.testing.assert_close(early[:, :, :26], whole[:, :, :26])
    assert frames.tolist() == [51]
