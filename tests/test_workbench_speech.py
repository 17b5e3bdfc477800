"""Speech by espeak-ng: known text, phonemes and voices; noise of a known colour."""

import importlib.metadata
import itertools
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from isthmus.errors import InvalidInputError, MissingExtraError, UnknownNameError
from isthmus.workbench import speech
from isthmus.workbench.speech import Line, babble, lines, noise, say, surrounded


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    return tmp_path


def test_a_line_is_spoken_and_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Line("hello there", "hello there"), Line("eight", "eight", "gmw/en-GB-scotland+f2")]
    heard = say(wanted)
    assert [u.line for u in heard] == wanted
    assert heard[1].phonemes == ("ˈeː", "t")
    for utterance in heard:
        assert utterance.samples.dtype == torch.float32 and 0.3 < len(utterance.samples) / 16000 < 2
        assert utterance.samples.abs().max() > 0.1
        assert list(utterance.starts_s) == sorted(utterance.starts_s)
        assert len(utterance.starts_s) == len(utterance.phonemes)
    monkeypatch.setattr(speech, "_by_library", None)  # now from the cache or not at all
    again = say(wanted)
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(heard, again, strict=True))
    assert [a.phonemes for a in heard] == [b.phonemes for b in again]


def test_a_phoneme_begins_when_it_is_said_to(own_cache: Path) -> None:
    heard = say([Line("a see", "a see")])[0]  # the s is the only thing that hisses
    start = heard.starts_s[heard.phonemes.index("s")]
    crossing = (heard.samples[1:] * heard.samples[:-1] < 0).float()
    rate = torch.nn.functional.avg_pool1d(crossing[None, None], 160, 16)[0, 0]
    hiss = float((rate > 0.3).nonzero()[0, 0]) * 16 / 16000
    assert abs(hiss - start) < 0.03


def test_an_unknown_voice_and_a_missing_program(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInputError, match="no voice 'nobody'"):
        say([Line("hello", "hello", "nobody")])
    with pytest.raises(InvalidInputError, match="said nothing"):
        say([Line("", "")])

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'isthmus\[speech\]', or: apt"):
        say([Line("hello", "hello")])


@pytest.mark.parametrize("kind", speech.SETS)
def test_splits_share_neither_texts_nor_accents(kind: str) -> None:
    drawn = {split: lines(kind, split, 200) for split in speech.SPLITS}
    answers = {split: {line.target for line in found} for split, found in drawn.items()}
    assert not answers["train"] & (answers["held-out"] | answers["accent"])
    voices = {split: {line.voice for line in found} for split, found in drawn.items()}
    assert not voices["train"] & voices["accent"] or kind == "multi"
    assert lines(kind, "train", 200) == drawn["train"]
    assert lines(kind, "train", 200, seed=1) != drawn["train"]


def test_unknown_sets() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'numbers'"):
        lines("number", "train", 1)
    with pytest.raises(UnknownNameError, match="held-out"):
        lines("numbers", "heldout", 1)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="pink"):
        noise("pinc", 10, torch.Generator())


@pytest.mark.parametrize(("kind", "fall_db"), [("white", 0.0), ("pink", 3.0), ("brown", 6.0)])
def test_noise_has_its_colour(kind: str, fall_db: float) -> None:
    wave = noise(kind, 64000, torch.Generator().manual_seed(0))
    power = torch.fft.rfft(wave).abs().square()
    hertz = torch.fft.rfftfreq(64000, 1 / 16000)
    octaves = [power[(hertz >= f) & (hertz < 2 * f)].mean().log10() * 10 for f in (250, 500, 1000)]
    assert float(wave.square().mean()) == pytest.approx(1, rel=1e-4)
    for low, high in itertools.pairwise(octaves):
        assert float(low - high) == pytest.approx(fall_db, abs=0.5)


def test_hum_clicks_and_babble(own_cache: Path) -> None:
    hum = noise("hum", 16000, torch.Generator().manual_seed(0))
    power = torch.fft.rfft(hum).abs().square()
    assert power[:600].sum() > 0.99 * power.sum()
    clicks = noise("clicks", 16000, torch.Generator().manual_seed(0))
    assert clicks.abs().max() > 5 and (clicks.abs() < 0.01).float().mean() > 0.5
    voices = say([Line("hello there", "hello there")])
    crowd = babble(voices, 40000, torch.Generator().manual_seed(0))
    assert crowd.shape == (40000,) and float(crowd.square().mean()) == pytest.approx(1, rel=1e-4)


def test_speech_lies_unchanged_within_silence_or_noise_of_its_ratio() -> None:
    draw = torch.Generator().manual_seed(3)
    speech_like = torch.randn(800, generator=draw)
    around = partial(surrounded, speech_like, longest_s=0.1, snr_db=(0.0, 20.0))
    before, added, ratios = [], [], []
    for _ in range(200):
        heard = around(draw)
        if len(heard) == 800:
            assert heard is speech_like
            continue
        same = (heard.unfold(0, 800, 1) - speech_like).abs().amax(1)
        start = int(same.argmin())
        assert float(same[start]) == 0
        before.append(start / (len(heard) - 800))
        added.append(len(heard) - 800)
        rest = torch.cat([heard[:start], heard[start + 800 :]])
        ratios.append(10 * float((speech_like.square().mean() / rest.square().mean()).log10()))
    assert 75 < len(added) < 125 and 1400 < max(added) <= 1600 and min(added) < 200
    assert min(before) < 0.1 and max(before) > 0.9 and 0.4 < sum(before) / len(before) < 0.6
    noise_ratios = [ratio for ratio in ratios if ratio < math.inf]
    assert 0.05 < 1 - len(noise_ratios) / len(ratios) < 0.3  # silence is one of six
    assert -1e-3 < min(noise_ratios) < 2 and 18 < max(noise_ratios) < 20 + 1e-3
    assert len(surrounded(speech_like, draw, longest_s=0.0, share=1.0)) == 800
    first, again = (around(torch.Generator().manual_seed(8), share=1.0) for _ in range(2))
    assert len(first) > 800 and torch.equal(first, again)
