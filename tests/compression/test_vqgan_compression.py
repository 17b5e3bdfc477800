"""vqgan-compression: files of any picture, lost frames, sizes of the codebook, what learns when."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.codecs.base import pack, unpack
from isthmus.codecs.container import Reader
from isthmus.codecs.frames import parts, samples_of, sealed
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Signal
from isthmus.signals.image import PictureFile, write_pixels
from isthmus.systems.compression.vqgan_compression import Settings, VqganCompression
from isthmus.testing import check_codec
from isthmus.training.data import Data
from isthmus.training.system import train
from isthmus.workbench import picture_trials as trials
from isthmus.workbench.coded_scenes import CodedScene, coded_scenes

TOLD = VqganCompression.scales["test"]
PLAN = replace(TOLD.plan, steps=24, validate_every=24, learning_rate=3e-4)


@pytest.fixture(scope="module")
def data() -> Data[CodedScene]:
    return Data(coded_scenes(40), coded_scenes(4, "held-out"))


@pytest.fixture(scope="module")
def codec(data: Data[CodedScene]) -> VqganCompression:
    made = train(VqganCompression, data, TOLD.settings, PLAN)
    assert isinstance(made, VqganCompression)
    return made


@pytest.fixture(scope="module")
def scene() -> Tensor:
    return coded_scenes(8, "held-out")[7].picture()


def test_contract(codec: VqganCompression, scene: Tensor) -> None:
    """Odd sides, beyond a tile; grey; colour with alpha; grey with alpha, one pixel."""
    alpha = torch.cat([scene, scene[:1]])
    cuts = (scene[:, :41, :30], scene[:1, :9, :33], alpha[:, :16, :7], alpha[2:, :1, :1])
    check_codec(codec.but(packets=3), [lambda c=c: trials.signal(c) for c in cuts], mutations=40)
    for cut in cuts:  # along the model, at the lowest rate, and evenly
        for other, rate in ((codec, None), (codec, codec.rates[0]), (codec.but(coded=False), None)):
            assert trials.coded(other, cut[None], rate).back.shape == cut[None].shape


def test_rates_are_those_of_indices(codec: VqganCompression, scene: Tensor) -> None:
    """Raw: log2 K' bits for every 8 by 8 pixels, and at most two words of the coder."""
    assert codec.rates == (2 / 64, 3 / 64, 4 / 64)
    raw = codec.but(coded=False)
    for rate, size in zip(codec.rates, (4, 8, 16), strict=True):
        assert raw.parameters(trials.signal(scene).info, rate + 0.001)["size"] == size
        found = trials.coded(raw, scene[None], rate)
        assert 0 <= found.bits * 64 * 64 - rate * 64 * 64 <= 64
    with pytest.raises(InvalidInputError, match=r"needs 0\.0312"):
        raw.parameters(trials.signal(scene).info, 0.03)
    big = {"medium": "image", "dtype": "uint8", "shape": [3, 1 << 12, 1 << 11]}
    with pytest.raises(InvalidInputError, match="up to 4194304 pixels"):
        raw.parameters(big)
    with pytest.raises(InvalidInputError, match="8 divides the side"):
        VqganCompression(replace(TOLD.settings, side=36))


def test_the_whole_codebook_is_not_shrunk(codec: VqganCompression, scene: Tensor) -> None:
    """K' = K is the identity; smaller ones are made of its clusters."""
    net = codec.module
    assert net.begun and torch.equal(net.maps[0], torch.arange(16))
    assert torch.equal(net.centres0, net.vq.embed)
    assert [int(m.max()) + 1 for m in net.maps] == [16, 8, 4]
    codes = codec.analyse(scene, 0)
    assert torch.equal(codec.analyse(scene, 2), net.maps[2][codes])
    words, uses, label = net.vq.embed, net.vq.count, net.maps[2]
    for group in range(4):
        mine = label == group
        mean = (words * uses[:, None])[mine].sum(0) / uses[mine].sum()
        assert torch.allclose(net.centres2[group], mean, atol=1e-4)
    # the trial of the fine-tuning can fail: without it the whole codebook's decoder shows centres
    off = codec.but(tuned=False)
    assert not torch.equal(off.synthesise(codes % 4, 2, (3, 64, 64)),
                           codec.synthesise(codes % 4, 2, (3, 64, 64)))  # fmt: skip


