"""Error rates and quality of speech."""

import math

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.metrics.speech import (
    character_error_rate,
    normalise,
    pesq,
    si_sdr,
    stoi,
    word_error_rate,
)


def test_error_rates_are_pooled_not_averaged() -> None:
    found = word_error_rate(["one two three four", "five"], ["one two three", "six seven"])
    assert (found.edits, found.length) == (3, 5) and found.rate == 0.6
    assert character_error_rate(["abc"], ["ab"]).rate == pytest.approx(1 / 3)
    assert word_error_rate(["Über  uns."], ["über uns"]).rate == 0
    assert normalise("e\u0301t\u00e9") == "été"


def test_empty_references_are_counted() -> None:
    found = word_error_rate(["...", "yes"], ["oh no", "yes"])
    assert (found.edits, found.length, found.empty) == (2, 1, 1)
    with pytest.raises(InvalidInputError, match="no reference"):
        word_error_rate([""], ["a"])
    with pytest.raises(InvalidInputError, match="one hypothesis"):
        word_error_rate(["a"], [])


def test_si_sdr_by_hand_and_by_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    s, n = torch.randn(2, 2, 8000, generator=generator, dtype=torch.float64).unbind()
    s, n = s - s.mean(-1, keepdim=True), n - n.mean(-1, keepdim=True)
    n = n - (n * s).sum(-1, keepdim=True) / s.square().sum(-1, keepdim=True) * s
    n = n * (s.square().sum(-1, keepdim=True) / n.square().sum(-1, keepdim=True) / 10).sqrt()
    for gain in (1.0, 0.01, 30.0):
        found = si_sdr(gain * (s + n) + 0.5, s)
        torch.testing.assert_close(found, torch.full((2,), 10.0, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="silent truth"):
        si_sdr(s, torch.zeros_like(s))


def test_quality_of_identical_and_of_unusable_sounds() -> None:
    t = torch.arange(32000) / 16000
    envelope = (torch.sin(2 * math.pi * 3 * t) > 0).float()
    voice = 0.3 * envelope * sum(torch.sin(2 * math.pi * f * t) for f in (200, 400, 1300))
    noisy = voice + 0.1 * torch.randn(32000, generator=torch.Generator().manual_seed(0))
    assert stoi([voice], [voice]).mean == pytest.approx(1, abs=1e-3)
    bad = [torch.zeros(32000), torch.full((32000,), math.nan), voice[:1000], voice]
    true = [voice, voice, voice[:1000], voice]
    found = stoi(bad, true)
    assert (found.judged, found.failed) == (1, 3)
    assert math.isnan(stoi(bad[:1], true[:1]).mean)
    pytest.importorskip("pesq", reason="it is built from source")
    assert pesq([voice], [voice]).mean == pytest.approx(4.644, abs=0.01)
    assert pesq([noisy], [voice]).mean < 3
    assert (pesq(bad, true).judged, pesq(bad, true).failed) == (1, 3)
