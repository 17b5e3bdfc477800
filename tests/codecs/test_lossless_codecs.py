"""The codecs without loss, on signals of every kind, and mutated files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from make_corpus import FILES, packed, picture, sound, spans
from PIL import Image

from isthmus.codecs import lossless_audio, lossless_image
from isthmus.codecs.base import find, ids, lookup, pack, unpack
from isthmus.codecs.container import EMBEDDED, Frame, Header, Reader, write
from isthmus.codecs.lossless_audio import LosslessAudio
from isthmus.codecs.lossless_image import LosslessImage
from isthmus.codecs.rangecoder import Decoder, Encoder
from isthmus.codecs.residuals import CONTEXTS, SCALES, SHAPES, Bank, choose, entry
from isthmus.errors import (
    BrokenFileError,
    DesyncError,
    InvalidInputError,
    MismatchError,
    UnknownNameError,
)
from isthmus.roles import Signal
from isthmus.testing import check_codec
from isthmus.testing.mutations import fuzz

CORPUS = Path(__file__).parent / "corpus"


def back(data: bytes, **how: Any) -> torch.Tensor:
    opened = unpack(data, **how)
    return torch.cat(list(opened.signal.chunks), 1)


def test_pictures_keep_the_contract() -> None:
    sizes = [(1, 1, 1), (3, 17, 5), (4, 1, 40), (2, 40, 33), (1, 30, 1), (5, 6, 6)]
    makers = [lambda s=s: picture(*s) for s in sizes]
    check_codec(LosslessImage(), [*makers, lambda: picture(1, 9, 9, 16)])


def test_drawings_are_embedded_where_that_is_smaller() -> None:
    board = (torch.arange(64)[:, None] // 8 + torch.arange(80) // 8) % 2 * 200
    for planes in (1, 3, 4):
        pixels = board.to(torch.uint8).expand(planes, -1, -1).contiguous()
        if planes == 4:
            pixels[3] = 0  # colours under full transparency come back as well
        signal = Signal({"medium": "image", "dtype": "uint8", "shape": [planes, 64, 80]}, [pixels])
        data = packed(signal)
        assert next(iter(Reader(data))).kind == EMBEDDED
        assert torch.equal(back(data), pixels)
        out = io.BytesIO()
        pack(LosslessImage(drawings=False), Signal(signal.info, [pixels]), out)
        assert len(out.getvalue()) > len(data) and torch.equal(back(out.getvalue()), pixels)


def test_an_embedded_picture_of_another_size_is_refused() -> None:
    info = {"medium": "image", "dtype": "uint8", "shape": [3, 8, 8]}
    kinds = [((8, 9), "WEBP", "has the size"), ((8, 8), "PNG", "cannot be read")]
    kinds.append(((8, 8), "bomb", "cannot be read|has the size"))
    for size, form, says in kinds:
        small, out = io.BytesIO(), io.BytesIO()
        Image.new("RGB", size).save(small, "WEBP" if form == "bomb" else form, lossless=True)
        if form == "bomb":  # 16,000 by 12,000 pixels, it says
            raw = bytearray(small.getvalue())
            raw[21:25] = (15_999 | 11_999 << 14).to_bytes(4, "little")
            small = io.BytesIO(bytes(raw))
        header = Header("parts/lossless-image", bytes(32), info, lossless=True)
        write(out, header, [Frame(small.getvalue(), kind=EMBEDDED, samples=8)])
        with pytest.raises(BrokenFileError, match=says):
            back(out.getvalue())


def test_sound_keeps_the_contract() -> None:
    kinds = [(1, 1, "int8"), (2, 333, "int16"), (3, 70, "int24"), (1, 50, "int32")]
    kinds += [(2, 80, "float32")]
    check_codec(LosslessAudio(), [lambda k=k: sound(*k) for k in kinds])  # type: ignore[misc]


def test_extremes_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 65536, (3, 50, 20), generator=generator, dtype=torch.int32)
    info = {"medium": "image", "dtype": "uint16", "shape": [3, 50, 20]}
    assert torch.equal(back(packed(Signal(info, [noise]))), noise)
    for low, dtype in ((-(2**31), "int32"), (-(2**15), "int16")):
        wild = torch.randint(low, -low, (2, 5000), generator=generator).to(torch.int32)
        wild[:, 1000:2000:2], wild[:, 1001:2000:2] = low, -low - 1
        info = {"medium": "audio", "dtype": dtype, "shape": [2, 5000], "rate_hz": 9}
        assert torch.equal(back(packed(Signal(info, [wild]))), wild)
    odd = torch.tensor([[0.0, -0.0, float("inf"), -1e-45, 3e38, -3e38, float("nan"), 1.0]])
    info = {"medium": "audio", "dtype": "float32", "shape": [1, 8], "rate_hz": 9}
    found = back(packed(Signal(info, [odd])))
    assert torch.equal(found.view(torch.int32), odd.view(torch.int32))


def test_photographs_are_smaller_than_png_and_near_webp() -> None:
    pixels = np.asarray(Image.open(_photograph()).convert("RGB"))[60:188, 150:278]
    signal = Signal(
        {"medium": "image", "dtype": "uint8", "shape": [3, 128, 128]},
        [torch.from_numpy(pixels.copy()).permute(2, 0, 1)],
    )
    ours = len(packed(signal))
    png, webp = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", optimize=True)
    Image.fromarray(pixels).save(webp, "WEBP", lossless=True, quality=100, method=6)
    assert ours < 0.85 * len(png.getvalue()) and ours < 1.05 * len(webp.getvalue())


def _photograph() -> Path:
    skimage = pytest.importorskip("skimage")
    return Path(skimage.__file__).parent / "data" / "astronaut.png"


@pytest.mark.parametrize(("channels", "most"), [(2, 0.96), (1, 1.02)])
def test_sound_is_as_small_as_flac(channels: int, most: float) -> None:
    """Two channels of decaying tones, and coloured noise, which FLAC predicts as well."""
    rng = np.random.default_rng(0)
    if channels == 2:
        t = np.arange(66_150) / 44_100
        rates = enumerate((220, 331, 440.5, 660, 1250, 3000), 1)
        tones = sum(np.sin(2 * np.pi * f * t) * np.exp(-(t % 0.5) * k) for k, f in rates) * 3000
        left, right = tones, 0.7 * tones + 0.2 * np.roll(tones, 13)
        sound = np.stack([left, right]) + rng.normal(0, 30, (2, len(t)))
    else:
        sound = rng.normal(0, 300, 20_000)
        for _ in range(3):
            sound = np.convolve(sound, [0.4, 0.8, 0.4], "same")
        sound = sound[None]
    whole = np.rint(sound).astype(np.int32)
    info = {"medium": "audio", "dtype": "int16", "shape": list(whole.shape), "rate_hz": 44_100}
    flac = io.BytesIO()
    soundfile.write(flac, whole.T.astype(np.int16), 44_100, format="FLAC", compression_level=1.0)
    ours = len(packed(Signal(info, [torch.from_numpy(whole)])))
    assert ours < most * len(flac.getvalue())


def test_long_signals_are_coded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless_image, "BAND", 200)
    monkeypatch.setattr(lossless_image, "TILE", 8)
    whole = next(iter(picture(3, 45, 21).chunks))
    info = {"medium": "image", "dtype": "uint8", "shape": [3, 45, 21]}
    out = io.BytesIO()
    sizes = pack(LosslessImage(), Signal(info, torch.split(whole, 7, 1)), out)
    assert sizes.frames == 12 and sizes.samples == 45
    assert torch.equal(back(out.getvalue()), whole)
    opened = unpack(spans(sound(2, 300), known=True))
    chunks = list(opened.signal.chunks)
    assert [c.shape[1] for c in chunks] == [128, 128, 44] and opened.texts == ["a note"]
    assert torch.equal(torch.cat(chunks, 1), next(iter(sound(2, 300).chunks)))


def test_a_stream_of_unknown_length() -> None:
    data = spans(sound(1, 300, "int24"), known=False)
    assert torch.equal(back(data), next(iter(sound(1, 300, "int24").chunks)))
    cut = unpack(data[:-200], allow_partial=True)
    got = torch.cat(list(cut.signal.chunks), 1)
    assert got.shape[1] in (128, 256) and "cut off" in cut.reader.damage
    assert torch.equal(got, next(iter(sound(1, 300, "int24").chunks))[:, : got.shape[1]])


def test_tables_are_the_same_everywhere() -> None:
    """Integers from integers: one hash for all machines."""
    import hashlib

    state = hashlib.sha256()
    for number in range(SCALES * SHAPES):
        table, shift = entry(number)
        state.update(table.counts.astype("<i8").tobytes() + bytes([shift, -table.low]))
    assert state.hexdigest()[:16] == "03b365ad1909cefb"


def test_a_bank_codes_what_it_was_chosen_for() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([0.01, 0.5, 4.0, 60.0, 1e5])
    contexts = rng.integers(0, 5, 30_000)
    residuals = np.rint(rng.laplace(0, scales[contexts])).astype(np.int64)
    chosen = choose(residuals, contexts)
    coder, bank = Encoder(), Bank(chosen)
    bank.encode(coder, residuals, contexts)
    data = coder.finish()
    assert np.array_equal(bank.decode(Decoder(data), contexts), residuals)
    bits = [0.0, 1.56, 4.44, 8.35, 19.05]  # entropies of these Laplacians, rounded
    assert 8 * len(data) < 30_000 * (np.mean(bits) + 0.03)
    assert len(chosen) == CONTEXTS


def test_the_corpus_is_what_its_maker_makes() -> None:
    """A file of an older version that no longer decodes alike would show here."""
    for name, make in FILES.items():
        stored = (CORPUS / f"{name}.ist").read_bytes()
        assert torch.equal(
            back(stored).contiguous().view(torch.uint8), back(make()).contiguous().view(torch.uint8)
        ), name


def test_mutated_files_are_refused_or_decoded() -> None:
    files = [p.read_bytes() for p in sorted(CORPUS.glob("*.ist"))]
    found = fuzz(files, 2000, seed=1)
    assert found.failures == []
    assert found.slowest_s < 5 and found.grown < 1 << 30
    assert found.refused["BrokenFileError"] > 1000 and found.refused["DesyncError"] > 20


def test_the_check_sees_a_codec_that_does_not_check() -> None:
    class Careless(LosslessImage):
        def decode(self, header: Header, frames: Any) -> Any:
            def trusted() -> Any:
                for frame in frames:
                    frame.verify = lambda symbols: None
                    yield frame

            return super().decode(header, trusted())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless_image, "LosslessImage", Careless)
        with pytest.raises(AssertionError, match="check of its symbols is wrong"):
            check_codec(Careless(), [lambda: picture(1, 4, 4)])


def test_names_of_codecs() -> None:
    assert {"parts/lossless-image", "parts/lossless-audio"} <= set(ids())
    assert lookup("lossless-image") is lookup("parts/lossless-image") is LosslessImage
    with pytest.raises(UnknownNameError, match="did you mean 'parts/lossless-image'"):
        lookup("parts/losless-image")
    for name in ("os/path", "speculative/medusa", "parts/../x", "text/marian"):
        with pytest.raises(UnknownNameError):
            lookup(name)
    with pytest.raises(MismatchError, match=r"01010101 is needed \(at hand: 00000000\)"):
        find("parts/lossless-image", b"\1" * 32)


def test_signals_that_are_not_coded() -> None:
    out = io.BytesIO()
    with pytest.raises(InvalidInputError, match="codes image, and this is audio"):
        pack(LosslessImage(), sound(1, 10), out)
    with pytest.raises(InvalidInputError, match="no rate to choose"):
        pack(LosslessImage(), picture(1, 4, 4), out, rate=1.0)
    with pytest.raises(InvalidInputError, match="is not coded"):
        pack(LosslessAudio(), Signal({**sound(1, 4).info, "dtype": "float64"}, []), out)
    short = Signal({**picture(1, 4, 4).info, "shape": [1, 5, 4]}, picture(1, 4, 4).chunks)
    with pytest.raises(InvalidInputError, match="has 4 rows and names 5"):
        pack(LosslessImage(), short, out)


def test_a_file_that_lies_about_its_length() -> None:
    codec = LosslessImage()
    frame = list(codec.encode(picture(1, 4, 4), Header(codec.id, bytes(32), picture(1, 4, 4).info)))
    for rows, says in (
        (5, "nonsense|another|other symbols"),
        (3, "nonsense|other symbols|another"),
    ):
        info = {**picture(1, 4, 4).info, "shape": [1, rows, 4]}
        header = Header(codec.id, bytes(32), info, lossless=True)
        out = io.BytesIO()
        write(out, header, [Frame(frame[0].payload, frame[0].check, samples=4)])
        with pytest.raises((BrokenFileError, DesyncError), match=says):
            back(out.getvalue())


def test_lossless_sound_in_blocks_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless_audio, "BLOCK", 100)
    monkeypatch.setattr(lossless_audio, "BLOCKS", 3)
    for length in (99, 100, 101, 300, 301, 450):
        whole = next(iter(sound(2, length).chunks))
        assert torch.equal(back(packed(sound(2, length))), whole)
