"""The trained codecs that come with isthmus: ready on a fresh machine, and no other than it was."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus
from isthmus.codecs.base import find, known, lookup, pack, unpack
from isthmus.errors import InvalidInputError
from isthmus.folders import EMBEDDED
from isthmus.metrics.sound import log_mel_distance
from isthmus.metrics.speech import stoi
from isthmus.roles import Signal
from isthmus.signals.audio import Waveform, write
from isthmus.systems.codecs.hificodec import Hificodec
from isthmus.workbench import coding
from isthmus.workbench.codec_bench import _ours
from isthmus.workbench.speech import corpus
from isthmus.workbench.trained import at_hand


@pytest.fixture(autouse=True)
def fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached, and nothing may be trained."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("isthmus.workbench.trained.train", _no)


def _no(*_: Any, **__: Any) -> None:
    raise AssertionError("trained")


def test_a_rate_is_enough(tmp_path: Path) -> None:
    t = torch.arange(40_000) / 44_100
    wave = 0.3 * torch.sin(2 * torch.pi * 220 * t) * (1 + torch.sin(2 * torch.pi * 3 * t))
    write(tmp_path / "a.wav", Waveform(wave.expand(2, -1), 44_100))
    sizes = isthmus.encode(tmp_path / "a.wav", tmp_path / "a.ist", rate=2)
    assert sizes.codec == "codecs/hificodec"
    assert sizes.payload * 8 / (40_000 / 44_100) < 1.7e3
    told = coding.inspect(tmp_path / "a.ist")
    assert told["model"] == "at hand"
    isthmus.decode(tmp_path / "a.ist", tmp_path / "b.wav")
    with pytest.raises(InvalidInputError, match=r"one rate of 1\.60 kbit/s"):
        isthmus.encode(tmp_path / "a.wav", tmp_path / "a.ist", rate=0.5)
    assert coding.inspect(tmp_path / "a.ist") == told  # what was there stays
    # without one nothing is lost
    assert coding.default(tmp_path / "a.wav") == "parts/lossless-audio"


def test_speech_of_an_accent_it_has_not_learnt_from_is_understood() -> None:
    codec = next(known(Hificodec))
    sounds = [u.samples for u in corpus("sentences", "accent", 4, seed=1)]
    back = []
    for sound in sounds:
        info = {"medium": "audio", "dtype": "float32", "shape": [1, len(sound)], "rate_hz": 16_000}
        file = io.BytesIO()
        pack(codec, Signal(info, [sound[None]]), file)
        back.append(torch.cat(list(unpack(file.getvalue()).signal.chunks), 1)[0])
    assert sum(log_mel_distance(a, b) for a, b in zip(back, sounds, strict=True)) < 4 * 7.0
    assert stoi(back, sounds).mean > 0.78


def test_it_is_found_by_name_by_fingerprint_and_by_the_bench() -> None:
    folder = EMBEDDED / "hificodec"
    codec: Any = coding.ready("hificodec")
    assert at_hand(lookup("hificodec")) == folder
    assert find(codec.id, codec.fingerprint).fingerprint == codec.fingerprint
    assert "isthmus hificodec" in [peer.name for peer in _ours("audio", None)]
    # files of other machines name this model: another one must not take its place unnoticed
    assert codec.fingerprint.hex().startswith(FINGERPRINT)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 3_000_000


FINGERPRINT = "23b6c6b630536762"
