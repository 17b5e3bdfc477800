"""The trained codecs that come with isthmus: ready on a fresh machine, and no other than it was."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import isthmus
from isthmus.codecs.base import find, known, lookup, pack, unpack
from isthmus.errors import InvalidInputError
from isthmus.folders import EMBEDDED
from isthmus.metrics.sound import log_mel_distance
from isthmus.metrics.speech import stoi
from isthmus.roles import Signal
from isthmus.signals.audio import Waveform, write
from isthmus.signals.image import read_pixels, write_pixels
from isthmus.systems.codecs.hificodec import Hificodec
from isthmus.workbench import coding
from isthmus.workbench.codec_bench import _ours, psnr
from isthmus.workbench.photographs import photograph
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


def test_a_rate_is_enough_for_pictures_too(tmp_path: Path) -> None:
    kept = photograph("coffee")[:201, :300]
    pixels = torch.from_numpy(kept.copy()).permute(2, 0, 1)
    write_pixels(tmp_path / "a.png", pixels)
    sizes = isthmus.encode(tmp_path / "a.png", tmp_path / "a.ist", rate=0.8)
    assert sizes.codec == "parts/learned-image"
    assert 0.6 < 8 * sizes.payload / (201 * 300) <= 0.8
    assert coding.inspect(tmp_path / "a.ist")["model"] == "at hand"
    isthmus.decode(tmp_path / "a.ist", tmp_path / "b.png")
    # a photograph it has not learnt from, beside the best JPEG of no fewer bytes
    image, jpeg = Image.fromarray(kept), b""
    for quality in range(5, 96):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        jpeg = out.getvalue()
        if len(jpeg) >= sizes.file:
            break
    theirs = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)))).permute(2, 0, 1)
    ours = psnr(pixels, read_pixels(tmp_path / "b.png"))
    assert ours > psnr(pixels, theirs) + 0.3
    # without a rate nothing is lost
    assert coding.default(tmp_path / "a.png") == "parts/lossless-image"


#: Files of other machines name these models: others must not take their place unnoticed.
FINGERPRINTS = {"hificodec": "23b6c6b630536762", "learned-image": "83b82179cb7463e7"}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_they_are_found_by_name_by_fingerprint_and_by_the_bench(name: str) -> None:
    folder = EMBEDDED / name
    codec: Any = coding.ready(name)
    assert at_hand(lookup(name)) == folder
    assert find(codec.id, codec.fingerprint).fingerprint == codec.fingerprint
    assert f"isthmus {name}" in [peer.name for peer in _ours(codec.medium, None)]
    assert codec.fingerprint.hex().startswith(FINGERPRINTS[name])
    assert sum(p.stat().st_size for p in folder.iterdir()) < 5_000_000
