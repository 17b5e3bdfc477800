"""HiFi-Codec: groups of codebooks, files in packets, fingerprints, and the learner."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from isthmus.codecs.base import pack, unpack
from isthmus.codecs.sound import overlapped
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.hifigan import level
from isthmus.nn.quantize import RVQ, GroupedRVQ
from isthmus.roles import Signal
from isthmus.signals.audio import Recording
from isthmus.systems.codecs.hificodec import Hificodec, Settings
from isthmus.training.data import Data, Spoken
from isthmus.workbench import sound_trials as trials
from isthmus.workbench.codec_bench import _own_first

SETTINGS = Hificodec.scales["test"].settings


def sound(samples: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(channels, samples, generator=draw).cumsum(1).sin()


def signal(x: torch.Tensor, cut: int = 0, known: bool = True) -> Signal:
    shape = [len(x), x.shape[1] if known else None]
    info: Any = {"medium": "audio", "dtype": "float32", "shape": shape, "rate_hz": 16_000}
    return Signal(info, x.split(cut, 1) if cut else [x])


def made(settings: Settings = SETTINGS) -> Hificodec:
    torch.manual_seed(0)
    codec = Hificodec(settings)
    encoder: Any = codec.module.encoder
    decoder: Any = codec.module.decoder
    level(encoder, decoder, sound(6_400)[None])
    with torch.no_grad():  # codes as far apart as vectors are
        for p in codec.module.quantizer.parameters():
            p.copy_(torch.randn_like(p))
    codec.module.eval()
    return codec


@pytest.fixture(scope="module")
def codec() -> Hificodec:
    return made()


@pytest.mark.parametrize(
    ("samples", "channels", "cut", "known"),
    [(321, 2, 100, True), (7_000, 1, 999, False), (1, 1, 0, True), (6_400, 1, 0, True)],
)
def test_odd_lengths_come_back(
    codec: Hificodec, samples: int, channels: int, cut: int, known: bool
) -> None:
    """The whole contract, in a fresh process too, is held in test_systems_contracts."""
    x = sound(samples, channels)
    file = io.BytesIO()
    sizes = pack(codec, signal(x, cut, known), file, compact=known)
    back = torch.cat(list(unpack(file.getvalue(), codec=codec).signal.chunks), 1)
    assert back.shape == x.shape and sizes.samples == samples
    assert torch.isfinite(back).all() and back.abs().max() <= 1


def test_one_group_is_a_plain_residual_quantizer() -> None:
    torch.manual_seed(0)
    grouped, plain = GroupedRVQ(8, 16, 1, 4, learn="grad"), RVQ(8, 16, 4, learn="grad")
    plain.load_state_dict(grouped.layers[0].state_dict())
    z = torch.randn(2, 8, 30)
    a, b = grouped(z), plain(z)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q)
    assert torch.equal(a.commit_loss, b.commit_loss)
    assert torch.allclose(a.stats["explained"], b.stats["explained"])


def test_halves_of_one_bit_each_share_what_is_explained() -> None:
    """By hand: corners of a rectangle, energies 1 and 9; two exact bits explain all."""
    grouped = GroupedRVQ(2, 2, 2, 1, learn="grad").eval()
    z = torch.tensor([[[1.0, -1.0, 1.0, -1.0], [3.0, 3.0, -3.0, -3.0]]])
    with torch.no_grad():
        for layer, far in zip(grouped.layers, (1.0, 3.0), strict=True):
            layer.layers[0].embed.copy_(torch.tensor([[far], [-far]]))  # type: ignore[union-attr,index,operator]
    found = grouped(z)
    assert found.codes.tolist() == [[[0, 1, 0, 1]], [[0, 0, 1, 1]]]
    assert found.stats["explained"].tolist() == pytest.approx([0.1, 0.9])
    assert found.stats["perplexity"].tolist() == pytest.approx([2.0, 2.0])
    assert torch.equal(grouped.decode(grouped.encode(z)), z)


def test_uneven_groups_are_refused() -> None:
    for wrong in ({"groups": 3}, {"codebooks": 5}, {"groups": 0}, {"dim": 9}):
        with pytest.raises(InvalidInputError, match="equal groups"):
            replace(SETTINGS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="512 channels"):
        GroupedRVQ(512, 16, 3, 1)


def test_packets_decode_to_just_what_the_whole_gives(codec: Hificodec) -> None:
    x = sound(3 * codec.packet + 1_000)
    file = io.BytesIO()
    sizes = pack(codec, signal(x, 777), file)
    opened = unpack(file.getvalue(), codec=codec)
    chunks = list(opened.signal.chunks)
    assert len(chunks) == sizes.frames == 4
    # the codes of the file, decoded at once
    heard = overlapped(x.split(codec.packet, 1), codec.module.encoder.reach * SETTINGS.hop)  # type: ignore[operator]
    parts = []
    with torch.no_grad():
        for window, left, own in heard:
            padded = torch.nn.functional.pad(window, (0, -window.shape[1] % SETTINGS.hop))
            z = codec.module.encoder(padded[None])
            parts.append(z[..., left // SETTINGS.hop :][..., : -(-own // SETTINGS.hop)])
        quantizer: Any = codec.module.quantizer
        codes = quantizer.encode(torch.cat(parts, -1))
        whole = codec.module.decoder(quantizer.decode(codes))[0, :, : x.shape[1]]
    assert len(codes.unique()) > 8
    assert torch.allclose(torch.cat(chunks, 1), whole, atol=1e-5)
    # 4 codes of 4 bits a frame of 320 samples, in words; lengths
    frames = -(-x.shape[1] // 320)
    assert frames * 2 <= sizes.payload <= frames * 2 + 4 * (8 + 4)


def test_a_trained_encoder_leaves_old_files_readable(codec: Hificodec) -> None:
    other = made()
    assert other.fingerprint == codec.fingerprint
    with torch.no_grad():
        other.module.encoder.conv_post.bias += 1  # type: ignore[union-attr,operator]
        assert other.fingerprint == codec.fingerprint
        other.module.decoder.conv_post.bias += 1  # type: ignore[union-attr,operator]
    assert other.fingerprint != codec.fingerprint


def test_what_it_cannot_code_is_refused(codec: Hificodec) -> None:
    info = {"medium": "audio", "dtype": "float32", "shape": [1, 9], "rate_hz": 16_000}
    for wrong in ({"rate_hz": 8000}, {"dtype": "int16"}, {"shape": [9, 100]}):
        with pytest.raises(InvalidInputError, match="this codec takes"):
            codec.parameters(info | wrong)
    with pytest.raises(InvalidInputError, match=r"one rate of 0\.80 kbit/s"):
        codec.parameters(info, 0.5)
    assert codec.parameters(info, 0.8) == codec.parameters(info, 9.0) == {}
    file = io.BytesIO()
    pack(codec, signal(sound(900)), file)
    with pytest.raises(BrokenFileError):
        list(unpack(file.getvalue()[:-9], codec=codec).signal.chunks)


def test_the_learner_moves_all_parts_and_each_by_its_own() -> None:
    torch.manual_seed(0)
    rows = [Spoken(Recording(samples=sound(6_000, seed=i)[0]), "") for i in range(6)]
    codec = Hificodec.untrained(SETTINGS, Data(rows[2:], rows[:2]))
    learner = codec.learner(Data(rows[2:], rows[:2]), Hificodec.scales["test"].plan)
    x, n_q, judged, judging = learner.batch(0)
    assert (n_q, judged, judging) == (4, True, True)
    judges: Any = codec.module.discriminator
    assert len(judges(x)) == 1 + 3 + 1  # periods, scales, spectra
    total, told = codec.module.train()(x, n_q, True, False)
    total.backward()
    assert not any(p.grad is not None for p in judges.parameters())
    for part in ("encoder", "decoder", "quantizer"):
        grads = [p.grad for p in getattr(codec.module, part).parameters()]
        assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0, part
    assert {"mel", "adversarial", "features", "commit"} <= set(told) and "l1" not in told


def test_trials_of_codebooks(codec: Hificodec) -> None:
    """Over several sounds at once, the numbers are those of all their vectors together."""
    sounds = [sound(6_400)[0], sound(3_000, seed=1)[0]]
    found = trials.codebooks(codec.module, sounds, SETTINGS.hop)
    codes = torch.cat([trials.codes(codec.module, x, SETTINGS.hop) for x in sounds], 1)
    share = torch.bincount(codes[2]) / codes.shape[1]
    entropy = -(share * share.clamp(min=1e-9).log()).sum()
    assert found["perplexity"][2] == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert sum(found["energy"]) == pytest.approx(1) and len(found["energy"]) == SETTINGS.dim
    assert trials.largest_share([0.6, 0.2]) == pytest.approx(0.75)


def test_a_bench_takes_the_model_with_its_idea_on() -> None:
    small = Hificodec.scales["small"].settings
    found = _own_first([made(replace(SETTINGS, groups=1)), Hificodec(small), made()])
    assert found[0].settings == small
