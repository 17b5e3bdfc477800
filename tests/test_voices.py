"""Voices apart from what they say: the judge of voices, pairs, and shares of variance."""

import pytest
import torch

from isthmus.signals.mel import MelSpectrum
from isthmus.workbench import voices
from isthmus.workbench.voice_trials import inside, swaps


def test_texts_of_held_out_sentences_are_new_and_voices_keep_their_pitch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(voices, "say", lambda wanted: [(line,) for line in wanted])
    learn, held = (
        {u[0].text for own in voices.said(split, 30) for u in own}
        for split in ("train", "held-out")
    )
    assert len(learn) > 100 and not learn & held
    for (name, pitch), own in zip(voices.VOICES, voices.said("train", 3), strict=True):
        assert {(u[0].voice, u[0].pitch) for u in own} == {(name, pitch)}


def test_recordings_are_of_one_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = voices.said("held-out", 1, seed=7)
    monkeypatch.setattr(voices, "said", lambda split, each, seed=0: [own * 3 for own in heard])
    made = voices.data(3, joined=2)
    assert len(made.train) == 16 and len(made.valid) == 24
    first = made.train[0].sound.samples
    own = heard[0][0].samples
    assert first is not None and len(first) == 2 * (len(own) + 2000)
    assert torch.equal(first[: len(own)], own) and not first[len(own) : len(own) + 2000].any()


def test_the_judge_tells_sounds_apart() -> None:
    t, spectrum = torch.arange(40_000) / 16_000, MelSpectrum(16_000, 171, 20)
    sounds = [[0.3 * torch.sin(2 * torch.pi * f * t)] for f in (300.0, 2500.0)]
    state = torch.random.get_rng_state()
    judge = voices.judge(spectrum, sounds, steps=12, frames=24)
    assert torch.equal(state, torch.random.get_rng_state())
    mels = torch.cat([spectrum(own[0][None, 8_000 : 8_000 + 171 * 24]) for own in sounds])
    assert judge(mels).argmax(1).tolist() == [0, 1]
    assert not any(p.requires_grad for p in judge.parameters())


def test_pairs_and_shares() -> None:
    pairs = swaps(8, 6)
    assert len(pairs) == 56 == len({(i // 6, j // 6) for i, j in pairs})
    assert all(i // 6 != j // 6 and i % 6 != j % 6 for i, j in pairs)
    flat = torch.arange(12.0).repeat_interleave(3)[:, None]
    assert inside(flat, 3) == 0.0
    same = torch.randn(3, 4).repeat(5, 1)
    assert inside(same, 3) == pytest.approx(1.0, abs=1e-6)
