"""OWSM-CTC: what is learnt where, the prefix, long sound, files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.decoding.ctc import windows
from isthmus.errors import InvalidInputError
from isthmus.objectives.ctc import ctc_loss
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.systems.speech import owsm_ctc
from isthmus.systems.speech.owsm_ctc import Learner, OwsmCtc, Settings, judged
from isthmus.training.data import Data, Translated, read
from isthmus.training.loop import Plan
from isthmus.training.speech import Characters, Words, features_of, spelled
from isthmus.training.system import train
from isthmus.workbench.ears import ear
from isthmus.workbench.recogniser import Recogniser
from isthmus.workbench.recogniser import Settings as Hearing

TINY = Settings(16, 24, 3, 4, 5, 4, (1, 2), (1,), dropout=0.0, batch_size=8)
TONES = {"eins": 400.0, "zwei": 1200.0, "uno": 700.0, "dos": 2500.0}
MEANS = {"eins": "one", "zwei": "two", "uno": "one", "dos": "two"}


def spoken(count: int, seed: int) -> list[Translated]:
    """Words are tones of 0.4 s; the translation has them in reverse order."""
    generator = torch.Generator().manual_seed(seed)
    t, found = torch.arange(6400) / 16000, []
    for index in range(count):
        words = (("eins", "zwei"), ("uno", "dos"))[index % 2]
        size = int(torch.randint(1, 4, (), generator=generator))
        said = [words[i] for i in torch.randint(2, (size,), generator=generator).tolist()]
        parts = [
            torch.cat([0.3 * torch.sin(2 * torch.pi * TONES[w] * t), torch.zeros(3200)])
            for w in said
        ]
        sound = torch.cat([torch.zeros(1600), *parts])
        sound = sound + 0.005 * torch.randn(len(sound), generator=generator)
        means = " ".join(MEANS[w] for w in reversed(said))
        record = (("de", "es")[index % 2], " ".join(said), means)
        found.append(Translated(Recording(samples=sound), *record))
    return found


DATA = Data(spoken(60, 0), spoken(12, 1), "tones")


def made(settings: Settings = TINY) -> OwsmCtc:
    torch.manual_seed(0)
    system = OwsmCtc.untrained(settings, DATA)
    system.module.eval()
    return system


def test_lower_blocks_learn_the_transcript_and_upper_ones_the_task() -> None:
    system = made()
    learner = Learner(system, DATA, Plan(10))
    batch = learner.batch(3)
    words = system.words
    asked = {words.decode(row[:2].tolist()) for row in batch.answer}
    assert asked <= {f"<{lang}> <{task}>" for lang in ("de", "es") for task in ("asr", "translate")}
    assert len(asked) == 4 and torch.equal(batch.prefix[:, 1], batch.answer[:, 1])
    shown = batch.prefix[:, 0] != 0
    assert shown.any() and not shown.all()
    assert torch.equal(batch.prefix[shown, 0], batch.answer[shown, 0])
    again = learner.batch(3)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    first, second, top = system.module(batch.features, batch.frames, batch.prefix)[0]
    lengths = system.module(batch.features, batch.frames, batch.prefix)[1]
    transcript = ctc_loss(first, lengths, batch.transcript, batch.transcript_lengths)
    answer = [ctc_loss(p, lengths, batch.answer, batch.answer_lengths) for p in (second, top)]
    wanted = 0.2 * answer[1].nats.sum() + 0.4 * (transcript.nats.sum() + answer[0].nats.sum())
    assert transcript.fits.all() and answer[0].fits.all()
    torch.testing.assert_close(learner.loss(batch).total, wanted)


def test_sounds_lie_in_noise_in_training_and_nowhere_else() -> None:
    plain, around = (Learner(made(replace(TINY, around=a)), DATA, Plan(10)) for a in (0.0, 0.5))
    base, found = plain.batch(2), around.batch(2)
    more = found.frames - base.frames
    assert 0 < int((more > 1).sum()) < len(more) and int(more.max()) <= 50
    assert torch.equal(found.answer, base.answer)
    # features keep the level of a sound, so noise is not as loud as speech once it is all there is
    system = made()
    quiet, loud = (system.mel(a * torch.ones(1, 800).cumsum(1).sin(), torch.tensor([800]))[0]
                   for a in (0.01, 0.5))  # fmt: skip
    assert float((loud - quiet).mean()) > 0.5


def test_without_conditioning_and_inner_blocks_it_is_plain_ctc() -> None:
    plain = made(replace(TINY, inner=(), source=(), condition=False))
    learner = Learner(plain, DATA, Plan(10))
    batch = learner.batch(0)
    with torch.no_grad():
        read, lengths = plain.module(batch.features, batch.frames, batch.prefix)
        assert len(read) == 1
        wanted = ctc_loss(read[0], lengths, batch.answer, batch.answer_lengths).nats.sum()
        torch.testing.assert_close(learner.loss(batch).total, wanted)
        x, _ = plain.module.encoder(
            batch.features, batch.frames, prefix=plain.module.prefix(batch.prefix)
        )
        torch.testing.assert_close(read[0], plain.module.head(x).log_softmax(-1))


def test_languages_are_learnt_first_and_systems_are_kept(tmp_path: Path) -> None:
    plan = Plan(150, learning_rate=8e-3, warmup_steps=20, validate_every=150)
    settings = replace(TINY, depth=2, inner=(1,), source=(1,), factor=4)
    system = train(OwsmCtc, DATA, settings, plan, out=tmp_path / "ctc")
    assert isinstance(system, OwsmCtc)
    assert judged(system, DATA.valid)["languages"] > 0.9  # texts take longer
    write(tmp_path / "a.wav", Waveform(DATA.valid[0].sound.at(16000)[None], 16000))
    again = OwsmCtc.from_pretrained(tmp_path / "ctc").run(str(tmp_path / "a.wav"))
    assert again.record == system.run(str(tmp_path / "a.wav")).record
    assert again.record["language"] in ("<de>", "<es>")
    baseline = replace(settings, decoder=1, inner=(), source=())
    reader = train(OwsmCtc, DATA, baseline, replace(plan, steps=10), out=tmp_path / "aed")
    assert isinstance(reader, OwsmCtc)
    sounds = [record.sound.at(16000) for record in DATA.valid[:3]]
    alone = [reader.answer([sound])[0] for sound in sounds]
    assert reader.answer(sounds) == alone  # neighbours change nothing


def test_windows_tile_a_long_sound_and_the_interior_is_that_of_one_pass() -> None:
    for length in (1, 5, 6, 7, 23, 100):
        places = windows(length, 10, 3)
        used = [place for _, _, low, high in places for place in range(low, high)]
        assert used == list(range(length))
        assert all(start <= low and high <= end for start, end, low, high in places)
        x = torch.randn(length)
        kernel = torch.randn(1, 1, 7)  # looks 3 to either side

        def local(part: torch.Tensor, kernel: torch.Tensor = kernel) -> torch.Tensor:
            return torch.nn.functional.conv1d(part[None, None], kernel, padding=3)[0, 0]

        parts = [local(x[a:b])[low - a : high - a] for a, b, low, high in places]
        torch.testing.assert_close(torch.cat(parts), local(x))
    with pytest.raises(InvalidInputError, match="twice its context"):
        windows(10, 6, 3)


def test_long_form_of_a_short_sound_is_one_pass() -> None:
    system = made()
    sound = DATA.valid[0].sound.at(16000)
    text = system.long_form(sound)
    assert text.replace("<", "") == text and len(text.split()) <= 30
    # an untrained system may read the two places of the prefix as well; they come first
    assert text and system.answer([sound])[0][1].endswith(text[1:])


def test_unknown_languages_words_and_records(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has '<fr>', which the training data does not"):
        made().answer([torch.randn(16000)], language="<fr>")
    with pytest.raises(InvalidInputError, match="has 'bird'"):
        Words(("cat",)).encode("cat bird")
    write(tmp_path / "a.wav", Waveform(torch.rand(1, 1600), 16000))
    line = '{"audio": "a.wav", "language": "de", "text": "eins", "translation": "one"}\n'
    (tmp_path / "x.jsonl").write_text(line * 2)
    assert read("translated", [tmp_path / "x.jsonl"]).train[0].translation == "one"
    (tmp_path / "y.jsonl").write_text(line + line.replace("a.wav", "b.wav"))
    with pytest.raises(Exception, match=r"y.jsonl, line 2: there is no sound file"):
        read("translated", [tmp_path / "y.jsonl"])


@pytest.mark.parametrize("decoder", [0, 1])
def test_lower_blocks_start_from_a_recogniser_and_read_as_it_does(
    decoder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    letters = Characters.of(r.text for r in [*DATA.train, *DATA.valid])
    heard = Recogniser(Hearing(16, 24, 1, 4, 5, 8, 4, block="e-branchformer"), letters)
    monkeypatch.setattr(owsm_ctc, "ear", lambda data, settings: heard)
    part = {"inner": (), "source": ()} if decoder else {"inner": (1,), "source": (1,)}
    settings = replace(TINY, depth=1 if decoder else 2, ear=1, decoder=decoder, **part)
    system = made(settings)
    heard.module.eval()
    sounds = [record.sound.at(16000) for record in DATA.valid[:3]]
    features, frames = features_of(system.mel, sounds)
    with torch.no_grad():
        theirs: Any = heard.module(features, frames)[0][-1]
        read: Any = (
            system.module.encode(features, frames)[1]
            if decoder
            else system.module(features, frames)[0][0]
        )
    rows = [0, *system.words.encode(spelled(letters.characters)).tolist()]
    # rows of marks are new, so probabilities are the same up to their sum
    torch.testing.assert_close(read[..., rows].log_softmax(-1), theirs)
    if not decoder:
        own, other = (made(replace(settings, ear=e)).module.encoder for e in (1, 0))
        assert torch.equal(own.layers[1].merge.weight, other.layers[1].merge.weight)
        assert not torch.equal(own.layers[0].merge.weight, other.layers[0].merge.weight)


def test_an_ear_is_a_recogniser_of_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    sizes = Hearing(16, 16, 1, 2, 5, 4, 4, block="e-branchformer", batch_size=8)
    plan = Plan(3, validate_every=3)
    first, again = (ear(DATA, sizes, plan) for _ in range(2))
    assert first.letters.characters == "".join(sorted(set("einszweiunodos ")))
    assert first.record == again.record and first.record["steps"] == 3
