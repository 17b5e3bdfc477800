"""EnCodec: files, streams, what decides a fingerprint, and what the learner does."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from isthmus import testing
from isthmus.codecs.base import pack, unpack
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Signal
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.systems.codecs.encodec import Encodec
from isthmus.training.data import Data, Spoken
from isthmus.workbench import sound_trials as trials

SETTINGS = Encodec.scales["test"].settings


def sound(samples: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(channels, samples, generator=draw).cumsum(1).sin()


def signal(x: torch.Tensor, cut: int = 0, known: bool = True) -> Signal:
    shape = [len(x), x.shape[1] if known else None]
    info: Any = {"medium": "audio", "dtype": "float32", "shape": shape, "rate_hz": 16_000}
    return Signal(info, x.split(cut, 1) if cut else [x])


@pytest.fixture(scope="module")
def codec() -> Encodec:
    torch.manual_seed(0)
    made = Encodec(SETTINGS)
    made.module.train()
    for seed in range(3):  # codebooks begin
        made.module.quantizer(made.module.encoder(sound(32_000, seed=seed)[None]))
    made.module.eval()
    return made


def test_contract(codec: Encodec) -> None:
    makes: list[Callable[[], Signal]] = [
        lambda: signal(sound(15_000)),
        lambda: signal(sound(321, 2), 100),
        lambda: signal(sound(7_000), 999, known=False),
        lambda: signal(torch.zeros(1, 5_000)),
    ]
    testing.check_codec(codec, makes, rates=(None, 0.25), mutations=60)


def test_with_and_without_the_code_model_the_sound_is_the_same(codec: Encodec) -> None:
    raw = Encodec(replace(SETTINGS, coded=False))
    raw.module.load_state_dict(codec.module.state_dict())
    raw.module.eval()
    sounds = [sound(9_000)[0], sound(640, seed=1)[0]]
    (_, a), (size, b) = (trials.coded(c, sounds) for c in (codec, raw))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # 29 and 2 frames of 3 codes of 4 bits, in packets of 20 frames, in words; lengths
    assert size >= (29 + 2) * 3 * 4 // 8
    assert raw.fingerprint == codec.fingerprint


def test_frames_one_by_one_give_what_the_whole_gives(codec: Encodec) -> None:
    x = sound(16_000)
    whole = trials.whole(codec.module, x[0], SETTINGS.hop)
    for packet_s in (0.02, 0.4, 2.0):
        other = Encodec(replace(SETTINGS, packet_s=packet_s))
        other.module.load_state_dict(codec.module.state_dict())
        other.module.eval()
        file = io.BytesIO()
        sizes = pack(other, signal(x, 777), file)
        chunks = list(unpack(file.getvalue(), codec=other).signal.chunks)
        assert len(chunks) == sizes.frames
        assert torch.allclose(torch.cat(chunks, 1)[0], whole, atol=1e-5)


def test_a_trained_encoder_leaves_old_files_readable(codec: Encodec) -> None:
    other = Encodec(SETTINGS)
    other.module.load_state_dict(codec.module.state_dict())
    other.module.encoder.layers[0].conv.bias.data += 1  # type: ignore[union-attr,operator]
    assert other.fingerprint == codec.fingerprint
    other.module.decoder.layers[0].conv.bias.data += 1  # type: ignore[union-attr,operator]
    assert other.fingerprint != codec.fingerprint


def test_what_it_cannot_code_is_refused(codec: Encodec) -> None:
    for wrong in ({"rate_hz": 8000}, {"dtype": "int16"}, {"shape": [9, 100]}):
        info = {"medium": "audio", "dtype": "float32", "shape": [1, 9], "rate_hz": 16_000} | wrong
        with pytest.raises(InvalidInputError, match="this codec takes"):
            codec.parameters(info)
    info = dict(signal(sound(9)).info)
    with pytest.raises(InvalidInputError, match="kbit/s or more"):
        codec.parameters(info, 0.1)
    assert [codec.parameters(info, r)["books"] for r in (0.2, 0.59, 0.6, 9)] == [1, 2, 3, 3]
    file = io.BytesIO()
    pack(codec, signal(sound(900)), file)
    with pytest.raises(BrokenFileError):
        list(unpack(file.getvalue()[:-9], codec=codec).signal.chunks)


def records(count: int) -> Data[Spoken]:
    made = [Spoken(Recording(samples=sound(6_000, seed=i)[0]), "") for i in range(count)]
    return Data(made[2:], made[:2])


def test_the_loss_moves_all_parts_and_each_by_its_own() -> None:
    torch.manual_seed(0)
    codec = Encodec(SETTINGS)
    learner = codec.learner(records(6), Encodec.scales["test"].plan)
    x, *_ = learner.batch(0)
    total, told = codec.module.train()(x, 3, True, False)
    total.backward()
    assert not any(p.grad is not None for p in codec.module.discriminator.parameters())  # type: ignore[union-attr]
    assert not any(p.grad is not None for p in codec.module.lm.parameters())  # type: ignore[union-attr]
    for part in ("encoder", "decoder"):
        grads = [p.grad for p in getattr(codec.module, part).parameters()]
        assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0, part
    # the first step's averages are its own norms
    assert sum(float(v) for k, v in told.items() if k.startswith("norm_")) == pytest.approx(1)
    codec.module.zero_grad()
    total, told = codec.module(x, 3, False, True)
    total.backward()
    assert all(p.grad is not None for p in codec.module.discriminator.parameters())  # type: ignore[union-attr]
    assert "adversarial" not in told and "discriminator" in told


def test_the_code_model_learns_last_and_alone() -> None:
    codec = Encodec.untrained(SETTINGS, records(6))
    learner = codec.learner(records(6), replace(Encodec.scales["test"].plan, steps=4))
    codec.module.train()(*learner.batch(0))
    assert len(learner.batch(1)) == 4 and len(learner.batch(2)) == 1
    codes = learner.batch(2)[0]
    assert codes.shape[1:] == (4, 20) and len(codes) in SETTINGS.choices  # 0.4 s of 320 samples
    before = {k: v.clone() for k, v in codec.module.state_dict().items()}
    total, told = codec.module(codes)
    total.backward()
    assert torch.equal(codes, learner.batch(2)[0])
    # windows of the codes of whole sounds
    more = [F.pad(r.sound.samples, (0, 400)) for r in records(6).train]  # 18.75 frames each
    wholes = [trials.codes(codec.module, x, SETTINGS.hop) for x in more]
    spans = torch.cat([w[: len(codes)].unfold(1, 20, 1) for w in wholes], 1)  # [n_q, ., 20]
    for window in codes.unbind(1):
        assert (spans == window[:, None]).all(2).all(0).any()
    assert list(told) == ["nats"]
    for name, parameter in codec.module.named_parameters():
        assert (parameter.grad is not None) == name.startswith("lm."), name
    after = codec.module.state_dict()  # averages of codebooks and balancer stay, too
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_shares_follow_weights_only_when_balanced() -> None:
    torch.manual_seed(0)
    codec = Encodec(replace(SETTINGS, balance_decay=0.5))
    learner = codec.learner(records(6), replace(Encodec.scales["test"].plan, steps=12))
    codec.module.train()
    for part in range(6):
        codec.module(learner.batch(part)[0], None, True)
    weights = codec.module.balancer.weights
    balanced, fixed = (
        trials.gradient_shares(codec.module.eval(), learner, balance=b, batches=6)
        for b in (True, False)
    )
    assert trials.off_weights(balanced, weights) < 0.5 < trials.off_weights(fixed, weights)


def test_too_short_segments_are_refused() -> None:
    codec = Encodec(replace(SETTINGS, segment_s=0.02))
    with pytest.raises(InvalidInputError, match="segment_s"):
        codec.learner(records(3), Encodec.scales["test"].plan)


def test_files_of_another_rate_are_brought_to_the_codecs(codec: Encodec, tmp_path: Path) -> None:
    write(tmp_path / "a.wav", Waveform(sound(44_100, 2).clamp(-1, 1), 44_100))
    write(tmp_path / "b.wav", Waveform(sound(3_000, 2), 16_000))
    found = codec.open(tmp_path / "a.wav")
    assert found.info["shape"] == [1, 16_000] and found.info["rate_hz"] == 16_000
    answer = codec.run(str(tmp_path / "b.wav"))  # as it is, both channels
    assert answer.save is not None
    answer.save(tmp_path / "b.ist")
    opened = unpack(tmp_path / "b.ist", codec=codec)
    assert torch.cat(list(opened.signal.chunks), 1).shape == (2, 3_000)


def test_codebooks_begin_when_they_are_told_to() -> None:
    settings = replace(SETTINGS, quantized_from=0.5, lm_learns=(1.0, 0.4, 4))
    codec = Encodec.untrained(settings, records(6))
    learner = codec.learner(records(6), replace(Encodec.scales["test"].plan, steps=4))
    assert [learner.batch(part)[1] > 0 for part in range(4)] == [False, False, True, True]
    layers = codec.module.quantizer.layers
    for part in range(3):
        total, told = codec.module.train()(*learner.batch(part))
        total.backward()
        begun = part == 2
        assert bool(layers[0].ready) == ("commit" in told) == begun  # type: ignore[operator,union-attr]
    assert all(p.grad is not None for p in codec.module.encoder.parameters())


def test_what_streams_is_what_the_whole_gives(codec: Encodec) -> None:
    vectors, apart, moved = trials.streamed(codec.module, sound(5_000)[0], SETTINGS.hop)
    assert vectors < 1e-5 and apart < 1e-5 and moved < 0.02
