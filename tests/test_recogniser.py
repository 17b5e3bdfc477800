"""The workbench recogniser learns to write what it hears, and keeps it."""

from pathlib import Path

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.system import train
from isthmus.workbench.recogniser import Recogniser, Settings

TONES = {"a": 400.0, "b": 900.0, "c": 2000.0}


def beep(text: str, generator: torch.Generator) -> torch.Tensor:
    """A tone of 0.15 s for each letter, and a pause behind it."""
    t = torch.arange(2400) / 16000
    parts = [torch.zeros(800)]
    for letter in text:
        parts += [0.3 * torch.sin(2 * torch.pi * TONES[letter] * t), torch.zeros(1600)]
    sound = torch.cat(parts)
    return sound + 0.005 * torch.randn(len(sound), generator=generator)


def beeps(count: int, seed: int) -> list[Spoken]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        size = int(torch.randint(1, 5, (), generator=generator))
        text = "".join("abc"[i] for i in torch.randint(3, (size,), generator=generator).tolist())
        found.append(Spoken(Recording(samples=beep(text, generator)), text))
    return found


def test_beeps_are_spelled(tmp_path: Path) -> None:
    data = Data(beeps(120, 0), beeps(20, 1), "beeps")
    settings = Settings(20, 32, 1, 4, channels=4, dropout=0.0, batch_size=8)
    plan = Plan(150, learning_rate=8e-3, warmup_steps=10, validate_every=75)
    train(Recogniser, data, settings, plan, out=tmp_path / "out")
    heard = Recogniser.from_pretrained(tmp_path / "out")
    assert heard.record["validation"][-1]["cer"] < 0.1
    sounds = [record.sound.at(16000) for record in data.valid]
    for beam in (0, 4):
        said = [heard.letters.decode(t.tokens) for t in heard.transcribe(sounds, beam=beam)]
        right = sum(s == r.text for s, r in zip(said, data.valid, strict=True))
        assert right >= 16
    write(tmp_path / "a.wav", Waveform(data.valid[0].sound.at(44100)[None].expand(2, -1), 44100))
    answer = heard.run(str(tmp_path / "a.wav"))
    assert answer.record["changed"] == ["2 channels averaged", "resampled from 44100 to 16000 Hz"]
    assert set(answer.text) <= set("abc") and answer.text
    write(tmp_path / "b.wav", Waveform(torch.zeros(1, 16000), 16000))
    with pytest.raises(InvalidInputError, match=r"b.wav is silent"):
        heard.run(str(tmp_path / "b.wav"))
