"""Records with sound, from manifests."""

from pathlib import Path

import pytest
import torch

from isthmus.errors import BrokenFileError
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.training.data import read


def test_manifests_of_every_kind(tmp_path: Path) -> None:
    for name, rate in (("a", 16000), ("b", 8000)):
        write(tmp_path / f"{name}.wav", Waveform(torch.full((2, rate), 0.25), rate))
    (tmp_path / "x.tsv").write_text("a.wav\thello\nb.wav\tthere\n")
    spoken = read("spoken", [tmp_path / "x.tsv"])
    assert [r.text for r in spoken.train] == ["hello"]
    assert [r.text for r in spoken.valid] == ["there"]
    assert spoken.valid[0].sound.at(16000).shape == (16000,)
    (tmp_path / "x.jsonl").write_text('{"noisy": "a.wav", "clean": "b.wav"}\n' * 2)
    noisy = read("noisy", [tmp_path / "x.jsonl"])
    assert noisy.train[0].clean.path == tmp_path / "b.wav"
    assert noisy.fingerprint == read("noisy", [tmp_path / "x.jsonl"]).fingerprint
    (tmp_path / "y.tsv").write_text("a.wav\thello\nc.wav\tthere\n")
    with pytest.raises(BrokenFileError, match=r"y.tsv, line 2: there is no sound file .*c.wav"):
        read("spoken", [tmp_path / "y.tsv"])
    (tmp_path / "z.csv").write_text("a.wav,a.wav\na.wav\n")
    with pytest.raises(BrokenFileError, match="needs two columns, noisy and clean"):
        read("noisy", [tmp_path / "z.csv"])


def test_fingerprints_tell_sounds_apart() -> None:
    one, two = Recording(samples=torch.zeros(5)), Recording(samples=torch.ones(5))
    assert repr(one) != repr(two) and repr(one) == repr(Recording(samples=torch.zeros(5)))
