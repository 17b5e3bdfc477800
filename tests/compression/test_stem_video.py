"""stem-video: files, what a lost frame does, cuts, and what the learner teaches when."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.codecs.base import pack, unpack
from isthmus.codecs.container import RESET, Reader
from isthmus.codecs.frames import parts, samples_of, sealed
from isthmus.errors import BrokenFileError, DesyncError, InvalidInputError
from isthmus.metrics.images import psnr
from isthmus.roles import Signal
from isthmus.signals.clips import ClipFile, Moving
from isthmus.signals.video import save_video
from isthmus.systems.compression.stem_video import Settings, StemVideo
from isthmus.testing import check_codec
from isthmus.training.clip_codec import CLIPS, GRID, PICTURES, pasts
from isthmus.training.data import Data, read
from isthmus.training.system import train
from isthmus.workbench import moving
from isthmus.workbench import video_trials as trials

PLAN = replace(StemVideo.scales["test"].plan, steps=40)
SETTINGS = replace(StemVideo.scales["test"].settings, cuts=False)


def clips(count: int, part: moving.Part = "train") -> list[Moving]:
    return [*moving.pans(count, part), *moving.flights(1, part)]


@pytest.fixture(scope="module")
def data() -> Data[Moving]:
    return Data(clips(6), clips(1, "held-out"))


@pytest.fixture(scope="module")
def codec(data: Data[Moving]) -> StemVideo:
    made = train(StemVideo, data, SETTINGS, PLAN)
    assert isinstance(made, StemVideo)
    return made


@pytest.fixture(scope="module")
def film() -> torch.Tensor:
    return moving.pans(1, "judged", 3)[0].frames()


def again(codec: StemVideo, **changed: bool) -> StemVideo:
    """The same weights and integers, other settings."""
    made = StemVideo(replace(codec.settings, **changed))
    made.module.load_state_dict(codec.module.state_dict())
    made.module.eval()
    return made


def test_contract(codec: StemVideo, film: torch.Tensor) -> None:
    """Odd sides, a film of unknown length, a single picture."""

    def cut(frames: torch.Tensor, known: bool = True) -> Signal:
        shape = [len(frames) if known else None, *frames.shape[1:]]
        info = {"medium": "video", "dtype": "uint8", "shape": shape, "rate": "30/1"}
        return Signal(info, frames.split(2))

    makes = [lambda: cut(film[:3, :, :31, :50]), lambda: cut(film[:2, :, :9, :7], False)]
    check_codec(codec, makes, mutations=10)


def test_pixels_are_those_of_latents_alone(codec: StemVideo, film: torch.Tensor) -> None:
    """With and without time, and each frame by itself: errors cannot grow."""
    with_time, without = (
        trials.coded(c, film[None]) for c in (codec, again(codec, temporal=False))
    )
    assert torch.equal(with_time.back, without.back)
    assert not torch.equal(with_time.bits, without.bits)
    for t in (0, 5):
        y, _ = codec.analyse(film[t])
        assert torch.equal(codec.synthesise(y, 64, 64)[0], with_time.back[0, t])
    assert torch.allclose(with_time.psnr_db[0], psnr(with_time.back[0], film))
    bits = codec.estimates(film)
    assert (with_time.bits[0] <= 1.005 * bits + 64).all() and (with_time.bits[0] > bits - 64).all()


def test_a_lost_frame_is_noticed_and_not_shown(codec: StemVideo, film: torch.Tensor) -> None:
    data = trials.coded(codec, film[None]).files[0]
    chunks, shown = iter(unpack(trials.without(data, 3), codec=codec).signal.chunks), []
    with pytest.raises(DesyncError, match="other symbols"):
        shown.extend(chunks)
    assert len(shown) in (0, 3)
    assert trials.noticed(codec, data, 3)
    with pytest.raises(BrokenFileError, match="needs one before it"):
        list(unpack(trials.without(data, 0), codec=codec).signal.chunks)
    # without time nothing is missed, so the trial can fail
    off = again(codec, temporal=False)
    assert not trials.noticed(off, trials.coded(off, film[None]).files[0], 3)


def test_after_a_cut_decoding_begins_anew(codec: StemVideo, film: torch.Tensor) -> None:
    """Another clip in the middle: its frames decode without what was before."""
    both = torch.cat([film[:4], moving.flights(1, "judged", 4)[0].frames()[:3]])
    cutting = again(codec, cuts=True)
    info = {"medium": "video", "dtype": "uint8", "shape": [None, 3, 64, 64], "rate": "25/1"}
    file = io.BytesIO()
    pack(cutting, Signal(info, [both]), file)
    kinds = [frame.kind for frame in Reader(file.getvalue())]
    coder = cutting.coder
    for t in range(1, 7):  # a frame begins anew where, and only where, that is cheaper
        (y, z), (one, _), two = *(cutting.analyse(both[k]) for k in (t, t - 1)), None
        begun = max(k for k in range(t) if kinds[k] == RESET)
        two = cutting.analyse(both[t - 2])[0] if t - 2 >= begun else torch.zeros_like(y)
        none = torch.zeros_like(torch.cat([y, y], 1))
        cheaper = coder.bits(y, z, none) < coder.bits(y, z, torch.cat([one, two], 1))
        assert (kinds[t] == RESET) == cheaper
    # a file in which the frame after the cut is a place to begin, wherever the codec put one
    head, frames, width = parts(file.getvalue())
    data = trials.coded(cutting, both[None, 4:]).files[0]
    alone = torch.cat(list(unpack(data, codec=cutting).signal.chunks))
    joined = [*frames[:4], *parts(data)[1]]
    assert samples_of(data) == 3
    found = unpack(sealed(head, joined, width, 7), codec=cutting).signal.chunks
    assert torch.equal(torch.cat(list(found))[4:], alone)


def test_what_it_cannot_code_is_refused(codec: StemVideo) -> None:
    info = {"medium": "video", "dtype": "uint8", "shape": [2, 3, 16, 16], "rate": "25/1"}
    with pytest.raises(InvalidInputError, match="set trade"):
        codec.parameters(info, 1.0)
    with pytest.raises(InvalidInputError, match="3 planes"):
        codec.parameters(info | {"shape": [2, 1, 16, 16]})
    with pytest.raises(InvalidInputError, match="up to"):
        codec.parameters(info | {"shape": [2, 3, 1 << 12, 1 << 12]})


def test_decoders_outlive_a_new_encoder(codec: StemVideo) -> None:
    other = again(codec)
    other.module.law.h_a[0].bias.data += 1  # type: ignore[operator,union-attr]
    assert other.fingerprint == codec.fingerprint
    third = again(codec)
    third.module.law.prior.index.layers[0].conv.bias.data += 1  # type: ignore[operator,union-attr]
    assert third.fingerprint != codec.fingerprint


def test_stages_teach_what_they_say(data: Data[Moving]) -> None:
    torch.manual_seed(0)
    codec = StemVideo(SETTINGS)
    learner = codec.learner(data, PLAN)
    assert [learner.stage(p) for p in (0, 19, 20, 31, 32, 39)] == [PICTURES] * 2 + [CLIPS] * 2 + [
        GRID
    ] * 2
    module = codec.module.train()
    for part, auto in ((0, True), (20, False), (39, False)):
        module.zero_grad()
        learner.loss(learner.batch(part)).total.backward()  # type: ignore[no-untyped-call]
        for name in ("g_a", "g_s"):
            grads = [p.grad for p in getattr(module, name).parameters()]
            assert all((g is not None and bool(g.any())) == auto for g in grads), (part, name)
        assert all(p.grad is not None for p in module.law.prior.parameters())
    y = torch.arange(8.0).view(2, 4, 1, 1, 1)
    assert pasts(y)[1, :, :, 0, 0].tolist() == [[0, 0], [4, 0], [5, 4], [6, 5]]


def test_latents_that_no_longer_change_are_made_once(data: Data[Moving]) -> None:
    codec = StemVideo(replace(SETTINGS, side=64))
    learner = codec.learner(data, PLAN)
    assert learner.batch(0)[2] is None  # pictures are still learnt
    x, stage, y = learner.batch(25)
    assert y is not None and stage == CLIPS
    with torch.no_grad():
        again = codec.module.g_a(x.flatten(0, 1) - 0.5).view(y.shape)
        assert torch.allclose(y, again, atol=1e-5)
        known, found = (codec.module.eval()(x, codec.settings, GRID, z)[1] for z in (y, None))
    assert torch.allclose(known, found, rtol=1e-3)
    assert codec.learner(data, PLAN).batch(25)[0].shape == x.shape
    cut = StemVideo(SETTINGS).learner(data, PLAN)  # crops are elsewhere each time
    assert cut.batch(25)[2] is None


def test_without_time_pictures_are_learnt_alike(data: Data[Moving]) -> None:
    """So that both arms of the claim have one autoencoder."""
    few = replace(PLAN, steps=8)
    a, b = (train(StemVideo, data, replace(SETTINGS, temporal=t), few) for t in (True, False))
    first, second = (m.module.state_dict() for m in (a, b))
    same = {k for k in first if torch.equal(first[k], second[k])}
    assert {k for k in first if k.startswith(("g_a.", "g_s."))} <= same
    assert any(k.startswith("law.prior.fusion") for k in first.keys() - same)


def test_films_of_ones_own(
    codec: StemVideo, film: torch.Tensor, tmp_path: Path, data: Data[Moving]
) -> None:
    info = {"medium": "video", "dtype": "uint8", "shape": [8, 3, 64, 64], "rate": "25/1"}
    for name in ("a.mp4", "b.mkv", "c.mp4"):
        save_video(tmp_path / name, Signal(info, [film]), exact=True)
    answer = codec.run(str(tmp_path / "a.mp4"))
    assert answer.save is not None
    answer.save(tmp_path / "a.ist")
    opened = unpack(tmp_path / "a.ist", codec=codec)
    assert torch.cat(list(opened.signal.chunks)).shape == (8, 3, 64, 64)
    found = read("clips", [tmp_path])
    assert isinstance(found.train[0], ClipFile) and torch.equal(found.train[0].frames(), film)
    wide = StemVideo(replace(SETTINGS, side=96)).learner(found, PLAN)
    with pytest.raises(InvalidInputError, match="96 by 96 are learnt from"):
        wide.batch(0)
    (tmp_path / "d.mp4").write_bytes(b"no film")
    with pytest.raises(BrokenFileError, match=r"d\.mp4, line 1"):
        read("clips", [tmp_path])
    for wrong in ({"side": 50}, {"frames": 2}):
        with pytest.raises(InvalidInputError, match="change side and frames"):
            StemVideo(replace(SETTINGS, **wrong)).learner(data, PLAN)  # type: ignore[arg-type]


def test_the_papers_settings_fit() -> None:
    with torch.device("meta"):
        module = StemVideo(Settings()).module
    assert module.multiple == 64
