"""Single-Codec: files, the vector that is sent once, and rates by hand."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus import testing
from isthmus.codecs.base import pack, unpack
from isthmus.codecs.container import Reader
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Signal
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.systems.codecs.single_codec import Settings, SingleCodec
from isthmus.training.data import Data, Spoken

SETTINGS = SingleCodec.scales["test"].settings
STRETCH = SETTINGS.packet * SETTINGS.hop


def sound(samples: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(channels, samples, generator=draw).cumsum(1).sin()


def signal(x: torch.Tensor, cut: int = 0, known: bool = True) -> Signal:
    shape = [len(x), x.shape[1] if known else None]
    info: Any = {"medium": "audio", "dtype": "float32", "shape": shape, "rate_hz": 16_000}
    return Signal(info, x.split(cut, 1) if cut else [x])


def made(**changed: Any) -> SingleCodec:
    torch.manual_seed(0)
    codec = SingleCodec(replace(SETTINGS, **changed))
    codec.module.quantizer.embed.normal_()
    codec.module.eval()
    return codec


@pytest.fixture(scope="module")
def codec() -> SingleCodec:
    return made()


def payloads(codec: SingleCodec, x: torch.Tensor) -> list[bytes]:
    file = io.BytesIO()
    pack(codec, signal(x), file)
    return [frame.payload for frame in Reader(file.getvalue())]


def test_contract(codec: SingleCodec) -> None:
    makes = [
        lambda: signal(sound(15_000)),
        lambda: signal(sound(321, 2), 100),
        lambda: signal(sound(7_000), 999, known=False),
        lambda: signal(torch.zeros(1, 5_000)),
    ]
    testing.check_codec(codec, makes, mutations=20)


def test_rates_of_the_paper_by_hand() -> None:
    s = Settings()  # 24000 / (256 x 4) codes a second of 13 bits
    assert s.codes_hz == 23.4375 and s.bits_s == 13 * 23.4375 and int(s.bits_s) == 304
    assert SingleCodec.scales["small"].settings.codes_hz == pytest.approx(23.4, abs=0.05)


@pytest.mark.parametrize("samples", [1, 683, 684, 685, 171 * 9])
def test_what_pads_to_four_frames_is_cropped(codec: SingleCodec, samples: int) -> None:
    file = io.BytesIO()
    pack(codec, signal(sound(samples)), file)
    back = torch.cat(list(unpack(file.getvalue(), codec=codec).signal.chunks), 1)
    assert back.shape == (1, samples)
    g, codes = payloads(codec, sound(samples))
    each = -(-samples // 684)
    assert len(g) == 3 and len(codes) == (1 if samples < 128 else 2) + -(-each * 4 // 8)


def test_the_vector_is_sent_once_and_serves_all_stretches(codec: SingleCodec) -> None:
    x = sound(STRETCH * 2 + 700, 2)
    g, *stretches = payloads(codec, x)
    assert len(g) == 2 * SETTINGS.g_dim and len(stretches) == 3
    assert payloads(codec, x[:, :STRETCH])[0] == g
    assert len(payloads(made(g_dim=0), x)) == 3
    # the second stretch is coded with the first one's g
    mel = codec.mel(x[:, STRETCH : 2 * STRETCH])
    numbers = codec.module.numbers(codec.mel(x[:, :STRETCH])[..., : SETTINGS.heard])
    from isthmus.codecs.fixed import pack_codes

    assert stretches[1].endswith(pack_codes(codec.module.codes(mel, numbers), codec.bits))


def test_another_vector_gives_another_sound_of_the_same_codes(codec: SingleCodec) -> None:
    a, b = codec.sent(sound(5_000)[0]), codec.sent(sound(5_000, seed=1)[0])
    assert not torch.equal(a.numbers, b.numbers)
    own, other = (codec.module.spectra(n, a.codes) for n in (a.numbers, b.numbers))
    assert own.shape == other.shape and not torch.allclose(own, other, atol=1e-3)
    without = made(g_dim=0)
    a, b = without.sent(sound(5_000)[0]), without.sent(sound(5_000, seed=1)[0])
    assert torch.equal(
        without.module.spectra(a.numbers, a.codes), without.module.spectra(b.numbers, a.codes)
    )


def test_encoders_may_learn_anew_and_old_files_stay(codec: SingleCodec) -> None:
    other = made()
    for part in (other.module.encoder.leave, other.module.reference.leave):  # type: ignore[union-attr]
        part.bias.data += 1  # type: ignore[union-attr]
    assert other.fingerprint == codec.fingerprint
    other.module.decoder.leave.bias.data += 1  # type: ignore[union-attr]
    assert other.fingerprint != codec.fingerprint


def test_what_it_cannot_code_is_refused(codec: SingleCodec) -> None:
    for wrong in ({"rate_hz": 8000}, {"dtype": "int16"}, {"shape": [9, 100]}):
        info = dict(signal(sound(9)).info) | wrong
        with pytest.raises(InvalidInputError, match="this codec takes"):
            codec.parameters(info)
    with pytest.raises(InvalidInputError, match=r"has one rate, 0\.094 kbit/s"):
        codec.parameters(dict(signal(sound(9)).info), 0.05)
    with pytest.raises(InvalidInputError, match="multiple of 4"):
        made(packet=42)
    with pytest.raises(InvalidInputError, match="2, 4, 8"):
        made(size=12)
    file = io.BytesIO()
    pack(codec, signal(sound(9_000)), file)
    for broken in (file.getvalue()[:-9], file.getvalue().replace(b'"g":3', b'"g":2')):
        with pytest.raises(BrokenFileError):
            list(unpack(broken, codec=codec).signal.chunks)


def test_the_learner_hears_g_elsewhere_and_codes_begin_when_told() -> None:
    records = [Spoken(Recording(samples=sound(20_000, seed=i)[0]), "") for i in range(4)]
    data = Data(records[1:], records[:1])
    codec = SingleCodec.untrained(replace(SETTINGS, quantized_from=0.5), data)
    learner = codec.learner(data, replace(SingleCodec.scales["test"].plan, steps=4))
    batches = [learner.batch(part) for part in range(4)]
    assert [b.quantized for b in batches] == [False, False, True, True]
    assert [b.judged for b in batches] == [False, False, True, True]
    b = batches[2]
    assert b.mel.shape == (2, 20, 24) and b.other.shape[2] == int(b.frames.max()) <= 40
    for batch in batches[1:3]:
        loss = learner.loss(batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert ("commit" in loss.sums) == batch.quantized == bool(codec.module.quantizer.ready)
    assert all(p.grad is not None for p in codec.module.parameters())
    assert set(learner.validate()) == {"mcd_db"}


def test_only_the_encoder_hears_warped_spectra() -> None:
    data = Data([Spoken(Recording(samples=sound(9_000, seed=i)[0]), "") for i in range(3)], [])
    plan = SingleCodec.scales["test"].plan
    plain, warped = (made(warp=w).learner(data, plan).batch(1) for w in (0.0, 0.2))
    assert plain.heard is None and warped.heard is not None
    assert torch.equal(plain.mel, warped.mel) and torch.equal(plain.other, warped.other)
    assert warped.heard.shape == plain.mel.shape and not torch.equal(warped.heard, plain.mel)
    module = made().module.eval()
    batches = (plain, plain._replace(heard=plain.mel), warped)
    unheard, same, other = (module(*b._replace(quantized=False))[0] for b in batches)
    assert unheard == same != other


def test_files_of_another_rate_are_brought_to_the_codecs(
    codec: SingleCodec, tmp_path: Path
) -> None:
    write(tmp_path / "a.wav", Waveform(sound(44_100, 2).clamp(-1, 1), 44_100))
    found = codec.open(tmp_path / "a.wav")
    assert found.info["shape"] == [1, 16_000] and found.info["rate_hz"] == 16_000
    answer = codec.run(str(tmp_path / "a.wav"))
    assert answer.save is not None
    answer.save(tmp_path / "a.ist")
    opened = unpack(tmp_path / "a.ist", codec=codec)
    back = torch.cat(list(opened.signal.chunks), 1)
    assert back.shape == (1, 16_000) and float(back.abs().max()) <= 1.0