def test_a_lost_frame_is_a_known_mask(codec: VqganCompression, scene: Tensor) -> None:
    """Damaged, missing in the middle, cut off: the same gaps, filled the same way."""
    five = codec.but(packets=5)
    file = io.BytesIO()
    assert pack(five, trials.signal(scene), file).frames == 5
    data, codes = file.getvalue(), codec.analyse(scene, 0)
    row, column = torch.arange(8)[:, None], torch.arange(8)
    gaps = ((column + 2 * row) % 5 == 3)[None]  # a knight's moves apart, by hand
    wanted = codec.synthesise(codec.mend(codes, gaps, 0), 0, (3, 64, 64))
    head, frames, width = parts(data)
    assert len(codes.unique()) > 3
    start = data.rindex(frames[4][1])
    index = data.rindex(frames[3][1], 0, start) - 3  # type, number, length
    gone = data[:index] + data[index + 3 + len(frames[3][1]) + width :]
    for damaged in (trials.spoilt(data, [3]), gone):
        opened = unpack(damaged, codec=five, allow_partial=True)
        assert torch.equal(torch.cat(list(opened.signal.chunks), 1), wanted)
        assert "frame" in opened.reader.damage
        with pytest.raises(BrokenFileError):
            list(unpack(damaged, codec=five).signal.chunks)
    cut = unpack(data[:start], codec=five, allow_partial=True)
    last = codec.mend(codes, ((column + 2 * row) % 5 == 4)[None], 0)
    assert torch.equal(
        torch.cat(list(cut.signal.chunks), 1), codec.synthesise(last, 0, (3, 64, 64))
    )
    nothing = unpack(trials.spoilt(data, range(5)), codec=five, allow_partial=True)
    with pytest.raises(BrokenFileError, match="nothing arrived"):
        list(nothing.signal.chunks)
    # other codecs are told of losses as before: what comes before them is all there is
    assert len(list(Reader(trials.spoilt(data, [3]), allow_partial=True))) == 3
    assert samples_of(sealed(head, frames, width, 64)) == 64


def test_gaps_are_filled_from_around(codec: VqganCompression) -> None:
    codes = torch.arange(16).view(1, 4, 4)
    gaps = torch.zeros_like(codes, dtype=torch.bool)
    gaps[0, 1, 1] = True
    assert torch.equal(codec.mend(codes, ~gaps & gaps, 0), codes)
    assert int(codec.but(mended=False).mend(codes, gaps, 0)[0, 1, 1]) == 1  # the one above
    found = codec.mend(codes, gaps, 0)
    assert torch.equal(found[~gaps], codes[~gaps]) and 0 <= int(found[gaps]) < 16


def test_stages_teach_what_they_say(data: Data[CodedScene]) -> None:
    torch.manual_seed(0)
    codec = VqganCompression(TOLD.settings)
    learner = codec.learner(data, PLAN)
    net = codec.module.train()
    for part, learning in ((0, ("encoder", "decoders.0")), (15, ("books.1", "decoders.1"))):
        batch = learner.batch(part)
        assert batch[1] == (part == 15) and batch[2]["judged"] == (part == 15)
        net.zero_grad()
        learner.loss(batch).total.backward()  # type: ignore[no-untyped-call]
        got = {k for k, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
        for name in ("encoder", "decoders.0", "books.1", "decoders.1"):
            assert any(k.startswith(name) for k in got) == (name in learning), (part, name)
        later = any(k.startswith(("lm.", "masker.", "discriminator.")) for k in got)
        assert later == (part == 15)
    turns = [(learner.batch(part)[1], learner.batch(part)[2]["gaps"]) for part in range(12, 24)]
    assert [level for level, _ in turns] == [0, 0, 1, 1, 2, 2] * 2  # all equally
    assert [gaps for _, gaps in turns] == [0, 0, 0, 1, 0, 2] * 2  # the whole codebook most


def test_decoders_outlive_a_new_encoder(codec: VqganCompression, scene: Tensor) -> None:
    other = VqganCompression(codec.settings)
    other.module.load_state_dict(codec.module.state_dict())
    other.module.encoder.shortcut.bias.data += 1
    assert other.fingerprint == codec.fingerprint
    other.module.books[2].data += 1
    assert other.fingerprint != codec.fingerprint
    assert codec.but(packets=5).fingerprint == codec.fingerprint != codec.but(mended=False)


def test_pictures_of_ones_own(codec: VqganCompression, scene: Tensor, tmp_path: Path) -> None:
    write_pixels(tmp_path / "a.png", scene[:, :40])
    answer = codec.run(str(tmp_path / "a.png"))
    assert answer.save is not None
    answer.save(tmp_path / "a.ist")
    chunks = unpack(tmp_path / "a.ist", codec=codec).signal.chunks
    assert torch.cat(list(chunks), 1).shape == (3, 40, 64)
    few = Data([PictureFile(tmp_path / "a.png")] * 2, [PictureFile(tmp_path / "a.png")])
    assert codec.learner(few, PLAN).batch(0)[0].shape == (4, 3, 32, 32)
    wide = VqganCompression(replace(TOLD.settings, side=64)).learner(few, PLAN)
    with pytest.raises(InvalidInputError, match="crops of 64 are learnt from"):
        wide.batch(0)


def test_the_papers_settings_fit() -> None:
    with torch.device("meta"):
        made = VqganCompression(Settings(sizes=(1024, 8)))
    assert made.tile == 16 and made.rates[-1] == 10 / 256  # 0.039 bits a pixel, as in the paper


def test_a_signal_of_another_kind_is_refused(codec: VqganCompression) -> None:
    deep = Signal({"medium": "image", "dtype": "uint16", "shape": [1, 8, 8]}, [])
    with pytest.raises(InvalidInputError, match="uint8"):
        pack(codec, deep, io.BytesIO())
