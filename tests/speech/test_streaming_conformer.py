"""Streaming conformer: streams equal the whole, the loss is both losses, files, off, bad input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.cached_conformer import windowed
from isthmus.objectives.ctc import ctc_loss
from isthmus.objectives.rnnt import rnnt_loss
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.systems.speech.streaming_conformer import (
    Learner,
    Settings,
    StreamingConformer,
    arms,
    judged,
)
from isthmus.testing import check_streaming
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.speech import features_of
from isthmus.training.system import train

TINY = Settings(
    16, 24, 2, 2, 5, 4, 4, 24, 24, 8, 3, (0, 1, 3), past=8, dropout=0.0, batch_size=8, fastemit=0.0
)
TONES = {"a": 400.0, "b": 1200.0, "c": 2500.0}


def spoken(count: int, seed: int) -> list[Spoken]:
    """Words are tones of 0.2 s."""
    generator = torch.Generator().manual_seed(seed)
    t, found = torch.arange(3200) / 16000, []
    for _ in range(count):
        size = int(torch.randint(1, 4, (), generator=generator))
        said = ["abc"[i] for i in torch.randint(3, (size,), generator=generator).tolist()]
        parts = [
            torch.cat([0.3 * torch.sin(2 * torch.pi * TONES[w] * t), torch.zeros(1600)])
            for w in said
        ]
        sound = torch.cat([torch.zeros(800), *parts])
        sound = sound + 0.005 * torch.randn(len(sound), generator=generator)
        found.append(Spoken(Recording(samples=sound), " ".join(said)))
    return found


DATA = Data(spoken(60, 0), spoken(12, 1), "tones")


def made(settings: Settings = TINY) -> StreamingConformer:
    torch.manual_seed(0)
    system = StreamingConformer.untrained(settings, DATA)
    system.module.eval()
    with torch.no_grad():
        system.module.head.weight *= 6  # an untrained one writes nothing, or does not stop
    return system


@pytest.mark.parametrize("right", TINY.rights)
@torch.no_grad()
def test_the_stream_gives_what_the_whole_gives(right: int) -> None:
    system = made(replace(TINY, right=right))
    sound = 0.1 * torch.randn(2, 15_000, generator=torch.Generator().manual_seed(5))
    features, frames = system.mel(sound, torch.tensor([15_000] * 2))
    states, _ = system.encode(features, frames, right)
    check_streaming(system.stream(), sound, states.transpose(1, 2))
    whole = system.answer(list(sound))
    assert sum(len(t.tokens) for t in whole) > 4
    for row, found in zip(sound, whole, strict=True):
        for packet in (77, 1600, 15_000):
            heard, partial = system.listen(row, packet)
            assert (heard.tokens, heard.frames) == (found.tokens, found.frames)
            wrote = "".join(part["wrote"] for part in partial)
            assert wrote == system.letters.decode(found.tokens)


def test_the_loss_is_that_of_both_readers() -> None:
    system = made()
    learner = Learner(system, DATA, Plan(10))
    batch = learner.batch(3)
    spoken, right = batch
    states, valid = system.encode(spoken.features, spoken.frames, right)
    targets, lengths = spoken.targets, spoken.target_lengths
    logits = system.module.joined(states, targets)
    ctc = ctc_loss(system.module.ctc(states).log_softmax(-1), valid, targets, lengths).nats.sum()
    wanted = 0.7 * rnnt_loss(logits, targets, valid, lengths).sum() + 0.3 * ctc
    torch.testing.assert_close(learner.loss(batch).total, wanted)
    assert {learner.batch(part).right for part in range(30)} == set(TINY.rights)
    assert learner.batch(3).right == right


@torch.no_grad()
def test_the_search_reads_with_the_states_that_training_has() -> None:
    system, sound = made(), 0.1 * torch.randn(15_000, generator=torch.Generator().manual_seed(5))
    found = system.answer([sound])[0]
    states, _ = system.encode(*features_of(system.mel, [sound]), TINY.right)
    log_probs = system.module.joined(states, torch.tensor([found.tokens]))[0].log_softmax(-1)
    total, u = 0.0, 0
    for t in range(states.shape[1]):
        while u < len(found.tokens) and found.frames[u] == t:
            total += float(log_probs[t, u, found.tokens[u]])
            u += 1
        if found.frames.count(t) < 10:
            total += float(log_probs[t, u, 0])
    assert found.logprob == pytest.approx(total, abs=1e-3)


@torch.no_grad()
def test_windows_with_the_whole_past_are_the_whole() -> None:
    system = made(replace(TINY, look="all"))
    features, frames = features_of(system.mel, [DATA.valid[0].sound.at(16000)])
    whole = system.encode(features, frames, 0)[0][0]
    torch.testing.assert_close(windowed(system.module.encoder, features, frames, 0, 999), whole)
    assert windowed(system.module.encoder, features, frames, 8, 4).shape == whole.shape
    with pytest.raises(InvalidInputError, match="look=chunks"):
        system.stream()


@pytest.mark.parametrize("look", ["chunks", "regular", "all"])
@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_every_kind_answers_from_a_file(tmp_path: Path, look: Any, weight: float) -> None:
    system = made(replace(TINY, look=look, transducer_weight=weight))
    write(tmp_path / "a.wav", Waveform(DATA.valid[0].sound.at(16000)[None], 16000))
    answer = system.run(str(tmp_path / "a.wav"))
    assert answer.text.split() == [word["word"] for word in answer.record["words"]]


def test_it_learns_and_is_kept(tmp_path: Path) -> None:
    plan = Plan(240, learning_rate=8e-3, warmup_steps=20, validate_every=240)
    settings = replace(TINY, depth=1)
    system = train(StreamingConformer, DATA, settings, plan, out=tmp_path / "made")
    assert isinstance(system, StreamingConformer)
    rates = [judged(system, DATA.valid, ctc) for ctc in (False, True)]
    assert min(rates) < 0.6, rates
    sound = DATA.valid[0].sound.at(16000)
    write(tmp_path / "a.wav", Waveform(sound[None], 8000))  # half the speed: resampled, and said
    again = StreamingConformer.from_pretrained(tmp_path / "made").run(str(tmp_path / "a.wav"))
    assert again == system.run(str(tmp_path / "a.wav"))
    assert again.record["changed"] == ["resampled from 8000 to 16000 Hz"]
    sounds = [record.sound.at(16000) for record in DATA.valid[:3]]
    alone = [system.answer([sound])[0].tokens for sound in sounds]
    assert [t.tokens for t in system.answer(sounds)] == alone  # neighbours change nothing


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InvalidInputError, match="multiple of the chunk"):
        made(replace(TINY, rights=(0, 2)))
    with pytest.raises(InvalidInputError, match="look is chunks"):
        made(replace(TINY, look="far"))  # type: ignore[arg-type]
    assert arms(StreamingConformer.scales["small"].settings)["regular"].right == 2
