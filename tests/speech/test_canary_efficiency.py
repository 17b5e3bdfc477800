"""Canary, efficient: buckets and their sizes, what is learnt, kept keys and values, files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.encoder_decoder import Config, EncoderDecoder
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.systems.speech import canary_efficiency
from isthmus.systems.speech.canary_efficiency import CanaryEfficiency, Settings
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.speech import features_of, heard
from isthmus.training.system import train

TINY = Settings(16, 24, 3, 1, 4, 5, 4, inner=48, dropout=0.0, parts=3, batch_size=3, factor=4)
TONES = {"one": 400.0, "two": 1200.0, "ten": 2500.0}


def spoken(count: int, seed: int) -> list[Spoken]:
    """Words are tones of 0.3 s."""
    draw = np.random.default_rng(seed)
    t, found = torch.arange(4800) / 16000, []
    for _ in range(count):
        said = draw.choice(list(TONES), int(draw.integers(1, 7))).tolist()
        tones = [torch.sin(2 * torch.pi * TONES[w] * t) for w in said]
        parts = [torch.cat([0.3 * tone, torch.zeros(1600)]) for tone in tones]
        found.append(Spoken(Recording(samples=torch.cat(parts)), ", ".join(said)))
    return found


DATA = Data(spoken(60, 0), spoken(8, 1), "tones")


def made(settings: Settings = TINY) -> CanaryEfficiency:
    torch.manual_seed(0)
    return CanaryEfficiency.untrained(settings, DATA)


def test_buckets_hold_what_memory_allows_and_off_is_random() -> None:
    system = made()
    learner = system.learner(DATA, Plan(4))
    assert learner.buckets is not None and 0 <= learner.headroom < 0.4
    assert learner.sizes[-1] == 3 and learner.sizes[0] > 3  # three of the longest fit
    rows = np.concatenate(learner.train.sampler.epoch())
    assert len({*rows}) == len(rows) == 60 - learner.profile.left_out
    off = made(replace(TINY, parts=0, batch_size=6)).learner(DATA, Plan(4))
    assert off.buckets is None and off.sizes == [6]
    assert off.profile.cost > 2 * learner.profile.cost > 0
    weights = [p.clone() for p in system.module.parameters()]
    for batch in (learner.batch(0), off.batch(0)):
        tops = batch.spoken.frames.max()
        assert batch.spoken.features.shape[2] == tops
    assert all(torch.equal(a, b) for a, b in zip(weights, system.module.parameters(), strict=True))
    one_d = made(replace(TINY, subparts=1)).learner(DATA, Plan(4))
    assert len(one_d.sizes) <= 3 < len(learner.sizes) + 1


def test_far_too_many_characters_for_their_sound_are_left_out() -> None:
    wild = Spoken(DATA.train[0].sound, ", ".join(["ten"] * 60))
    data = Data([*DATA.train, wild], DATA.valid, "one wild")
    learner = made().learner(data, Plan(4))
    assert learner.profile.left_out == 1
    assert 60 not in np.concatenate(learner.train.sampler.epoch())
    assert made(replace(TINY, sigmas=100.0)).learner(data, Plan(4)).profile.left_out == 0


def test_the_loss_is_that_of_each_record_alone() -> None:
    system = made()
    learner = system.learner(DATA, Plan(4))
    system.module.eval()
    batch = learner._told(learner.valid, learner.valid.of([0, 3, 5]))
    total = learner.loss(batch)
    alone = [learner.loss(learner._told(learner.valid, learner.valid.of([r]))) for r in (0, 3, 5)]
    assert float(total.weight) == sum(len(DATA.valid[r].text) + 1 for r in (0, 3, 5))
    torch.testing.assert_close(total.total, torch.stack([a.total for a in alone]).sum())
    with torch.no_grad():  # the text by hand
        record = DATA.valid[3]
        target = system.letters.encode(record.text)
        features, frames = features_of(system.mel, [record.sound.at(16000)])
        logits, _, _ = system.module(features, frames, F.pad(target, (1, 0))[None])
        wanted = F.pad(target, (0, 1), value=len(system.letters))
        hand = F.cross_entropy(logits[0], wanted, reduction="sum")
    torch.testing.assert_close(torch.as_tensor(alone[1].sums["text"]), hand)


def test_it_learns_and_is_kept(tmp_path: Path) -> None:
    plan = Plan(40, learning_rate=4e-3, warmup_steps=10, validate_every=20)
    settings = replace(TINY, encoder_layers=2)
    system = train(CanaryEfficiency, DATA, settings, plan, out=tmp_path / "x")
    assert isinstance(system, CanaryEfficiency)
    first, last = system.record["validation"]
    assert last["loss"] < first["loss"] < np.log(len(system.letters))
    assert system.record["batches"]["cost"] < 0.3
    write(tmp_path / "a.wav", Waveform(DATA.valid[0].sound.at(16000)[None], 16000))
    again = CanaryEfficiency.from_pretrained(tmp_path / "x").run(str(tmp_path / "a.wav"))
    assert again.text == system.run(str(tmp_path / "a.wav")).text
    sounds = [record.sound.at(16000) for record in DATA.valid]
    said = [system.transcribe([sound])[0] for sound in sounds]
    assert [text[:8] for text in system.transcribe(sounds)] == [text[:8] for text in said]


@pytest.mark.parametrize("kind", ["t5", "pre"])
def test_kept_keys_and_values_change_nothing(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 32}
    config = (
        Config.t5(50, encoder_layers=2, decoder_layers=2, **sizes)
        if kind == "t5"
        else Config(50, encoder_layers=2, decoder_layers=2, norm_place="pre", **sizes)
    )
    model = EncoderDecoder(config).eval()
    source, target = torch.randint(2, 50, (3, 7)), torch.randint(2, 50, (3, 9))
    source[1, 4:] = 0
    with torch.no_grad():
        memory, written = model.encode(source), model.begin()
        whole = model.decode(target, memory)
        parts = [model.decode(t, memory, written=written) for t in target.split([2, 1, 3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert written.length == 9 and written.across[0].keys is not None
    assert written.across[0].keys.shape == (3, 2, 7, 8)


def test_equal_parameters_and_layers_moved() -> None:
    shallow = replace(CanaryEfficiency.scales["small"].settings, ear=0)
    deep = replace(shallow, encoder_layers=6, decoder_layers=6)
    counts = [sum(p.numel() for p in made(s).module.parameters()) for s in (shallow, deep)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_words_that_are_heard_and_letters_that_are_not_known() -> None:
    assert heard("Ten, two; one!") == "ten two one"
    spelt = made(replace(TINY, spell=True))
    assert spelt.words.words == tuple("_enotw") and made().words.words == ("one", "ten", "two")
    learner = spelt.learner(DATA, Plan(4))
    told, text = learner._told(learner.valid, learner.valid.of([3])), heard(DATA.valid[3].text)
    assert spelt.words.decode(told.words[0].tolist()) == " ".join(text.replace(" ", "_"))
    with pytest.raises(InvalidInputError, match="has 'z'"):
        made().letters.encode("z")


def test_a_small_one_starts_from_an_ear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    monkeypatch.setattr(canary_efficiency, "EAR", Plan(2, validate_every=2))
    settings = replace(TINY, encoder_layers=3, ear=2)
    one, two = made(settings), made(replace(settings, encoder_layers=2, decoder_layers=2))
    theirs = dict(two.module.encoder.named_parameters())
    for name, value in one.module.encoder.named_parameters():
        assert name.startswith("layers.2") or torch.equal(value, theirs[name])
    assert torch.equal(one.module.ctc.weight, two.module.ctc.weight)
    fresh = made(replace(settings, ear=0)).module
    assert not torch.equal(one.module.ctc.weight, fresh.ctc.weight)
    assert torch.equal(
        one.module.encoder.layers[2].conv.depthwise_conv.weight,
        fresh.encoder.layers[2].conv.depthwise_conv.weight,
    )
